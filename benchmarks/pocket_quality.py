"""How good the embedded model's pictures are, in how many steps and seconds: prompt accuracy and Frechet distance.

    python benchmarks/pocket_quality.py --data WORK [--old FOLDER]

WORK is the folder in which `examples/pocket/pictures.py` put the drawings. A small classifier is trained on them
first; it reads thing, background, size and place off a picture, and its features are the space of the Frechet distance
(torchmetrics). Prompts and seeds are drawn by rule, half of them pair a thing with a background that no training
picture had. FOLDER is the `pocket/model` of an older version, whose pictures are enlarged to the new size and measured
with the same prompts and seeds. Writes `benchmarks/pocket_quality.json` and the tables of `docs/pocket-quality.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

import lcmlora
from lcmlora import pocket

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples/pocket"))
from pictures import (  # noqa: E402
    BACKGROUNDS,
    POSITIONS,
    SIZE,
    SIZES,
    TAUGHT,
    Scene,
    Sprites,
    caption,
    draw_scene,
    training_scenes,
)

LOOKS = {"base": "noto", "style": "fluent", "chalk": "chalk"}
QUESTIONS = {"thing": TAUGHT, "background": tuple(BACKGROUNDS), "size": tuple(SIZES), "position": tuple(POSITIONS)}
BATCH = 64
OWN = "PNDM"
FEW = {OWN: (50, 8, 4), "Euler": (8, 4)}  # what a style and a fine-tune are measured at beside the LCM-LoRA
DEFAULT_GUIDANCE = 7.5  # diffusers', where a call gives none


class Reader(nn.Module):
    """Reads a scene off a picture. `forward` gives features, (batch, 96), from pictures, (batch, 3, SIZE, SIZE), that
    are uint8 or in [0, 1].
    """

    def __init__(self) -> None:
        super().__init__()

        def block(a: int, b: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

        self.layers = nn.Sequential(
            nn.Sequential(*block(3, 16, 2)),
            *(nn.Sequential(*block(a, b, 2), *block(b, b, 1)) for a, b in pairwise((16, 32, 48, 96, 128))),
        )
        self.flat = nn.Sequential(nn.Flatten(), nn.Linear(128 * 16, 96))
        self.heads = nn.ModuleDict({name: nn.Linear(96, len(answers)) for name, answers in QUESTIONS.items()})

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures.float()
        return self.flat(self.layers(x - 0.5))

    def answers(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        features = F.relu(self(pictures))
        return {name: head(features) for name, head in self.heads.items()}


def pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """The pictures, (batch, 3, SIZE, SIZE), those of an older and smaller model enlarged."""
    pictures = [p if p.width == SIZE else p.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for p in pictures]
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)


def drawings(sprites: Sprites, scenes: list[Scene], look: str) -> torch.Tensor:
    """The real pictures of the scenes, each with its own small variations."""
    return pixels([sprites.compose(s, look, random.Random(i)) for i, s in enumerate(scenes)])


def labels(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([a.index(getattr(s, name)) for s in scenes]) for name, a in QUESTIONS.items()}


def scenes_of(count: int, seed: int) -> list[Scene]:
    """Scenes of the taught things, held-out pairings included."""
    rng = random.Random(seed)
    return [draw_scene(rng) for _ in range(count)]


def prompts(count: int, seed: int) -> list[Scene]:
    """Scenes to draw, every other one with a pairing that training never saw."""
    drawn = iter(scenes_of(100 * count, seed))
    seen, held = [], []
    while min(len(seen), len(held)) < count // 2:
        scene = next(drawn)
        (held if scene.held_out else seen).append(scene)
    return [s for pair in zip(seen[: count // 2], held[: count // 2], strict=True) for s in pair]


@torch.no_grad()
def worn(pictures: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
    """Drawings with the faults of generated pictures, or a classifier takes these faults for another thing.

    A quarter goes through the VAE with a little noise on the latents, a third is blurred, all of them get another
    contrast, a cast of colour and noise. `pictures` are in [0, 1], shape (batch, 3, SIZE, SIZE).
    """
    n, quarter = len(pictures), len(pictures) // 4
    latents = vae.encode(pictures[:quarter] * 2 - 1).latent_dist.mode()
    latents = latents + torch.randn_like(latents) * latents.std() * 0.15 * torch.rand(quarter, 1, 1, 1)
    x = torch.cat([vae.decode(latents).sample.clamp(-1, 1) / 2 + 0.5, pictures[quarter:]])
    x[::3] = F.interpolate(F.avg_pool2d(x[::3], 2), scale_factor=2, mode="bilinear")
    x = (x - 0.5) * (0.85 + 0.3 * torch.rand(n, 1, 1, 1)) + 0.5 + 0.03 * torch.randn(n, 3, 1, 1)
    return (x + torch.randn_like(x) * 0.06 * torch.rand(n, 1, 1, 1)).clamp(0, 1)


def train_reader(sprites: Sprites, file: Path, steps: int) -> Reader:
    """The classifier, on all three looks."""
    torch.manual_seed(0)
    reader = Reader()
    if file.exists():
        reader.load_state_dict(torch.load(file, weights_only=True))
        return reader.eval()
    vae = pocket.load_pocket().vae
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3, weight_decay=5e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        rng = random.Random(step)
        scenes = scenes_of(96, seed=50_000 + step)
        drawn = pixels([sprites.compose(s, rng.choice(tuple(LOOKS.values())), rng) for s in scenes]).float() / 255
        answers, right = reader.answers(worn(drawn, vae)), labels(scenes)
        loss = sum(F.cross_entropy(answers[name], right[name]) for name in QUESTIONS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.save(reader.state_dict(), file)
    return reader.eval()


@torch.no_grad()
def accuracy(reader: Reader, pictures: torch.Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Share of pictures whose thing, whose background, and whose every property is the prompt's."""
    right = labels(scenes)
    hits = {name: answer.argmax(1) == right[name] for name, answer in reader.answers(pictures).items()}
    held = torch.tensor([s.held_out for s in scenes])
    both = hits["thing"] & hits["background"]
    return {
        "accuracy": both.float().mean().item(),
        "held_out": both[held].float().mean().item(),
        "everything": torch.stack(list(hits.values())).all(0).float().mean().item(),
    }


