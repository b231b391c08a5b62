"""Saving an accelerated pipe as an ordinary checkpoint, for programs that know nothing of LoRAs."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from . import __version__, baked, calls
from . import recipe as recipes
from .compat import bars_hidden
from .errors import PipelineError, brief
from .kinds import as_kind, check_kind
from .lora.sources import REPOSITORY
from .meanwhile import merged
from .state import status
from .transition.records import PipeRecord, note_baked, pipe_record_of
from .transition.snapshot import BAKED, Snapshot, read_baked
from .transition.target import PipeSettings
from .transition.verification import why_not_fast


def bake(pipe: Any, folder: str | Path, *, overwrite: bool = False, **save: Any) -> Path:
    """Save an accelerated pipe with its LoRAs merged in, as a folder that plain diffusers loads. A baked one, again.

    The saved scheduler is the recipe's, for LCM `LCMScheduler`; how to call the pipe (steps, guidance) and what was
    merged stands in `lcmlora.json`. A pipe with PEFT adapters (fuse=False) is merged for the time of saving, and left
    as it is.

    Args:
        pipe: an accelerated pipe, or a baked one.
        folder: where to; must not exist, or be empty, unless `overwrite`. It appears only when all is written.
        overwrite: replace what is there, if that is a checkpoint (with a `model_index.json`) or an empty folder.
        save: as for diffusers' `save_pretrained`, such as `variant="fp16"`.

    Returns:
        The folder.

    Raises:
        PipelineError: the pipe is not accelerated, can't be merged, its recipe was unregistered, or the folder is in
            use by something else.
    """
    record = pipe_record_of(pipe)
    if record is None:
        raise PipelineError(
            "bake saves an accelerated pipe; lcmlora.accelerate(pipe) first, or pipe.save_pretrained()."
        )
    if (name := record.settings.policy.recipe.name) not in {recipe.name for recipe in recipes.recipes()}:
        raise PipelineError(
            f"recipe {name!r} was unregistered, and no folder of it could be loaded: register it again."
        )
    if why := why_not_fast(pipe, record):
        raise PipelineError(f"bake would save a pipe without the LCM-LoRA: {why}.")
    try:
        folder = Path(os.path.realpath(folder))
        check_folder(folder, overwrite)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
            made = Path(place) / folder.name
            with merged(pipe), bars_hidden():
                _require_plain(pipe)
                cls: Any = calls.plain(type(pipe))  # an accelerated pipe's own save_pretrained warns
                cls.save_pretrained(pipe, made, **save)
            (made / BAKED).write_text(json.dumps(_recipe(pipe, record), indent=1), encoding="utf-8")
            _put_in_place(made, folder, Path(place) / "replaced")
    except (OSError, ValueError, TypeError) as error:
        raise PipelineError(f"bake can't write to {brief(folder)}: {error}") from error
    return folder


def _put_in_place(made: Path, folder: Path, aside: Path) -> None:
    """Have the new folder where the old one was, or the old one still."""
    if not folder.exists():
        made.rename(folder)
        return
    folder.rename(aside)
    try:
        made.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse to replace what is no checkpoint, whatever the caller says."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / "model_index.json").is_file():
        raise PipelineError(f"{folder} exists and is no checkpoint: bake replaces nothing else. Give another folder.")
    if not overwrite:
        raise PipelineError(f"{folder} exists and is not empty; give another folder, or overwrite=True.")


def load_baked(folder: str | Path, *, kind: str | None = None, **load: Any) -> Any:
    """Load what `bake` saved, with its call defaults: the steps and guidance it was baked with, kept within range.

    Args:
        folder: as given to `bake`.
        kind: "text2img", "img2img" or "inpaint"; None leaves what was baked.
        load: as for diffusers' `from_pretrained`, such as `dtype`.

    Returns:
        A pipeline of the class that was baked, or of that kind.

    Raises:
        PipelineError: the folder was not baked, can't be loaded, or there is no pipeline of that kind for it.
        BaseModelError: its recipe is not registered.
    """
    from diffusers import DiffusionPipeline

    written = read_baked(Path(folder))
    if written is None:
        raise PipelineError(f"{folder} was not made by lcmlora.bake: there is no {BAKED} in it that says what it is.")
    settings = PipeSettings(baked.policy_of(written))
    if kind is not None:
        check_kind(kind)
    try:
        with bars_hidden():
            pipe = DiffusionPipeline.from_pretrained(os.path.abspath(folder), **load)
    except Exception as error:  # diffusers raises many kinds
        raise PipelineError(f"{folder} can't be loaded as a pipeline: {error}") from error
    note_baked(pipe.unet, written)
    record = baked.dress(Snapshot.of(pipe), written, settings)
    record.found = record.made  # there is nothing to restore
    return pipe if kind is None else as_kind(pipe, kind)


def _recipe(pipe: Any, record: PipeRecord) -> dict[str, Any]:
    now = status(pipe)
    call = {"num_inference_steps": now.steps, "guidance_scale": now.guidance}
    if record.baked:
        return {"lcmlora": __version__, "call": call, "merged": record.baked["merged"]}
    applied = record.unet.applied
    assert applied is not None
    file = applied.lcm.file
    merged_in = {key: getattr(now, key) for key in ("recipe", "licence", "weight", "base")}
    # the folder may be given away: no paths of this machine
    name = file.given if file.path is None or REPOSITORY.fullmatch(file.given) else file.path.name
    merged_in |= {"lora": name, "styles": dict(now.styles)}
    return {"lcmlora": __version__, "call": call, "merged": merged_in}


def _require_plain(pipe: Any) -> None:
    """Refuse to write keys that no loader would understand ("base_layer", "lora_A")."""
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module):
            odd = next((key for key in module.state_dict() if "base_layer" in key or "lora_" in key), None)
            if odd:
                raise PipelineError(f"{name} has a LoRA that can't be merged ({odd}): unload it before bake().")
