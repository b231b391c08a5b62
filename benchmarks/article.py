"""The article's three experiments on the embedded model: its pictures and tables in docs/sheets.md.

    python benchmarks/article.py

Steps with the LCM-LoRA and without (`compare`), guidance (`sweep_guidance`), and a style's weight against the
LCM-LoRA's (`sweep_weights`). Seconds are one thread's own.
"""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

import torch

import lcmlora
from lcmlora import pocket
from lcmlora.sheets.metrics import distance
from shapes import ROOT

PROMPTS = ["a fox on a teal background", "a large owl on a yellow background"]
FILE, IMAGES = ROOT / "docs/sheets.md", ROOT / "docs/images"


def put(name: str, text: str) -> None:
    """Replace what stands between two marks of the page."""
    front, mark, rest = FILE.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    end = rest[rest.index("<!-- end -->") :]
    FILE.write_text(f"{front}{mark}{text.strip()}\n{end}", encoding="utf-8")


def curve(sheet: lcmlora.Sheet) -> str:
    """Seconds and distance of each column, over the prompts."""
    lines = ["| | seconds a picture | seconds a step | distance to 50 steps |", "| --- | --- | --- | --- |"]
    for column in sheet.columns:
        rows = [row for row in sheet.rows if row["column"] == column]
        seconds, step = (statistics.median(row[name] for row in rows) for name in ("seconds", "seconds_per_step"))
        far = statistics.mean(row["distance"] or 0 for row in rows)
        lines.append(f"| {column} | {seconds:.3f} | {step:.3f} | {far:.3f} |")
    return "\n".join(lines)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    torch.set_num_threads(1)
    time.perf_counter = time.process_time  # this process's own seconds: others on the machine do not matter
    IMAGES.mkdir(exist_ok=True)
    pipe = quiet(lcmlora.load_pocket())
    pipe(PROMPTS[0], num_inference_steps=1)
    sheet = lcmlora.compare(pipe, PROMPTS, base_guidance=pocket.GUIDANCE, metrics={"distance": distance()})
    sheet.image.save(IMAGES / "compare.png")
    put("compare", curve(sheet))
    with lcmlora.accelerated(pipe, guidance=None), warnings.catch_warnings():
        warnings.simplefilter("ignore", lcmlora.LcmLoraWarning)  # the sheet is there to show what the warning says
        scales, negative = (1, 1.25, 1.5, 2, 4, 7.5), "a large thing on a white background"
        burnt = lcmlora.sweep_guidance(pipe, PROMPTS, scales, negative_prompt=negative, title="4 steps, over guidance")
    burnt.image.save(IMAGES / "guidance.png")
    styles = {"styles": {"3d": lcmlora.Style(pocket.STYLE, 1.0)}}
    weights = lcmlora.sweep_weights(
        pipe, PROMPTS[0], (0, 0.5, 0.75, 1, 1.25), (0, 0.5, 1), without={"steps": 50, "guidance": pocket.GUIDANCE},
        accelerate=styles, title="4 steps, a style's weight against the LCM-LoRA's",
    )  # fmt: skip
    weights.image.save(IMAGES / "weights.png")


if __name__ == "__main__":
    main()
