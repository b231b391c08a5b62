"""What the exact undo costs: bytes and seconds of each way of keeping originals, on the full SD 1.5 and SDXL shapes.

    python benchmarks/undo_cost.py [sd15 sdxl]

UNets of the real shapes with random half-precision weights, an LCM-LoRA of the official layout (rank 64, kohya keys,
every layer an LCM-LoRA adapts). For each way of keeping: seconds of accelerate and of restore (median of three), bytes
kept, and whether every tensor came back. Beside it, in the same run, plain diffusers: load, fuse, unfuse, unload.
Writes `benchmarks/undo_cost.json` and `docs/undo-cost.md`.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file

import lcmlora
from lcmlora.unets import lcm_layers

ROOT = Path(__file__).resolve().parent.parent
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
REPEATS = 3


def build(shape: str) -> Any:
    """A pipeline that is nothing but its UNet, random weights, half precision."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SHAPES[shape])
    unet = unet.to(torch.float16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.03)
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear")
    empty = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if shape == "sdxl":
        pair = dict.fromkeys(("text_encoder_2", "tokenizer_2"))
        return StableDiffusionXLPipeline(**empty, **pair, unet=unet, scheduler=scheduler, add_watermarker=False)
    other = dict.fromkeys(("safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(**empty, **other, unet=unet, scheduler=scheduler, requires_safety_checker=False)


def write_lora(unet: torch.nn.Module, file: Path, rank: int = 64) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, layer in lcm_layers(unet).items():
        shape, front = layer.weight.shape, "lora_unet_" + name.replace(".", "_")
        down = torch.randn(rank, *shape[1:], generator=generator) * 0.02
        up = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator) * 0.02
        tensors |= {f"{front}.lora_down.weight": down.half(), f"{front}.lora_up.weight": up.half()}
        tensors[f"{front}.alpha"] = torch.tensor(8.0)
    save_file(tensors, file)


def changed(unet: torch.nn.Module, originals: dict[str, torch.Tensor]) -> float:
    """Share of the LCM layers' weights that are not what they were."""
    layers = lcm_layers(unet)
    differing = sum(int((layers[name].weight != value).sum()) for name, value in originals.items())
    return differing / sum(value.numel() for value in originals.values())


def timed(work: Any) -> float:
    gc.collect()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def plain(pipe: Any, lora: Path) -> tuple[float, float]:
    """Seconds of the published recipe: (load and fuse, unfuse and unload)."""

    def there() -> None:
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="lcm")
        pipe.fuse_lora()

    def back() -> None:
        pipe.unfuse_lora()
        pipe.unload_lora_weights()

    return timed(there), timed(back)


def measure(shape: str, folder: Path) -> list[dict[str, Any]]:
    pipe = build(shape)
    lora = folder / f"{shape}.safetensors"
    write_lora(pipe.unet, lora)
    originals = {name: layer.weight.detach().clone() for name, layer in lcm_layers(pipe.unet).items()}
    rows: list[dict[str, Any]] = []
    for keep in ("memory", "disk"):
        pairs, kept = [], 0
        for _ in range(REPEATS):
            there = timed(lambda keep=keep: lcmlora.accelerate(pipe, lora=lora, keep=keep))
            kept = lcmlora.status(pipe).kept_bytes
            pairs.append((there, timed(lambda: lcmlora.restore(pipe))))
        rows.append(row(shape, f'keep="{keep}"', pairs, kept, changed(pipe.unet, originals)))
    plain_pairs = []
    for i in range(REPEATS):
        plain_pairs.append(plain(pipe, lora))
        if i == 0:
            left = changed(pipe.unet, originals)
    rows.append(row(shape, "diffusers", plain_pairs, 0, left))
    there = timed(lambda: lcmlora.accelerate(pipe, lora=lora, keep=None))
    rows.append(row(shape, "keep=None", [(there, float("nan"))], lcmlora.status(pipe).kept_bytes, float("nan")))
    return rows


def row(shape: str, way: str, pairs: list[tuple[float, float]], kept: int, left: float) -> dict[str, Any]:
    there, back = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    return {"shape": shape, "way": way, "accelerate_s": there, "restore_s": back, "kept_bytes": kept, "changed": left}


def page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# What the exact undo costs",
        "",
        f"Made by `benchmarks/undo_cost.py` ({platform.machine()}, {os.cpu_count()} processors, "
        f"torch {torch.__version__}):",
        "full UNet shapes, random weights in half precision, an LCM-LoRA of rank 64. Median of three. *diffusers* is",
        "load, fuse, then unfuse, unload.",
        "",
        "| shape | way | accelerate, s | restore, s | kept, MiB | weights changed after the way back |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        back = "refused" if r["restore_s"] != r["restore_s"] else f"{r['restore_s']:.2f}"
        left = "" if r["changed"] != r["changed"] else f"{r['changed']:.2%}"
        kept = f"{r['kept_bytes'] / 2**20:.0f}"
        lines.append(f"| {r['shape']} | {r['way']} | {r['accelerate_s']:.2f} | {back} | {kept} | {left} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in sys.argv[1:] or SHAPES:
            rows += measure(shape, Path(folder))
            print(page(rows), flush=True)
    (ROOT / "benchmarks/undo_cost.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (ROOT / "docs/undo-cost.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
