"""A sketch becomes a picture, at four strengths, each in the four steps that were asked for.

    python examples/img2img.py [MODEL SKETCH PROMPT]

Without a sketch one is drawn here. Writes img2img-....png.
"""

import sys

import torch
from PIL import Image, ImageDraw

import lcmlora


def sketch(side):
    image = Image.new("RGB", (100, 100), "teal")
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 30, 80, 90), fill="orange")
    draw.rectangle((47, 15, 53, 35), fill="green")
    return image.resize((side, side))


def main(model="pocket", picture=None, prompt="a pumpkin on a teal background"):
    pipe = lcmlora.accelerate(lcmlora.load(model, kind="img2img"))
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    start = Image.open(picture).convert("RGB") if picture else sketch(side)
    for strength in (0.3, 0.5, 0.7, 0.9):  # plain diffusers would run 1, 2, 2 and 3 of the 4 steps
        generator = torch.Generator().manual_seed(1)
        pipe(prompt, image=start, strength=strength, generator=generator).images[0].save(f"img2img-{strength}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
