"""torch.compile in place, and back: the UNet stays the same object, and merging into it needs no new compilation."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

Compile = bool | Literal["regional", "whole"]
_COMPILED = "_compiled_call_impl"  # where torch.nn.Module.compile puts its result


def regions(unet: nn.Module, how: Compile) -> list[nn.Module]:
    """The modules to compile: the UNet, or its transformer blocks, which are all alike and compiled but once.

    What is compiled already stays as it is.
    """
    if not how:
        return []
    repeated = set(getattr(unet, "_repeated_blocks", None) or ("BasicTransformerBlock",))
    wanted = [unet] if how == "whole" else [m for m in unet.modules() if type(m).__name__ in repeated]
    return [module for module in wanted if getattr(module, _COMPILED, None) is None]


def undo(module: nn.Module) -> None:
    """Let a module run as it is written again."""
    attributes: dict[str, Any] = module.__dict__
    attributes.pop(_COMPILED, None)
