"""One progress bar over many calls of a pipe, in the place of one a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from .compat import progress_bar_config, set_progress_bar_config


@contextmanager
def one_bar(pipe: Any, total: int, what: str) -> Iterator[Any]:
    """A bar to `update`. The pipe's own bars are off meanwhile; where its user turned them off, so is this one."""
    found = progress_bar_config(pipe)
    set_progress_bar_config(pipe, {**(found or {}), "disable": True})
    try:
        with tqdm(**{"desc": what, "total": total, **(found or {})}) as bar:
            yield bar
    finally:
        set_progress_bar_config(pipe, found)
