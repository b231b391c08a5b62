"""Which way of distilling is best, at equal cost: four figures at 1, 2, 4 and 8 steps, under two schedulers.

    python benchmarks/objectives.py train WORK [NAME ...]   # every run of RUNS, two seeds; resumes what was stopped
    python benchmarks/objectives.py train-styled WORK       # style and few steps in one file
    python benchmarks/objectives.py measure WORK [PART ...] # the figures, to benchmarks/results/objectives.json
    python benchmarks/objectives.py page                    # the table of docs/distillation.md from them

On the embedded model, from prompts alone. The figures, of held-out prompts, against its own 50 steps:

*rel*: relative distance of the latents to those of the teacher's 50 steps from the same noise.
*FD*: Frechet distance to the teacher's pictures of other prompts, in the middle features of the base's UNet.
*margin*: how much nearer a picture's features are to its own thing than to nine others on the same ground, as a share.
*sharp*: mean gradient of the pixels, as a share of the teacher's.
*right*: share of the pictures that are nearest to their own thing among those ten: the prompt was followed.

rel and margin reward softness, FD and sharp do not: none of them alone says what is better.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler

import lcmlora
from lcmlora import pocket

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples/pocket"))
from pictures import TAUGHT, Scene, caption, draw_scene  # noqa: E402

STEPS = (1, 2, 4, 8)
SCHEDULERS = {"LCM": "lcm", "TCD": "tcd"}
FEATURE_TIMESTEP = 99
GROUPS = 24  # of one ground and ten things each: a picture's own and nine others


def training_prompts(count: int = 800, seed: int = 11) -> list[str]:
    """Prompts of pairings that are not held out."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        scene = draw_scene(rng)
        if not scene.held_out:
            found.append(caption(scene))
    return found


def groups(count: int, seed: int) -> list[list[Scene]]:
    """Ten things on one ground, and as the training prompts say it."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        scene = draw_scene(rng)
        things = rng.sample(sorted(TAUGHT), 10)
        found.append([scene.__class__(**{**vars(scene), "thing": thing}) for thing in things])
    return found


class Judge:
    """The teacher's own pictures, and what is measured against them.

    Args:
        pipe: the pipe that the LoRA is used on, not accelerated.
        seed: of the prompts: the presets are chosen on other ones than the table is made of.
    """

    def __init__(self, pipe: Any, seed: int, count: int = GROUPS) -> None:
        self.pipe = pipe
        self.scenes = groups(count, seed)
        self.prompts = [caption(group[0]) for group in self.scenes for _ in range(4)]
        self.noise = list(range(1000 * seed, 1000 * seed + len(self.prompts)))
        self.target = self.teacher(self.prompts, self.noise)
        others = [caption(scene) for group in groups(2 * count, seed + 1) for scene in group[:4]]
        self.reference = self.features(self.teacher(others, range(10**6, 10**6 + len(others))))
        each = [caption(scene) for group in self.scenes for scene in group]
        self.things = self.features(self.teacher(each, range(2 * 10**6, 2 * 10**6 + len(each)))).view(count, 10, -1)
        self.gradient = gradient(self.decoded(self.target))

    def teacher(self, prompts: list[str], seeds: Any) -> torch.Tensor:
        """Latents of 50 steps of DPM++ at the guidance that was distilled in."""
        found = self.pipe.scheduler
        self.pipe.scheduler = DPMSolverMultistepScheduler.from_config(found.config)
        try:
            return self.latents(self.pipe, prompts, seeds, num_inference_steps=50, guidance_scale=pocket.GUIDANCE)
        finally:
            self.pipe.scheduler = found

    @staticmethod
    def latents(pipe: Any, prompts: list[str], seeds: Any, **call: Any) -> torch.Tensor:
        drawn, seeds = [], list(seeds)
        for first in range(0, len(prompts), 48):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[first : first + 48]]
            batch = prompts[first : first + 48]
            drawn.append(pipe(batch, generator=generators, output_type="latent", **call).images)
        return torch.cat(drawn)

    @torch.no_grad()
    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipe.vae
        return torch.cat([vae.decode(z / vae.config.scaling_factor).sample for z in latents.split(48)]).clamp(-1, 1)

    @torch.no_grad()
    def features(self, latents: torch.Tensor) -> torch.Tensor:
        """Means over the places of the base UNet's middle block, for latents with a little noise."""
        base, kept = _plain_unet(), []
        hook = base.mid_block.register_forward_hook(lambda module, args, output: kept.append(output))
        text = _empty_prompt().expand(len(latents), -1, -1)
        alpha = self.pipe.scheduler.alphas_cumprod[FEATURE_TIMESTEP]
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0))
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        for z, words in zip(noisy.split(48), text.split(48), strict=True):
            base(z, torch.tensor(FEATURE_TIMESTEP), words)
        hook.remove()
        return torch.cat(kept).flatten(2).mean(2).double()

    def figures(self, **call: Any) -> dict[str, float]:
        """The four figures of the pipe as it is accelerated now."""
        latents = self.latents(self.pipe, self.prompts, self.noise, **call)
        features = self.features(latents)
        rel = (latents - self.target).flatten(1).norm(dim=1) / self.target.flatten(1).norm(dim=1)
        nearest = torch.cdist(features.view(len(self.scenes), 4, -1), self.things)  # (group, picture, thing)
        far = nearest.mean(1)
        own, others = far[:, 0], far[:, 1:].mean(1)
        return {
            "rel": rel.mean().item(),
            "fd": frechet(features, self.reference),
            "margin": ((others - own) / others).mean().item(),
            "sharp": gradient(self.decoded(latents)) / self.gradient,
            "right": (nearest.argmin(-1) == 0).double().mean().item(),
        }


