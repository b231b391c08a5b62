"""One progress bar over many calls of a pipe, in the place of one a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from .compat import progress_bar_config, without_bars


@contextmanager
def one_bar(pipe: Any, total: int, what: str) -> Iterator[Any]:
    """A bar to `update`. The pipe's own bars are off meanwhile; where its user turned them off, so is this one."""
    found = progress_bar_config(pipe) or {}
    with without_bars(pipe), tqdm(**{"desc": what, "total": total, **found}) as bar:
        yield bar
