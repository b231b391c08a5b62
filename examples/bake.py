"""A fast checkpoint for those who don't have lcmlora: LCM-LoRA and style merged in, for good.

    python examples/bake.py [MODEL STYLE.safetensors FOLDER]

Writes a folder that plain diffusers loads.
"""

import sys

import torch
from diffusers import DiffusionPipeline

import lcmlora


def main(model="pocket", style=lcmlora.pocket.STYLE, folder="baked"):
    pipe = lcmlora.accelerate(lcmlora.load(model), styles={"style": lcmlora.Style(style, weight=0.8)})
    lcmlora.bake(pipe, folder)

    prompt = "a fox on a teal background"
    plain = DiffusionPipeline.from_pretrained(folder, dtype=pipe.dtype).to(pipe.device)  # must be told how to call it
    generator = torch.Generator().manual_seed(1)
    plain(prompt, num_inference_steps=4, guidance_scale=1, generator=generator).images[0].save("plain.png")

    baked = lcmlora.load(folder)  # knows its steps and guidance
    baked(prompt, generator=torch.Generator().manual_seed(1)).images[0].save("baked.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
