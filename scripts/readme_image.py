"""Draw the pictures that the README and the front page show, with the embedded model.

    python scripts/readme_image.py

docs/images/first.png: few steps without and with the LCM-LoRA, one line each. docs/images/steps.png: over many steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

import lcmlora
from lcmlora import demo, pocket
from lcmlora.sheets.sheet import Line, Sheet

IMAGES = Path(__file__).parents[1] / "docs/images"
PROMPTS = (
    "a fox on a teal background",
    "a large owl on a yellow background",
    "a rocket on a black background",
    "a strawberry on a blue background",
    "a cactus on a pink background",
    "a snail on a green background",
)


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    pipe = lcmlora.load_pocket()
    pipe.set_progress_bar_config(disable=True)
    first(pipe).image.save(IMAGES / "first.png", optimize=True)
    steps(pipe).save(IMAGES / "steps.png", optimize=True)


def first(pipe: Any) -> Sheet:
    """A prompt a column; the base at 50 and 4 steps and the accelerated pipe at 4, a line each."""
    drawn = lcmlora.compare(pipe, PROMPTS, base_steps=(50, 4), lcm_steps=(4,), base_guidance=pocket.GUIDANCE)
    ways = ("without, 50 steps", "without, 4 steps", "accelerated, 4 steps")
    columns = tuple(prompt.removeprefix("a ") for prompt in PROMPTS)
    return Sheet(tuple(zip(*drawn.cells, strict=True)), columns, tuple(Line(way) for way in ways))


def steps(pipe: Any) -> Image.Image:
    """With the LCM-LoRA over 1 to 8 steps, and below it without over 1 to 50."""
    prompts = demo.PROMPTS[:3]
    with lcmlora.accelerated(pipe):
        fast = lcmlora.sweep_steps(pipe, prompts, title="with the LCM-LoRA, guidance 1").image
    title = f"without: {type(pipe.scheduler).__name__}, guidance {pocket.GUIDANCE:g}"
    slow = lcmlora.sweep_steps(
        pipe, prompts, (1, 2, 4, 8, 15, 25, 30, 50), title=title, guidance_scale=pocket.GUIDANCE
    ).image
    both = Image.new("RGB", (max(fast.width, slow.width), fast.height + slow.height), "white")
    both.paste(fast, (0, 0))
    both.paste(slow, (0, fast.height))
    return both


if __name__ == "__main__":
    main()
