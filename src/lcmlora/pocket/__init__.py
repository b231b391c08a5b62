"""The embedded model: a real, small text-to-image pipeline of Stable Diffusion's shape that needs no hub.

It draws some eighty things on twelve backgrounds, 128 x 128 pixels: "a small fox on a teal background, on the left".
Beside it lie its LCM-LoRA (made by `lcmlora.distill`), a style LoRA, a fine-tuned UNet and a tiny VAE.
`examples/pocket/` made them all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..quiet import IMPORTING, hushed

if TYPE_CHECKING:
    import torch

MODEL = Path(__file__).parent / "model"
LCM_LORA = MODEL / "lcm-lora"
"""Its few-step LoRA, for `recipe="lcm"` and `recipe="tcd"` alike: the latter is nearer to its 50 steps."""
STYLE = MODEL / "style-lora"
"""The style LoRA's folder: soft 3-D renders, for `accelerate(pipe, styles={"3d": lcmlora.pocket.STYLE})`."""
GUIDANCE = 2.5
"""The `guidance_scale` for the model when it is not accelerated: its LCM-LoRA was distilled for it (w = 1.5)."""


def words() -> dict[str, list[str]]:
    """What prompts are made of: "things", "backgrounds", "sizes", "positions", and one "example" prompt."""
    vocabulary: dict[str, list[str]] = json.loads((MODEL / "words.json").read_text(encoding="utf-8"))
    return vocabulary


def load_pocket(variant: Literal["base", "chalk"] = "base", *, dtype: torch.dtype | None = None) -> Any:
    """Load the embedded model, without any network.

    Args:
        variant: "base", or "chalk": the same pipeline with a UNet fine-tuned on chalk drawings, to which the base's
            LCM-LoRA applies untouched.
        dtype: of all weights; None is float32 (the files are half precision, which most CPUs compute slowly).

    Returns:
        A `StableDiffusionPipeline` for pictures of 128 x 128 pixels.

    Raises:
        ValueError: there is no such variant.
    """
    import torch

    if variant not in ("base", "chalk"):
        raise ValueError(f"variant={variant!r}: 'base' or 'chalk' is expected.")
    with hushed(*IMPORTING):
        from diffusers import StableDiffusionPipeline

        from ..compat import bars_hidden, set_name_or_path

        with bars_hidden():
            pipe = StableDiffusionPipeline.from_pretrained(
                MODEL / "pipeline", dtype=torch.float32, local_files_only=True
            )
    if variant == "chalk":
        _add_difference(pipe.unet, MODEL / "chalk" / "unet_difference.safetensors")
    set_name_or_path(pipe, "pocket" if variant == "base" else f"pocket:{variant}")  # whatever machine reads it
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        torch.nn.Module.to(model, dtype=dtype)  # diffusers' own `to` logs a warning for any dtype
    return pipe


def _add_difference(unet: Any, file: Path) -> None:
    """Add a fine-tune's difference: int8 steps per output channel, `name` = `name`.step * `name`.int8."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(file)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            steps = tensors[f"{name}.step"].float()
            parameter += tensors[f"{name}.int8"].float() * steps.view(-1, *[1] * (parameter.ndim - 1))
