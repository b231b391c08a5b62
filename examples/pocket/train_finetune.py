"""Fine-tune the base's UNet, all its weights, on chalk drawings: a fine-tune such as people share.

python train_finetune.py --data DIR --base DIR/base/pipeline --output DIR/chalk
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from train_base import further_training, train, training_arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_arguments(parser, steps=1100, lr=4e-4, decay=900, pictures=12000)
    parser.add_argument("--base", type=Path, required=True)
    args = parser.parse_args()

    torch.manual_seed(2)
    pipe, latents, prompts, empty = further_training(args, "chalk", seed=3)
    pipe.unet.to(memory_format=torch.channels_last)
    train({"unet": pipe.unet}, latents, prompts, empty, args, args.decay)
    pipe.unet.save_pretrained(args.output / "unet")


if __name__ == "__main__":
    main()
