"""The bases an LCM-LoRA exists for, and how a UNet's structure tells them apart.

A base is recognised by the width of its cross-attention, its block widths and the number of layers an LCM-LoRA adapts.
Class and file names play no part: SDXL, SSD-1B and Segmind-Vega share class, widths and names, and differ in depth
alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from .errors import BaseModelError
from .layers import lcm_layers, unet_of


@dataclasses.dataclass(frozen=True)
class Base:
    """A family of UNets of one structure, and the LCM-LoRA made for it.

    Args:
        name: what `accelerate(base=...)` takes.
        title: the name in words.
        cross_attention_dim: width of the text embeddings that the UNet attends to.
        block_out_channels: widths of the UNet's levels.
        layers: how many layers an LCM-LoRA adapts (the kinds in `lcmlora.unets.KINDS`).
        lora: the LCM-LoRA: a repository of the hub, a folder or a file. None where there is none.
        weight_name: the file's name inside the repository or folder, where it is not diffusers' usual one.
        rank: the rank of that LoRA.
        weight: what that LoRA counts with where `accelerate(weight=)` is not given.
        beta_schedule: the noise schedule its pipelines need, where that is not the pipe's own.
        motion: whether only UNets with motion modules (AnimateDiff's) are meant. "auto" never finds such a base:
            motion modules of different training have one structure.
        tiny_vae: repository or folder of an AutoencoderTiny for its latents, what `accelerate(vae="tiny")` takes.
        fp16_vae: of a VAE that half precision does not overflow, what `accelerate(vae="fp16-fix")` takes.
    """

    name: str
    title: str
    cross_attention_dim: int
    block_out_channels: tuple[int, ...]
    layers: int
    lora: str | None
    weight_name: str | None = None
    rank: int = 64
    weight: float = 1.0
    beta_schedule: str | None = None
    motion: bool = False
    tiny_vae: str | None = None
    fp16_vae: str | None = None

    def matches(self, unet: nn.Module) -> bool:
        """Whether the UNet has this base's structure."""
        if self.motion and not any(name.endswith(".motion_modules") for name, _ in unet.named_modules()):
            return False
        return self.structure == signature(unet)

    @property
    def structure(self) -> tuple[int | None, tuple[int, ...], int]:
        """What `signature` gives for its UNets."""
        return (self.cross_attention_dim, self.block_out_channels, self.layers)


_SD = (320, 640, 1280, 1280)
_XL = (320, 640, 1280)
_TAESD = "madebyollin/taesd"
_XL_VAES: dict[str, Any] = {"tiny_vae": "madebyollin/taesdxl", "fp16_vae": "madebyollin/sdxl-vae-fp16-fix"}
_POCKET = str(Path(__file__).parent / "pocket/model/lcm-lora")
_registered: dict[str, Base] = {
    base.name: base
    for base in (
        Base("sd15", "Stable Diffusion 1.x", 768, _SD, 278, "latent-consistency/lcm-lora-sdv1-5", tiny_vae=_TAESD),
        Base("sdxl", "Stable Diffusion XL", 2048, _XL, 788, "latent-consistency/lcm-lora-sdxl", **_XL_VAES),
        Base("ssd-1b", "SSD-1B", 2048, _XL, 423, "latent-consistency/lcm-lora-ssd-1b", **_XL_VAES),
        Base("vega", "Segmind-Vega", 2048, _XL, 233, "segmind/Segmind-VegaRT", rank=128, **_XL_VAES),
        Base(
            "animatelcm",
            "AnimateLCM (SD 1.x)",
            768,
            _SD,
            278,
            "wangfuyun/AnimateLCM",
            weight_name="AnimateLCM_sd15_t2v_lora.safetensors",
            weight=0.8,
            beta_schedule="linear",
            motion=True,
            tiny_vae=_TAESD,
        ),
        Base("pocket", "the embedded model", 128, (48, 80, 128), 129, _POCKET, rank=16),
    )
}


def signature(unet: nn.Module) -> tuple[int | None, tuple[int, ...], int]:
    """(cross-attention width, block widths, number of layers an LCM-LoRA adapts)."""
    config: Any = unet.config
    width = config.get("cross_attention_dim")
    return (
        width if isinstance(width, int) else None,
        tuple(config.get("block_out_channels") or ()),
        len(lcm_layers(unet)),
    )


def bases() -> tuple[Base, ...]:
    """Every base that `accelerate` can find a LoRA for, the user's own included."""
    return tuple(_registered.values())


def register(base: Base) -> None:
    """Add a base of one's own: from then on `accelerate` recognises it and finds its LoRA.

    Raises:
        BaseModelError: a base of that name, or one of the same structure, is registered already.
    """
    for known in _registered.values():
        if known.name == base.name or (known.structure == base.structure and not base.motion):
            raise BaseModelError(
                f"base {base.name!r} can't be registered: {known.name!r} has that name or structure already."
            )
    _registered[base.name] = base


def find_base(unet: nn.Module) -> Base | None:
    """The registered base of this structure, or None. Kolors' UNet differs from SDXL's in what it attends to alone."""
    if _unsupported(unet):
        return None
    structure = signature(unet)
    return next((b for b in _registered.values() if b.structure == structure and not b.motion), None)


def made_for(cross_attention_dim: int | None, modules: int) -> str | None:
    """The title of the base whose LCM-LoRA has this text width and this many modules, or None."""
    if (cross_attention_dim, modules) == (1024, 278):
        return "Stable Diffusion 2.x"
    return next(
        (b.title for b in _registered.values() if (b.cross_attention_dim, b.layers) == (cross_attention_dim, modules)),
        None,
    )


def title_of(unet: nn.Module) -> str:
    """What kind of UNet this is, in words, whether an LCM-LoRA exists for it or not."""
    base = find_base(unet)
    return base.title if base else _unsupported(unet) or "a UNet of its own kind"


def detect_base(pipe_or_unet: Any) -> Base:
    """The base of a pipeline or UNet, found from the UNet's structure.

    Raises:
        BaseModelError: there is no UNet, or its structure is no registered base's.
    """
    unet = unet_of(pipe_or_unet)
    if unet is None:
        raise BaseModelError(
            f"{type(pipe_or_unet).__name__} has no UNet; lcmlora accelerates pipelines with a `unet`."
        )
    base = find_base(unet)
    if base is None:
        raise BaseModelError(unknown(unet))
    return base


def by_name(name: str) -> Base:
    """The base of that name.

    Raises:
        BaseModelError: there is none.
    """
    if name not in _registered:
        known = ", ".join(map(repr, _registered))
        raise BaseModelError(f"base={name!r} is not known. Give 'auto' or one of {known}, or register your own.")
    return _registered[name]


def _unsupported(unet: nn.Module) -> str | None:
    """The name of a known base that has no LCM-LoRA, told by what sets it apart; None for every other UNet."""
    config: Any = unet.config
    width, widths, _ = signature(unet)
    if (width, widths) == (1024, _SD):
        return "Stable Diffusion 2.x"
    if (width, widths) == (1280, (384, 768, 1536, 1536)):
        return "the SDXL refiner"
    if config.get("encoder_hid_dim_type") == "text_proj" and config.get("encoder_hid_dim") == 4096:
        return "Kolors"
    if (width, widths) == (2048, _XL) and config.get("layers_per_block") == 1:
        return "KOALA"
    return None


def unknown(unet: nn.Module) -> str:
    """Why a UNet is no base of ours, in words that say what to do."""
    width, widths, count = signature(unet)
    shape = f"cross-attention width {width}, block widths {list(widths)}, {count} adaptable layers"
    if name := _unsupported(unet):
        return (
            f"This UNet is {name} ({shape}), for which no LCM-LoRA exists. "
            "Pass lora= with one of your own (see lcmlora.distill)."
        )
    return f"This UNet ({shape}) has the structure of no known base. Pass lora= with an LCM-LoRA made for it."
