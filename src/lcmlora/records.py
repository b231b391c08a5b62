"""What was done to a UNet and to each pipe around it, and the way back: kept on them, run by `restore`."""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

from . import adapters, calls, decoders, merge
from .errors import PipelineError
from .plan import Part, Request
from .prompts import PromptCache
from .registry import Base
from .unets import layers, unet_of

Pipe = TypeVar("Pipe")
RECORD = "_lcmlora"  # the attribute that holds our record, on the UNet and on each accelerated pipe
SPOILED = "_lcmlora_spoiled"  # on a UNet whose weights are neither the old nor the new ones
LOST = (
    "some of the UNet's weights are merged and some are not, and with keep=None no originals were kept. Load the pipe "
    "anew with from_pretrained."
)
lock = threading.RLock()


class Undo:
    """The steps back, newest first. Bound methods and partials only, so that a deep copy of a pipe undoes the copy."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []

    def push(self, step: Callable[..., Any], *args: Any) -> None:
        """Register a step *before* doing what it undoes: an interruption in between must not lose it."""
        self._steps.append(functools.partial(step, *args))

    def run(self) -> None:
        """Go back. A step that raises stays, with those after it: another call goes on there."""
        while self._steps:
            self._steps[-1]()
            self._steps.pop()

    def roll_back(self) -> None:
        """Go back as far as possible: a step that raises does not keep the others from running."""
        failed: BaseException | None = None
        while self._steps:
            try:
                self._steps.pop()()
            except BaseException as error:
                failed = failed or error
        if failed:
            raise failed

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None:
            self.roll_back()


@dataclasses.dataclass
class UnetRecord:
    """What was done to the weights. `pipes` are the shells that rely on it; the last one restored gives them back."""

    request: Request
    base: Base | None
    lcm: Path
    parts: dict[str, Part]
    weights: dict[str, float]
    originals: merge.Originals
    undo: Undo
    schedulers: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)  # (ours, the one it stands for)
    pipes: weakref.WeakSet[Any] = dataclasses.field(default_factory=weakref.WeakSet)

    @property
    def fused(self) -> bool:
        """Whether the UNet's LoRAs are merged."""
        return self.parts["unet"].merged

    def settle(self, parts: dict[str, Part], weights: dict[str, float]) -> None:
        """What is in the parts now."""
        self.parts, self.weights = parts, weights

    def __deepcopy__(self, memo: dict[int, Any]) -> UnetRecord:
        names = [field.name for field in dataclasses.fields(self) if field.name != "pipes"]
        return UnetRecord(**{name: deepcopy(getattr(self, name), memo) for name in names})


@dataclasses.dataclass
class Shell:
    """What the caller of `accelerate` asked of one pipe, apart from its UNet."""

    policy: calls.Policy
    vae: decoders.Vae
    cache_prompts: int


@dataclasses.dataclass
class PipeRecord:
    """What was done to one shell."""

    asked: Shell
    undo: Undo
    cache: PromptCache | None = None

    @property
    def policy(self) -> calls.Policy:
        """How its calls are completed and checked."""
        return self.asked.policy


def record_of(pipe: Any) -> UnetRecord | None:
    """What was done to the pipe's UNet, through whichever pipe; None for nothing."""
    return getattr(unet_of(pipe), RECORD, None)


def pipe_record_of(pipe: Any) -> PipeRecord | None:
    """What was done to this very pipe; None for nothing."""
    record = getattr(pipe, "__dict__", {}).get(RECORD)
    return record if isinstance(record, PipeRecord) else None


def policy_of(pipe: Any) -> calls.Policy | None:
    """How the calls of this very pipe are completed; None where it is not accelerated."""
    record = pipe_record_of(pipe)
    return record.policy if record else None


def cache_of(pipe: Any) -> PromptCache | None:
    """The prompt cache of this very pipe; None where it has none."""
    record = pipe_record_of(pipe)
    return record.cache if record else None


def forget(thing: Any) -> None:
    """Take the record off a UNet or a pipe."""
    thing.__dict__.pop(RECORD, None)


def change(
    part: Part, there: Mapping[str, Any], weights: Mapping[str, float], originals: merge.Originals, undo: Undo
) -> None:
    """Bring a part to the weights given; `there` are the LoRAs that are in it already, none the first time."""
    if not there:
        push_return(part, originals, undo)
    if part.merged:
        if not there:
            part.adapters.park()
        merge.merge(layers(part.module), part.loras, weights, originals)
        return
    for name, lora in part.loras.items():
        if isinstance(lora, merge.FileLora) and name not in there:
            adapters.inject(part.module, name, lora)
    adapters.activate(part.module, {name: w for name, w in weights.items() if name in part.loras})


def push_return(part: Part, originals: merge.Originals, undo: Undo) -> None:
    """Register the way back of a part: its weights first, then PEFT's layers around them."""
    undo.push(part.adapters.restore)
    if part.merged:
        undo.push(merge.merge, layers(part.module), {}, {}, originals)


def require_originals(record: UnetRecord, purpose: str) -> None:
    """Raise `PipelineError` where `purpose` needs originals that were not kept."""
    if record.request.keep is None and any(part.merged for part in record.parts.values()):
        raise PipelineError(
            f"the LoRAs were merged with keep=None, so the originals are gone and lcmlora can't {purpose}: load the "
            "pipe anew with from_pretrained. accelerate(pipe, keep='memory') or keep='disk' makes it possible."
        )
