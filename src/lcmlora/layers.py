"""What a LoRA sees of a UNet: its adaptable layers by name, whether PEFT has wrapped them or not."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

KINDS = (
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


_ADDED = re.compile(r"(^|\.)(motion_modules|fuser|processor)(\.|$)")


def base_layer(module: nn.Module) -> nn.Module:
    """The layer itself, or the one inside the PEFT layer around it."""
    return module._modules.get("base_layer") or module  # getattr is ten times slower where there is none


def layer_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a Linear's or Conv2d's weight, told by the layer itself: quantised weights have shapes of their
    own.
    """
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)
    raise TypeError(f"{type(layer).__name__} is neither Linear nor Conv2d")


def layers(unet: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and Conv2d of a model by its own name, PEFT wrapping seen through.

    What people put into a UNet beside its own layers is left out: motion modules, GLIGEN's fusers, IP-Adapter
    processors.
    """
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in unet.named_modules():
        if name.startswith(inside) and inside:
            continue  # the parts of a PEFT layer
        if base_layer(module) is not module:
            inside = (*inside, name + ".")
        layer = base_layer(module)
        if isinstance(layer, nn.Linear | nn.Conv2d) and not _ADDED.search(name):
            found[name] = layer
    return found


def lcm_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """The layers that an LCM-LoRA of this UNet has to cover."""
    endings = tuple("." + kind for kind in KINDS)
    return {name: layer for name, layer in layers(unet).items() if name.endswith(endings)}


def unet_of(pipe_or_unet: Any) -> nn.Module | None:
    """The UNet of a pipeline, or the UNet itself; None where there is none."""
    unet = pipe_or_unet if isinstance(pipe_or_unet, nn.Module) else getattr(pipe_or_unet, "unet", None)
    unet = getattr(unet, "_orig_mod", unet)  # a torch.compile'd module
    return unet if isinstance(unet, nn.Module) else None
