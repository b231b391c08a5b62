"""One progress bar over many calls of a pipe, in the place of one a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from .compat import progress_bar_config, without_bars


@contextmanager
def one_bar(pipe: Any, total: int, what: str, there: int = 0, hidden: bool = False) -> Iterator[Any]:
    """A bar to `update`. The pipe's own bars are off meanwhile; where its user turned them off, so is this one.

    Args:
        pipe: whose calls they are.
        total: of all things.
        what: they are, before the bar.
        there: how many of them are done already.
        hidden: show no bar at all.
    """
    found = {"desc": what, "total": total, "initial": there, **(progress_bar_config(pipe) or {})}
    with without_bars(pipe), tqdm(**{**found, "disable": hidden or found.get("disable", False)}) as bar:
        yield bar
