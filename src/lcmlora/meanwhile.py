"""What an accelerated pipe is for the length of a block: with other settings, without the LCM-LoRA, or all merged."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .acceleration import accelerate, alone, kept
from .errors import PipelineError
from .moving import require_originals
from .transition import transaction
from .transition.records import AS_FOUND, Content, pipe_record_of
from .transition.snapshot import Snapshot, not_in_memory
from .transition.transaction import Undo
from .transition.verification import check_as_left, check_way_back


@contextmanager
def varied(pipe: Any, settings: Mapping[str, Any]) -> Iterator[Any]:
    """An accelerated pipe with other settings, for this thread alone; afterwards it is what it was."""
    with kept(pipe):
        accelerate(pipe, **settings)
        yield pipe


@contextmanager
def plainly(pipe: Any) -> Iterator[Any]:
    """A copy of an accelerated pipe as `restore` gives it back, for the length of a block and this thread alone.

    The pipe itself keeps what it has, its scheduler and what was loaded since `accelerate` too. What uses its models
    in other threads waits.

    Raises:
        PipelineError: the way back is not exact, or the pipe was baked.
    """
    record, undo = pipe_record_of(pipe), Undo()
    assert record is not None, "the pipe is accelerated"
    with record.gate.changing():
        try:
            with alone(pipe):
                now = Snapshot.of(pipe)
                for component in now.components.values():
                    if component.record is not None:
                        require_originals(component.record, "show the pipe without the LCM-LoRA")
                        check_way_back(component, "restore the weights")
                for component in now.components.values():
                    if component.record is not None:
                        transaction.change(component.record, component, AS_FOUND, None, undo)
                undo.push(setattr, record.unet, "applied", record.unet.applied)
                record.unet.applied = None
            twin = copy.copy(pipe)
            transaction.undress(twin, record)
            yield twin
        finally:
            with alone(pipe):
                undo.roll_back()


@contextmanager
def merged(pipe: Any) -> Iterator[None]:
    """An accelerated pipe with every LoRA in its weights, for as long as the block lasts, however it was accelerated.

    Raises:
        PipelineError: its weights can't be merged (quantised, DoRA).
    """
    with alone(pipe), Undo() as undo:
        now = Snapshot.of(pipe)
        for name, component in now.components.items():
            record = component.record
            if record is None:
                continue
            if why := not_in_memory(component):
                raise PipelineError(f"bake needs the weights, and {why}")
            check_as_left(component, "bake")
            if record.content.merged or (not record.content.touched and not component.adapters.active):
                continue
            content = record.content
            loras, weights = content.loras, content.weights
            if not content.touched:
                loras, weights = component.adapters.loras, dict.fromkeys(component.adapters.active)
            if why := component.why_not_mergeable:
                raise PipelineError(f"the LoRAs of this pipe's {name} can't be merged into its weights: {why}.")
            transaction.change(record, component, Content(loras, weights, True), "memory", undo)
        try:
            yield
        finally:
            undo.roll_back()
