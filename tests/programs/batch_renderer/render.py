"""Render a table of prompts, styles and seeds into a folder, and a contact sheet of what is there.

    python render.py jobs.csv out --model stabilityai/stable-diffusion-xl-base-1.0 --style ink=ink.safetensors

Started again it goes on. Rows that fail are tried again; what still fails stands in out/failed.json, and the exit code
is 1 then. Written as a user of lcmlora would, from its docs alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

import lcmlora


def render(
    pipe: Any, jobs: Path, out: Path, *, styles: Mapping[str, Any] | None = None, attempts: int = 3
) -> lcmlora.Generated:
    """Draw all rows; those that fail again, up to so many attempts in all."""
    for _ in range(attempts):
        with warnings.catch_warnings():  # what failed is told in the end, once
            warnings.simplefilter("ignore", lcmlora.LcmLoraWarning)
            made = lcmlora.generate(pipe, jobs, out, styles=styles)
        if made.interrupted or not made.failed:
            break
    return made


def contact_sheet(files: tuple[Path, ...], side: int = 160, columns: int = 4) -> Image.Image:
    """All pictures, each above its prompt and seed, as its file tells them."""
    letters = 28
    lines = -(-len(files) // columns)
    sheet = Image.new("RGB", (columns * side, lines * (side + letters)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, file in enumerate(files):
        x, y = i % columns * side, i // columns * (side + letters)
        with Image.open(file) as image:
            made = json.loads(image.text["lcmlora"])
            image.thumbnail((side, side))
            sheet.paste(image, (x, y))
        draw.text((x + 2, y + side + 2), f"{made['prompt'][:24]}\nseed {made['seed']}", fill="black")
    return sheet


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--style", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--attempts", type=int, default=3)
    options = parser.parse_args(arguments)
    styles = dict(style.split("=", 1) for style in options.style)
    try:
        pipe = lcmlora.accelerate(lcmlora.load(options.model))
        made = render(pipe, options.jobs, options.out, styles=styles, attempts=options.attempts)
    except lcmlora.LcmLoraError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    if made.files:
        contact_sheet(made.files).save(options.out / "contact.png")
    failed = [{"row": row.row, "reason": row.reason} for row in made.failed]
    (options.out / "failed.json").write_text(json.dumps(failed, indent=1))
    print(f"{len(made.files)} pictures ({made.already} were there), {len(failed)} rows failed")
    return 1 if failed or made.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
