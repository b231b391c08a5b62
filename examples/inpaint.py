"""Draw a picture, then draw a part of it anew, with two pipes that share one accelerated UNet.

    python examples/inpaint.py [MODEL PROMPT PROMPT_OF_THE_PART]

The part is the left half. Writes inpaint-before.png and inpaint-after.png. diffusers' inpainting takes latents of 4
channels, and the embedded model's have 16: without MODEL a tiny untrained one stands in, which draws noise.
"""

import sys

import torch
from diffusers import AutoPipelineForInpainting
from PIL import Image

import lcmlora


def untrained():
    pipe = lcmlora.testing.tiny_pipeline()
    return lcmlora.accelerate(pipe, lora=lcmlora.testing.tiny_lora(pipe, "untrained-lora.safetensors"))


def main(model=None, prompt="a fox", part="a panda"):
    pipe = lcmlora.accelerate(lcmlora.load(model)) if model else untrained()
    before = pipe(prompt, generator=torch.Generator().manual_seed(1)).images[0]
    before.save("inpaint-before.png")

    painter = lcmlora.accelerate(AutoPipelineForInpainting.from_pipe(pipe))  # the UNet is merged already
    mask = Image.new("L", before.size)
    mask.paste(255, (0, 0, before.width // 2, before.height))  # white is drawn anew
    size = {"width": before.width, "height": before.height}
    after = painter(part, image=before, mask_image=mask, generator=torch.Generator().manual_seed(1), **size).images[0]
    after.save("inpaint-after.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
