"""CPU seconds a step and peak memory of `distill` and of diffusers' own script, on the same work.

    python benchmarks/distilling.py --official PATH/train_lcm_distill_lora_sdxl.py [--steps 16 48] [--turns 3]
    python benchmarks/distilling.py --page   # the table of docs/distillation.md from results/distilling.json

The script is diffusers' examples/consistency_distillation/train_lcm_distill_lora_sdxl.py; it needs torchvision and
datasets. Without `--official` ours alone is run. The teacher has SDXL's structure, its full depth and a tenth of its
widths (a hundredth of the parameters: UNet 25.6 M, text encoders 7.5 M, VAE 0.7 M), and random weights. The same for
all: pictures, batch, rank, fixed w, loss, learning rate, float32, one thread.

Each run is a process of its own, at two lengths, and a step's cost is their difference. What is left of the shorter
run is `start`: loading, what is computed once and kept (both lengths see all pictures, so that it is the same), our
checks of the file before the first step and at the end. Both draw pictures at their end, the script 16 by a second
pipeline, ours a validation sheet. Rows that are called bare are without. The paths, those of the sheet too, are drawn
once, before.
Turns are interleaved. Memory is the whole process's greatest resident set. A busy machine makes CPU seconds too high,
and not evenly so: measure on one that has nothing else to do.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESOLUTION, BATCH, RANK, W, PICTURES = 128, 4, 16, 7.5, 64
OBJECTIVES = ("lcm", "paths")


class Cost(NamedTuple):
    seconds: float
    peak_bytes: int


def make_teacher(folder: Path) -> None:
    """SDXL at a tenth of its widths, random weights, as a saved pipeline."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from lcmlora.testing import tiny_tokenizer
    from shapes import SHAPES

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 77
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    first = CLIPTextConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=12, num_attention_heads=4, **ids)
    sizes = {"hidden_size": 128, "projection_dim": 128, "intermediate_size": 512, "num_hidden_layers": 32}
    second = CLIPTextConfig(num_attention_heads=4, **sizes, **ids)
    unet = {**SHAPES["sdxl"], "sample_size": RESOLUTION // 8, "block_out_channels": [32, 64, 128]}
    unet |= {"attention_head_dim": [1, 2, 4], "cross_attention_dim": 192}
    unet |= {"addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 6 * 32 + 128}
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(12, 24, 48, 48), layers_per_block=2, norm_num_groups=4, **levels)
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(**unet),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    ).save_pretrained(folder)


