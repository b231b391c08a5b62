"""Numbers for the pictures of a sheet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from .sheet import Sheet

Metric = Callable[[Image.Image, Mapping[str, Any], "Image.Image | None"], float]


def measured(sheet: Sheet, metrics: Mapping[str, Metric]) -> Sheet:
    """A sheet with these numbers in its rows."""
    raise NotImplementedError
