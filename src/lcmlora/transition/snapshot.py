"""All that is known of a pipe at one moment. Taken once per public call and handed down; nothing here changes it."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel, UNetMotionModel
from torch import nn

from .. import base as bases
from .. import calls, compat
from ..errors import PipelineError, how_to_load
from ..layers import ModuleIndex
from ..lora.adapters import Adapters
from ..lora.merge import Lora
from .records import ModuleRecord, PipeRecord, baked_of, copied_from, module_record_of, pipe_record_of, stands_for

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
COMPONENTS = ("unet", *TEXT_ENCODERS)
BAKED = "lcmlora.json"
"""The file in a baked folder that says what was merged, and how to call the pipe."""


@dataclasses.dataclass(frozen=True)
class Component:
    """A model that LoRAs go into: the UNet or a text encoder.

    Attributes:
        name: the pipeline's name for it.
        index: its layers and PEFT's wrappers, walked over once.
        adapters: what PEFT has in it now.
        record: what lcmlora did to it, through whichever pipe; None for nothing.
        sources: the folders or repositories that it may have been loaded from.
    """

    name: str
    index: ModuleIndex
    adapters: Adapters
    record: ModuleRecord | None
    sources: tuple[str, ...] = ()

    @staticmethod
    def of(name: str, module: nn.Module, *holders: Any) -> Component:
        """A model as it is now. What `holders` were loaded from, it may have been loaded from too."""
        index = ModuleIndex.of(module)
        sources = tuple(compat.name_or_path(thing) for thing in (module, *holders))
        return Component(name, index, Adapters(index), module_record_of(module), sources)

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self.index.module

    @property
    def found(self) -> Adapters:
        """What PEFT had in it before lcmlora."""
        return self.record.adapters if self.record else self.adapters

    @functools.cached_property
    def late(self) -> dict[str, Lora]:
        """The adapters that somebody else loaded after lcmlora had changed it."""
        if self.record is None:
            return {}
        merged = self.record.content.merged  # then nothing of ours, or that was found, is an adapter
        ours = set() if merged else {*self.record.content.loras, *self.record.adapters.names}
        return {name: lora for name, lora in self.adapters.loras.items() if name not in ours}

    @functools.cached_property
    def why_not_mergeable(self) -> str | None:
        """Why LoRAs can't be merged into its weights, or its own adapters can't; None where all can."""
        for name, layer in self.index.layers.items():
            weight = layer.weight
            plain = type(weight) is nn.Parameter and weight.dtype.is_floating_point and weight.dtype.itemsize > 1
            if not plain:
                return f"{name} has quantised weights ({type(weight).__name__}, {getattr(weight, 'dtype', None)})"
        seen: dict[int, str] = {}
        for name, layer in self.index.layers.items():
            if (other := seen.setdefault(id(layer.weight), name)) != name:
                return f"{other} and {name} share one weight"
        return self.found.why_not_mergeable or (self.adapters.why_not_mergeable if self.late else None)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A pipe at one moment.

    Attributes:
        pipe: the pipeline.
        record: what lcmlora did to this very pipe; None for nothing.
        components: its UNet and text encoders, those that it has.
    """

    pipe: Any
    record: PipeRecord | None
    components: Mapping[str, Component]

    @staticmethod
    def of(pipe: Any) -> Snapshot:
        """Look at a pipe.

        Raises:
            PipelineError: this is no pipeline with a UNet that can be accelerated.
        """
        _check_pipeline(pipe)
        components: dict[str, Component] = {}
        for name in COMPONENTS:
            module = compat.uncompiled(getattr(pipe, name, None))
            once = all(module is not other.module for other in components.values())  # SDXL's encoders may be one
            if isinstance(module, nn.Module) and once:
                components[name] = Component.of(name, module, pipe)  # a UNetMotionModel forgets its own source
        return Snapshot(pipe, pipe_record_of(pipe), components)

    @property
    def unet(self) -> Component:
        """The UNet."""
        return self.components["unet"]

    @functools.cached_property
    def structure(self) -> bases.Structure:
        """What tells the UNet from others."""
        return bases.structure_of(self.unet.index)


