"""The figures and the table of docs/how-it-works.md.

    python benchmarks/how_it_works.py

A one-dimensional diffusion whose paths can be computed exactly; the timesteps that diffusers' schedulers visit; what
the embedded model predicts at each step; one LCM-LoRA on three models; and what rounding leaves of weights after plain
diffusers' way back.
"""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image

import lcmlora
from lcmlora import pocket
from shapes import ROOT

FILE, IMAGES = ROOT / "docs/how-it-works.md", ROOT / "docs/images"
PROMPT = "a fox on a teal background"
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TARGET, BASE, LCM = "#9aa0a6", "#c5221f", "#1a56b0"
STEPS = 4


def main() -> None:
    torch.set_num_threads(1)
    plt.rcParams.update({"figure.dpi": 130, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    paths()
    schedules()
    predictions()
    one_vector()
    put("rounding", rounding())


def save(figure: Any, name: str) -> None:
    figure.savefig(IMAGES / f"{name}.png", facecolor="white", bbox_inches="tight")
    plt.close(figure)


def put(name: str, text: str) -> None:
    """Replace what stands between two marks of the page."""
    front, mark, rest = FILE.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    end = rest[rest.index("<!-- end -->") :]
    FILE.write_text(f"{front}{mark}{text.strip()}\n{end}", encoding="utf-8")


# -- a diffusion in one dimension -------------------------------------------------------------------------------------

PLACES, WIDTH = np.array([-1.0, 1.0]), 0.12


def mean_of_data(z: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """E[z_0 | z_t], exactly, where the data are two narrow Gaussians: what a perfect model predicts."""
    spread = (alpha * WIDTH) ** 2 + sigma**2
    nearness = np.exp(-((z[:, None] - alpha * PLACES) ** 2) / (2 * spread))
    share = nearness / nearness.sum(1, keepdims=True)
    return (share * (PLACES + alpha * WIDTH**2 / spread * (z[:, None] - alpha * PLACES))).sum(1)


def ddim(z: np.ndarray, timesteps: np.ndarray, bars: np.ndarray) -> np.ndarray:
    """The values at each of the timesteps, and at the end."""
    values = [z]
    for here, there in zip(timesteps, [*timesteps[1:], None], strict=True):
        alpha, sigma = bars[here] ** 0.5, (1 - bars[here]) ** 0.5
        clean = mean_of_data(z, alpha, sigma)
        noise = (z - alpha * clean) / sigma
        z = clean if there is None else bars[there] ** 0.5 * clean + (1 - bars[there]) ** 0.5 * noise
        values.append(z)
    return np.array(values)


def paths() -> None:
    """The exact paths, DDIM in four steps, and consistency sampling in four steps."""
    bars = diffusers.DDIMScheduler(**BETAS).alphas_cumprod.numpy().astype(float)
    start = np.linspace(-2.2, 2.2, 12)
    exact = np.arange(999, -1, -1)
    few = np.array([999, 759, 499, 259])
    figure, sides = plt.subplots(1, 2, figsize=(8.4, 3.1), sharey=True)
    for side in sides:
        side.plot([*exact, -1], ddim(start, exact, bars), color=TARGET, lw=0.8)
        side.set_xlim(1010, -60)
        side.set_xlabel("timestep t")
    sides[0].plot([*few, -1], ddim(start, few, bars), color=BASE, lw=1, marker="o", ms=3)
    sides[0].set_title(f"DDIM, {STEPS} steps: along the tangent")
    sides[0].set_ylabel("z")
    _consistency(sides[1], bars, exact, few)
    sides[1].set_title(f"consistency, {STEPS} steps: to the end, and noised again")
    save(figure, "paths")


def _consistency(side: Axes, bars: np.ndarray, exact: np.ndarray, few: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    z = np.array([-1.1, 0.35, 1.6])
    for here, there in zip(few, [*few[1:], None], strict=True):
        end = ddim(z, exact[999 - here :], bars)[-1]  # f(z_t, t): the end of the path through z_t
        side.plot([[here] * len(z), [-1] * len(z)], [z, end], color=LCM, lw=0.9, alpha=0.8)
        side.plot([here] * len(z), z, "o", color=LCM, ms=3)
        side.plot([-1] * len(z), end, "o", color=LCM, ms=4)
        if there is not None:
            z = bars[there] ** 0.5 * end + (1 - bars[there]) ** 0.5 * rng.standard_normal(len(z))


# -- schedulers -------------------------------------------------------------------------------------------------------


def schedules() -> None:
    """The timesteps that four steps visit, and how much of a latent is noise there."""
    trailing = {"timestep_spacing": "trailing"}
    kinds: dict[str, Any] = {
        "PNDM (SD 1.5's own)": diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        "Euler, leading (SDXL's own)": diffusers.EulerDiscreteScheduler(
            **BETAS, timestep_spacing="leading", steps_offset=1
        ),
        "DPM++ 2M": diffusers.DPMSolverMultistepScheduler(**BETAS),
        "DDIM or Euler, trailing (hyper, lightning)": diffusers.DDIMScheduler(**BETAS, **trailing),
        "TCD (tcd)": diffusers.TCDScheduler(**BETAS),
        "LCM (lcm)": diffusers.LCMScheduler(**BETAS),
    }
    bars = next(iter(kinds.values())).alphas_cumprod
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8.4, 3.6), sharex=True, height_ratios=(1, 1.6), constrained_layout=True
    )
    top.plot(range(1000), (1 - bars).sqrt(), color=BASE, label="noise, $\\sigma_t$")
    top.plot(range(1000), bars.sqrt(), color=LCM, label="picture, $\\alpha_t$")
    top.legend(frameon=False, loc="center left")
    for line, scheduler in enumerate(kinds.values()):
        scheduler.set_timesteps(STEPS)
        visited = sorted({int(t) for t in scheduler.timesteps}, reverse=True)
        colour = BASE if line < 3 else LCM
        bottom.plot(visited, [line] * len(visited), "o", color=colour, ms=6)
        for t in visited:
            bottom.annotate(str(t), (t, line), (0, 6), textcoords="offset points", ha="center", fontsize=7)
    bottom.set_yticks(range(len(kinds)), list(kinds))
    bottom.set_ylim(-0.5, len(kinds) - 0.3)
    bottom.set_xlim(1020, -20)
    bottom.set_xlabel("timestep t")
    save(figure, "schedules")


# -- the embedded model -----------------------------------------------------------------------------------------------


def predicted(pipe: Any, **call: Any) -> list[Image.Image]:
    """What a pipe takes for the finished picture at each of its steps."""
    latents: list[torch.Tensor] = []
    step = pipe.scheduler.step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        out = step(*args, **kwargs)
        latents.append(out[1])
        return out

    pipe.scheduler.step = recorded
    try:
        pipe(PROMPT, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1337), **call)
    finally:
        del pipe.scheduler.step
    with torch.no_grad():
        decoded = pipe.vae.decode(torch.cat(latents) / pipe.vae.config.scaling_factor).sample
    return list(pipe.image_processor.postprocess(decoded))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def table(rows: dict[str, list[Image.Image]], columns: list[str], name: str) -> None:
    """Labelled pictures."""
    figure, places = plt.subplots(
        len(rows), len(columns), figsize=(1.5 * len(columns) + 1.2, 1.55 * len(rows)), squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    for line, (label, images) in enumerate(rows.items()):
        for column, image in enumerate(images):
            place = places[line][column]
            place.imshow(np.asarray(image), interpolation="bicubic")
            place.set_xticks([])
            place.set_yticks([])
            for spine in place.spines.values():
                spine.set_visible(False)
            if line == 0:
                place.set_title(columns[column], fontsize=8)
            if column == 0:
                place.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    save(figure, name)


def predictions() -> None:
    """The picture that each of four steps predicts, without the LCM-LoRA and with it, from the same noise."""
    pipe = quiet(lcmlora.load_pocket())
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    rows = {"without,\nDDIM": predicted(pipe, guidance_scale=pocket.GUIDANCE)}
    with lcmlora.accelerated(pipe):
        rows["with the\nLCM-LoRA"] = predicted(pipe)
    table(rows, [f"prediction at\nstep {n}" for n in range(1, STEPS + 1)], "predictions")


def one_vector() -> None:
    """The same LCM-LoRA on the base, beside a style, and on a fine-tune."""
    base, chalk = quiet(lcmlora.load_pocket()), quiet(lcmlora.load_pocket("chalk"))
    style = {"3d": lcmlora.Style(pocket.STYLE, 1.0)}
    own: dict[str, Any] = {"base_guidance": pocket.GUIDANCE, "base_steps": (50, STEPS), "lcm_steps": (STEPS,)}
    rows = {
        "base": lcmlora.compare(base, PROMPT, **own).images,
        "base + style": lcmlora.compare(_with(base, style), PROMPT, **own).images,
        "fine-tune": lcmlora.compare(chalk, PROMPT, **own).images,
    }
    columns = ["50 steps", f"{STEPS} steps", f"{STEPS} steps,\n+ the LCM-LoRA"]
    table({name: list(images) for name, images in rows.items()}, columns, "one-vector")


def _with(pipe: Any, styles: dict[str, lcmlora.Style]) -> Any:
    """A copy that has styles as plain diffusers loads them."""
    pipe = copy.deepcopy(pipe)
    for name, style in styles.items():
        pipe.load_lora_weights(
            style.source, weight_name="pytorch_lora_weights.safetensors", adapter_name=name, local_files_only=True
        )
    return pipe


# -- rounding ---------------------------------------------------------------------------------------------------------


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}


def changed(before: dict[str, torch.Tensor], pipe: Any) -> tuple[float, float]:
    """The share of a UNet's weights that are others now, and the largest difference."""
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    odd = sum(int((tensor != after[name]).sum()) for name, tensor in before.items())
    most = max(float((tensor.double() - after[name].double()).abs().max()) for name, tensor in before.items())
    return odd / sum(tensor.numel() for tensor in before.values()), most


def by_hand(pipe: Any) -> None:
    """Merge the LCM-LoRA and take it out again, as plain diffusers does."""
    pipe.load_lora_weights(pocket.LCM_LORA, weight_name="pytorch_lora_weights.safetensors", local_files_only=True)
    pipe.fuse_lora()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()


def by_lcmlora(pipe: Any) -> None:
    lcmlora.restore(lcmlora.accelerate(pipe))


def rounding() -> str:
    lines = [
        "| weights | way | changed after once | after 10 times | largest difference |",
        "| --- | --- | --- | --- | --- |",
    ]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for name, way in (
            ("plain diffusers, fuse and unfuse", by_hand),
            ("lcmlora, accelerate and restore", by_lcmlora),
        ):
            pipe = lcmlora.load_pocket(dtype=dtype)
            before = weights(pipe)
            way(pipe)
            once, _ = changed(before, pipe)
            for _ in range(9):
                way(pipe)
            often, most = changed(before, pipe)
            lines.append(f"| {str(dtype).removeprefix('torch.')} | {name} | {once:.1%} | {often:.1%} | {most:.1g} |")
    where = f"The embedded model's UNet and LCM-LoRA; diffusers {diffusers.__version__}, torch {torch.__version__}."
    return "\n".join([*lines, "", where])


if __name__ == "__main__":
    main()
