"""The bases that few-step LoRAs exist for, and how a UNet's structure tells them apart.

A base is recognised by the width of its cross-attention, its block widths and the number of layers an LCM-LoRA adapts.
Class and file names play no part: SDXL, SSD-1B and Segmind-Vega share class, widths and names, and differ in depth
alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .errors import BaseModelError, near_match
from .layers import ModuleIndex, unet_of


class Structure(NamedTuple):
    """What tells one UNet from another.

    Attributes:
        cross_attention_dim: width of the text embeddings that the UNet attends to.
        block_out_channels: widths of the UNet's levels.
        layers: how many layers an LCM-LoRA adapts (the kinds in `lcmlora.layers.TARGET_MODULES`).
        layers_per_block: how many resnets a down block has.
        text_projection: whether it projects the text embeddings itself, as Kolors does.
    """

    cross_attention_dim: int | None
    block_out_channels: tuple[int, ...]
    layers: int | None
    layers_per_block: Any = None
    text_projection: bool = False


@dataclasses.dataclass(frozen=True)
class Base:
    """A family of UNets of one structure. The files for those of the table stand in `lcmlora.recipes()`.

    Args:
        name: what `accelerate(base=...)` takes.
        title: the name in words.
        cross_attention_dim: width of the text embeddings that the UNet attends to.
        block_out_channels: widths of the UNet's levels.
        layers: how many layers an LCM-LoRA adapts: 278 of Stable Diffusion 1.5, 788 of SDXL. None: any number.
        lora: an LCM-LoRA of one's own: a repository of the hub, a folder or a file.
        weight_name: the file's name inside the repository or folder, where it is not diffusers' usual one.
        rank: the rank of that LoRA.
        weight: what that LoRA counts with where `accelerate(weight=)` is not given.
        beta_schedule: the noise schedule its pipelines need, where that is not the pipe's own.
        motion: whether only UNets with motion modules (AnimateDiff's) are meant. "auto" never finds such a base:
            motion modules of different training have one structure.
        tiny_vae: repository or folder of an AutoencoderTiny for its latents, what `accelerate(vae="tiny")` takes.
        fp16_vae: of a VAE that half precision does not overflow, what `accelerate(vae="fp16-fix")` takes.
        layers_per_block: how many resnets a down block has, where that has to be told.
        text_projection: whether the UNet projects the text embeddings itself, as Kolors' does.
    """

    name: str
    title: str
    cross_attention_dim: int
    block_out_channels: tuple[int, ...]
    layers: int | None
    lora: str | None = None
    weight_name: str | None = None
    rank: int = 64
    weight: float = 1.0
    beta_schedule: str | None = None
    motion: bool = False
    tiny_vae: str | None = None
    fp16_vae: str | None = None
    layers_per_block: int | None = None
    text_projection: bool = False

    def matches(self, structure: Structure, motion: bool = False) -> bool:
        """Whether a UNet of this structure, with motion modules or without, is of this base."""
        return (
            (self.cross_attention_dim, self.block_out_channels) == structure[:2]
            and self.layers in (None, structure.layers)
            and self.layers_per_block in (None, structure.layers_per_block)
            and self.text_projection == structure.text_projection
            and (motion or not self.motion)
        )


_SD = (320, 640, 1280, 1280)
_XL = (320, 640, 1280)
_TAESD = "madebyollin/taesd"
_POCKET_VAE = str(Path(__file__).parent / "pocket/model/tiny-vae")
_XL_VAES: dict[str, Any] = {"tiny_vae": "madebyollin/taesdxl", "fp16_vae": "madebyollin/sdxl-vae-fp16-fix"}
_registered: dict[str, Base] = {
    base.name: base
    for base in (
        Base("sd15", "Stable Diffusion 1.x", 768, _SD, 278, tiny_vae=_TAESD),
        Base("sdxl", "Stable Diffusion XL", 2048, _XL, 788, **_XL_VAES),
        Base("ssd-1b", "SSD-1B", 2048, _XL, 423, **_XL_VAES),
        Base("vega", "Segmind-Vega", 2048, _XL, 233, **_XL_VAES),
        Base("pocket", "the embedded model", 128, (48, 80, 128), 129, tiny_vae=_POCKET_VAE),
    )
}


_unsupported = (
    Base("sd2", "Stable Diffusion 2.x", 1024, _SD, None),
    Base("refiner", "the SDXL refiner", 1280, (384, 768, 1536, 1536), None),
    Base("kolors", "Kolors", 2048, _XL, None, text_projection=True),
    Base("koala", "KOALA", 2048, _XL, None, layers_per_block=1),
)
"""Known UNets that no LCM-LoRA exists for."""


def structure_of(unet: nn.Module | ModuleIndex) -> Structure:
    """What tells a UNet from others."""
    index = unet if isinstance(unet, ModuleIndex) else ModuleIndex.of(unet)
    config: Any = index.module.config
    width = config.get("cross_attention_dim")
    return Structure(
        width if isinstance(width, int) else None,
        tuple(config.get("block_out_channels") or ()),
        len(index.lcm),
        config.get("layers_per_block"),
        config.get("encoder_hid_dim_type") == "text_proj",
    )


def bases() -> tuple[Base, ...]:
    """Every base that `accelerate` can find a LoRA for, the user's own included."""
    return tuple(_registered.values())


def register(base: Base) -> None:
    """Add a base of one's own: from then on `accelerate` recognises it and finds its LoRA. `unregister` undoes it.

    Raises:
        BaseModelError: a base of that name, or one of the same structure, is registered already.
    """
    for known in _registered.values():
        if known.name == base.name or (known.matches(_structure_in(base)) and not base.motion):
            raise BaseModelError(
                f"base {base.name!r} can't be registered: {known.name!r} has that name or structure already."
            )
    _registered[base.name] = base


def unregister(name: str) -> Base:
    """Take a base out of the table again; returns it.

    Raises:
        BaseModelError: there is none of that name.
    """
    base = by_name(name)
    del _registered[name]
    return base


def _structure_in(base: Base) -> Structure:
    return Structure(
        base.cross_attention_dim, base.block_out_channels, base.layers, base.layers_per_block, base.text_projection
    )


def find_base(structure: Structure) -> Base | None:
    """The registered base of this structure, or None."""
    if unsupported(structure):
        return None
    return next((b for b in _registered.values() if b.matches(structure)), None)


def unsupported(structure: Structure) -> Base | None:
    """The known base of this structure that no LCM-LoRA exists for; None for every other structure."""
    return next((b for b in _unsupported if b.matches(structure)), None)


def check_named(name: str, structure: Structure, motion: bool) -> Base:
    """The base of that name, which has to be the UNet's.

    Raises:
        BaseModelError: there is none, or the UNet has another structure.
    """
    named = by_name(name)
    if unsupported(structure) is None and named.matches(structure, motion):
        return named
    found = find_base(structure)
    other = f"{found.title} (base={found.name!r})" if found else f"another. {unknown(structure)}"
    if found is not None and named.motion and not motion:
        other += ", without motion modules"
    raise BaseModelError(
        f"base={name!r} was given, {named.title}, but the pipe's UNet is {other}. base='auto' finds it by itself."
    )


def made_for(cross_attention_dim: int | None, modules: int) -> str | None:
    """The title of the base whose LCM-LoRA has this text width and this many modules, or None."""
    if (cross_attention_dim, modules) == (1024, 278):
        return "Stable Diffusion 2.x"
    return next(
        (b.title for b in _registered.values() if (b.cross_attention_dim, b.layers) == (cross_attention_dim, modules)),
        None,
    )


def title_of(structure: Structure) -> str:
    """What kind of UNet this is, in words, whether an LCM-LoRA exists for it or not."""
    base = find_base(structure) or unsupported(structure)
    return base.title if base else "a UNet of its own kind"


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
    structure = structure_of(unet)
    base = find_base(structure)
    if base is None:
        raise BaseModelError(unknown(structure))
    return base


def by_name(name: str) -> Base:
    """The base of that name.

    Raises:
        BaseModelError: there is none.
    """
    if name not in _registered:
        known, near = ", ".join(map(repr, _registered)), near_match(name, _registered)
        meant = f" Is {near!r} meant?" if near else ""
        raise BaseModelError(
            f"base={name!r} is not known.{meant} Give 'auto' or one of {known}, or register your own. A few-step "
            "LoRA's file is given as lora=."
        )
    return _registered[name]


def unknown(structure: Structure) -> str:
    """Why a UNet is no base of ours, in words that say what to do."""
    width, widths, count = structure[:3]
    shape = f"cross-attention width {width}, block widths {list(widths)}, {count} adaptable layers"
    if base := unsupported(structure):
        return (
            f"This UNet is {base.title} ({shape}), for which no LCM-LoRA exists. "
            "Pass lora= with one of your own (see lcmlora.distill)."
        )
    return f"This UNet ({shape}) has the structure of no known base. Pass lora= with an LCM-LoRA made for it."
