"""Tiny random pipelines of real diffusers classes, and LoRA files made for them."""

from __future__ import annotations

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches the network

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from lcmlora import testing
from lcmlora.testing import text_config as text_config
from lcmlora.testing import tiny_tokenizer as tiny_tokenizer
from lcmlora.testing import tiny_vae as tiny_vae

torch.set_num_threads(1)  # tiny tensors: a second thread only waits


def tiny_unet(seed: int = 0, width: int = 32, **changes: object) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return testing.tiny_unet("sd", seed=seed, **{"cross_attention_dim": width, **changes})


def sdxl_unet(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return testing.tiny_unet("sdxl", seed=seed)


def sd_pipe(
    seed: int = 0, unet: UNet2DConditionModel | None = None, cls: type = StableDiffusionPipeline
) -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    pipe = testing.tiny_pipeline("sd", seed=seed, cls=cls)
    if unet is not None:
        pipe.register_modules(unet=unet)
    return pipe


def sdxl_pipe(seed: int = 0, cls: type = StableDiffusionXLPipeline) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    return testing.tiny_pipeline("sdxl", seed=seed, cls=cls)


PIPES = {"sd": sd_pipe, "sdxl": sdxl_pipe}


def write_lora(path: Path, unet: UNet2DConditionModel, **options: object) -> Path:
    """A LoRA file for the LCM layers of a UNet that `only` lets through: see `lcmlora.testing.tiny_lora`."""
    return testing.tiny_lora(unet, path, **options)


@pytest.fixture
def lcm_file(tmp_path: Path) -> Callable[..., Path]:
    """Write the LCM-LoRA of a pipe."""

    def write(pipe: StableDiffusionPipeline, name: str = "lcm.safetensors", **options: object) -> Path:
        return write_lora(tmp_path / name, pipe.unet, **options)

    return write


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of five small captioned pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (20 + i, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def snapshot(pipe: StableDiffusionPipeline) -> dict[str, object]:
    """Everything a restore has to give back: tensors by value, objects by identity."""
    state: dict[str, object] = {"class": type(pipe), "scheduler": pipe.scheduler, "config": dict(pipe.config)}
    for part, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        for name, parameter in module.named_parameters():
            state[f"{part}.{name}"] = (parameter, parameter.detach().clone(), parameter.requires_grad)
        for name, inner in module.named_modules():
            # transformers marks a text encoder at its first pass, accelerated or not
            marks = set(inner.__dict__) - {"_output_capturing_hooks_installed"}
            state[f"{part}:{name}"] = (inner, inner.training, marks)
            if isinstance(scales := getattr(inner, "scaling", None), dict) and scales:  # a number in BEiT
                state[f"{part}:{name}:scales"] = (dict(scales), list(inner.active_adapters), inner.disable_adapters)
        state[f"{part}:peft"] = dict(getattr(module, "peft_config", {}))
    return state


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        other = after[key]
        if isinstance(value, tuple) and isinstance(value[0], torch.nn.Parameter):
            assert value[0] is other[0], f"{key} is another Parameter"
            assert torch.equal(value[1], other[1]), f"{key} has other values"
            assert value[2] == other[2], f"{key} has another requires_grad"
        elif isinstance(value, tuple) and isinstance(value[0], torch.nn.Module):
            assert value[0] is other[0], f"{key} is another module"
            assert value[1:] == other[1:], f"{key} differs: {value[1:]} != {other[1:]}"
        elif key in ("class", "scheduler"):
            assert value is other, key
        else:
            assert value == other, key
