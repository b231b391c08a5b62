"""The same picture again, from what its PNG says."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from .. import loading, pictures
from ..acceleration import accelerate, accelerated, as_it_was
from ..calls import plain
from ..devices import device_of
from ..errors import DataError, LcmLoraWarning, LoraFileError, PipelineError
from ..lora.sources import LoraFile, Source
from ..parameters import as_weight
from ..pictures import file_digest
from ..transition.records import baked_of, pipe_record_of
from ..transition.target import Style
from ..warn import warn
from .loop import drawn
from .records import FORMAT, fingerprint, scheduler_of, vae_of
from .rows import Row


def again(picture: str | os.PathLike[str], pipe: Any = None) -> Image.Image:
    """Make a picture again that `generate` wrote: pixel for pixel, on the same kind of device with the same versions.

    What stands in the PNG is verified: the LoRA files' and input pictures' SHA-256, the pipeline's class, the base,
    and the model by its norms and biases. What else was done to a pipe by hand (textual inversion, IP-Adapter) is not
    known: pass that pipe.

    Args:
        picture: the PNG.
        pipe: the pipeline, not accelerated; it is given back as it was. None loads the model that the PNG names.

    Returns:
        The picture.

    Raises:
        DataError: it does not say what made it, or something of that is gone or has changed.
        PipelineError: the model can't be loaded, or the pipe given is another one.
    """
    record = pictures.record_of(os.fspath(picture))
    _check_record(picture, record)
    _check_can_be_made(picture, record, pipe is not None)
    row = _row(record)
    baked, how = _was_baked(record), _how(record)
    if pipe is None:
        pipe = _load(record)
    elif (now := pipe_record_of(pipe)) and not (now.baked and baked):
        what = "one that was not baked drew it." if now.baked else "lcmlora.restore(pipe) first."
        raise PipelineError(f"again needs the pipe as it was: {what}")
    if plain(type(pipe)).__name__ != record["pipeline"]:
        raise PipelineError(f"{picture} was made by a {record['pipeline']}, and this is a {type(pipe).__name__}.")
    if fingerprint(pipe) != record["fingerprint"]:
        raise PipelineError(f"{picture} was made by a {record['model'] or 'model'} of other weights than this one.")
    _warn_of_differences(record, device_of(pipe).type)
    with ExitStack() as stack:
        stack.enter_context(_scheduled(pipe, record["scheduler"]))
        if baked and baked_of(pipe) is not None:  # else plain diffusers loaded it
            stack.enter_context(as_it_was(pipe))
            steps = record["accelerated"].get("enforce_inference_steps", True)
            accelerate(pipe, enforce_inference_steps=steps)
        if how is not None:
            with _file_is_known():
                stack.enter_context(accelerated(pipe, **how))
            _verify(record, pipe)
        if pictures.provenance(pipe)["weights"] != record["weights"]:
            warn("some weights are others than those that drew the picture, so it may differ.")
        return drawn(pipe, [row])[0]


@contextmanager
def _file_is_known() -> Iterator[None]:
    """The few-step LoRA's name says nothing here: its SHA-256 is the record's, and so is its recipe."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is driven as ", LcmLoraWarning)
        yield


_FIELDS: Mapping[str, Any] = {
    **dict.fromkeys(("seed", "batch"), int),
    **dict.fromkeys(("settings", "files", "loras", "versions"), dict),
    **dict.fromkeys(("pipeline", "dtype", "device", "fingerprint", "weights"), str),
    **dict.fromkeys(("in_memory",), list),
    **dict.fromkeys(("accelerated", "scheduler", "status"), dict | None),
    **dict.fromkeys(("prompt", "model"), str | None),
    "fit": list | None,
}
_HOW = ("recipe", "weight", "fuse", "compile", "vae", "steps", "guidance", "enforce_inference_steps")


def _check_record(picture: Any, record: Mapping[str, Any]) -> None:
    """Refuse a record that `generate` did not write so: the PNG may come from anywhere."""
    if record.get("format") != FORMAT:
        raise DataError(f"{picture} was not written by generate, or by another version of it.")
    for name, kind in _FIELDS.items():
        if name not in record or not isinstance(record[name], kind):
            raise DataError(f"{picture}: what it says is damaged, its {name!r} is missing or no {kind}.")
    if not isinstance(getattr(torch, record["dtype"], None), torch.dtype):
        raise DataError(f"{picture}: what it says is damaged, its type of weights is {record['dtype']!r}.")


