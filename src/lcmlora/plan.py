"""From a pipeline and a request to a plan, or a refusal. Nothing here changes the pipe: every check comes first."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from torch import nn

from . import registry
from .errors import BaseModelError, LcmLoraWarning, LoraFileError, LoraMismatchError, PipelineError
from .lorafile import LoraInfo, cover, find_file, read
from .merge import Adapters, Share, tuner_layers
from .unets import layers, lcm_layers, unet_of

LCM = "lcmlora_lcm"
"""The name of our own PEFT adapter. Styles are loaded under the names they are given."""

Fuse = Literal["auto", True, False]
Keep = Literal["memory", None]


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


@dataclasses.dataclass(frozen=True)
class Request:
    """What the caller of `accelerate` asked of the weights. Two equal requests are the same acceleration."""

    base: str
    lora: str | Path | None
    weight_name: str | None
    weight: float
    styles: tuple[tuple[str, Style], ...]
    fuse: Fuse
    keep: Keep
    hub: tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be done, all of it checked.

    Attributes:
        base: the base's name, or "custom" for a UNet of no known structure with a LoRA of its own.
        lcm: the LCM-LoRA's share; it covers every layer an LCM-LoRA adapts.
        styles: the new styles' shares by name.
        text_styles: the names of those whose files also hold text-encoder keys.
        adapters: the adapters that were active already, with their weights.
        fuse: whether the weights are merged, or PEFT adapters left in the UNet.
        scheduler: the one that the pipe will get.
    """

    base: str
    lcm: Share
    styles: Mapping[str, Share]
    text_styles: tuple[str, ...]
    adapters: Mapping[str, float]
    fuse: bool
    scheduler: LCMScheduler


def make(pipe: Any, request: Request) -> Plan:
    """Check everything that can be checked without touching the pipe.

    Raises:
        PipelineError, BaseModelError, LoraFileError, LoraMismatchError: see `accelerate`.
    """
    unet = _usable_unet(pipe)
    _usable_schedule(pipe)
    adapters = Adapters(unet)
    if adapters.merged:
        raise PipelineError(
            "some of this UNet's layers have a LoRA merged by fuse_lora(), which can't be told from the "
            "weights any more. Call pipe.unfuse_lora() first; lcmlora merges active LoRAs itself."
        )
    if any(getattr(module, "fused_projections", False) for module in unet.modules()):
        raise PipelineError(
            "fuse_qkv_projections() is on: LoRAs would have no effect there. Call pipe.unfuse_qkv_projections() first."
        )
    base = _base(unet, request)
    lcm = _lcm_share(unet, base, request)
    styles, text_styles = {}, []
    for name, style in request.styles:
        if name in getattr(unet, "peft_config", {}) or name == LCM or "." in name or not name:
            raise PipelineError(
                f"style name {name!r} can't be used: taken already, reserved, empty, or with a dot in it."
            )
        styles[name], has_text = _style_share(unet, name, style, dict(request.hub))
        if has_text:
            text_styles.append(name)
    return Plan(
        base=base.name if base else "custom",
        lcm=lcm,
        styles=styles,
        text_styles=tuple(text_styles),
        adapters=adapters.weights,
        fuse=_fuse(unet, request.fuse),
        scheduler=lcm_scheduler(pipe),
    )


def _usable_unet(pipe: Any) -> UNet2DConditionModel:
    unet = unet_of(pipe)
    if isinstance(pipe, nn.Module) or not callable(pipe):
        raise PipelineError(f"accelerate takes a diffusers pipeline, not {type(pipe).__name__}.")
    if not isinstance(unet, UNet2DConditionModel):
        raise PipelineError(
            f"{type(pipe).__name__} has no UNet2DConditionModel as `unet`; "
            "LCM-LoRAs exist for Stable Diffusion and SDXL UNets."
        )
    wanted = {"num_inference_steps", "guidance_scale"}
    if missing := wanted - set(inspect.signature(type(pipe).__call__).parameters):
        raise PipelineError(
            f"{type(pipe).__name__} takes no {' or '.join(sorted(missing))}; it can't be driven in a few steps."
        )
    if unet.config.get("time_cond_proj_dim") is not None:
        raise PipelineError(
            "this UNet is a full latent consistency model already (time_cond_proj_dim is set): it needs no LCM-LoRA, "
            "only LCMScheduler and 4 to 8 steps."
        )
    return unet


def _usable_schedule(pipe: Any) -> None:
    config = pipe.scheduler.config
    if "beta_start" not in config and "trained_betas" not in config:
        raise PipelineError(
            f"{type(pipe.scheduler).__name__} has no beta schedule (an EDM base?): "
            "LCM-LoRAs are made for epsilon models with betas."
        )
    if config.get("prediction_type", "epsilon") != "epsilon":
        warnings.warn(
            f"this pipe predicts {config['prediction_type']!r}; the official LCM-LoRAs were distilled for epsilon, "
            "so pictures may be poor. One distilled from this pipe (lcmlora.distill) is the way out.",
            LcmLoraWarning,
            stacklevel=4,
        )