def _check_pipeline(pipe: Any) -> None:
    name = type(pipe).__name__
    if isinstance(pipe, nn.Module) or not (callable(pipe) or hasattr(pipe, "unet")):
        raise PipelineError(f"accelerate takes a diffusers pipeline, not {name}{how_to_load(pipe)}.")
    unet = compat.uncompiled(getattr(pipe, "unet", None))
    if isinstance(unet, UNet2DConditionModel | UNetMotionModel):
        return
    kind = type(unet).__name__
    if hasattr(unet, "merge_and_unload"):
        raise PipelineError(
            f"pipe.unet is a {kind}, PEFT's own wrapping of a whole model: set pipe.unet = "
            "pipe.unet.merge_and_unload() first, or load the LoRA with pipe.load_lora_weights()."
        )
    if isinstance(getattr(unet, "module", None), UNet2DConditionModel | UNetMotionModel):
        raise PipelineError(f"pipe.unet is wrapped in {kind}: set pipe.unet = pipe.unet.module.")
    raise PipelineError(
        f"{name} has no UNet2DConditionModel or UNetMotionModel as `unet`"
        f"{f' but {kind}' if unet is not None else ''}; LCM-LoRAs exist for the UNets of Stable Diffusion and SDXL."
    )


def _not_drivable(snapshot: Snapshot) -> str | None:
    if not hasattr(stands_for(getattr(snapshot.pipe, "scheduler", None)), "config"):
        return f"{type(snapshot.pipe).__name__} has no scheduler that LCMScheduler could stand in for."
    return None if snapshot.record else calls.why_not(calls.plain(type(snapshot.pipe)))  # the class was asked then


def _no_betas(snapshot: Snapshot) -> str | None:
    scheduler = stands_for(snapshot.pipe.scheduler)
    config, name = scheduler.config, type(scheduler).__name__
    if "EDM" in name or ("beta_start" not in config and "trained_betas" not in config):
        return (
            f"{name} has no beta schedule (an EDM base?): LCM-LoRAs are made for models with betas, such as "
            "Stable Diffusion 1.x and SDXL."
        )
    return None


def _full_lcm(snapshot: Snapshot) -> str | None:
    config: Any = snapshot.unet.module.config
    if config.get("time_cond_proj_dim") is None:
        return None
    return (
        "this UNet is a full latent consistency model already (time_cond_proj_dim is set): it needs no LCM-LoRA, "
        "only LCMScheduler and 4 to 8 steps."
    )


def baked_into(pipe: Any) -> Mapping[str, Any] | None:
    """What `bake` wrote of the folder that a pipe's UNet was loaded from; None where LCM was not baked into it.

    Beside `baked_of` also where plain diffusers loaded it, as far as the folder is still what it was.
    """
    known, unet = baked_of(pipe), compat.uncompiled(getattr(pipe, "unet", None))
    if known is not None or module_record_of(unet) is not None:
        return known
    source = compat.name_or_path(unet) or compat.name_or_path(pipe)  # a UNetMotionModel forgets its own
    places = (Path(source), Path(source).parent) if source else ()
    return next((written for folder in places if (written := read_baked(folder)) is not None), None)


