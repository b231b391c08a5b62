"""The article's three experiments on the embedded model: steps with, guidance, steps without; style, fine-tune."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from . import __version__, pocket
from .acceleration import accelerated
from .errors import LcmLoraWarning
from .quiet import TEXT_ENCODERS, hushed
from .sheets import BASE_STEPS, Sheet, sweep, sweep_guidance, sweep_steps
from .transition.target import Style

PROMPTS = (
    "a fox on a teal background",
    "a small rocket on a black background, at the top",
    "a large owl on a yellow background",
    "a strawberry on a blue background, on the right",
)
NEGATIVE = "a large thing on a white background"


@dataclasses.dataclass(frozen=True)
class Demo:
    """What the demo made: sheets by file name, and the folder they lie in."""

    sheets: dict[str, Sheet]
    folder: Path

    @property
    def timings(self) -> dict[str, float]:
        """Mean seconds per picture: base at 50 steps and at 4, LCM at 4, and the ratio of the first to the last."""
        base, lcm = self.sheets["3-base-steps"], self.sheets["1-lcm-steps"]
        seconds = {
            "base_50_steps": base.seconds("50 steps"),
            "base_4_steps": base.seconds("4 steps"),
            "lcm_4_steps": lcm.seconds("4 steps"),
        }
        return {**seconds, "ratio": seconds["base_50_steps"] / seconds["lcm_4_steps"]}


def run(folder: str | Path, progress: Callable[[str], Any] = lambda text: None) -> Demo:
    """Make every sheet and write it to `folder`; about half a minute on two cores, no network.

    Args:
        folder: for the PNG and JSON files.
        progress: called with the name of each part as it begins.
    """
    folder, began = Path(folder), time.perf_counter()
    progress("loading the embedded model")
    pipe = pocket.load_pocket()
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPTS[0], num_inference_steps=1)  # warms up
    sheets = {}
    progress("LCM-LoRA, 1 to 8 steps")
    with accelerated(pipe):
        sheets["1-lcm-steps"] = sweep_steps(pipe, PROMPTS, title="LCM-LoRA, guidance 1")
    progress("guidance, with a negative prompt")
    with accelerated(pipe, guidance=None), warnings.catch_warnings():
        warnings.simplefilter("ignore", LcmLoraWarning)  # the sheet is there to show what the warning says
        sheets["2-guidance"] = sweep_guidance(
            pipe,
            PROMPTS,
            (1, 1.25, 1.5, 2, 4, 7.5),
            num_inference_steps=4,
            negative_prompt=NEGATIVE,
            title=f"LCM-LoRA, 4 steps, negative prompt {NEGATIVE!r}: 1 to 2 works, 4 and 7.5 burn",
        )
    progress(f"the base restored, {BASE_STEPS[0]} to {BASE_STEPS[-1]} steps")
    title = f"the base, restored: {type(pipe.scheduler).__name__}, guidance {pocket.GUIDANCE:g}"
    sheets["3-base-steps"] = sweep_steps(pipe, PROMPTS, title=title, guidance_scale=pocket.GUIDANCE)
    progress("a style LoRA beside it")
    sheets["4-style"] = _with_style(pipe)
    progress("a fine-tuned UNet under it")
    sheets["5-fine-tune"] = _fine_tuned()
    progress("another scheduler")
    sheets["6-schedulers"] = _schedulers(pipe)
    return _saved(Demo(sheets, folder), time.perf_counter() - began)


def _saved(demo: Demo, seconds: float) -> Demo:
    for name, sheet in demo.sheets.items():
        sheet.save(demo.folder, name)
    record = {
        "lcmlora": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "seconds_per_picture": demo.timings,
        "seconds": seconds,
    }
    (demo.folder / "demo.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return demo


def _steps(count: int, **more: Any) -> dict[str, Any]:
    return {"num_inference_steps": count, **more}


def _with_style(pipe: Any) -> Sheet:
    """The style LoRA alone at 50 steps (through plain diffusers) and at 4, then with the LCM-LoRA beside it at 4."""
    base = {"guidance_scale": pocket.GUIDANCE}
    with hushed(TEXT_ENCODERS):
        pipe.load_lora_weights(
            pocket.STYLE, weight_name="pytorch_lora_weights.safetensors", adapter_name="3d", local_files_only=True
        )
    alone = sweep(pipe, PROMPTS, {"style, 50 steps": _steps(50, **base), "style, 4 steps": _steps(4, **base)})
    pipe.unload_lora_weights()
    cells = {"style + LCM, 4 steps": _steps(4), "guidance 1.5": _steps(4, guidance_scale=1.5)}
    with accelerated(pipe, styles={"3d": Style(pocket.STYLE, 1.0)}):
        both = sweep(pipe, PROMPTS, cells, title="a style LoRA, with and without the LCM-LoRA")
    return dataclasses.replace(alone + both, title=both.title)


def _fine_tuned() -> Sheet:
    """A fine-tune of the base, alone and under the base's LCM-LoRA."""
    pipe = pocket.load_pocket("chalk")
    pipe.set_progress_bar_config(disable=True)
    base = {"guidance_scale": pocket.GUIDANCE}
    alone = sweep(pipe, PROMPTS, {"fine-tune, 50 steps": _steps(50, **base), "fine-tune, 4 steps": _steps(4, **base)})
    with accelerated(pipe):
        both = sweep(pipe, PROMPTS, {"+ LCM, 4 steps": _steps(4), "guidance 1.5": _steps(4, guidance_scale=1.5)})
    return dataclasses.replace(alone + both, title="a fine-tuned UNet under the base's LCM-LoRA, untouched")


def _schedulers(pipe: Any) -> Sheet:
    """The LCM-LoRA under two schedulers, from the same noise as the model's own 50 steps."""
    sheet = sweep(pipe, PROMPTS, {"50 steps": _steps(50, guidance_scale=pocket.GUIDANCE)})
    with accelerated(pipe):
        sheet += sweep(pipe, PROMPTS, {"LCM, 4 steps": _steps(4), "LCM, 8 steps": _steps(8)})
    with accelerated(pipe, recipe="tcd"):  # its noise between the steps would lead away from them
        sheet += sweep(pipe, PROMPTS, {"TCD, 4 steps": _steps(4, eta=0.0), "TCD, 8 steps": _steps(8, eta=0.0)})
    return dataclasses.replace(sheet, title="one LoRA, one noise: TCD stays nearer to 50 steps")
