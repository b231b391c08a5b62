"""From a pipeline and a request to a plan, or a refusal. Nothing here changes the pipe: every check comes first."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import LCMScheduler, UNet2DConditionModel, UNetMotionModel
from torch import nn

from . import registry
from .adapters import Adapters, tuner_layers
from .calls import why_not
from .compiling import Compile
from .errors import BaseModelError, LoraFileError, LoraMismatchError, PipelineError
from .lorafile import LoraInfo, cover, find_file, read
from .merge import FileLora, Keep, Lora, check_room
from .unets import layers, lcm_layers, unet_of
from .warn import warn

LCM = "lcmlora_lcm"
"""The name of our own adapter. Styles have the names they are given."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")

Fuse = Literal["auto", True, False]


@dataclasses.dataclass(frozen=True)
class Style:
    """A style LoRA and how strongly it counts.

    Args:
        source: a repository of the hub, a folder, or a safetensors file.
        weight: what its change of the weights is multiplied with; 1 is as trained, 0.8 leaves LCM room (LCM-LoRA
            report).
        weight_name: the file's name in the repository or folder, if it is not `pytorch_lora_weights.safetensors`.
    """

    source: str | Path
    weight: float = 0.8
    weight_name: str | None = None

    @staticmethod
    def of(source: str | Path | Style) -> Style:
        """A source alone stands for the style at its usual weight."""
        return source if isinstance(source, Style) else Style(source)


Styles = Mapping[str, "str | Path | Style"]


@dataclasses.dataclass(frozen=True)
class Request:
    """What the caller of `accelerate` asked of the weights. Two equal requests are the same acceleration."""

    base: str
    lora: str | Path | None
    weight_name: str | None
    weight: float | None
    styles: tuple[tuple[str, Style], ...]
    fuse: Fuse
    keep: Keep
    hub: tuple[tuple[str, Any], ...]
    compile: Compile = False


@dataclasses.dataclass(frozen=True)
class Part:
    """One model that LoRAs go into: the UNet or a text encoder.

    Attributes:
        name: the pipeline's name for it.
        module: the model.
        adapters: what PEFT had in it.
        loras: by name: the LCM-LoRA, styles, and the adapters that were there.
        merged: whether they are merged into the weights, or stay PEFT adapters.
    """

    name: str
    module: nn.Module
    adapters: Adapters
    loras: Mapping[str, Lora]
    merged: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be done, all of it checked.

    Attributes:
        base: the base, or None for a UNet of no known structure with a LoRA of its own.
        lcm: the LCM-LoRA's file.
        parts: what is changed: the UNet first.
        weights: each LoRA's, by name.
        scheduler: the one that the pipe will get.
        kept_bytes: what the originals of the merged layers take.
    """

    base: registry.Base | None
    lcm: Path
    parts: tuple[Part, ...]
    weights: Mapping[str, float]
    scheduler: LCMScheduler
    kept_bytes: int

    @property
    def fused(self) -> bool:
        """Whether the UNet's weights are merged."""
        return self.parts[0].merged


def make(pipe: Any, request: Request) -> Plan:
    """Check everything that can be checked without touching the pipe.

    Raises:
        PipelineError, BaseModelError, LoraFileError, LoraMismatchError: see `accelerate`.
    """
    unet = _usable_unet(pipe)
    _usable_schedule(pipe)
    base = _base(unet, request)
    lcm = lcm_lora(unet, base, request)
    files: dict[str, dict[str, FileLora]] = {"unet": {LCM: lcm}}
    adapters = Adapters(unet)
    taken = {LCM, *adapters.names}
    for name, style in request.styles:
        check_style_name(name, taken)
        for part, lora in style_loras(pipe, name, style, dict(request.hub)).items():
            files.setdefault(part, {})[name] = lora
    fuse = _fuse(unet, adapters, request.fuse)
    parts = tuple(
        part_for(pipe, name, fuse, files.get(name))
        for name in ("unet", *TEXT_ENCODERS)
        if name in files or (fuse and _adapted(getattr(pipe, name, None)))
    )
    weight = request.weight if request.weight is not None else (base.weight if base else 1.0)
    weights = {name: w for part in parts for name, w in part.adapters.weights.items()}
    _hint(pipe, weights)
    return Plan(
        base=base,
        lcm=lcm.path,
        parts=parts,
        weights={**weights, **{name: style.weight for name, style in request.styles}, LCM: weight},
        scheduler=lcm_scheduler(pipe, base),
        kept_bytes=sum(_room(part, request.keep) for part in parts if part.merged),
    )