def distance_to(reader: Reader, pictures: torch.Tensor) -> Callable[[torch.Tensor], float]:
    """Measures the Frechet distance of others to `pictures`, whose features are taken once."""
    metric = FrechetInceptionDistance(feature=reader, reset_real_features=False, input_img_size=(3, SIZE, SIZE))
    metric.update(pictures, real=True)

    def distance(others: torch.Tensor) -> float:
        metric.reset()
        metric.update(others, real=False)
        return float(metric.compute())

    return distance


def draw(pipe: Any, scenes: list[Scene], seed: int = 0, **call: Any) -> tuple[torch.Tensor, float]:
    """One picture a scene, seed = `seed` + its place; and the seconds that the UNet took for all of them."""
    pictures, unet_seconds, began = [], 0.0, 0.0

    def before(module: Any, args: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def after(module: Any, args: Any, output: Any) -> None:
        nonlocal unet_seconds
        unet_seconds += time.perf_counter() - began

    hooks = [pipe.unet.register_forward_pre_hook(before), pipe.unet.register_forward_hook(after)]
    for first in range(0, len(scenes), BATCH):
        part = scenes[first : first + BATCH]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        pictures += pipe([caption(s) for s in part], generator=generators, **call).images
    for hook in hooks:
        hook.remove()
    return pixels(pictures), unet_seconds


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def schedulers(pipe: Any) -> dict[str, Any]:
    """The pipe's own, which is Stable Diffusion 1.5's, and two that people put in its place."""
    config = pipe.scheduler.config
    return {
        OWN: pipe.scheduler,
        "Euler": EulerDiscreteScheduler.from_config(config),
        "DPM++ 2M": DPMSolverMultistepScheduler.from_config(config),
    }


@contextmanager
def under(pipe: Any, name: str) -> Iterator[None]:
    """The pipe with one of the `schedulers`, for the length of a block."""
    own = pipe.scheduler
    pipe.scheduler = schedulers(pipe)[name]
    try:
        yield
    finally:
        pipe.scheduler = own


def plain_rows(pipe: Any, run: Callable[..., None], guidance: float, counts: dict[str, tuple[int, ...]]) -> None:
    """The pipe as plain diffusers draws it: the steps to take under each of the `schedulers` named."""
    for name, steps in counts.items():
        with under(pipe, name):
            for count in steps:
                run(pipe, name, count, guidance)


def base_rows(pipe: Any, run: Callable[..., None], guidance: float, others: tuple[float, ...]) -> None:
    """The base at `guidance` under every scheduler, and at other guidances where few steps are what is asked."""
    plain_rows(pipe, run, guidance, dict.fromkeys(schedulers(pipe), (50, 25, 8, 4, 2, 1)))
    for name, other in product((OWN, "Euler"), others):
        plain_rows(pipe, run, other, {name: (50, 8, 4)})


def lcm_rows(pipe: Any, run: Callable[..., None], steps: tuple[int, ...], **options: Any) -> None:
    with lcmlora.accelerated(pipe, **options):
        for count in steps:
            run(pipe, "LCM-LoRA", count, 1.0)
        run(pipe, "LCM-LoRA", 4, 1.5)


def tcd_rows(pipe: Any, run: Callable[..., None], steps: tuple[int, ...]) -> None:
    """The same LoRA under TCDScheduler, without noise between the steps."""
    with lcmlora.accelerated(pipe, recipe="tcd"):
        for count in steps:
            run(pipe, "TCD", count, 1.0, eta=0.0)


def guidances(
    pipe: Any, reader: Reader, scenes: list[Scene], distance_to_real: Callable[[torch.Tensor], float]
) -> list[dict[str, float]]:
    """The base at 25 steps of Euler with several guidance scales."""
    rows = []
    with under(pipe, "Euler"):
        for guidance in (1.5, 2.5, 4.0, 6.0, DEFAULT_GUIDANCE):
            pictures, _ = draw(pipe, scenes, num_inference_steps=25, guidance_scale=guidance)
            far = distance_to_real(pictures)
            rows.append({"guidance": guidance, **accuracy(reader, pictures, scenes), "distance_to_real": far})
    return rows


def best(choice: list[dict[str, float]]) -> float:
    """The most accurate guidance; of equal ones, that whose pictures are nearest to the drawings."""
    return max(choice, key=lambda row: (row["accuracy"], -row["distance_to_real"]))["guidance"]


def measure(
    data: Path,
    count: int,
    reader_steps: int,
    style_only: bool = False,
    choice: list[dict[str, float]] | None = None,
    old: Path | None = None,
) -> dict[str, Any]:
    sprites = Sprites(data)
    reader = train_reader(sprites, data / "reader.pt", reader_steps)
    scenes = prompts(count, seed=2024)
    pipe = quiet(pocket.load_pocket())
    drawn = training_scenes(2000, seed=77)
    distance_to_real = {part: distance_to(reader, drawings(sprites, drawn, look)) for part, look in LOOKS.items()}
    distance_to_real["old"] = distance_to_real["base"]
    guidance = pocket.GUIDANCE
    choice = choice or guidances(pipe, reader, scenes, distance_to_real["base"])
    rows: list[dict[str, Any]] = []

    def runner(part: str, pipe: Any) -> Callable[..., None]:
        """Adds a row. The part's own 50 steps are the measure of all, with other prompts and seeds than the rows have:
        with the same seeds a sampler that follows the same path would seem better than it is.
        """
        others = prompts(2 * count, seed=4048)
        reference, _ = draw(pipe, others, 500_000, num_inference_steps=50, guidance_scale=guidance)
        distance_to_50 = distance_to(reader, reference)
        first_seconds: list[float] = []

        def run(pipe: Any, sampler: str, steps: int, scale: float, **call: Any) -> None:
            pictures, seconds = draw(pipe, scenes, num_inference_steps=steps, guidance_scale=scale, **call)
            first_seconds.append(seconds)
            rows.append(
                {
                    "part": part,
                    "sampler": sampler,
                    "steps": steps,
                    "guidance": scale,
                    **accuracy(reader, pictures, scenes),
                    "distance_to_50": distance_to_50(pictures),
                    "distance_to_real": distance_to_real[part](pictures),
                    "unet_seconds": seconds / len(scenes),
                    "unet_time_of_50": seconds / first_seconds[0],
                }
            )
            print(rows[-1], flush=True)

        return run

    if not style_only:
        run = runner("base", pipe)
        base_rows(pipe, run, guidance, tuple(sorted({best(choice), DEFAULT_GUIDANCE} - {guidance})))
        lcm_rows(pipe, run, (1, 2, 4, 8))
        tcd_rows(pipe, run, (1, 2, 4, 8))
    pipe.load_lora_weights(pocket.STYLE, weight_name="pytorch_lora_weights.safetensors", adapter_name="3d")
    run = runner("style", pipe)
    plain_rows(pipe, run, guidance, FEW)
    pipe.unload_lora_weights()
    lcm_rows(pipe, run, (4, 8), styles={"3d": lcmlora.Style(pocket.STYLE, 1.0)})
    if style_only:
        return {"rows": rows}
    pipe = quiet(pocket.load_pocket("chalk"))
    run = runner("chalk", pipe)
    plain_rows(pipe, run, guidance, FEW)
    lcm_rows(pipe, run, (4, 8))
    if old:
        pipe = quiet(StableDiffusionPipeline.from_pretrained(old / "pipeline", dtype=torch.float32))
        run = runner("old", pipe)
        plain_rows(pipe, run, guidance, {OWN: (50,), "Euler": (25,)})
        lcm_rows(pipe, run, (4,), lora=old / "lcm-lora")
    real_accuracy = {part: accuracy(reader, drawings(sprites, scenes, look), scenes) for part, look in LOOKS.items()}
    return {
        "lcmlora": lcmlora.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "prompts": len(scenes),
        "guidance": guidance,
        "guidance_choice": choice,
        "accuracy_of_real_pictures": real_accuracy,
        "rows": rows,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| sampler | steps | guidance | accuracy | held out | distance to 50 steps | distance to real | UNet ms a "
        "picture | share of 50 steps' |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['sampler']} | {row['steps']} | {row['guidance']:g} | {row['accuracy']:.1%} | "
            f"{row['held_out']:.1%} | {row['distance_to_50']:.0f} | "
            f"{row['distance_to_real']:.0f} | {1000 * row['unet_seconds']:.0f} | {row['unet_time_of_50']:.1%} |"
        )
    return "\n".join(lines)


def reading(rows: list[dict[str, Any]], guidance: float, low: float) -> str:
    """The tables in words, every figure taken from them."""

    def find(part: str, sampler: str, steps: int, guidance: float | None = None) -> dict[str, Any]:
        fits = (r for r in rows if (r["part"], r["sampler"], r["steps"]) == (part, sampler, steps))
        return next(r for r in fits if guidance in (None, r["guidance"]))

    def share(part: str, steps: int, guidance: float) -> str:
        lcm, whole = find(part, "LCM-LoRA", steps, guidance), find(part, OWN, 50)
        return f"{lcm['accuracy'] / whole['accuracy']:.1%}"

    def accuracy_of(part: str, sampler: str, steps: int, guidance: float | None = None) -> str:
        return f"{find(part, sampler, steps, guidance)['accuracy']:.1%}"

    def best_guidance(part: str, steps: int) -> str:
        shares = {guidance: share(part, steps, guidance) for guidance in (1.0, 1.5)}
        return f"{shares[1.0]}, and {shares[1.5]} with guidance 1.5"

    lcm, tcd, old = find("base", "LCM-LoRA", 4, 1.0), find("base", "TCD", 4, 1.0), find("old", OWN, 50)
    distances = {
        (sampler, steps): f"{find('base', sampler, steps)['distance_to_50']:.0f}"
        for sampler, steps in ((OWN, 50), (OWN, 8), ("Euler", 8))
    }
    return f"""## Reading it

- Of the accuracy of the base's 50 steps the LCM-LoRA keeps {share("base", 4, 1.0)} in 4, in
  {lcm["unet_time_of_50"]:.1%} of the UNet's time. Its distance to pictures of 50 steps is
  {lcm["distance_to_50"]:.0f}; the base's own 50 steps have {distances[OWN, 50]}, its 8 steps {distances[OWN, 8]}
  ({distances["Euler", 8]} with Euler). The same file under TCDScheduler (`recipe="tcd"`, `eta=0`):
  {tcd["accuracy"]:.1%} at a distance of {tcd["distance_to_50"]:.0f}.
- Of the style's 50 steps, style and LCM-LoRA together keep {best_guidance("style", 4)}; of the fine-tune's,
  {best_guidance("chalk", 4)}, and {share("chalk", 8, 1.0)} in 8 steps.
- Without the LCM-LoRA, with its own scheduler, {OWN}, which is Stable Diffusion 1.5's, and its own guidance,
  {guidance:g}, the base has {accuracy_of("base", OWN, 4)} at 4 steps, {accuracy_of("base", OWN, 8)} at 8 and
  {accuracy_of("base", OWN, 25)} at 25. **With Euler or DPM++ it has {accuracy_of("base", "Euler", 4, guidance)} and
  {accuracy_of("base", "DPM++ 2M", 4, guidance)} at 4 steps**, more than a real model: a caption all but settles a
  picture this small, and its way from noise is nearly straight. At diffusers' default guidance of
  {DEFAULT_GUIDANCE:g} it has {accuracy_of("base", OWN, 4, DEFAULT_GUIDANCE)} with {OWN} and
  {accuracy_of("base", "Euler", 4, DEFAULT_GUIDANCE)} with Euler at 4 steps,
  {accuracy_of("base", OWN, 50, DEFAULT_GUIDANCE)} and {accuracy_of("base", "Euler", 50, DEFAULT_GUIDANCE)} at 50.
- The model before drew 64 x 64 pixels. Enlarged, its 50 steps have {old["accuracy"]:.1%} and a distance to real of
  {old["distance_to_real"]:.0f}; now they have {accuracy_of("base", OWN, 50)} and
  {find("base", OWN, 50)["distance_to_real"]:.0f}.

![Twelve prompts: the model before, enlarged, above the one now](images/pocket-before-after.png)

*The model before, its 50 steps enlarged, above the one now, from the same prompts and seeds. Made by
`examples/pocket/compare.py`.*

## What was tried

- 128 pixels by factor 8 need 16 latent channels. Squared error and error of the gradients at three scales, on 64
  drawings each: .0013 and .051, where the 64 pixels of before had .0074 and .146, and no 64 pixels can have less than
  .0021 and .050. Muon in the place of AdamW halved the error after as many steps.
- With latents of unit variance the base drew the right things on grounds of wrong colours. At the last timestep of
  Stable Diffusion's schedule a sixteen-channel latent's mean still shows, so that the UNet read the ground off the
  noise in training and drew what pure noise showed it. Latents of 0.4 of that, and one step in seven at the highest
  timesteps, put that right within 500 steps.
- `paths`, then `schedule` is the way of distilling that is shipped; `paths`, then `lcm` at a rate of 3e-3 left grain
  on flat grounds ([the table](distillation.md#which-one)).
"""


def page(result: dict[str, Any]) -> str:
    titles = {
        "base": "The base",
        "style": "With the style LoRA",
        "chalk": "The fine-tuned UNet",
        "old": f"The model before, its pictures enlarged to {SIZE} x {SIZE}",
    }
    parts = [
        f"## {title}\n\n{table([row for row in result['rows'] if row['part'] == part])}"
        for part, title in titles.items()
        if any(row["part"] == part for row in result["rows"])
    ]
    real = ", ".join(f"{part} {row['accuracy']:.1%}" for part, row in result["accuracy_of_real_pictures"].items())
    choice = "; ".join(
        f"{row['guidance']:g}: {row['accuracy']:.1%}, {row['distance_to_real']:.0f}"
        for row in result["guidance_choice"]
    )
    low = best(result["guidance_choice"])
    return f"""# The embedded model, measured

Made by `benchmarks/pocket_quality.py` ({result["machine"]}, torch {result["torch"]}, diffusers {result["diffusers"]}).

{result["prompts"]} prompts drawn by rule, half of them with a pairing of thing and background that training never saw
("held out"). *Accuracy*: share of pictures in which a small classifier, trained on the same drawings, finds the
prompt's thing and background. On the drawings themselves it finds both in: {real}.
*Distance*: Frechet distance in that classifier's feature space, to {2 * result["prompts"]} pictures that the same pipe
draws in 50 steps for other prompts with other seeds (its own 50 steps in the first row show how much of that is
chance), and to 2,000 drawings.

The base is measured at guidance {result["guidance"]:g}, which its LCM-LoRA was distilled for; few steps also at
diffusers' default and at the most accurate one, {low:g} (25 steps of Euler, accuracy and
distance to real, which decides between equals: {choice}).

{chr(10).join(part + chr(10) for part in parts)}
{reading(result["rows"], result["guidance"], low)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--reader-steps", type=int, default=2000)
    parser.add_argument("--style-only", action="store_true", help="measure the style's rows alone, keep the others")
    parser.add_argument("--old", type=Path, help="the `pocket/model` folder of an older version, to measure beside it")
    parser.add_argument("--same-guidance", action="store_true", help="keep the figures of the base's guidances")
    parser.add_argument("--page-only", action="store_true", help="write the page anew from the figures there are")
    parser.add_argument("--reader-only", action="store_true", help="train the classifier and stop")
    args = parser.parse_args()
    if args.reader_only:
        train_reader(Sprites(args.data), args.data / "reader.pt", args.reader_steps)
        return
    file = ROOT / "benchmarks/pocket_quality.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    choice = before["guidance_choice"] if args.same_guidance or args.style_only else None
    result = before
    if not args.page_only:
        result = measure(args.data, args.prompts, args.reader_steps, args.style_only, choice, args.old)
    if args.style_only:
        result = {**before, "rows": [row for row in before["rows"] if row["part"] != "style"] + result["rows"]}
    file.write_text(json.dumps(result, indent=1), encoding="utf-8")
    (ROOT / "docs/pocket-quality.md").write_text(page(result), encoding="utf-8")


if __name__ == "__main__":
    main()
