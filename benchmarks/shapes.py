"""What the speed benchmarks share: pipelines of the real shapes with random weights, LoRA files of the official
layout, interleaved timing, and peak memory.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file

from lcmlora.layers import lcm_layers

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
SHAPES["sdxl-tiny"] = {  # to see a script run
    **SHAPES["sdxl"],
    "sample_size": 8,
    "cross_attention_dim": 64,
    "attention_head_dim": [1, 2, 2],
    "block_out_channels": [32, 64, 64],
    "transformer_layers_per_block": [1, 1, 1],
}


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights, quickly: one million normal numbers over and over."""
    numbers = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)) * 0.02
    with torch.no_grad():
        for parameter in module.parameters():
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(numbers)):
                flat[start : start + len(numbers)] = numbers[: len(flat) - start]
    return module


def empty(build: Callable[[], torch.nn.Module], dtype: torch.dtype, device: str = "cpu") -> torch.nn.Module:
    """A module with memory but no values yet."""
    with torch.device("meta"):
        module = build()
    return module.to(dtype).to_empty(device=device)


def build_vae(dtype: torch.dtype, **changes: Any) -> torch.nn.Module:
    """The VAE of both shapes, random weights."""
    levels = 4
    config = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": 2,
        "latent_channels": 4,
        **changes,
    }
    return fill(empty(lambda: AutoencoderKL(**config), dtype)).eval()


def build(shape: str, dtype: torch.dtype = torch.float16) -> Any:
    """A pipeline that is nothing but its UNet, random weights."""
    unet = fill(empty(lambda: UNet2DConditionModel(**SHAPES[shape]), dtype)).eval()
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear")
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if shape.startswith("sdxl"):
        pair = dict.fromkeys(("text_encoder_2", "tokenizer_2"))
        return StableDiffusionXLPipeline(**none, **pair, unet=unet, scheduler=scheduler, add_watermarker=False)
    other = dict.fromkeys(("safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(**none, **other, unet=unet, scheduler=scheduler, requires_safety_checker=False)


def write_lora(
    unet: torch.nn.Module, file: Path, rank: int = 64, only: Callable[[str], bool] = lambda name: True, seed: int = 1
) -> Path:
    """A LoRA of the official layout: kohya keys, half precision, alpha 8; of the layers an LCM-LoRA adapts."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in lcm_layers(unet).items():
        if only(name):
            shape, front = layer.weight.shape, "lora_unet_" + name.replace(".", "_")
            down = torch.randn(rank, *shape[1:], generator=generator) * 0.02
            up = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator) * 0.02
            tensors |= {f"{front}.lora_down.weight": down.half(), f"{front}.lora_up.weight": up.half()}
            tensors[f"{front}.alpha"] = torch.tensor(8.0)
    save_file(tensors, file)
    return file


def in_attention(name: str) -> bool:
    """The layers that most style LoRAs adapt."""
    return "attentions" in name


clock = time.perf_counter


def count_one_processors_time() -> None:
    """Have `seconds` count this process's own time, on one thread: what others do on the machine matters less then."""
    global clock
    torch.set_num_threads(1)
    clock = time.process_time


def seconds(work: Callable[[], object]) -> float:
    gc.collect()
    began = clock()
    work()
    return clock() - began


def interleaved(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Each of the works in turn, `repeats` times, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            took = seconds(work)
            if turn:
                times[name].append(took)
    return times


def summary(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "least": min(times), "most": max(times), "repeats": len(times)}


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes of memory of its own (not mapped files, which the system can take back) that the work needed on top."""

    def anonymous() -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    gc.collect()
    with suppress(OSError, AttributeError):  # what glibc holds back would be used again and not be counted
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, peak, over = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        over.set()
        watcher.join()
    return max(peak, anonymous()) - before


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} processors"
    return f"{platform.machine()}, {device}, torch {torch.__version__}, diffusers {diffusers.__version__}"


def save(name: str, result: dict[str, Any]) -> None:
    """Write one benchmark's figures, from which `performance_page.py` makes the page."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(), **result}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)
