"""The safetensors files that a model was loaded from, held open: they already hold the weights as they were."""

from __future__ import annotations

import ctypes
import json
import math
import os
import struct
import weakref
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from ..errors import PipelineError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 20  # bytes that are read at once: they stay in the processor's cache while they are compared
_LONGEST_HEADER = 100_000_000  # which safetensors allows
_OPTIONAL = "text_model."  # transformers 5 leaves it out of its names, and files have it or not


class Checkpoint:
    """The files that a model came from, sharded and variant files too, held open.

    An open file outlives its name: that it is deleted, or another one renamed to its name, does no harm.

    Args:
        sources: the folders or repositories that it may come from. The first one with files counts.
    """

    def __init__(self, sources: Iterable[str]) -> None:
        found = (list(_candidates(source)) for source in sources if source)
        self._files = [file for path in next(filter(None, found), []) if (file := _open(path)) is not None]
        self.used: set[_File] = set()

    def find(self, name: str, parameter: nn.Parameter) -> Stored | None:
        """Where a file holds a layer's weight, if it equals the weight bit for bit after the same cast."""
        key = _plain(f"{name}.weight")
        entries = [(file, *file.entries[key]) for file in self._files if key in file.entries]
        for file, place, dtype, shape in sorted(entries, key=lambda entry: entry[2] != parameter.dtype):
            if shape == parameter.shape and parameter.numel():
                stored = Stored(file, place, dtype, parameter)
                with suppress(OSError):
                    if stored.is_in(parameter):
                        self.used.add(file)
                        return stored
        return None

    def close_others(self) -> None:
        """Close all but the files in the folders in which something was found."""
        folders = {file.path.parent for file in self.used}
        self._files = [file for file in self._files if file.path.parent in folders]

    def why_cut(self) -> str | None:
        """Which file in use was cut short, in words; None where none was. Cheap."""
        return next((file.why_changed() for file in self.used if file.is_cut()), None)