def _base(unet: nn.Module, request: Request) -> registry.Base | None:
    """The base found and, where one is named, that it is the one. None: a UNet and LoRA of their own."""
    found = registry.find_base(unet)
    if request.base == "auto":
        if found is None and request.lora is None:
            raise BaseModelError(registry.unknown(unet))
        return found
    named = registry.by_name(request.base)
    if found is not named:
        is_ = (
            f"{found.title} (base={found.name!r})" if found else f"none of the known bases ({registry.unknown(unet)})"
        )
        raise BaseModelError(
            f"base={named.name!r} was given, {named.title}, but the pipe's UNet is {is_}. "
            "base='auto' finds it by itself."
        )
    return named


def _lcm_share(unet: nn.Module, base: registry.Base | None, request: Request) -> Share:
    source, weight_name = request.lora, request.weight_name
    if source is None:
        assert base is not None
        if base.lora is None:
            raise BaseModelError(f"base {base.name!r} has no LCM-LoRA; pass lora=.")
        source, weight_name = base.lora, base.weight_name
    info = read(find_file(source, weight_name, **dict(request.hub)))
    coverage = cover(info, layers(unet))
    left_out = [name for name in lcm_layers(unet) if name not in coverage.pairs]
    if left_out or coverage.clashes or coverage.foreign:
        raise LoraMismatchError(_mismatch(info, unet, base, left_out, coverage.clashes, coverage.foreign))
    if info.text_encoder_keys:
        raise LoraMismatchError(
            f"{info.describe()} has text-encoder keys, which an LCM-LoRA has not: is it a style LoRA? Pass styles=."
        )
    return Share(info.path, coverage.pairs, request.weight)


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
        parts.append(f"names {len(foreign)} modules that the UNet has not (such as {foreign[0]})")
    fits = _looks_like(info)
    way_out = (
        f" For this pipe use {base.lora}." if base and base.lora else " Pass lora= with a file made for this UNet."
    )
    return (
        f"{info.path} does not fit this pipe, {base.title if base else 'a UNet of its own kind'}: "
        f"it {', '.join(parts)}."
        + (f" It looks like the LCM-LoRA of {fits.title}." if fits and fits is not base else "")
        + way_out
    )


def _looks_like(info: LoraInfo) -> registry.Base | None:
    size = (info.cross_attention_dim, len(info.modules))
    return next((base for base in registry.bases() if (base.cross_attention_dim, base.layers) == size), None)


def _style_share(unet: nn.Module, name: str, style: Style, hub: dict[str, Any]) -> tuple[Share, bool]:
    """A style may cover little, but not nothing, and must not clash."""
    info = read(find_file(style.source, style.weight_name, **hub))
    coverage = cover(info, layers(unet))
    if coverage.clashes or coverage.foreign or not (coverage.pairs or info.text_encoder_keys):
        odd = (*coverage.clashes, *coverage.foreign)
        raise LoraMismatchError(
            f"style {name!r}, {info.describe()}, does not fit this pipe's UNet (text width "
            f"{registry.signature(unet)[0]}): {len(coverage.pairs)} modules fit, {len(coverage.clashes)} have "
            "other shapes, "
            f"{len(coverage.foreign)} do not exist" + (f", such as {odd[0]}." if odd else ".")
        )
    return Share(info.path, coverage.pairs, style.weight), bool(info.text_encoder_keys)


def _fuse(unet: nn.Module, wanted: Fuse) -> bool:
    """Whether the weights can be merged. "auto" leaves adapters where they can't, True refuses."""
    odd = next((reason for name, layer in layers(unet).items() if (reason := _not_plain(name, layer))), None)
    if odd is None and any(getattr(tuner, "lora_variant", None) for tuner in tuner_layers(unet).values()):
        odd = "an active adapter is no plain LoRA (DoRA or the like)"
    if odd and wanted is True:
        raise PipelineError(f"fuse=True is impossible here: {odd}. fuse=False leaves PEFT adapters instead.")
    return wanted is not False and odd is None


def _not_plain(name: str, layer: nn.Module) -> str | None:
    weight = getattr(layer, "weight", None)
    if type(weight) is not nn.Parameter or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        return f"{name} has quantised weights ({type(weight).__name__}, {getattr(weight, 'dtype', None)})"
    if weight.device.type == "meta":
        return f"{name} has its weights off-loaded (accelerate before enable_sequential_cpu_offload())"
    return None


def lcm_scheduler(pipe: Any) -> LCMScheduler:
    """An LCMScheduler for the pipe: its own betas and prediction type, without the settings that ruin LCM.

    `clip_sample` and `thresholding` would clamp latents; `rescale_betas_zero_snr` makes alpha 0 at the first step, by
    which an epsilon prediction is divided (scheduling_lcm.py, step).
    """
    known = set(inspect.signature(LCMScheduler.__init__).parameters)
    config = {key: value for key, value in pipe.scheduler.config.items() if key in known}
    harmless = {"clip_sample": False, "thresholding": False, "original_inference_steps": 50}
    if config.get("prediction_type", "epsilon") == "epsilon":
        harmless["rescale_betas_zero_snr"] = False
    scheduler = LCMScheduler.from_config({**config, **harmless})
    assert isinstance(scheduler, LCMScheduler)
    return scheduler


def check_weight(what: str, weight: float) -> None:
    """Refuse weights that are no numbers."""
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not torch.isfinite(torch.tensor(float(weight)))
    ):
        raise LoraFileError(f"{what}: weight {weight!r} is no finite number.")