def read_baked(folder: Path) -> Mapping[str, Any] | None:
    """What `bake` wrote into a folder; None where it wrote nothing."""
    try:
        written = json.loads((folder / BAKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    parts = (written.get("merged"), written.get("call")) if isinstance(written, dict) else (None,)
    return written if all(isinstance(part, dict) for part in parts) else None


def _baked(snapshot: Snapshot) -> str | None:
    written = baked_into(snapshot.pipe)
    return None if written is None else already_in(written)


def already_in(written: Mapping[str, Any]) -> str:
    """That a few-step LoRA is in a pipe which was baked, and what to type."""
    return (
        f"LCM is merged into this pipe already: lcmlora baked it, says {BAKED} beside it ({written['merged']}). It "
        "needs no acceleration: lcmlora.load_baked(folder) loads it with its call defaults, and "
        "load_baked(folder, kind='img2img') as another pipeline."
    )


def _copied_weights(snapshot: Snapshot) -> str | None:
    if snapshot.unet.record or not copied_from(snapshot.pipe.scheduler, snapshot.unet.index):
        return None
    return (
        "this UNet's weights were copied from an accelerated pipe, so an LCM-LoRA is merged into them already: "
        "lcmlora.restore() that pipe before making another of its UNet."
    )


def _joint_projections(snapshot: Snapshot) -> str | None:
    if snapshot.unet.record or not any(map(compat.uses_fused_projections, snapshot.unet.index.joint_projections)):
        return None
    return (
        "fuse_qkv_projections() is on: LoRAs would have no effect there. Call pipe.unfuse_qkv_projections() first, "
        "and fuse them again after accelerate()."
    )


def _wrapped_whole(snapshot: Snapshot) -> str | None:
    for component in snapshot.components.values():
        if hasattr(component.module, "merge_and_unload"):
            return (
                f"pipe.{component.name} is a {type(component.module).__name__}, PEFT's own wrapping of a whole model: "
                f"set pipe.{component.name} = pipe.{component.name}.merge_and_unload() first."
            )
    return None


def _fused_by_hand(snapshot: Snapshot) -> str | None:
    for component in snapshot.components.values():
        if component.record is None and component.adapters.merged:
            return (
                f"some layers of this pipe's {component.name} have a LoRA merged by fuse_lora(), which can't be told "
                "from the weights any more. Call pipe.unfuse_lora() first; lcmlora merges active LoRAs itself."
            )
    return None


def _not_in_memory(snapshot: Snapshot) -> str | None:
    return None if snapshot.unet.record else not_in_memory(snapshot.unet)


def not_in_memory(component: Component) -> str | None:
    """Why a component's weights can't be read or written where they are; None where they can."""
    name = component.name
    if component.index.on_disk:
        return (
            f"the weights of this pipe's {name} are off-loaded to disk (group off-loading with offload_to_disk_path), "
            "so their memory is not initialised: accelerate the pipe before enable_group_offload(), or off-load to "
            "memory."
        )
    for layer_name, layer in component.index.layers.items():
        weight = compat.own_parameters(layer).get("weight")
        if weight is not None and weight.is_meta:
            return (
                f"the weights of this pipe's {name} are off-loaded ({layer_name} is on the meta device): accelerate "
                "the pipe before enable_sequential_cpu_offload(), or any other off-loading of single layers. "
                "enable_model_cpu_offload() may come before or after."
            )
    return None


_RULES = (
    _not_drivable,
    _no_betas,
    _baked,
    _copied_weights,
    _full_lcm,
    _wrapped_whole,
    _joint_projections,
    _fused_by_hand,
    _not_in_memory,
)


def check_drivable(snapshot: Snapshot) -> None:
    """Refuse a pipe whose calls no few-step scheduler can drive, whatever is in its weights.

    Raises:
        PipelineError: with the reason.
    """
    if why := _not_drivable(snapshot):
        raise PipelineError(why)


def check_rules(snapshot: Snapshot) -> None:
    """Refuse a pipe that can't be accelerated, or not in this state.

    Raises:
        PipelineError: with the reason.
    """
    for rule in _RULES:
        if why := rule(snapshot):
            raise PipelineError(why)


def identity_adapter(snapshot: Snapshot) -> str | None:
    """What keeps a person's face in this pipe, told from its parts; None where nothing does."""
    projections = getattr(getattr(snapshot.unet.module, "encoder_hid_proj", None), "image_projection_layers", ())
    if any("FaceID" in type(projection).__name__ for projection in projections):
        return "an IP-Adapter FaceID"
    instant = "InstantID" in type(snapshot.pipe).__name__ or hasattr(snapshot.pipe, "image_proj_model")
    return "InstantID" if instant else None


_FAST = re.compile(r"(?<![a-z])(turbo|lightning|hyper|lcm|tcd|pcm|dmd2?|flash)(?![a-z])", re.IGNORECASE)


def signs_of_speed(snapshot: Snapshot) -> list[str]:
    """What says that the pipe is a few-step model already: names and the scheduler. No structure tells."""
    pipe = snapshot.pipe
    paths = [Path(compat.name_or_path(thing)).name for thing in (pipe, snapshot.unet.module)]
    active = {name for component in snapshot.components.values() for name in component.found.active}
    signs = [repr(text) for text in (*paths, *sorted(active)) if _FAST.search(text)]
    scheduler = type(stands_for(pipe.scheduler)).__name__
    return [*signs, scheduler] if scheduler.startswith(("LCM", "TCD")) else signs
