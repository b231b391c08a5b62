"""Make a model its own few-step LoRA from prompts alone, with a style learned in.

    pip install 'lcmlora[train]'
    python examples/distil_from_prompts.py [MODEL PROMPTS.txt STYLE.safetensors STEPS]

The teacher is the model with the style, so the LoRA draws that style in few steps by itself. 20 steps only show how.
It is in styled-lora/, with its card and report.html.
"""

import sys

import torch

import lcmlora

PROMPTS = [f"a {thing} on a {colour} background" for thing in ("fox", "owl") for colour in ("teal", "pink")]


def main(model="pocket", prompts=None, style=lcmlora.pocket.STYLE, steps="20"):
    pipe = lcmlora.load(model)
    config = lcmlora.DistillConfig.preset("paths", steps=int(steps), rank=8, batch_size=4, w=1.5)
    file = lcmlora.distill(pipe, prompts or PROMPTS, "styled-lora", config, styles={"style": style})
    lcmlora.accelerate(pipe, lora=file)  # the file names its recipe, so the scheduler is the right one
    print(lcmlora.status(pipe).recipe)
    pipe(PROMPTS[0], generator=torch.Generator().manual_seed(1)).images[0].save("distilled.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
