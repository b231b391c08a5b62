"""Train the style LoRA (soft 3-D renders) with plain diffusers and PEFT: lcmlora has no part in it.

python train_style.py --data DIR --base DIR/base/pipeline --output DIR/style
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from train_base import further_training, train, training_arguments

RANK, ALPHA = 16, 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_arguments(parser, steps=1600, lr=1.5e-3, decay=1200, pictures=12000)
    parser.add_argument("--base", type=Path, required=True)
    args = parser.parse_args()

    torch.manual_seed(1)
    pipe, latents, prompts, empty = further_training(args, "fluent", seed=2)
    pipe.unet.requires_grad_(False)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    pipe.unet.add_adapter(lora, adapter_name="style")
    pipe.unet.to(memory_format=torch.channels_last)
    train({"unet": pipe.unet}, latents, prompts, empty, args, args.decay)
    layers = {
        key: value.half().contiguous()
        for key, value in get_peft_model_state_dict(pipe.unet, adapter_name="style").items()
    }
    metadata = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS}
    pipe.save_lora_weights(args.output, layers, unet_lora_adapter_metadata=metadata)


if __name__ == "__main__":
    main()
