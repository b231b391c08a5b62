"""Pictures on disk that say what made them, in a text chunk of the PNG."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import numbers
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import torch
import transformers
from PIL import Image, PngImagePlugin
from torch import nn

from . import __version__
from .errors import DataError
from .lora.sources import LoraFile
from .pages import write
from .state import status
from .transition.records import module_record_of

CHUNK = "lcmlora"
"""The name of the text chunk; it holds JSON."""


def _named(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def described(value: Any, other: Callable[[Any], Any] = _named) -> Any:
    """A call's argument as JSON can hold it. Equal arguments have equal descriptions, in any process: pictures and
    tensors are named by a digest of their content.

    Args:
        value: the argument.
        other: describes a function, or an object of unknown content; by its name, unless said otherwise.
    """
    match value:
        case None | bool() | int() | float() | str():
            return value
        case np.generic():
            return described(value.item(), other)
        case numbers.Number():
            return repr(value)
        case os.PathLike():
            return os.fspath(value)
        case Mapping():
            return {str(key): described(one, other) for key, one in value.items()}
        case list() | tuple() | range():
            return [described(one, other) for one in value]
        case Image.Image():
            return {"picture": _digest(value.mode, value.size, value.tobytes()), "size": list(value.size)}
        case torch.Tensor():
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            return {"tensor": _digest(value.dtype, value.shape, content.numpy().tobytes())}
        case np.ndarray():
            return {"tensor": _digest(value.dtype, value.shape, np.ascontiguousarray(value).tobytes())}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: described(getattr(value, field.name), other) for field in dataclasses.fields(value)}
    return other(value)


def key(settings: Mapping[str, Any], other: Callable[[Any], Any] = _named) -> str:
    """16 hexadecimal digits that stand for these settings: a picture that is there already is told by them, where
    `untold` finds nothing in them.
    """
    return _digest(json.dumps(described(settings, other), sort_keys=True))


def untold(call: Mapping[str, Any]) -> list[str]:
    """The arguments that no description tells from others: functions, such as callbacks, and objects of unknown
    content.
    """
    found = []
    for name, value in call.items():
        unknown: list[Any] = []
        described(value, unknown.append)
        found += [name] * bool(unknown)
    return found


def _digest(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else str(part).encode())
    return found.hexdigest()[:16]


def provenance(pipe: Any) -> dict[str, Any]:
    """What a picture of this pipe is made by: pipeline, model, a digest of its weights as they are now, scheduler,
    status (recipe, licence word, styles), LoRA files with their SHA-256, versions.

    LoRAs that were in the pipe before, as adapters, came from no file that is known: they have a weight alone.
    """
    record, scheduler = module_record_of(getattr(pipe, "unet", None)), getattr(pipe, "scheduler", None)
    files: dict[str, LoraFile] = {}
    if record is not None and record.applied is not None:
        files = {record.applied.target.adapter_name: record.applied.lcm.file, **record.applied.files}
    return {
        "pipeline": type(pipe).__name__,
        "model": getattr(pipe, "name_or_path", None) or None,
        "weights": _of_weights(pipe),
        "scheduler": [type(scheduler).__name__, described(dict(getattr(scheduler, "config", {})))],
        "status": described(status(pipe).to_dict()) if getattr(pipe, "unet", None) is not None else None,
        "loras": {name: {"file": file.label, "sha256": sha256(file)} for name, file in files.items()},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what makes a picture."""
    modules = {"diffusers": diffusers, "peft": peft, "torch": torch, "transformers": transformers}
    return {"lcmlora": __version__, **{name: str(module.__version__) for name, module in modules.items()}}


def _of_weights(pipe: Any) -> str:
    """A digest of eight values of each weight: another fine-tune under the same name is told by it."""
    models = [model for _, model in sorted(getattr(pipe, "components", {}).items()) if isinstance(model, nn.Module)]
    some = [_eight_of(p.detach()) for m in models for p in m.parameters() if p.numel() and not p.is_meta]
    return _digest(torch.cat(some).cpu().numpy().tobytes()) if some else ""


def _eight_of(weight: torch.Tensor) -> torch.Tensor:
    """Eight of its values, the same in any memory format."""
    every = -(-weight.numel() // 8)
    if weight.is_contiguous():
        return weight.view(-1)[::every].double()
    index = torch.arange(0, weight.numel(), every, device=weight.device)
    return weight[torch.unravel_index(index, weight.shape)].double()


def sha256(file: LoraFile) -> str | None:
    """The digest of a LoRA's file; None for tensors that came from no file."""
    return None if file.path is None else _sha256(file.path, file.stamp)


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, computed once for a file as it is."""
    stat = path.stat()
    return _sha256(path, (stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=1024)
def _sha256(path: Path, stamp: Any) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save(image: Image.Image, path: str | Path, record: Mapping[str, Any]) -> Path:
    """Write a PNG with `record` in its text chunk. It appears under its name only when it is whole.

    Raises:
        DataError: it can't be written there.
    """
    text, stream = PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_itxt(CHUNK, json.dumps(described(record)))
    image.save(stream, format="PNG", pnginfo=text)
    return write(path, stream.getvalue())


def record_of(path: str | Path) -> dict[str, Any]:
    """What a picture's chunk says; the picture itself is not decoded.

    Raises:
        DataError: it is no picture, or none that lcmlora wrote.
    """
    with _opened(path) as picture:
        return _said(path, picture)


def load(path: str | Path) -> tuple[Image.Image, dict[str, Any]]:
    """A picture and what its chunk says.

    Raises:
        DataError: it is no picture, or none that lcmlora wrote.
    """
    with _opened(path) as picture:
        picture.load()
        record, image = _said(path, picture), picture.copy()
    image.info.pop(CHUNK, None)
    return image, record


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as picture:
            yield picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} can't be read as a picture: {error}") from error


def _said(path: str | Path, picture: Image.Image) -> dict[str, Any]:
    text = picture.info.get(CHUNK)
    record = json.loads(text) if isinstance(text, str) else None
    if not isinstance(record, dict):
        raise DataError(f"{path} does not say what made it: only a PNG that lcmlora wrote does.")
    return record
