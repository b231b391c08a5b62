"""The processes that share the rows of one run."""

from __future__ import annotations

import os
from typing import Any, TypeVar

from ..errors import LcmLoraError
from .rows import Failed

T = TypeVar("T")


def _state(cpu: bool) -> Any:
    """Accelerate's state of this process; None where no launcher has started several.

    Raises:
        LcmLoraError: Accelerate is not installed, or was set up in another way before.
    """
    if (size := int(os.environ.get("WORLD_SIZE") or 1)) < 2:
        return None
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise LcmLoraError("several processes need Hugging Face Accelerate: pip install accelerate") from error
    state = PartialState(cpu=cpu)
    if state.num_processes != size:  # it is one object for all, and whoever asked first has set it up
        raise LcmLoraError(
            f"the launcher started {size} processes, but Accelerate was set up before for {state.num_processes}: "
            f"PartialState({'cpu=True' if cpu else ''}) is expected."
        )
    return state


class Processes:
    """The processes that share the rows: one, unless a launcher has started more.

    Args:
        cpu: whether they compute on the processor.

    Raises:
        LcmLoraError: Accelerate is not installed, or was set up in another way before.
    """

    def __init__(self, cpu: bool) -> None:
        self._state = _state(cpu)

    @property
    def first(self) -> bool:
        """Whether this is the one that tells of what concerns all."""
        return self._state is None or self.speaks()

    @staticmethod
    def speaks() -> bool:
        """Whether this process is the one that speaks for all, as far as the launcher says."""
        return int(os.environ.get("RANK") or 0) == 0

    def share(self, batches: list[T]) -> list[T]:
        """This process' part: neighbours, so that few styles are merged in more than one process."""
        if self._state is None:
            return batches
        with self._state.split_between_processes(batches) as mine:
            return list(mine)

    def together(
        self, done: set[str], failed: list[Failed], already: int, interrupted: bool
    ) -> tuple[set[str], list[Failed], int]:
        """What all have done. One that was interrupted does not wait for the others."""
        if self._state is None or interrupted:
            return done, failed, already
        from accelerate.utils import gather_object

        parts = gather_object([(done, failed, already)])
        everyone = {one for _, several, _ in parts for one in several}
        return {name for names, _, _ in parts for name in names}, list(everyone), sum(n for _, _, n in parts)
