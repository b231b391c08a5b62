"""A ControlNet in four steps: edges of one picture say where things are in the next.

    python examples/controlnet.py [MODEL CONTROLNET PICTURE PROMPT]

MODEL and CONTROLNET belong together, such as stable-diffusion-v1-5/stable-diffusion-v1-5 and
lllyasviel/sd-controlnet-canny. The embedded model has no ControlNet: an untrained one stands in, which changes nothing
yet. Writes controlnet-edges.png and controlnet.png.
"""

import sys

import torch
from diffusers import AutoPipelineForText2Image, ControlNetModel
from PIL import Image, ImageFilter

import lcmlora


def untrained(pipe):
    widths = (16, 32, 96, 256)[: len(pipe.vae.config.block_out_channels)]  # from pixels to latents
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=widths)
    return net.to(next(pipe.unet.parameters()))  # the same device and dtype


def main(model="pocket", controlnet=None, picture=None, prompt="a fox on a teal background"):
    pipe = lcmlora.accelerate(lcmlora.load(model))
    generator = torch.Generator().manual_seed(1)
    image = Image.open(picture) if picture else pipe(prompt, generator=generator).images[0]
    edges = image.convert("L").filter(ImageFilter.FIND_EDGES).convert("RGB")
    edges.save("controlnet-edges.png")

    if controlnet:
        net = ControlNetModel.from_pretrained(controlnet, dtype=pipe.dtype).to(pipe.device)
    else:
        net = untrained(pipe)
    guided = lcmlora.accelerate(AutoPipelineForText2Image.from_pipe(pipe, controlnet=net))
    generator = torch.Generator().manual_seed(1)
    image = guided(prompt, image=edges, controlnet_conditioning_scale=0.8, generator=generator).images[0]
    image.save("controlnet.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
