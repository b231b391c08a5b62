"""Writing the distilled LoRA, and reading the file back the way its users will."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .. import __version__
from ..acceleration import accelerated
from ..errors import LcmLoraError
from ..layers import TARGET_MODULES
from ..lora.files import WEIGHT_NAME
from .config import DistillConfig
from .files import whole


def save(
    state: Mapping[str, torch.Tensor], folder: Path, config: DistillConfig, alpha: float | None, recipe: str
) -> Path:
    """The factors in diffusers' layout, half precision; returns the file.

    Args:
        state: `layer.lora_A.weight` and `layer.lora_B.weight` of each layer.
        folder: where to write.
        config: the run's settings, for the metadata.
        alpha: of all layers; None: each layer's alpha is its rank, which is what a loader takes it for by itself.
        recipe: how it is to be driven.
    """
    tensors = {f"unet.{key}": value.detach().to("cpu", torch.float16).contiguous() for key, value in state.items()}
    metadata = {
        "format": "pt",
        "lcmlora_recipe": recipe,
        "lcmlora": json.dumps({"version": __version__, **dataclasses.asdict(config)}),
    }
    if alpha is not None:  # only what every PEFT knows: diffusers hands it to `LoraConfig` as it is
        adapter = {"r": config.rank, "lora_alpha": alpha, "target_modules": sorted(TARGET_MODULES)}
        metadata["lora_adapter_metadata"] = json.dumps({f"unet.{key}": value for key, value in adapter.items()})
    file = folder / WEIGHT_NAME
    with whole(file) as partial:
        save_file(tensors, partial, metadata=metadata)
    return file


@torch.no_grad()
def check(pipe: Any, file: Path, inputs: dict[str, Any], expected: torch.Tensor) -> None:
    """Load the file through `accelerate` and compare one UNet pass with that of the weights in training.

    Raises:
        LcmLoraError: the outputs differ by more than half precision explains, or the file makes no difference.
    """
    bare = pipe.unet(**inputs, return_dict=False)[0]
    with accelerated(pipe, lora=file, fuse=False):
        loaded = pipe.unet(**inputs, return_dict=False)[0]
    change = (expected - bare).float().norm()
    error = (loaded - expected).float().norm()
    rounding = 4 * torch.finfo(pipe.unet.dtype).eps
    if not error <= 0.02 * change + max(1e-3, rounding) * expected.float().norm():
        raise LcmLoraError(
            f"{file} does not load back: its UNet pass is off by {error:.3g}, where the LoRA changes {change:.3g}."
        )
