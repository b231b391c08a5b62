"""The weights that merges change, as they were: in host memory, in a temporary file, or in the file they came from."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..errors import PipelineError
from .checkpoint import Checkpoint, Stored, in_memory

Keep = Literal["memory", "disk", "source", None]
"""Where the originals of merged weights wait for the way back; None: nowhere."""
KEEPS = ("memory", "disk", "source", None)


class Originals:
    """The weights that merges change, as they were.

    Args:
        keep: "memory" copies them to host memory, "disk" to a temporary file that is mapped when it is read, "source"
            reads those that stand in the model's own file from there and copies the rest to host memory, None keeps
            nothing: then there is no way back from the first change on, which `lost` says.
        sources: the folders or repositories that the model may come from.
    """

    def __init__(self, keep: Keep, sources: Iterable[str] = ()) -> None:
        self.keep = keep
        self._store: _Memory | _Disk | None = None
        if keep:
            self._store = _Disk() if keep == "disk" else _Memory()
        self._source = Checkpoint(sources) if keep == "source" else None
        self._kept: dict[int, tuple[nn.Parameter, Any]] = {}
        self.bytes = 0
        self.lost = False

    def expect(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make room for those of the weights that are not kept yet, before `of` is asked for them.

        Raises:
            PipelineError: there is not memory enough.
        """
        if self._store is None:
            return
        size = 0
        for name, parameter in parameters.items():
            if id(parameter) in self._kept:
                continue
            if self._source is not None and (same := self._source.find(name, parameter)) is not None:
                self._kept[id(parameter)] = (parameter, same)
            else:
                size += _room(parameter)
        if self._source is not None:
            self._source.close_others()
        self._store.reserve(size)

    def of(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        """The weight as it was, about to be changed; kept from the first time on that it is asked for."""
        if self._store is None:
            self.lost = True
            return parameter
        if id(parameter) not in self._kept:
            self._kept[id(parameter)] = (parameter, self._store.save(parameter.detach()))
            self.bytes += parameter.nbytes
            return parameter  # as it is still unchanged, it need not come back from host memory or disk
        token = self._kept[id(parameter)][1]
        if isinstance(token, Stored):  # into the weight itself: no layer is in memory twice
            token.copy_into(parameter)
            return parameter
        return self._read(token).to(parameter.device, parameter.dtype)

    def _read(self, token: Any) -> torch.Tensor:
        if isinstance(token, torch.Tensor):
            return token
        assert isinstance(self._store, _Disk)
        return self._store.load(token)

    def holds(self, parameter: nn.Parameter | None) -> bool:
        """Whether this weight's original is kept."""
        return id(parameter) in self._kept

    def put_back(self, parameter: nn.Parameter) -> None:
        """Put one original back, if it was ever changed and kept."""
        if id(parameter) in self._kept:
            mode = torch.inference_mode if parameter.is_inference() else torch.no_grad
            token = self._kept[id(parameter)][1]
            if isinstance(token, Stored):
                mode()(token.copy_into)(parameter)
            else:
                mode()(parameter.copy_)(self._read(token))

    def put_all_back(self) -> None:
        """Put every original back that is kept. Doing it twice does no harm."""
        for parameter, _ in self._kept.values():
            self.put_back(parameter)

    def rebind(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """The layer has another Parameter now, with the same values: from now on the original is that one's."""
        if id(old) in self._kept:
            self._kept[id(new)] = (new, self._kept.pop(id(old))[1])

    def leave_out(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give up the originals of these weights."""
        for parameter in parameters:
            self._kept.pop(id(parameter), None)

    def why_cut(self) -> str | None:
        """Which file of originals was cut short, in words; None where none was. Cheap, and reads no weight."""
        return self._source.why_cut() if self._source is not None else None

    def unreadable(self) -> dict[int, str]:
        """The weights whose originals can't be read any more, by id, with the reason in words. It reads no weight."""
        stored = {key: token for key, (_, token) in self._kept.items() if isinstance(token, Stored)}
        gone: dict[int, str] = {}
        for file in {token.file for token in stored.values()}:
            lost = file.changed([token for token in stored.values() if token.file is file])
            why = file.why_changed()
            gone |= {key: why for key, token in stored.items() if token in lost}
            if file.is_cut():  # and the model itself may be mapped from it
                gone |= {key: why for key, (parameter, _) in self._kept.items() if not in_memory(parameter)}
        return gone

    def forget(self) -> None:
        """Drop the originals; there is no way back then. A deep copy may go on with the same store."""
        self._kept.clear()
        self._store = self._source = None
        self.bytes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Originals:
        """For a deep copy of a pipe: its own parameters, the same kept bytes, which nothing ever changes."""
        twin = object.__new__(Originals)
        memo[id(self)] = twin
        twin.keep, twin._source = self.keep, self._source
        twin._store, twin.bytes, twin.lost = self._store, self.bytes, self.lost
        copies = [(deepcopy(parameter, memo), token) for parameter, token in self._kept.values()]
        twin._kept = {id(parameter): (parameter, token) for parameter, token in copies}
        return twin


class _Memory:
    """Copies in host memory, one after the other: an accelerator's own memory is the scarcer one."""

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8, device="cpu")

    def reserve(self, size: int) -> None:
        try:
            self._room = _memory(size)
        except (OSError, RuntimeError) as error:  # mmap's, torch's
            raise PipelineError(
                f"keep='memory' needs {size / 2**20:.0f} MiB of memory, which the system does not give: keep='disk' "
                "needs as much room in TMPDIR, keep=None needs none but leaves no way back."
            ) from error

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        place = self._room[: tensor.nbytes].view(tensor.dtype)
        self._room = self._room[_room(tensor) :]
        strides = torch.empty_like(tensor, device="meta").stride()  # its own, but where it has gaps
        return place.as_strided(tensor.shape, strides, place.storage_offset()).copy_(tensor)


def _room(tensor: torch.Tensor) -> int:
    """Bytes that a copy takes, so that the next one is aligned for every dtype."""
    return -(-tensor.nbytes // 64) * 64


def _memory(size: int) -> torch.Tensor:
    """Fresh host memory as bytes, handed out by the system before it is needed.

    On huge pages, of which SDXL's originals take 2,440 and not more than a million. And touched by all threads, each
    in its own part: while a weight is copied they would wait for the same pages (SDXL's originals, where a virtual
    machine with two processors had to get the memory from its host: 5.5 s, 7.3 s without this).
    """
    if not size or not hasattr(mmap, "MADV_HUGEPAGE"):  # only Linux has it
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel may be without them
        block.madvise(mmap.MADV_HUGEPAGE)
    room = torch.frombuffer(block, dtype=torch.uint8)
    room[:: mmap.PAGESIZE].zero_()
    return room


class _Disk:
    """Copies in one temporary file, mapped back piece by piece. The file goes with the last reference to it."""

    def __init__(self) -> None:
        try:
            descriptor, self._path = tempfile.mkstemp(prefix="lcmlora-originals-")
        except OSError as error:
            raise PipelineError(
                f"keep='disk' can't write to the temporary folder ({error}): set TMPDIR to a folder with room, or "
                "keep='memory'."
            ) from error
        self._file = os.fdopen(descriptor, "w+b")
        self._end = 0
        weakref.finalize(self, _remove, self._file, self._path)

    def reserve(self, size: int) -> None:
        """Nothing to do: the file grows as it is written."""

    def save(self, tensor: torch.Tensor) -> tuple[int, torch.dtype, torch.Size]:
        raw = tensor.to("cpu").contiguous().flatten().view(torch.uint8)
        place = self._end
        self._file.seek(place)
        self._file.write(raw.numpy().data)
        self._file.flush()
        self._end = place + _room(raw)
        self._file.truncate(self._end)
        return place, tensor.dtype, tensor.shape

    def load(self, token: tuple[int, torch.dtype, torch.Size]) -> torch.Tensor:
        place, dtype, shape = token
        # through the open file: its name may be gone
        mapped = torch.frombuffer(
            mmap.mmap(self._file.fileno(), self._end, access=mmap.ACCESS_COPY), dtype=torch.uint8
        )
        return mapped[place : place + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def _remove(file: Any, path: str) -> None:
    file.close()
    Path(path).unlink(missing_ok=True)


def check_room(parameters: Iterable[nn.Parameter], keep: Keep) -> int:
    """Bytes that the originals of these weights take.

    Raises:
        PipelineError: they are to be kept on disk, and there is not room enough.
    """
    total = sum(weight.nbytes for weight in parameters) if keep else 0
    if keep == "disk":
        folder = Path(tempfile.gettempdir())
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise PipelineError(
                f"keep='disk' writes to {folder}, which can't be used ({error}): set TMPDIR to a folder with "
                f"{total / 2**20:.0f} MiB of room, or keep='memory'."
            ) from error
        if free < total:
            raise PipelineError(
                f"keep='disk' needs {total / 2**20:.0f} MiB in {folder}, and {free / 2**20:.0f} are free: set TMPDIR "
                "to a folder with room, or keep='memory'."
            )
    return total
