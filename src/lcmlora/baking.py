"""Saving an accelerated pipe as an ordinary checkpoint, for programs that know nothing of LoRAs."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from . import __version__
from .acceleration import merged
from .errors import PipelineError
from .state import is_accelerated, status

RECIPE = "lcmlora.json"
"""The file in a baked folder that says what was merged, and how to call the pipe."""


def bake(pipe: Any, folder: str | Path, *, overwrite: bool = False, **save: Any) -> Path:
    """Save an accelerated pipe with its LoRAs merged in, as a folder that plain diffusers loads.

    The saved scheduler is `LCMScheduler`; how to call the pipe (steps, guidance) and what was merged stands in
    `lcmlora.json`. A pipe with PEFT adapters (fuse=False) is merged for the time of saving. The pipe is left as it is.

    Args:
        pipe: an accelerated pipe.
        folder: where to; must not exist, or be empty, unless `overwrite`. It appears only when all is written.
        overwrite: replace what is there.
        save: as for diffusers' `save_pretrained`, such as `variant="fp16"`.

    Returns:
        The folder.

    Raises:
        PipelineError: the pipe is not accelerated, can't be merged, or the folder is in use.
    """
    folder = Path(folder)
    if not is_accelerated(pipe):
        raise PipelineError(
            "bake saves an accelerated pipe; lcmlora.accelerate(pipe) first, or pipe.save_pretrained()."
        )
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise PipelineError(f"{folder} exists and is not empty; give another folder, or overwrite=True.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
        made = Path(place) / folder.name
        with merged(pipe):
            _require_plain(pipe)
            pipe.save_pretrained(made, **save)
        (made / RECIPE).write_text(json.dumps(_recipe(pipe), indent=1), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def _recipe(pipe: Any) -> dict[str, Any]:
    now = status(pipe)
    call = {"num_inference_steps": now.steps, "guidance_scale": now.guidance}
    merged_in = {"lora": now.lora, "weight": now.weight, "styles": dict(now.styles), "base": now.base}
    return {"lcmlora": __version__, "call": call, "merged": merged_in}


def _require_plain(pipe: Any) -> None:
    """Refuse to write keys that no loader would understand ("base_layer", "lora_A")."""
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module):
            odd = next((key for key in module.state_dict() if "base_layer" in key or "lora_" in key), None)
            if odd:
                raise PipelineError(f"{name} has a LoRA that can't be merged ({odd}): unload it before bake().")
