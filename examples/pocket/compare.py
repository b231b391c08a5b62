"""Two models side by side, the first enlarged to the second's size: twelve prompts, the same seeds, 50 steps each.

python compare.py --old OLD/pipeline --new DIR/base/pipeline --output compare.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

PROMPTS = """
a fox on a teal background; a large owl on a purple background; a rocket on a black background
a small cat on an orange background, on the left; a panda on a yellow background; a large robot on a grey background
a cake on a pink background; a house on a blue background, at the bottom; a large tiger on a green background
a guitar on a white background; a bee on a red background, at the top; a pizza on a brown background
""".replace("\n", ";").split(";")
GUIDANCE = 2.5


def draw(folder: Path, prompts: list[str]) -> list[Image.Image]:
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(prompts, guidance_scale=GUIDANCE, num_inference_steps=50, generator=generators).images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in ("old", "new", "output"):
        parser.add_argument(f"--{part}", type=Path, required=True)
    args = parser.parse_args()
    prompts = [p.strip() for p in PROMPTS if p.strip()]
    new = draw(args.new, prompts)
    side, half, gap = new[0].width, len(prompts) // 2, 8
    old = [picture.resize((side, side), Image.Resampling.BICUBIC) for picture in draw(args.old, prompts)]
    sheet = Image.new("RGB", (half * (side + gap) - gap, 4 * (side + gap)), "white")
    for i, pair in enumerate(zip(old, new, strict=True)):
        for row, picture in enumerate(pair):
            sheet.paste(picture, (i % half * (side + gap), (2 * (i // half) + row) * (side + gap)))
    sheet.save(args.output)


if __name__ == "__main__":
    main()
