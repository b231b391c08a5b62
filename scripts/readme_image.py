"""Draw the README's picture, docs/images/steps.png: the embedded model over steps, with its LCM-LoRA and without."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

import lcmlora
from lcmlora import demo, pocket


def main() -> None:
    prompts = demo.PROMPTS[:3]
    pipe = lcmlora.load_pocket()
    pipe.set_progress_bar_config(disable=True)
    with lcmlora.accelerated(pipe):
        fast = lcmlora.sweep_steps(pipe, prompts, title="with the LCM-LoRA, guidance 1").image
    title = f"without: {type(pipe.scheduler).__name__}, guidance {pocket.GUIDANCE:g}"
    slow = lcmlora.sweep_steps(
        pipe, prompts, (1, 2, 4, 8, 15, 25, 30, 50), title=title, guidance_scale=pocket.GUIDANCE
    ).image
    both = Image.new("RGB", (max(fast.width, slow.width), fast.height + slow.height), "white")
    both.paste(fast, (0, 0))
    both.paste(slow, (0, fast.height))
    folder = Path(__file__).parents[1] / "docs/images"
    folder.mkdir(parents=True, exist_ok=True)
    both.save(folder / "steps.png", optimize=True)


if __name__ == "__main__":
    main()
