"""Writing the distilled LoRA, and reading the file back the way its users will."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from .. import __version__
from ..acceleration import accelerated
from ..errors import LcmLoraError
from ..lora.files import WEIGHT_NAME
from ..recipe import LCM
from .config import DistillConfig

ADAPTER = "lcmlora_student"


def save(unet: Any, folder: Path, config: DistillConfig, lora: LoraConfig) -> Path:
    """The adapter in diffusers' layout, half precision, its alpha in the metadata; returns the file.

    Without that metadata every loader takes alpha for the rank. Only what every PEFT knows is written: diffusers hands
    the metadata to `LoraConfig` as it is.
    """
    state = get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    tensors = {f"unet.{key}": value.detach().to("cpu", torch.float16).contiguous() for key, value in state.items()}
    adapter = {"r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": sorted(lora.target_modules or ())}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in adapter.items()}),
        "lcmlora_recipe": LCM.name,
        "lcmlora": json.dumps({"version": __version__, **dataclasses.asdict(config)}),
    }
    file = folder / WEIGHT_NAME
    save_file(tensors, file, metadata=metadata)
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
    if not error <= 0.02 * change + 1e-3 * expected.float().norm():
        raise LcmLoraError(
            f"{file} does not load back: its UNet pass is off by {error:.3g}, where the LoRA changes {change:.3g}."
        )