def make_pictures(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for i in range(PICTURES):
        side = RESOLUTION + int(rng.integers(0, 64))
        pixels = rng.integers(0, 255, (RESOLUTION, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
        lines.append(json.dumps({"file_name": f"{i:03}.png", "text": f"picture {i} of {PICTURES}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def official(script: Path, place: Path, steps: int, out: Path, bare: bool) -> list[str]:
    settings = {"pretrained_teacher_model": place / "teacher", "train_data_dir": place / "pictures"}
    settings |= {"output_dir": out, "cache_dir": place / "cache", "resolution": RESOLUTION, "train_batch_size": BATCH}
    settings |= {"lora_rank": RANK, "lora_alpha": RANK, "w_min": W, "w_max": W, "loss_type": "huber"}
    settings |= {"learning_rate": 1e-4, "max_train_steps": steps, "seed": 0, "mixed_precision": "no"}
    settings |= {"checkpointing_steps": 10**6, "validation_steps": 10**6, "report_to": "all"}
    given = [str(script), *(f"--{key}={value}" for key, value in settings.items())]
    return [__file__, "--bare", *given] if bare else given


def distil_officially(script: str) -> None:
    """What a process of the script does, without its sample pictures."""
    spec = importlib.util.spec_from_file_location("official", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.log_validation = lambda *args, **settings: None
    module.main(module.parse_args())


def ours(objective: str, place: Path, steps: int, out: Path, bare: bool) -> list[str]:
    return [__file__, "--run", objective, str(place), str(steps), str(out), "bare" * bare]


def distil(objective: str, place: Path, steps: int, out: Path, bare: bool = True) -> None:
    """What a process of ours does."""
    import lcmlora

    settings: dict[str, Any] = {"rank": RANK, "steps": steps, "batch_size": BATCH, "w": W, "resolution": RESOLUTION}
    settings |= {"objective": objective, "checkpoint_every": 0, "log_every": 1}
    if bare:
        settings["validate_every"] = 0
    if objective == "paths":
        settings["cache_dir"] = str(place / "cache-paths")
    lcmlora.distill(place / "teacher", place / "pictures", out, lcmlora.DistillConfig(**settings), progress=False)


def run(command: list[str], log: Path) -> Cost:
    """A process's own CPU seconds and greatest resident set."""
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], env={**os.environ, **quiet}, stdout=file, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return Cost(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def measure(rows: dict[str, Callable[[int, Path], list[str]]], place: Path, steps: list[int], turns: int) -> Any:
    result: dict[str, Any] = {name: {"step": [], "start": [], "peak_bytes": []} for name in rows}
    for turn in range(turns):
        for name, command in rows.items():
            costs = []
            for count in steps:
                out = place / f"out-{name.replace(' ', '-')}-{turn}-{count}"
                costs.append(run(command(count, out), place / "log.txt"))
            step = (costs[1].seconds - costs[0].seconds) / (steps[1] - steps[0])
            found = (step, costs[0].seconds - steps[0] * step, max(cost.peak_bytes for cost in costs))
            for key, value in zip(result[name], found, strict=True):
                result[name][key].append(value)
            print(f"turn {turn + 1}, {name}: {found[0]:.3f} s a step", file=sys.stderr, flush=True)
    return result


def table(result: dict[str, Any]) -> str:
    """Medians, with the least and the most; shares are of the first row, turn by turn."""
    first = next(iter(result.values()))
    lines = ["| | CPU s a step | share | start, CPU s | peak MiB | share |", "| --- | --- | --- | --- | --- | --- |"]
    for name, found in result.items():
        step, peak = found["step"], statistics.median(found["peak_bytes"])
        share = statistics.median(a / b for a, b in zip(step, first["step"], strict=True))
        lines.append(
            f"| {name} | {statistics.median(step):.3f} ({min(step):.3f} to {max(step):.3f}) | {share:.2f} "
            f"| {statistics.median(found['start']):.1f} | {peak / 2**20:.0f} "
            f"| {peak / statistics.median(first['peak_bytes']):.2f} |"
        )
    return "\n".join(lines)


def page() -> None:
    """Put the table behind its mark in docs/distillation.md."""
    found = json.loads((ROOT / "benchmarks/results/distilling.json").read_text(encoding="utf-8"))
    file = ROOT / "docs/distillation.md"
    once = f"The paths, drawn once: {found['paths_once']:.0f} CPU seconds. {found['machine']}."
    told = f"{table(found['rows'])}\n\n{once}\n"
    mark = re.compile(r"(<!-- distilling -->\n).*?(?=<!-- end -->)", re.DOTALL)
    file.write_text(mark.sub(lambda at: at[1] + told, file.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path)
    parser.add_argument("--steps", type=int, nargs=2, default=[16, 48])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    if args.page:
        page()
        return
    from shapes import save

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_teacher(place / "teacher")
        make_pictures(place / "pictures")
        rows: dict[str, Callable[[int, Path], list[str]]] = {}
        for bare in (False, True):
            if script := args.official:
                rows["official script" + ", bare" * bare] = functools.partial(
                    lambda count, out, bare: official(script.resolve(), place, count, out, bare), bare=bare
                )
            for objective in OBJECTIVES[: 1 if bare else None]:
                rows[f"lcmlora {objective}" + ", bare" * bare] = functools.partial(
                    lambda count, out, kind, bare: ours(kind, place, count, out, bare), kind=objective, bare=bare
                )
        once, again = (run(ours("paths", place, 1, place / f"once-{n}", False), place / "log.txt") for n in range(2))
        result = measure(rows, place, args.steps, args.turns)
    settings = {"steps": args.steps, "batch": BATCH, "rank": RANK, "resolution": RESOLUTION}
    save("distilling", {**settings, "rows": result, "paths_once": once.seconds - again.seconds})
    print(table(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        sys.argv.pop(1)
        distil_officially(sys.argv.pop(1))  # what is left is the script's own
    elif sys.argv[1:2] == ["--run"]:
        kind, where, length, target, how = sys.argv[2:]
        distil(kind, Path(where), int(length), Path(target), how == "bare")
    else:
        main()
