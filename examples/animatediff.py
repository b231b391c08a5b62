"""A film with AnimateDiff, each frame in a few steps.

    python examples/animatediff.py [MODEL MOTION_MODULE PROMPT]

For a fine-tune of Stable Diffusion 1.5 and wangfuyun/AnimateLCM the recipe is "animatelcm". The embedded model has no
motion module: an untrained one stands in, so that each frame is a picture of its own. Writes animatediff.gif.
"""

import sys

import torch
from diffusers import AnimateDiffPipeline, MotionAdapter
from diffusers.utils import export_to_gif, logging

import lcmlora


def untrained(unet):
    adapter = MotionAdapter(
        block_out_channels=unet.config.block_out_channels,
        motion_layers_per_block=unet.config.layers_per_block,
        motion_num_attention_heads=4,
        motion_norm_num_groups=unet.config.norm_num_groups,
    )
    for name, parameter in adapter.named_parameters():
        if ".proj_out." in name:
            torch.nn.init.zeros_(parameter)  # as training starts
    return adapter


def main(model="pocket", motion=None, prompt="a fox on a teal background"):
    logging.set_verbosity_error()  # diffusers logs each cast
    base = lcmlora.load(model)
    adapter = MotionAdapter.from_pretrained(motion) if motion else untrained(base.unet)
    pipe = AnimateDiffPipeline.from_pipe(base, motion_adapter=adapter, dtype=base.dtype).to(base.device)
    lcmlora.accelerate(pipe, recipe="animatelcm" if motion else "lcm")
    frames = pipe(prompt, num_frames=8, generator=torch.Generator().manual_seed(1)).frames[0]
    export_to_gif(frames, "animatediff.gif")


if __name__ == "__main__":
    main(*sys.argv[1:])
