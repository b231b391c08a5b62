"""Put the trained parts together as the folder that the package ships: half precision, licences and model card beside
it.

python export.py --base DIR/base/pipeline --lcm DIR/lcm --style DIR/style --chalk DIR/chalk --output
src/lcmlora/pocket/model
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from pictures import BACKGROUNDS, POSITIONS, SIZES, TAUGHT, THINGS, Scene, caption
from safetensors.torch import save_file

LORA = "pytorch_lora_weights.safetensors"


def difference(base: UNet2DConditionModel, tuned: UNet2DConditionModel) -> tuple[dict[str, torch.Tensor], float]:
    """The fine-tune's difference in int8 steps per output channel, and its relative error.

    `base` must have the weights that are shipped (rounded to half precision), or its rounding would be missing.
    """
    tensors, error, total = {}, 0.0, 0.0
    theirs = dict(tuned.named_parameters())
    for name, parameter in base.named_parameters():
        delta = (theirs[name] - parameter).detach().double()
        flat = delta.flatten(1) if delta.ndim > 1 else delta[:, None]
        step = (flat.abs().amax(1) / 127).clamp(min=1e-12).half().double()
        step = torch.where(step > 0, step, torch.tensor(6e-8, dtype=torch.double))
        whole = (flat / step[:, None]).round().clamp(-127, 127)
        tensors[f"{name}.step"], tensors[f"{name}.int8"] = step.half(), whole.to(torch.int8).view(delta.shape)
        error += float((whole * step[:, None] - flat).square().sum())
        total += float(flat.square().sum())
    return tensors, (error / total) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in ("base", "lcm", "style", "chalk", "output"):
        parser.add_argument(f"--{part}", type=Path, required=part in ("base", "output"))
    parser.add_argument("--vae", type=Path, help="a VAE with the same encoder and a better decoder")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    pipe = StableDiffusionPipeline.from_pretrained(args.base)
    if args.vae:
        pipe.vae = AutoencoderKL.from_pretrained(args.vae)
    pipe.half().save_pretrained(args.output / "pipeline")
    if args.chalk:
        tuned = UNet2DConditionModel.from_pretrained(args.chalk / "unet")
        tensors, error = difference(pipe.unet.float(), tuned)
        print(f"chalk: int8 difference, relative error {error:.4f}")
        (args.output / "chalk").mkdir(exist_ok=True)
        save_file(tensors, args.output / "chalk" / "unet_difference.safetensors")
    for source, name in ((args.lcm, "lcm-lora"), (args.style, "style-lora")):
        if source:
            (args.output / name).mkdir(exist_ok=True)
            shutil.copy(source / LORA, args.output / name / LORA)
    words = {
        "things": [THINGS[key] for key in TAUGHT],
        "backgrounds": list(BACKGROUNDS),
        "sizes": [size for size in SIZES if size],
        "positions": [position for position in POSITIONS if position],
        "example": [caption(Scene("fox", "teal", "small", "on the left"))],
    }
    (args.output / "words.json").write_text(json.dumps(words, indent=1), encoding="utf-8")
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    print(f"{args.output}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
