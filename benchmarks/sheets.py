"""What a sheet costs beside its calls, and whether each of its cells equals the same single call.

    python benchmarks/sheets.py

On the embedded model: 64 cells against the same 64 calls, in turns; then sheets of every kind, cell by cell against
single calls, drawn at once and taken from a folder.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from typing import Any

import torch

import lcmlora
from lcmlora import load_pocket
from lcmlora.pocket import MODEL, STYLE

LCM = MODEL / "lcm-lora"
PROMPTS = ["a fox on a teal background", "a rocket on a black background"]


def picture(pipe: Any, prompt: str, seed: int, **call: Any) -> bytes:
    return pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), **call).images[0].tobytes()


def cost(turns: int = 5) -> float:
    """Median seconds of a sheet of 64 cells, against the same calls alone."""
    pipe = lcmlora.accelerate(load_pocket())
    pipe.set_progress_bar_config(disable=True)
    sheets, calls = [], []
    for turn in range(turns + 1):
        began = time.perf_counter()
        lcmlora.sweep(pipe, PROMPTS[0], x={"steps": (1, 2, 3, 4, 5, 6, 7, 8)}, y={"seed": range(8)})
        between = time.perf_counter()
        for seed in range(8):
            for steps in range(1, 9):
                picture(pipe, PROMPTS[0], seed, num_inference_steps=steps)
        if turn:  # the first warms up
            sheets.append(between - began)
            calls.append(time.perf_counter() - between)
    print(f"64 cells: sheet {statistics.median(sheets):.3f} s, calls alone {statistics.median(calls):.3f} s")
    return statistics.median(s / c for s, c in zip(sheets, calls, strict=True))


def kinds(pipe: Any, folder: str) -> list[tuple[str, Any, list[list[tuple[dict[str, Any], dict[str, Any] | None]]]]]:
    """Sheets of every kind; for each cell of a line the call, and what the pipe is accelerated with (None: not)."""
    ink = {"3d": lcmlora.Style(STYLE, 1.0)}
    given: dict[str, Any] = {"folder": folder}
    weight, styles = {"weight": 1}, {"styles": ink}
    return [
        (
            "compare",
            lambda: lcmlora.compare(pipe, PROMPTS, base_steps=(1, 8), lcm_steps=(1, 4), base_guidance=2.5, **given),
            [[*(({"num_inference_steps": n, "guidance_scale": 2.5}, None) for n in (1, 8)),
              *(({"num_inference_steps": n}, {}) for n in (1, 4))]],
        ),
        (
            "steps by guidance",
            lambda: lcmlora.sweep(pipe, PROMPTS, {"steps": (2, 4)}, {"guidance": (1, 2)}, accelerate=weight, **given),
            [[({"num_inference_steps": n, "guidance_scale": g}, {}) for n in (2, 4)] for g in (1, 2)],
        ),
        (
            "weights",
            lambda: lcmlora.sweep_weights(pipe, PROMPTS, (0.5, 1), {"3d": (0.0, 0.8)}, accelerate=styles, **given),
            [[({}, {"weight": w, "styles": {"3d": lcmlora.Style(STYLE, s)}}) for w in (0.5, 1)] for s in (0.0, 0.8)],
        ),
        (
            "recipes",
            lambda: lcmlora.sweep(pipe, PROMPTS, {"recipe": ("lcm", "tcd")}, accelerate={"lora": LCM}, **given),
            [[({}, {"lora": LCM, "recipe": name}) for name in ("lcm", "tcd")]],
        ),
    ]  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore", lcmlora.LcmLoraWarning)  # one file under two recipes: only the pixels matter here
    pipe = load_pocket()
    pipe.set_progress_bar_config(disable=True)
    equal = total = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, draw, expected in kinds(pipe, folder):
            drawn, again = draw(), draw()
            for sheet in (drawn, again):
                for line, (prompt, _) in enumerate(sheet.lines):
                    for column, (call, settings) in enumerate(expected[line % len(expected)]):
                        if settings is not None:
                            lcmlora.accelerate(pipe, **settings)
                        cell = sheet.cells[line][column]
                        equal += cell is not None and cell.image.tobytes() == picture(pipe, prompt, 1337, **call)
                        total += 1
                        if settings is not None:
                            lcmlora.restore(pipe)
            print(f"{name}: {len(drawn.images)} cells drawn, and taken from the folder")
    print(f"equal to the same single call, pixel for pixel: {equal} of {total}")
    print(f"a sheet costs {100 * (cost() - 1):+.1f} % beside its calls")


if __name__ == "__main__":
    main()
