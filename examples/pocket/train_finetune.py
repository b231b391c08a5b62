"""Fine-tune the base's UNet, all its weights, on chalk drawings: a fine-tune such as people share.

python train_finetune.py --data DIR --base DIR/base/pipeline --output DIR/chalk
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from pictures import Sprites, training_scenes
from train_base import encode_pictures, encode_prompts, train, training_arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_arguments(parser, steps=1100, lr=4e-4, decay=900, pictures=12000)
    parser.add_argument("--base", type=Path, required=True)
    args = parser.parse_args()

    torch.manual_seed(2)
    pipe = StableDiffusionPipeline.from_pretrained(args.base)
    scenes = training_scenes(args.pictures, seed=3)
    latents = encode_pictures(pipe.vae, Sprites(args.data), scenes, "chalk")
    prompts, empty = encode_prompts(pipe, scenes)
    pipe.unet.to(memory_format=torch.channels_last)
    train({"unet": pipe.unet}, latents, prompts, empty, args, args.decay)
    pipe.unet.save_pretrained(args.output / "unet")


if __name__ == "__main__":
    main()
