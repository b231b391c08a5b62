"""What a LoRA sees of a model: its adaptable layers by name, whether PEFT has wrapped them or not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from . import compat

TARGET_MODULES = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
"""The 14 kinds of layers an LCM-LoRA adapts (diffusers, train_lcm_distill_lora_sdxl.py, `lora_target_modules`)."""

INSIDE = ".base_layer"
_ENDINGS = tuple("." + kind for kind in TARGET_MODULES)
_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")  # whatever else hangs on a UNet is not its own
_ADDED = re.compile(r"(^|\.)(motion_modules|fuser|processor|image_projection_layers)(\.|$)")


@dataclasses.dataclass(frozen=True)
class ModuleIndex:
    """What one walk over a model finds.

    Attributes:
        module: the model.
        layers: every Linear and Conv2d by its own name, PEFT wrapping seen through, with those that others put in
            (motion modules, GLIGEN's fusers, IP-Adapter's processors and projections).
        wrappers: the modules that PEFT has put around others, by the name of what they stand for; one inside another
            has `INSIDE` behind its name.
        vectors: every other Parameter by its own name: biases, and those of norms.
        joint_projections: the attentions that `fuse_qkv_projections` has given a joint projection.
        gradients: every Parameter and whether it requires gradients.
        on_disk: whether group off-loading keeps weights in a file.
    """

    module: nn.Module
    layers: Mapping[str, nn.Module]
    wrappers: Mapping[str, nn.Module]
    vectors: Mapping[str, nn.Parameter]
    joint_projections: tuple[nn.Module, ...]
    gradients: tuple[tuple[nn.Parameter, bool], ...]
    on_disk: bool

    @staticmethod
    def of(module: nn.Module) -> ModuleIndex:
        """Walk over a model once."""
        layers: dict[str, nn.Module] = {}
        wrappers: dict[str, nn.Module] = {}
        vectors: dict[str, nn.Parameter] = {}
        joint: list[nn.Module] = []
        parameters: dict[int, nn.Parameter] = {}
        on_disk = False
        seen: set[int] = set()
        waiting = [("", module)]
        while waiting:
            name, here = waiting.pop()
            if id(here) in seen:
                continue
            seen.add(id(here))
            *around, inner = compat.wrappers_of(here)
            for depth, wrapper in enumerate(around):
                wrappers[name + INSIDE * depth] = wrapper
            if around:
                parameters.update((id(p), p) for p in here.parameters())
            if isinstance(inner, nn.Linear | nn.Conv2d):
                layers[name] = inner
            if compat.has_fused_projections(inner):
                joint.append(inner)
            on_disk = on_disk or compat.is_on_disk(inner)
            front = name + "." if name else ""
            own = {child: p for child, p in compat.own_parameters(inner).items() if p is not None}
            parameters.update((id(p), p) for p in own.values())
            vectors.update((front + child, p) for child, p in own.items() if name not in layers or child != "weight")
            children = compat.children_of(inner).items()
            waiting += [(front + child, part) for child, part in reversed(children) if part is not None]
        gradients = tuple((p, p.requires_grad) for p in parameters.values())
        return ModuleIndex(module, layers, wrappers, vectors, tuple(joint), gradients, on_disk)

    @property
    def own(self) -> dict[str, nn.Module]:
        """The layers without those that others put in."""
        return {name: layer for name, layer in self.layers.items() if not _ADDED.search(name)}

    @property
    def lcm(self) -> dict[str, nn.Module]:
        """The layers of a UNet that an LCM-LoRA has to cover."""
        return {n: x for n, x in self.own.items() if n.startswith(_BLOCKS) and n.endswith(_ENDINGS)}

    @property
    def has_motion(self) -> bool:
        """Whether there are motion modules (AnimateDiff's)."""
        return any(".motion_modules." in name for name in self.layers)


def layer_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a Linear's or Conv2d's weight, told by the layer itself: quantised weights have shapes of their
    own.
    """
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)
    raise TypeError(f"{type(layer).__name__} is neither Linear nor Conv2d")


def layers(module: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and Conv2d of a model by its own name, PEFT wrapping seen through, without what others put in."""
    return ModuleIndex.of(module).own


def lcm_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """The layers that an LCM-LoRA of this UNet has to cover."""
    return ModuleIndex.of(unet).lcm


def unet_of(pipe_or_unet: Any) -> nn.Module | None:
    """The UNet of a pipeline, or the UNet itself; None where there is none."""
    unet = pipe_or_unet if isinstance(pipe_or_unet, nn.Module) else getattr(pipe_or_unet, "unet", None)
    unet = compat.uncompiled(unet)
    return unet if isinstance(unet, nn.Module) else None