def _usable_unet(pipe: Any) -> nn.Module:
    unet = unet_of(pipe)
    if isinstance(pipe, nn.Module) or not hasattr(pipe, "scheduler"):
        raise PipelineError(f"accelerate takes a diffusers pipeline, not {type(pipe).__name__}.")
    name = type(pipe).__name__
    if not isinstance(unet, UNet2DConditionModel | UNetMotionModel):
        raise PipelineError(
            f"{name} has no UNet2DConditionModel or UNetMotionModel as `unet`; LCM-LoRAs exist for the UNets of "
            "Stable Diffusion and SDXL."
        )
    if reason := why_not(type(pipe)):
        raise PipelineError(reason)
    if unet.config.get("time_cond_proj_dim") is not None:
        raise PipelineError(
            "this UNet is a full latent consistency model already (time_cond_proj_dim is set): it needs no LCM-LoRA, "
            "only LCMScheduler and 4 to 8 steps."
        )
    if any(getattr(module, "fused_projections", False) for module in unet.modules()):
        raise PipelineError(
            "fuse_qkv_projections() is on: LoRAs would have no effect there. Call pipe.unfuse_qkv_projections() "
            "first, and fuse them again after accelerate()."
        )
    if Adapters(unet).merged:
        raise PipelineError(
            "some of this UNet's layers have a LoRA merged by fuse_lora(), which can't be told from the weights any "
            "more. Call pipe.unfuse_lora() first; lcmlora merges active LoRAs itself."
        )
    for layer_name, layer in layers(unet).items():
        if isinstance(layer.weight, torch.Tensor) and layer.weight.device.type == "meta":
            raise PipelineError(
                f"the UNet's weights are off-loaded ({layer_name} is on the meta device): accelerate the pipe before "
                "enable_sequential_cpu_offload(), or any other off-loading of single layers. "
                "enable_model_cpu_offload() may come before or after."
            )
    return unet  # type: ignore[no-any-return]


def _usable_schedule(pipe: Any) -> None:
    config = pipe.scheduler.config
    name = type(pipe.scheduler).__name__
    if "EDM" in name or ("beta_start" not in config and "trained_betas" not in config):
        raise PipelineError(
            f"{name} has no beta schedule (an EDM base?): LCM-LoRAs are made for models with betas, such as "
            "Stable Diffusion 1.x and SDXL."
        )
    if config.get("prediction_type", "epsilon") != "epsilon":
        warn(
            f"this pipe predicts {config['prediction_type']!r}; the official LCM-LoRAs were distilled for epsilon, "
            "so pictures may be poor. One distilled from this pipe (lcmlora.distill) is the way out."
        )


_FAST = re.compile(r"(?<![a-z])(turbo|lightning|hyper|lcm|tcd|pcm|dmd2?|flash)(?![a-z])", re.IGNORECASE)


def _hint(pipe: Any, adapters: Mapping[str, float]) -> None:
    """Warn where something says that the pipe is a few-step model already. No structure tells, so this refuses
    nothing.
    """
    config: Any = getattr(pipe, "config", {})
    unet = unet_of(pipe)
    paths = (config.get("_name_or_path", ""), getattr(unet, "config", {}).get("_name_or_path", ""))
    said = [*(Path(str(path)).name for path in paths), *adapters]
    signs = [repr(text) for text in said if _FAST.search(text)]
    scheduler = type(pipe.scheduler).__name__
    if scheduler.startswith(("LCM", "TCD")):
        signs.append(scheduler)
    if signs:
        warn(
            f"this pipe may be a few-step model already ({', '.join(signs)}): an LCM-LoRA on top of Turbo, Lightning, "
            "Hyper or another LCM spoils pictures."
        )


