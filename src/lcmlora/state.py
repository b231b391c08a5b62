"""What is active in a pipe now."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from .errors import PipelineError
from .layers import unet_of
from .lora import adapters
from .transition.plan import LCM
from .transition.records import pipe_record_of, record_of


@dataclasses.dataclass(frozen=True)
class Status:
    """What is active in a pipe now, read from its modules.

    Attributes:
        accelerated: whether this pipe was accelerated. A sibling that shares the UNet may be, when this one is not.
        base: the base's name, "custom" for a UNet of no known structure; None if its UNet is not accelerated.
        lora: the LCM-LoRA's file.
        weight: the weight that it counts with.
        fused: whether the LoRAs are merged into the weights; False where they are PEFT adapters.
        styles: the styles' weights by name: those that were there before and those that lcmlora loaded.
        adapters: the PEFT adapters active in the UNet, with their weights (none when fused).
        scheduler: the scheduler's class name.
        steps, guidance: what a call gets that passes none. None if not accelerated, or left to the caller.
        keep: where the merged layers' originals are: "memory", "disk" or None.
        kept_bytes: how many bytes they take there.
    """

    accelerated: bool
    base: str | None
    lora: str | None
    weight: float | None
    fused: bool
    styles: Mapping[str, float]
    adapters: Mapping[str, float]
    scheduler: str
    steps: int | None
    guidance: float | None
    keep: str | None
    kept_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON and for a picture's metadata."""
        return dataclasses.asdict(self)


def is_accelerated(pipe: Any) -> bool:
    """Whether `accelerate` was called on this pipe (and not yet `restore`)."""
    return pipe_record_of(pipe) is not None


def status(pipe: Any) -> Status:
    """What is active in the pipe now.

    Raises:
        PipelineError: there is no UNet.
    """
    unet = unet_of(pipe)
    if not isinstance(unet, nn.Module):
        raise PipelineError(f"{type(pipe).__name__} has no UNet.")
    mine, record = pipe_record_of(pipe), record_of(pipe)
    active = adapters.Adapters(unet).weights
    fused = bool(record and record.fused)
    weights = {**(record.weights if record and fused else {}), **active}
    return Status(
        accelerated=mine is not None,
        base=(record.base.name if record.base else "custom") if record else None,
        lora=str(record.lcm) if record else None,
        weight=weights.get(LCM) if record else None,
        fused=fused,
        styles={name: w for name, w in weights.items() if name != LCM and w},
        adapters=active,
        scheduler=type(pipe.scheduler).__name__,
        steps=mine.policy.steps if mine else None,
        guidance=mine.policy.guidance if mine else None,
        keep=record.request.keep if record and fused else None,
        kept_bytes=record.originals.bytes if record else 0,
    )