def _check_can_be_made(picture: Any, record: Mapping[str, Any], given: bool) -> None:
    """Refuse what no record can bring back."""
    if record["in_memory"]:
        raise DataError(f"{picture} was made with {', '.join(record['in_memory'])} given in memory: no file has it.")
    if not given and not record["model"]:
        raise DataError(f"{picture} does not say which model made it: pass the pipe, again(picture, pipe).")
    if (record["accelerated"] or {}).get("vae") == "a module":
        raise DataError(f"{picture} was made with a VAE given in memory: no file has it.")
    styles = record["status"]["styles"] if record["status"] else ()  # no status without a UNet
    nowhere = [name for name in styles if not record["loras"].get(name, {}).get("sha256")]
    nowhere += [name for name, one in record["loras"].items() if not one["sha256"] and name not in nowhere]
    if nowhere and not _was_baked(record) and not (record["status"] or {}).get("baked"):
        raise DataError(f"{picture} was made with LoRAs that came from no file that is known: {', '.join(nowhere)}.")
    for name, one in record["files"].items():
        path = Path(one["path"])
        if not path.is_file():
            raise DataError(f"{name} {path} is gone: put it back.")
        if file_digest(path) != one["sha256"]:
            raise DataError(f"{name} {path} is not what it was: its SHA-256 began with {one['sha256'][:12]}.")


def _was_baked(record: Mapping[str, Any]) -> bool:
    """Whether the pipe was a baked one, with its call defaults."""
    return bool((record["accelerated"] or {}).get("baked"))


def _row(record: Mapping[str, Any]) -> Row:
    prompt = {} if record["prompt"] is None else {"prompt": record["prompt"]}
    files = {name: Path(one["path"]) for name, one in record["files"].items()}
    fit = tuple(record["fit"]) if record["fit"] else None
    return Row(1, "", record["seed"], {**prompt, **record["settings"]}, files, fit)


def _how(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of `accelerate`, with the files that have the digests of the record."""
    if record["accelerated"] is None or _was_baked(record):
        return None
    base = record["status"]["base"]
    how = {name: record["accelerated"][name] for name in _HOW if name in record["accelerated"]}
    how |= {"base": "auto" if base == "custom" else base, "styles": {}}
    for name, one in record["loras"].items():
        if one["few_step"]:
            how["lora"] = _found(name, one)
            continue
        weight = record["status"]["styles"].get(name, 0.0)
        if (number := as_weight(weight)) is None:
            raise DataError(
                f"style {name!r} counted differently in different models ({weight}), which accelerate can't say."
            )
        if number:
            how["styles"][name] = Style(_found(name, one), number)
    return how


def _found(name: str, one: Mapping[str, Any]) -> str:
    """The path of a LoRA's file: where it was, or where its source is now."""
    if os.path.isfile(one["file"]) and pictures.sha256(LoraFile.at(one["file"], name)) == one["sha256"]:
        return str(one["file"])
    place = one["source"]
    changed = f"{one['file']} is not what it was" if os.path.isfile(one["file"]) else f"{one['file']} is gone"
    if place is not None and not os.path.isabs(place["where"]):
        try:
            file = Source.of(place["where"], place["weight_name"], place["subfolder"], place["revision"]).find()
        except LoraFileError as error:
            raise DataError(f"LoRA {name!r}: {changed}. {error}") from error
        if file.path is not None and pictures.sha256(file) == one["sha256"]:
            return str(file.path)
        changed = f"{place['where']} holds another file now"
    raise DataError(f"LoRA {name!r}: {changed}: its SHA-256 began with {one['sha256'][:12]}.")


def _load(record: Mapping[str, Any]) -> Any:
    has = record["device"] == "cpu" or torch.get_device_module(record["device"]).is_available()
    pipe = loading.load(
        record["model"], dtype=getattr(torch, record["dtype"]), device=record["device"] if has else None
    )
    pipe = loading.as_class(pipe, record["pipeline"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _warn_of_differences(record: Mapping[str, Any], device: str) -> None:
    now = {**pictures.versions(), "device": device}
    was_made = {**record["versions"], "device": record["device"]}
    other = [f"{name} {was} (now {now.get(name)})" for name, was in was_made.items() if now.get(name) != was]
    if other:
        warn(f"the picture was made with {', '.join(other)}: it may differ in the last bits.")
    if record["batch"] > 1:
        warn(f"the picture was drawn in a batch of {record['batch']}: alone it may differ in the last bits.")


@contextmanager
def _scheduled(pipe: Any, scheduler: Mapping[str, Any] | None) -> Iterator[None]:
    """The pipe with the scheduler of the record, for the length of the block."""
    if scheduler is None or scheduler == scheduler_of(pipe):
        yield
        return
    own, cls = pipe.scheduler, getattr(diffusers, scheduler["class"], None)
    if cls is None:
        raise PipelineError(f"diffusers has no {scheduler['class']}, which drew the picture.")
    pipe.scheduler = cls.from_config(scheduler["config"])
    try:
        yield
    finally:
        pipe.scheduler = own


def _verify(record: Mapping[str, Any], pipe: Any) -> None:
    """See that the pipe is what the record says."""
    now, made = pictures.provenance(pipe), record["accelerated"]
    if made["vae"] and made.get("vae_digest") != vae_of(pipe):
        raise PipelineError(f"the picture was made with VAE {made['vae']}, which has other weights now.")
    for part in ("base", "recipe", "scheduler"):
        was, found = record["status"][part], now["status"][part]
        if was != found:
            raise PipelineError(f"the picture was made with {part} {was}, and this pipe has {found}.")