def _base(unet: nn.Module, request: Request) -> registry.Base | None:
    """The base found and, where one is named, that it is the one. None: a UNet and LoRA of their own."""
    if request.base != "auto":
        named = registry.by_name(request.base)
        if not named.matches(unet):
            found = registry.find_base(unet)
            other = f"{found.title} (base={found.name!r})" if found else f"another. {registry.unknown(unet)}"
            raise BaseModelError(
                f"base={named.name!r} was given, {named.title}, but the pipe's UNet is {other}. "
                "base='auto' finds it by itself."
            )
        return named
    found = registry.find_base(unet)
    if found is None and request.lora is None:
        raise BaseModelError(registry.unknown(unet))
    return found


def lcm_lora(unet: nn.Module, base: registry.Base | None, request: Request) -> FileLora:
    """The LCM-LoRA asked for or the base's own; it has to cover every layer that an LCM-LoRA adapts, and no other
    UNet's.
    """
    source, weight_name = request.lora, request.weight_name
    if source is None:
        assert base is not None
        if base.lora is None:
            raise BaseModelError(f"base {base.name!r} has no LCM-LoRA; pass lora=.")
        source, weight_name = base.lora, base.weight_name
    info = read(find_file(source, weight_name, **dict(request.hub)))
    if info.text_modules:
        raise LoraMismatchError(
            f"{info.describe()} has text-encoder keys, which an LCM-LoRA has not: is it a style LoRA? Pass styles=."
        )
    coverage = cover("unet", info.modules, layers(unet))
    left_out = [name for name in lcm_layers(unet) if name not in coverage.pairs]
    if left_out or coverage.clashes or coverage.foreign:
        raise LoraMismatchError(_mismatch(info, unet, base, left_out, coverage.clashes, coverage.foreign))
    return FileLora(info.path, coverage.pairs)


def _mismatch(
    info: LoraInfo,
    unet: nn.Module,
    base: registry.Base | None,
    left_out: list[str],
    clashes: tuple[str, ...],
    foreign: tuple[str, ...],
) -> str:
    total = len(lcm_layers(unet))
    parts = [f"covers {total - len(left_out)} of the {total} layers an LCM-LoRA of this UNet has to cover"]
    if clashes:
        parts.append(f"has other shapes in {len(clashes)} (such as {clashes[0]})")
    if foreign:
        parts.append(f"names {len(foreign)} modules that the UNet has not, or names twice (such as {foreign[0]})")
    fits = registry.made_for(info.cross_attention_dim, len(info.modules))
    way_out = (
        f" For this pipe use {base.lora}." if base and base.lora else " Pass lora= with a file made for this UNet."
    )
    title = base.title if base else registry.title_of(unet)
    return (
        f"{info.path} does not fit this pipe, {title}: it {', '.join(parts)}."
        + (f" It looks like an LCM-LoRA of {fits}." if fits and fits != title else "")
        + way_out
    )


def check_style_name(name: str, taken: set[str]) -> None:
    """Refuse a name that PEFT, or we, could not use.

    Raises:
        PipelineError: it is taken, reserved, empty, or has a dot in it.
    """
    if not isinstance(name, str) or not name or "." in name or name == LCM or name in taken:
        raise PipelineError(f"style name {name!r} can't be used: taken already, reserved, empty, or with a dot in it.")


