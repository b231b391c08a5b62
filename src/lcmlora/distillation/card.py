"""The model card beside a distilled LoRA, and the way of both to the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__, recipe
from ..errors import LcmLoraError
from ..lora.files import WEIGHT_NAME, read
from ..lora.sources import Source
from ..recipe import Recipe
from ..writing import write_text
from .export import kohya_copy

CARD = "README.md"
_MARK = "<!-- made by lcmlora distill, and made anew by it as long as this line is here -->"
_WEIGHTS = (WEIGHT_NAME, kohya_copy(Path(WEIGHT_NAME)).name)
_UPLOADED = (*_WEIGHTS, *(f"best/{name}" for name in _WEIGHTS), CARD, "log.jsonl", "report.html", "validation/*.png")
"""All that is uploaded. No pattern is as wide as `*.png`, which reaches into folders: the data may be in one."""
_NAMED = ("lora=", "load_lora_weights(")
"""What stands before the LoRA's own name in a card."""


def write_card(
    file: Path, *, base: str, settings: Mapping[str, Any], pictures: Sequence[str] = (), name: str | None = None
) -> Path:
    """Write `README.md` beside a distilled LoRA: what it is, how it was made, how to use it. A card that somebody has
    written is left alone; `push_to_hub` names the repository in ours.

    Args:
        file: of `export.save`; its recipe stands in it.
        base: the teacher: a repository id, or a folder, of which only the last part is told.
        settings: what it was made with.
        pictures: files in the same folder to show; those that are not there are left out.
        name: what to call it. None: the folder's name.

    Returns:
        The card.

    Raises:
        LcmLoraError: it can't be written.
    """
    folder, card = file.parent, file.parent / CARD
    if card.is_file() and _MARK not in card.read_text(encoding="utf-8", errors="replace"):
        return card
    info = read(Source.of(file).find())
    how = recipe.by_name(info.recipe or recipe.LCM.name)
    base = base if _is_repository(base) else Path(base).name
    shown = [picture for picture in pictures if (folder / picture).is_file()]
    parts = [
        _front(base, how),
        _MARK,
        f"# {name or folder.resolve().name}",
        f"{how.title[0].upper()}{how.title[1:]} for {base}: {how.steps} steps instead of 25 to 50. "
        f"Rank {'/'.join(map(str, info.ranks))}, {len(info.modules)} layers; distilled with lcmlora {__version__}.",
        *(f"![{picture}]({picture})" for picture in shown),
        *_use(folder.resolve().name, base, how, kohya_copy(file)),
        "## How it was made",
        "| setting | value |\n| --- | --- |\n"
        + "\n".join(f"| {key} | {_cell(value)} |" for key, value in settings.items()),
        "## Licence",
        "Not stated yet. It follows from the teacher's and from what it was trained on: write `license: ...` at the "
        "top of this file.",
    ]
    write_text(card, "\n\n".join(parts) + "\n")
    return card


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")


def _is_repository(base: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not Path(base).exists()


def _front(base: str, how: Recipe) -> str:
    """What the hub reads."""
    tags = ["text-to-image", "diffusers", "lora", f"{how.name}-lora", "lcmlora"]
    lines = ["library_name: diffusers", "pipeline_tag: text-to-image", f"tags: {json.dumps(tags)}"]
    lines += [f"base_model: {base}", "base_model_relation: adapter"] if _is_repository(base) else []
    return "---\n" + "\n".join(lines) + "\n---"


def _use(name: str, base: str, how: Recipe, copy: Path) -> list[str]:
    call = f"num_inference_steps={how.steps}, guidance_scale={how.guidance:g}"
    call += "" if how.eta is None else f", eta={how.eta:g}"
    lora, load_lora = (f"{before}{json.dumps(name, ensure_ascii=False)}" for before in _NAMED)
    imported, pipe = "from diffusers import DiffusionPipeline", f'DiffusionPipeline.from_pretrained("{base}")'
    if base.partition(":")[0] == "pocket":
        imported, pipe = "from lcmlora import load_pocket", f'load_pocket("{base.partition(":")[2] or "base"}")'
    parts = [
        "## Use",
        f"```python\nimport lcmlora\n{imported}\n\npipe = {pipe}\n"
        f'pipe = lcmlora.accelerate(pipe, {lora})\npipe("...").images[0]\n```',
        "With diffusers alone:",
        f"```python\nfrom diffusers import {how.scheduler}\n{imported}\n\npipe = {pipe}\n"
        f'pipe.{load_lora}, weight_name="{WEIGHT_NAME}")\n'
        f"pipe.scheduler = {how.scheduler}.from_config(pipe.scheduler.config)\n"
        f'pipe("...", {call}).images[0]\n```',
    ]
    sampler = (
        "`lcm`, scheduler `sgm_uniform`" if how.name == recipe.LCM.name else f"that does what {how.scheduler} does"
    )
    if copy.is_file():
        parts.append(
            f"In ComfyUI and A1111: `{copy.name}` in their folder of LoRAs, strength {how.weight:g}; sampler "
            f"{sampler}, {how.steps} steps, CFG {max(how.guidance, 1.0):g}."
        )
    return parts


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload LoRA",
) -> str:
    """Upload a distilled LoRA, its card, its log and its pictures; checkpoints and caches stay. As diffusers' models
    have it, the repository is made where there is none.

    Args:
        folder: the output folder of `distill`.
        repo_id: "owner/name".
        private: whether a new repository is private. None: what the owner has set.
        token: as in `huggingface_hub`.
        commit_message: of the upload.

    Returns:
        The commit's address.

    Raises:
        LcmLoraError: there is no LoRA in the folder, or the hub refuses or can't be reached.
    """
    import huggingface_hub

    if not (Path(folder) / WEIGHT_NAME).is_file():
        raise LcmLoraError(f"{folder} holds no {WEIGHT_NAME}; give the output folder of distill.")
    card, name = Path(folder) / CARD, Path(folder).resolve().name
    try:
        api = huggingface_hub.HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if card.is_file() and _MARK in (text := card.read_text(encoding="utf-8", errors="replace")):
            for before in _NAMED:
                text = text.replace(f"{before}{json.dumps(name, ensure_ascii=False)}", f'{before}"{repository}"')
            write_text(card, text)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message,
            allow_patterns=list(_UPLOADED),
        )
    except Exception as error:  # httpx, huggingface_hub and the operating system raise many kinds
        raise LcmLoraError(f"{folder} can't be uploaded to {repo_id!r}: {' '.join(str(error).split())}") from error
    return str(commit.commit_url)