class Stored:
    """A weight in a file, as it was found equal. Read piece by piece: it is never in memory as a whole."""

    def __init__(self, file: _File, place: int, dtype: torch.dtype, parameter: nn.Parameter) -> None:
        self.file = file
        self._place, self._dtype = place, dtype
        self._cast, self._shape = parameter.dtype, parameter.shape
        self._checksum = 0

    def _pieces(self, sums: list[int]) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of the weight, cast as the model's were; a checksum of what was read goes to `sums`."""
        row = math.prod(self._shape[1:]) * self._dtype.itemsize
        rows, checksum = max(1, _PIECE // row), 0
        buffer = torch.empty(min(rows, self._shape[0]) * row, dtype=torch.uint8, device="cpu")
        for top in range(0, self._shape[0], rows):
            piece = buffer[: min(rows, self._shape[0] - top) * row]
            self.file.read(self._place + top * row, piece)
            checksum = _added(checksum, piece)
            yield slice(top, top + rows), piece.view(self._dtype).view(-1, *self._shape[1:]).to(self._cast)
        sums.append(checksum)

    def is_in(self, parameter: nn.Parameter) -> bool:
        """Whether the weight has these very bits: 0.0 and -0.0 are not the same.

        Raises:
            OSError: the file can't be read.
        """
        weight, sums = parameter.detach().view(_BITS[self._cast.itemsize]), list[int]()
        for rows, piece in self._pieces(sums):
            if not _equal(piece.to(weight.device).view(weight.dtype), weight[rows]):
                return False
        (self._checksum,) = sums
        return True

    def copy_into(self, parameter: torch.Tensor) -> None:
        """Write the weight into a parameter.

        Raises:
            PipelineError: the file can't be read any more.
        """
        weight = parameter.detach()
        try:
            for rows, piece in self._pieces([]):
                weight[rows] = piece.to(weight.device)
        except OSError as error:
            raise PipelineError(
                f"{self.file.path}, which holds the original weights, can't be read: {error}"
            ) from error

    def is_there(self) -> bool:
        """Whether the file still holds what was found in it."""
        sums: list[int] = []
        with suppress(OSError):
            for _ in self._pieces(sums):
                pass
        return sums == [self._checksum]


class _File:
    """One open safetensors file, and where each tensor stands in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._stamp = self._stamp_now()
        (length,) = struct.unpack("<Q", self._file.read(8))
        header = json.loads(self._file.read(min(length, _LONGEST_HEADER)))
        self.entries: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        for key, entry in header.items():
            if key != "__metadata__" and entry["dtype"] in _DTYPES:
                begin, shape = 8 + length + int(entry["data_offsets"][0]), tuple(entry["shape"])
                self.entries[_plain(key)] = (begin, _DTYPES[entry["dtype"]], shape)

    def _stamp_now(self) -> tuple[int, int, int]:
        """Size and times of the open file, whatever its name is now."""
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def is_cut(self) -> bool:
        """Whether the file is shorter than it was. Cheap."""
        try:
            return self._stamp_now()[0] < self._stamp[0]
        except OSError:
            return True

    def why_changed(self) -> str:
        """What was done to it, in words."""
        return (
            f"{self.path} was {'cut short' if self.is_cut() else 'written to'} since accelerate(keep='source') read it"
        )

    def changed(self, stored: Iterable[Stored]) -> list[Stored]:
        """Those of the weights that are not in the file any more; where nothing touched the file, nothing is read.

        A deleted or renamed file has another time too, so it is what the file holds that counts.
        """
        try:
            stamp = self._stamp_now()
        except OSError:
            return list(stored)
        if stamp == self._stamp:
            return []
        if not (gone := [one for one in stored if not one.is_there()]):
            self._stamp = stamp
        return gone

    def read(self, place: int, into: torch.Tensor) -> None:
        """Fill bytes from a place in the file. Not by a mapping: one of a file that was cut short ends the process.

        Raises:
            OSError: the file can't be read, or ends before that.
        """
        view: memoryview = into.numpy().data
        while view:
            if hasattr(os, "preadv"):  # which a forked process may do at the same time
                count = os.preadv(self._file.fileno(), [view], place)
            else:
                self._file.seek(place)
                count = self._file.readinto(view) or 0
            if not count:
                raise OSError("the file was cut short")
            view, place = view[count:], place + count


def _open(path: Path) -> _File | None:
    """The file, or None where it is none that can be read: then the weights are copied."""
    try:
        return _File(path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error):
        return None


def _plain(key: str) -> str:
    return key.removeprefix(_OPTIONAL)


def _equal(piece: torch.Tensor, weight: torch.Tensor) -> bool:
    """torch.equal, in words of eight bytes where both consist of them: that takes a third of the time."""
    if weight.is_contiguous() and not (weight.nbytes % 8 or weight.storage_offset() * weight.itemsize % 8):
        piece, weight = piece.view(-1).view(torch.int64), weight.view(-1).view(torch.int64)
    return torch.equal(piece, weight)


def _added(checksum: int, piece: torch.Tensor) -> int:
    """A checksum that costs next to nothing: the sum of the words, together with what was before."""
    words = piece[: len(piece) // 8 * 8]
    total = int(words.view(torch.int64).sum()).to_bytes(8, "little", signed=True)
    return zlib.crc32(piece[len(words) :].numpy().data, zlib.crc32(total, checksum))


def _candidates(source: str) -> Iterator[Path]:
    """The safetensors files of a model's folder, of the folders in it, or of its repository in the hub's cache."""
    with suppress(OSError, ValueError):  # a path may be too long or hold a zero
        if (folder := Path(source)).is_dir():
            places = folder.absolute(), "*.safetensors", "*/*.safetensors"
        else:
            from huggingface_hub import constants
            from huggingface_hub.file_download import repo_folder_name

            cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="model") / "snapshots"
            places = cached, "*/*.safetensors", "*/*/*.safetensors"
        for pattern in places[1:]:
            yield from sorted(places[0].glob(pattern))


def in_memory(parameter: torch.Tensor) -> bool:
    """Whether a parameter can be read.

    A model may be mapped from its file. Where that was cut short, a read would end the process; the system's own
    refuses.
    """
    if parameter.device.type != "cpu" or not parameter.numel() or not hasattr(os, "preadv"):
        return True
    last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    reading, writing = os.pipe()
    try:
        os.write(writing, (ctypes.c_char * 1).from_address(parameter.data_ptr() + last * parameter.itemsize))
        return True
    except OSError:
        return False
    finally:
        os.close(reading)
        os.close(writing)
