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
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from pictures import BACKGROUNDS, POSITIONS, SIZE, SIZES, TAUGHT, THINGS, Scene, caption
from safetensors import safe_open
from safetensors.torch import load_file, save_file

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


def copy_lora(source: Path, file: Path) -> None:
    """Without the recipe that it may name: it was measured under two, and neither shall warn of the other."""
    with safe_open(source, "pt") as opened:
        metadata = {key: value for key, value in opened.metadata().items() if key != "lcmlora_recipe"}
    save_file(load_file(source), file, metadata)


MODEL_CARD = """---
license: apache-2.0
library_name: diffusers
tags: [stable-diffusion, lcm-lora, test-model]
---
# The model inside lcmlora

A text-to-image pipeline of Stable Diffusion's shape ({parameters:.1f} M parameters, half precision), {side} x {side}
pixels, that knows {things} things on {backgrounds} backgrounds: "{example}". It exists to show and to test lcmlora
without a model hub; it is good for nothing else.

| folder | what | made by |
| --- | --- | --- |
| `pipeline` | VAE, CLIPTextModel with its own tokenizer, UNet2DConditionModel | `train_vae.py`, `train_base.py` |
| `tiny-vae` | an AutoencoderTiny for the same latents, `vae="tiny"` | `train_tiny.py` |
| `lcm-lora` | its few-step LoRA, for LCMScheduler and TCDScheduler alike | `lcmlora distill` |
| `style-lora` | a style LoRA: soft 3-D renders | `train_style.py` (diffusers and PEFT alone) |
| `chalk` | a fine-tuned UNet: its difference in 8-bit steps (error {error:.1%}) | `train_finetune.py` |

The scripts are in `examples/pocket/` of the source.

## Training pictures, and their licences
- The base and the fine-tune were trained on Noto Emoji, (c) Google, Apache-2.0 (npm package `@iconify-json/noto`
  1.2.9), modified: rasterised, placed on coloured backgrounds; for the fine-tune redrawn as chalk outlines. Google
  does not endorse this model.
- The style LoRA (and the VAE) also saw Fluent Emoji, (c) Microsoft Corporation, MIT (npm package
  `@lobehub/fluent-emoji-3d` 1.1.0), modified: scaled, placed on coloured backgrounds.

Both licences lie in `licenses`. The weights are under Apache-2.0.
"""

MIT = """MIT License

Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def write_papers(output: Path, parameters: int, error: float, words: dict[str, list[str]]) -> None:
    """Model card and licences beside the weights."""
    (output / "licenses").mkdir(exist_ok=True)
    shutil.copy(Path(__file__).parents[2] / "LICENSE", output / "licenses" / "NOTO-EMOJI-APACHE-2.0.txt")
    (output / "licenses" / "FLUENT-EMOJI-MIT.txt").write_text(MIT, encoding="utf-8")
    card = MODEL_CARD.format(
        parameters=parameters / 1e6,
        side=SIZE,
        things=len(words["things"]),
        backgrounds=len(words["backgrounds"]),
        example=words["example"][0],
        error=error,
    )
    (output / "README.md").write_text(card, encoding="utf-8")


def name_as_ever(file: Path) -> None:
    """Name a text encoder's tensors as every release of transformers reads them: newer ones read "text_model." too,
    but write none, and older ones then take random weights in the place of all.
    """
    named = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in load_file(file).items()}
    save_file(named, file, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in ("base", "lcm", "style", "chalk", "tiny", "output"):
        parser.add_argument(f"--{part}", type=Path, required=part in ("base", "output"))
    parser.add_argument("--vae", type=Path, help="a VAE with the same encoder and a better decoder")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    pipe = StableDiffusionPipeline.from_pretrained(args.base)
    if args.vae:
        pipe.vae = AutoencoderKL.from_pretrained(args.vae)
    parameters = sum(p.numel() for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())
    error = 0.0
    pipe.to(torch.float16).save_pretrained(args.output / "pipeline")
    name_as_ever(args.output / "pipeline" / "text_encoder" / "model.safetensors")
    if args.chalk:
        tuned = UNet2DConditionModel.from_pretrained(args.chalk / "unet")
        tensors, error = difference(pipe.unet.float(), tuned)
        print(f"chalk: int8 difference, relative error {error:.4f}")
        (args.output / "chalk").mkdir(exist_ok=True)
        save_file(tensors, args.output / "chalk" / "unet_difference.safetensors")
    for source, name in ((args.lcm, "lcm-lora"), (args.style, "style-lora")):
        if source:
            (args.output / name).mkdir(exist_ok=True)
            copy_lora(source / LORA, args.output / name / LORA)
    if args.tiny:
        AutoencoderTiny.from_pretrained(args.tiny).half().save_pretrained(args.output / "tiny-vae")
    words = {
        "things": [THINGS[key] for key in TAUGHT],
        "backgrounds": list(BACKGROUNDS),
        "sizes": [size for size in SIZES if size],
        "positions": [position for position in POSITIONS if position],
        "example": [caption(Scene("fox", "teal", "small", "on the left"))],
    }
    (args.output / "words.json").write_text(json.dumps(words, indent=1), encoding="utf-8")
    for file in args.output.rglob("*.json"):  # diffusers notes where the parts were loaded from
        config = json.loads(file.read_text(encoding="utf-8"))
        unused = config.pop("block_out_channels", None) if config.get("_class_name") == "AutoencoderTiny" else None
        if config.pop("_name_or_path", None) or unused:  # nor take those widths, which diffusers then says in the log
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_papers(args.output, parameters, error, words)
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    print(f"{args.output}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
