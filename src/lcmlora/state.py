"""What is active in a pipe now."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from .errors import PipelineError
from .layers import ModuleIndex, unet_of
from .lora.adapters import Adapters
from .lora.merge import weight_in
from .policy import Policy
from .recipe import LCM
from .transition.records import Applied, ModuleRecord, baked_of, module_record_of, pipe_record_of
from .transition.snapshot import COMPONENTS
from .transition.target import Strength


@dataclasses.dataclass(frozen=True)
class Status:
    """What is active in a pipe now, read from its modules.

    Attributes:
        accelerated: whether this pipe was accelerated. A sibling that shares the UNet may be, when this one is not.
        base: the base's name, "custom" for a UNet of no known structure; None if its UNet is not accelerated.
        recipe: how its few-step LoRA is driven; None if its UNet is not accelerated.
        licence: the licence of the recipe's published file, as its source gives it. None where the file is the user's
            own, unless the recipe's forbids commercial use: the file may be a copy of it.
        lora: the few-step LoRA's file; of a baked pipe, its name alone, or its repository.
        weight: the weight that it counts with.
        fused: whether the LoRAs are merged into the weights; False where they are PEFT adapters.
        styles: the styles' weights by name: those that were there before and those that lcmlora loaded. Where one is
            not the same in all layers, the least and the greatest of each component.
        adapters: the PEFT adapters active in the UNet, with their weights (none when fused).
        scheduler: the scheduler's class name.
        steps: what a call gets that passes none; None if not accelerated.
        guidance: what a call gets that passes none; None if not accelerated, or left to the caller.
        keep: where the merged layers' originals are: "memory", "disk", "source" or None.
        kept_bytes: how many bytes they take there; with "source", those that are not in a file and wait in memory.
        baked: whether `load_baked` loaded it, or the pipe that it shares the UNet with: the LoRAs are in its file.
    """

    accelerated: bool
    base: str | None
    recipe: str | None
    licence: str | None
    lora: str | None
    weight: float | None
    fused: bool
    styles: Mapping[str, Strength]
    adapters: Mapping[str, Strength]
    scheduler: str
    steps: int | None
    guidance: float | None
    keep: str | None
    kept_bytes: int
    baked: bool

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
    mine, record = pipe_record_of(pipe), module_record_of(unet)
    if (written := baked_of(pipe)) is not None:
        return _baked(written["merged"], mine.settings.policy if mine else None, pipe)
    applied = record.applied if record else None
    models = {name: model for name in COMPONENTS if isinstance(model := unet_of(getattr(pipe, name, None)), nn.Module)}
    models["unet"] = unet
    active = {name: _weights(model) for name, model in models.items()}
    lcm = applied.target.adapter_name if applied else None
    counts = by_style(active)
    fused = bool(record and record.content.merged)
    policy = mine.settings.policy if mine else None
    return Status(
        accelerated=mine is not None,
        base=(applied.base.name if applied.base else "custom") if applied else None,
        recipe=applied.recipe.name if applied else None,
        licence=_licence(applied) if applied else None,
        lora=applied.lcm.label if applied else None,
        weight=next((low for name, (low, _) in active["unet"].items() if name == lcm), None),
        fused=fused,
        styles={name: weight for name, weight in counts.items() if name != lcm},
        adapters=by_style({"unet": _adapters(unet)}),
        scheduler=type(getattr(pipe, "scheduler", None)).__name__,
        steps=policy.steps if policy else None,
        guidance=policy.guidance if policy else None,
        keep=record.originals.keep if record and fused else None,
        kept_bytes=sum(found.originals.bytes for m in models.values() if (found := module_record_of(m))),
        baked=False,
    )


def _baked(merged: Mapping[str, Any], policy: Policy | None, pipe: Any) -> Status:
    """What stands in the file that `bake` wrote."""
    base, licence, lora, weight, styles = (merged.get(key) for key in ("base", "licence", "lora", "weight", "styles"))
    recipe, scheduler = merged.get("recipe") or LCM.name, type(getattr(pipe, "scheduler", None)).__name__
    steps, guidance = (policy.steps, policy.guidance) if policy else (None, None)
    there, fast = styles or {}, policy is not None
    return Status(
        fast, base, recipe, licence, lora, weight, True, there, {}, scheduler, steps, guidance, None, 0, baked=True
    )


def _licence(applied: Applied) -> str | None:
    own = applied.target.lora.where is not None and applied.recipe.commercial is not False
    return None if own else applied.recipe.licence_of(applied.base)


Range = tuple[float, float]


def _weights(model: nn.Module) -> dict[str, Range]:
    """Each LoRA that counts in a model, merged or as an adapter: its least and greatest weight in a layer."""
    record = module_record_of(model)
    return {**_merged(record), **_adapters(model)} if record and record.content.merged else _adapters(model)


def _merged(record: ModuleRecord) -> dict[str, Range]:
    content = record.content
    weights = {
        name: [weight_in(content.loras[name], layer, weight) for layer in content.loras[name].layers]
        for name, weight in content.weights.items()
    }
    return {name: (min(there), max(there)) for name, there in weights.items() if any(there)}


def _adapters(model: nn.Module) -> dict[str, Range]:
    return Adapters(ModuleIndex.of(model)).ranges


def by_style(active: Mapping[str, Mapping[str, Range]]) -> dict[str, Strength]:
    """One number for each style, where it is the same everywhere."""
    found: dict[str, dict[str, Range]] = {}
    for component, ranges in active.items():
        for name, limits in ranges.items():
            found.setdefault(name, {})[component] = limits
    styles: dict[str, Strength] = {}
    for name, parts in found.items():
        least, greatest = min(low for low, _ in parts.values()), max(high for _, high in parts.values())
        styles[name] = greatest if greatest - least < 1e-6 else parts
    return styles