def frechet(one: torch.Tensor, two: torch.Tensor) -> float:
    """Frechet distance of two sets of features as Gaussians: |m - n|^2 + tr(C + D - 2 (C D)^(1/2))."""
    spread = [np.cov(found.numpy(), rowvar=False) for found in (one, two)]
    roots = np.linalg.eigvals(spread[0] @ spread[1])
    mean = (one.mean(0) - two.mean(0)).square().sum().item()
    return float(mean + np.trace(spread[0] + spread[1]) - 2 * np.sqrt(roots.clip(0).real).sum())


def gradient(pictures: torch.Tensor) -> float:
    """Mean absolute difference of neighbouring pixels."""
    return float(pictures.diff(dim=2).abs().mean() + pictures.diff(dim=3).abs().mean())


_cache: dict[str, Any] = {}


def _plain_unet() -> Any:
    if "unet" not in _cache:
        base = pocket.load_pocket()
        _cache["unet"] = base.unet
        _cache["text"] = base.encode_prompt("", "cpu", 1, False)[0]
    return _cache["unet"]


def _empty_prompt() -> torch.Tensor:
    _plain_unet()
    return _cache["text"]


@contextmanager
def fast(pipe: Any, file: Path, scheduler: str, styles: dict[str, Any] | None = None) -> Iterator[dict[str, float]]:
    """The pipe with a file under one of SCHEDULERS, and what its calls take: TCD without noise goes the teacher's way.

    Half of the files are made for the other one, which `accelerate` says.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lcmlora.LcmLoraWarning)
        with lcmlora.accelerated(pipe, lora=file, recipe=scheduler, styles=styles):
            yield {"eta": 0.0} if scheduler == "tcd" else {}


COMMON: dict[str, Any] = {
    "rank": 8, "batch_size": 32, "w": 1.5, "schedule": "cosine", "warmup": 20, "weight_decay": 0.0, "ema": 0.99,
    "huber_c": 1e-3, "checkpoint_every": 50, "validate_every": 0, "log_every": 10,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {  # about 100 CPU seconds each; the cache is shared
    "lcm, 1e-3": {"preset": "lcm", "learning_rate": 1e-3, "steps": 160},
    "schedule": {"preset": "schedule", "learning_rate": 1e-3, "steps": 240},
    "paths, 3e-3": {"preset": "paths", "learning_rate": 3e-3, "steps": 320},
    "paths, then schedule": {
        "preset": "paths",
        "steps": 560,
        "then": "schedule",
        "then_steps": 160,
        "points": "paths",
        "learning_rate": 3e-3,
        "then_learning_rate": 1e-3,
    },
    "paths, then lcm at 3e-3": {"preset": "paths-lcm", "steps": 260, "then_steps": 80, "learning_rate": 3e-3},
}
STYLED = "paths with the style"
"""One more run: style and few steps in one file, on a teacher that has the style."""
SEEDS = (0, 1)
RESULTS = ROOT / "benchmarks/results/objectives.json"
TEST, CHOICE = 2024, 7  # seeds of the prompts of the table, and of those that a preset is chosen on


def output_of(work: Path, name: str, seed: int) -> Path:
    return work / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def train(work: Path, names: list[str]) -> None:
    """Every run, in this process, on one thread; what is done already is left alone."""
    torch.set_num_threads(1)
    for seed in SEEDS:
        for name in names or RUNS:
            settings = {**COMMON, **RUNS[name], "seed": seed, "cache_dir": str(work / "cache")}
            output = output_of(work, name, seed)
            if (output / "cost.json").exists():
                continue
            began = time.process_time()
            config = lcmlora.DistillConfig.preset(settings.pop("preset"), **settings)
            lcmlora.distill(pocket.load_pocket(), training_prompts(), output, config, progress=False)
            cost = {"cpu_seconds": time.process_time() - began}
            (output / "cost.json").write_text(json.dumps(cost), encoding="utf-8")
            print(name, seed, cost, flush=True)


def train_styled(work: Path) -> None:
    """The run of STYLED, with a cache of its own."""
    torch.set_num_threads(1)
    settings = {**COMMON, **RUNS["paths, 3e-3"], "cache_dir": str(work / "cache")}
    config = lcmlora.DistillConfig.preset(settings.pop("preset"), **settings)
    styles = {"3d": lcmlora.Style(pocket.STYLE, 1.0)}
    lcmlora.distill(pocket.load_pocket(), training_prompts(), work / "styled", config, styles=styles, progress=False)


def measure_styled(work: Path) -> list[dict[str, Any]]:
    """The file of STYLED alone, against the style and the shipped LCM-LoRA side by side; the teacher has the style."""
    pipe = pocket.load_pocket()
    pipe.set_progress_bar_config(disable=True)
    weights = "pytorch_lora_weights.safetensors"
    pipe.load_lora_weights(pocket.STYLE, weight_name=weights, adapter_name="3d", local_files_only=True)
    judge, rows = Judge(pipe, TEST), []
    pipe.unload_lora_weights()
    shipped = pocket.MODEL / "lcm-lora" / WEIGHT_NAME
    both = {"3d": lcmlora.Style(pocket.STYLE, 1.0)}
    for name, file, styles in ((STYLED, work / "styled" / WEIGHT_NAME, {}), ("style and shipped", shipped, both)):
        for scheduler in SCHEDULERS:
            with fast(pipe, file, SCHEDULERS[scheduler], styles) as call:
                for steps in STEPS:
                    row = {"run": name, "seed": 0, "scheduler": scheduler, "steps": steps, "part": "style"}
                    rows.append({**row, "prompts": "table", **judge.figures(num_inference_steps=steps, **call)})
                    print(rows[-1], flush=True)
    return rows


PARTS = {"base": ("base", TEST), "chalk": ("chalk", TEST), "choice": ("base", CHOICE)}


def measure(work: Path, parts: list[str]) -> None:
    """The figures of every run; those that were measured before are kept.

    Args:
        work: where the runs are.
        parts: of PARTS, and "style"; empty for all.
    """
    files = {(name, seed): output_of(work, name, seed) / WEIGHT_NAME for name in RUNS for seed in SEEDS}
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    done = {(row["run"], row["seed"], row["part"], row["prompts"]) for row in rows}
    for part, prompts in (found for name, found in PARTS.items() if name in parts or not parts):
        said = {"part": part, "prompts": "table" if prompts == TEST else "choice"}
        left = {k: file for k, file in files.items() if file.exists() and (*k, *said.values()) not in done}
        if not left:
            continue
        pipe = pocket.load_pocket(part)
        pipe.set_progress_bar_config(disable=True)
        judge = Judge(pipe, prompts)
        for (name, seed), file in left.items():
            for scheduler in SCHEDULERS:
                with fast(pipe, file, SCHEDULERS[scheduler]) as call:
                    for steps in STEPS:
                        row = {"run": name, "seed": seed, "scheduler": scheduler, "steps": steps, **said}
                        rows.append({**row, **judge.figures(num_inference_steps=steps, **call)})
                        print(rows[-1], flush=True)
    if ("style" in parts or not parts) and not any(row["part"] == "style" for row in rows):
        rows += measure_styled(work)
    costs = {
        f"{name}, {seed}": json.loads((file.parent / "cost.json").read_text())["cpu_seconds"]
        for (name, seed), file in files.items()
        if (file.parent / "cost.json").exists()
    }
    RESULTS.write_text(json.dumps({"rows": rows, "cpu_seconds": costs}, indent=1), encoding="utf-8")


WEIGHT_NAME = "pytorch_lora_weights.safetensors"


DIGITS = {"rel": 2, "fd": 1, "margin": 2, "sharp": 2, "right": 2}


def table(part: str, prompts: str = "table") -> str:
    """A line for each run and scheduler: the figures at 1, 2, 4 and 8 steps, seeds averaged."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    lines = [f"| run | scheduler | {' | '.join(DIGITS)} |", "| --- " * (len(DIGITS) + 2) + "|"]
    for run in dict.fromkeys(row["run"] for row in found["rows"]):
        for scheduler in SCHEDULERS:
            told = {"run": run, "scheduler": scheduler, "part": part, "prompts": prompts}
            rows = [row for row in found["rows"] if told.items() <= row.items()]
            if not rows:
                continue
            cells = [
                " / ".join(
                    f"{statistics.mean(r[name] for r in rows if r['steps'] == n):.{DIGITS[name]}f}" for n in STEPS
                )
                for name in DIGITS
            ]
            lines.append(f"| {run} | {scheduler} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page() -> None:
    """Put a table behind each mark of docs/distillation.md, which says the part and the prompts."""
    file = ROOT / "docs/distillation.md"
    tables = re.compile(r"(<!-- (\w+), (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
    text = tables.sub(lambda found: f"{found[1]}{table(found[2], found[3])}\n", file.read_text(encoding="utf-8"))
    file.write_text(text, encoding="utf-8")


def main() -> None:
    command, *rest = sys.argv[1:] or ["--help"]
    if command == "train":
        train(Path(rest[0]), rest[1:])
    elif command == "train-styled":
        train_styled(Path(rest[0]))
    elif command == "measure":
        measure(Path(rest[0]), rest[1:])
    elif command == "page":
        page()
    else:
        print(__doc__)


if __name__ == "__main__":
    main()
