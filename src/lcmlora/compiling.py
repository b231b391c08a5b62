"""torch.compile in place, and back: the UNet stays the same object, and merging into it needs no new compilation."""

from __future__ import annotations

from typing import Literal

from torch import nn

from . import compat

Compile = bool | Literal["regional", "whole"]
"""What of the UNet is compiled: nothing, its transformer blocks (also True), or all of it."""


def regions(unet: nn.Module, how: Compile) -> list[nn.Module]:
    """The modules to compile: the UNet, or its transformer blocks, which are all alike and compiled but once."""
    if not how:
        return []
    repeated = compat.repeated_blocks(unet)
    return [unet] if how == "whole" else [m for m in unet.modules() if type(m).__name__ in repeated]
