"""The safetensors files that a model was loaded from, held open: they already hold the weights as they were."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import compat

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SUBFOLDERS = ("", "unet", "text_encoder", "text_encoder_2")


class Checkpoint:
    """Open mappings of the files that a model came from: `config._name_or_path`, sharded and variant files too.

    A mapping outlives the file's name: a deleted file does no harm.
    """

    def __init__(self, module: nn.Module) -> None:
        self._files = [file for path in _candidates(module) if (file := _open(path)) is not None]

    def find(self, name: str, parameter: nn.Parameter) -> torch.Tensor | None:
        """What a file holds for a layer's weight, if it equals the weight bit for bit after the same cast."""
        for key in (f"{name}.weight", f"text_model.{name}.weight"):  # transformers 5 drops text_model in front
            for file in self._files:
                stored = file.tensor(key)
                if stored is not None and stored.shape == parameter.shape and _same_bits(stored, parameter):
                    return stored
        return None

    def why_changed(self) -> str | None:
        """Which file was rewritten since it was opened, in words; None where none was."""
        for file in self._files:
            if file.stamp() != file.opened_as:
                return f"{file.path} was changed since accelerate(keep='source') read it"
        return None


class _File:
    """One safetensors file, mapped, and what its header says of each tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        self.opened_as = self.stamp()
        (length,) = struct.unpack("<Q", self._file.read(8))
        self._start = 8 + length
        self._header: dict[str, Any] = json.loads(self._file.read(length))
        self._bytes = torch.from_file(str(path), shared=False, size=self.opened_as[0], dtype=torch.uint8)

    def stamp(self) -> tuple[int, int]:
        """Size and time of the open file, whatever its name is now."""
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def tensor(self, key: str) -> torch.Tensor | None:
        """A view of the mapping."""
        entry = self._header.get(key)
        dtype = _DTYPES.get(entry["dtype"]) if entry else None
        if entry is None or dtype is None:
            return None
        begin, end = (self._start + offset for offset in entry["data_offsets"])
        if begin % dtype.itemsize or end - begin != math.prod(entry["shape"]) * dtype.itemsize:
            return None
        return self._bytes[begin:end].view(dtype).view(entry["shape"])


def _open(path: Path) -> _File | None:
    """The file, or None where it is none that can be read: then the weights are copied."""
    try:
        return _File(path)
    except (OSError, ValueError, RuntimeError, struct.error):
        return None


def _candidates(module: nn.Module) -> Iterator[Path]:
    source = compat.name_or_path(module)
    if not source:
        return
    for subfolder in _SUBFOLDERS:
        folder = Path(source) / subfolder
        if folder.is_dir():
            yield from sorted(folder.glob("*.safetensors"))
        elif not Path(source).exists() and source.count("/") == 1:
            yield from _cached(source, subfolder)


def _cached(repository: str, subfolder: str) -> list[Path]:
    """The safetensors files of a repository's folder in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(repository, f"{subfolder}/config.json" if subfolder else "config.json")
    except ValueError:
        return []
    return sorted(Path(config).parent.glob("*.safetensors")) if isinstance(config, str) else []


def _same_bits(stored: torch.Tensor, parameter: nn.Parameter) -> bool:
    """Whether the stored tensor, cast as the weight was, is the weight: 0.0 and -0.0 are not the same."""
    weight = parameter.detach()
    cast = stored.to(weight.device, weight.dtype)
    bits = _BITS[weight.dtype.itemsize]
    return torch.equal(cast.view(bits), weight.view(bits))
