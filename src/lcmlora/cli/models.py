"""`lcmlora inspect`, `bases`, `recipes` and `bake`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from .group import Say, command
from .options import FOLDER, Model, Speed, model_options, speed_options


@command("bases")
def bases(say: Say) -> None:
    """List the bases and their LCM-LoRAs."""
    from ..base import bases
    from ..recipe import LCM

    found = [(base, LCM.on(base).loras.get(base.name)) for base in bases()]
    lines = [
        f"{base.name:8} {base.title:22} {base.layers:4} layers   {source.lora if source else 'none'}"
        for base, source in found
    ]
    say.result(
        "\n".join(lines),
        [
            {"name": base.name, "title": base.title, "layers": base.layers, "lora": source.lora if source else None}
            for base, source in found
        ],
    )


@command("recipes")
def recipes(say: Say) -> None:
    """List the recipes: how other few-step LoRAs are driven."""
    from ..recipe import recipes

    lines, data = [], []
    for one in recipes():
        licence = one.licence or "no licence given"
        lines.append(f"{one.name:16} {one.scheduler:22} {one.steps_in_words:>7} steps   {', '.join(one.loras)}")
        lines.append(f"{'':16} guidance {one.guidance_in_words}; {licence}{f'; {one.note}' if one.note else ''}")
        data.append(dataclasses.asdict(one))
    say.result("\n".join(lines), data)


@command()
@click.argument("source")
@click.option("--weight-name", help="The file's name in a repository or folder.")
@click.option("--subfolder", help="The folder inside it.")
@click.option("--local-files-only", is_flag=True, help="Never ask the hub.")
def inspect(source: str, weight_name: str | None, subfolder: str | None, local_files_only: bool, say: Say) -> None:
    """Tell what a LoRA's file holds, from its header.

    SOURCE is a file, a folder or a repository.

    \b
    lcmlora inspect ink.safetensors
    """
    from ..lora.files import inspect_lora

    info = inspect_lora(source, weight_name, subfolder=subfolder, local_files_only=local_files_only)
    texts = {name: len(modules) for name, modules in info.text_modules.items()}
    alphas = ", ".join(f"{alpha:g}" for alpha in info.alphas)
    lines = [info.describe(), f"format {info.format}; alphas {alphas}; {sum(texts.values())} text-encoder modules"]
    lines += [f"left out, as diffusers does: {note}" for note in info.notes]
    data = {
        "path": str(info.path),
        "format": info.format,
        "modules": len(info.modules),
        "text_modules": texts,
        "ranks": info.ranks,
        "alphas": info.alphas,
        "cross_attention_dim": info.cross_attention_dim,
        "recipe": info.recipe,
        "notes": info.notes,
    }
    say.result("\n".join(lines), data)


@command()
@click.argument("folder", type=FOLDER)
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is there.")
@model_options
@speed_options
def bake(folder: Path, overwrite: bool, model: Model, speed: Speed, say: Say) -> None:
    """Save the accelerated model as an ordinary checkpoint.

    FOLDER is made; programs that know nothing of LoRAs load it.

    \b
    lcmlora bake fast-model -m my-model --style ink=ink.safetensors:0.8
    """
    from .. import baking
    from ..writing import require_writable

    if not speed.accelerate:
        raise click.UsageError("--no-accelerate leaves nothing to bake.")
    speed.arguments()
    model.require()
    baking.check_folder(folder, overwrite)
    require_writable(folder.absolute().parent)
    made = baking.bake(speed.apply(model.load(say), model.local_files_only), folder, overwrite=overwrite)
    say.result(str(made), _about(made))


def _about(folder: Path) -> dict[str, Any]:
    from ..transition.snapshot import read_baked

    return {"folder": str(folder), **dict(read_baked(folder) or {})}