def style_loras(pipe: Any, name: str, style: Style, hub: dict[str, Any]) -> dict[str, FileLora]:
    """A style's LoRA for each part of the pipe. It may cover little, but not nothing, and must not clash.

    Raises:
        LoraFileError, LoraMismatchError: see `accelerate`.
    """
    info = read(find_file(style.source, style.weight_name, **hub))
    loras = {}
    for part, modules in {"unet": info.modules, **info.text_modules}.items():
        module = unet_of(pipe) if part == "unet" else getattr(pipe, part, None)
        coverage = cover(part, modules, layers(module) if isinstance(module, nn.Module) else {})
        odd = (*coverage.clashes, *coverage.foreign)
        if odd:
            unet = unet_of(pipe)
            assert unet is not None
            raise LoraMismatchError(
                f"style {name!r}, {info.describe()}, does not fit this pipe's {part} (text width of the UNet "
                f"{registry.signature(unet)[0]}): {len(coverage.pairs)} modules fit, {len(coverage.clashes)} have "
                f"other shapes, {len(coverage.foreign)} do not exist, such as {odd[0]}."
            )
        if coverage.pairs:
            loras[part] = FileLora(info.path, coverage.pairs)
    return loras


def _adapted(module: Any) -> bool:
    return isinstance(module, nn.Module) and bool(tuner_layers(module))


def part_for(pipe: Any, name: str, fuse: bool, files: Mapping[str, Lora] | None = None) -> Part:
    """A part of the pipe as it is, and the LoRA files that are to go into it."""
    module = unet_of(pipe) if name == "unet" else getattr(pipe, name)
    assert isinstance(module, nn.Module)
    adapters = Adapters(module)
    # "auto" may have found that the UNet can't be merged; a text encoder that can't gets adapters, which cost little
    # there
    fuse = fuse and _not_mergeable(module, adapters) is None
    return Part(name, module, adapters, {**adapters.loras, **(files or {})}, fuse)


def _room(part: Part, keep: Keep) -> int:
    touched = {layer for lora in part.loras.values() for layer in lora.layers}
    return check_room(layers(part.module), touched, keep)


def _fuse(unet: nn.Module, adapters: Adapters, wanted: Fuse) -> bool:
    """Whether the weights can be merged. "auto" leaves adapters where they can't, True refuses."""
    odd = _not_mergeable(unet, adapters)
    if odd and wanted is True:
        raise PipelineError(f"fuse=True is impossible here: {odd}. fuse=False leaves PEFT adapters instead.")
    return wanted is not False and odd is None


def _not_mergeable(module: nn.Module, adapters: Adapters) -> str | None:
    """Why a model's weights can't be merged into; None where they can."""
    if not adapters.plain:
        return "an adapter in it is no plain LoRA (DoRA or the like)"
    for name, layer in layers(module).items():
        weight = layer.weight
        plain = type(weight) is nn.Parameter and weight.dtype.is_floating_point and weight.dtype.itemsize > 1
        if not plain:
            return f"{name} has quantised weights ({type(weight).__name__}, {getattr(weight, 'dtype', None)})"
    return None


def lcm_scheduler(pipe: Any, base: registry.Base | None) -> LCMScheduler:
    """An LCMScheduler for the pipe: its own betas and prediction type, without the settings that ruin LCM.

    `clip_sample` and `thresholding` would clamp latents; `rescale_betas_zero_snr` makes alpha 0 at the first step, by
    which an epsilon prediction is divided (scheduling_lcm.py, step).
    """
    known = set(inspect.signature(LCMScheduler.__init__).parameters)
    config = {key: value for key, value in pipe.scheduler.config.items() if key in known}
    harmless = {"clip_sample": False, "thresholding": False, "original_inference_steps": 50}
    if config.get("prediction_type", "epsilon") == "epsilon":
        harmless["rescale_betas_zero_snr"] = False
    if base is not None and base.beta_schedule:
        config["beta_schedule"] = base.beta_schedule
    scheduler = LCMScheduler.from_config({**config, **harmless})
    assert isinstance(scheduler, LCMScheduler)
    return scheduler


def check_weight(what: str, weight: Any) -> None:
    """Refuse weights that are no numbers.

    Raises:
        LoraFileError: naming what it was meant for.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < 100:
        raise LoraFileError(f"{what}: weight {weight!r} is no number between -100 and 100; 1 is as trained.")
