"""Merging LoRAs into a model's weights, and the exact way back.

W' = W + sum_i w_i * alpha_i / r_i * B_i @ A_i, computed in float32 and rounded once to the weight's dtype. Every merge
starts from the weight as it was, never from a merged one, so that a hundred merges are as exact as one. The way back
computes nothing: it copies the kept originals, so it is exact in every dtype.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from .errors import LoraFileError, PipelineError
from .lorafile import LoraFile, Pair, load, load_magnitude

Keep = Literal["memory", "disk", None]
Halves = tuple[float, torch.Tensor, torch.Tensor]
"""alpha / rank, up (out, rank), down (rank, in); the matrices in float32."""


class Lora(Protocol):
    """What one LoRA adds to the layers of one model, wherever it comes from."""

    @property
    def layers(self) -> frozenset[str]:
        """The layers it touches."""

    def opened(self) -> Any:
        """A context whose value maps a layer's name to its `Halves`."""


@dataclasses.dataclass(frozen=True)
class FileLora:
    """A LoRA in a file: its pairs by layer name."""

    file: LoraFile
    pairs: Mapping[str, Pair]

    @property
    def layers(self) -> frozenset[str]:
        """The layers it touches."""
        return frozenset(self.pairs)

    @property
    def label(self) -> str:
        """Its file's path, or what else it is."""
        return self.file.label

    @property
    def unmergeable(self) -> str | None:
        """Why it can't be merged into weights; None where it can."""
        dora = any(pair.magnitude for pair in self.pairs.values())
        return f"{self.label} is a DoRA, of which up @ down tells only a part" if dora else None

    def check(self) -> None:
        """Whether its file still is what was found; nothing is read.

        Raises:
            LoraFileError: it is gone, or was written to.
        """
        self.file.check()

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """See `Lora.opened`.

        Raises:
            LoraFileError: it is a DoRA; or as for `opened_whole`.
        """
        if self.unmergeable:
            raise LoraFileError(f"{self.unmergeable}: fuse=False leaves it an adapter.")
        with self.opened_whole() as read:
            yield lambda layer: read(layer)[:3]

    @contextmanager
    def opened_whole(self) -> Iterator[Any]:
        """The same with DoRA's magnitudes as a fourth value, None where there are none.

        Raises:
            LoraFileError: the file is gone, was written to or is damaged; a half holds NaN or infinity.
        """
        with self.file.opened() as file:

            def read(layer: str) -> tuple[float, torch.Tensor, torch.Tensor, torch.Tensor | None]:
                pair = self.pairs[layer]
                return (pair.scale, *load(self.file, pair, file), load_magnitude(self.file, pair, file))

            yield read


class Originals:
    """The weights that merges change, as they were.

    Args:
        keep: "memory" copies them to host memory, "disk" to a temporary file that is mapped when it is read, None
            keeps nothing: then there is no way back from the first change on, which `lost` says.
    """

    def __init__(self, keep: Keep) -> None:
        self._store: _Memory | _Disk | None = None
        if keep:
            self._store = _Disk() if keep == "disk" else _Memory()
        self._kept: dict[int, tuple[nn.Parameter, Any]] = {}
        self.bytes = 0
        self.lost = False

    def expect(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make room for those of the weights that are not kept yet, before `of` is asked for them.

        Raises:
            PipelineError: there is not memory enough.
        """
        if self._store is not None:
            self._store.reserve(sum(_room(each) for each in parameters if id(each) not in self._kept))

    def of(self, parameter: nn.Parameter) -> torch.Tensor:
        """The weight as it was, about to be changed; kept from the first time on that it is asked for."""
        if self._store is None:
            self.lost = True
            return parameter
        if id(parameter) not in self._kept:
            self._kept[id(parameter)] = (parameter, self._store.save(parameter.detach()))
            self.bytes += parameter.nbytes
            return parameter  # as it is still unchanged, it need not come back from host memory or disk
        return self._store.load(self._kept[id(parameter)][1]).to(parameter.device)

    def put_back(self, parameter: nn.Parameter) -> None:
        """Put one original back, if it was ever changed and kept."""
        if self._store is not None and id(parameter) in self._kept:
            with torch.no_grad():
                parameter.copy_(self._store.load(self._kept[id(parameter)][1]))

    def forget(self) -> None:
        """Drop the originals; there is no way back then."""
        self._kept.clear()
        if self._store is not None:
            self._store.close()
        self.bytes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Originals:
        """For a deep copy of a pipe: its own parameters, the same kept bytes, which nothing ever changes."""
        twin = object.__new__(Originals)
        memo[id(self)] = twin
        from copy import deepcopy

        twin._store, twin.bytes, twin.lost = self._store, self.bytes, self.lost
        copies = [(deepcopy(parameter, memo), token) for parameter, token in self._kept.values()]
        twin._kept = {id(parameter): (parameter, token) for parameter, token in copies}
        return twin


class _Memory:
    """Copies in host memory, one after the other: an accelerator's own memory is the scarcer one."""

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)

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

    def load(self, token: torch.Tensor) -> torch.Tensor:
        return token

    def close(self) -> None:
        """Memory goes with the last tensor in it."""
        self.reserve(0)


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
        return torch.empty(size, dtype=torch.uint8)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel may be without them
        block.madvise(mmap.MADV_HUGEPAGE)
    room = torch.frombuffer(block, dtype=torch.uint8)
    room[:: mmap.PAGESIZE].zero_()
    return room


class _Disk:
    """Copies in one temporary file, mapped back piece by piece. The file goes with the last reference to it."""

    def __init__(self) -> None:
        descriptor, self._path = tempfile.mkstemp(prefix="lcmlora-originals-")
        self._file = os.fdopen(descriptor, "wb")
        self._end = 0
        self._remove = weakref.finalize(self, _remove, self._file, self._path)

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
        mapped = torch.from_file(self._path, shared=False, size=self._end, dtype=torch.uint8)
        return mapped[place : place + shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def close(self) -> None:
        self._remove()


def _remove(file: Any, path: str) -> None:
    file.close()
    Path(path).unlink(missing_ok=True)


@torch.no_grad()  # as a `with` of ours, an interruption at its end would leave gradients off for good
def merge(
    layers: Mapping[str, nn.Module], loras: Mapping[str, Lora], weights: Mapping[str, float], originals: Originals
) -> None:
    """Set every layer to its original plus what the LoRAs add to it; layers that none touches get their original back.

    The parameters stay the same objects, in the same memory.

    Args:
        layers: a model's layers by name (`lcmlora.unets.layers`).
        loras: by name.
        weights: what each of them counts with.
        originals: receives each weight before its first change.

    Raises:
        LoraFileError: a LoRA holds NaN or infinity, or its sum with a weight does.
    """
    tiles = _Tiles()
    with ExitStack() as stack:
        halves = {name: stack.enter_context(lora.opened()) for name, lora in loras.items()}
        # sorted: the sum must not hang on the order in which styles came
        active = [(name, loras[name].layers) for name in sorted(loras) if weights.get(name)]
        adding = {layer: [name for name, touched in active if layer in touched] for layer in layers}
        parameters: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
        originals.expect(parameters[name] for name, here in adding.items() if here)
        for layer_name, here in adding.items():
            weight = parameters[layer_name]
            if not here:
                originals.put_back(weight)
                continue
            up, down = _stacked([(weights[name], *halves[name](layer_name)) for name in here], weight.device)
            if not tiles.add(originals.of(weight), up, down, weight):
                raise LoraFileError(f"{' and '.join(here)} would make weights of {layer_name} infinite or NaN.")


def _stacked(
    parts: list[tuple[float, float, torch.Tensor, torch.Tensor]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum of w * scale * up @ down as one product: (out, r1 + r2 + ...) and (r1 + r2 + ..., in), float32."""
    up = torch.cat([w * scale * up for w, scale, up, _ in parts], dim=1)
    down = torch.cat([down for _, _, _, down in parts], dim=0)
    return up.to(device), down.to(device)


class _Tiles:
    """Adds a product to a weight, one tile after the other, through one float32 buffer for all of them.

    A tile stays in the CPU's cache from the product to the rounding, and no layer is ever whole in float32 (SDXL has
    one of 113 MiB). An accelerator gets larger tiles, for fewer launches.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.device, torch.Tensor] = {}

    def add(self, original: torch.Tensor, up: torch.Tensor, down: torch.Tensor, weight: torch.Tensor) -> bool:
        """weight = original + up @ down, rounded once. `original` may be `weight` itself.

        Returns:
            Whether every value of the sum is finite in the weight's dtype.
        """
        # (out, in * ...) in the order of the weight's own memory, so that channels_last is written in place too
        inner = sorted(range(1, weight.ndim), key=weight.stride, reverse=True)
        down = down.view(len(down), *weight.shape[1:]).permute(0, *inner).flatten(1)
        whole, target = (tensor.detach().permute(0, *inner).flatten(1) for tensor in (original, weight))
        rows, columns = (1280, 1280) if weight.device.type == "cpu" else (2048, 8192)
        extremes: list[torch.Tensor] = []
        for top in range(0, target.shape[0], rows):
            for left in range(0, target.shape[1], columns):
                place = (slice(top, top + rows), slice(left, left + columns))
                a, b = up[place[0]], down[:, place[1]]
                tile = self._buffer(weight.device, rows * columns)[: len(a) * b.shape[1]].view(len(a), b.shape[1])
                tile.copy_(whole[place]).addmm_(a, b)
                extremes += torch.aminmax(tile)
                target[place] = tile
        if target.data_ptr() != weight.data_ptr():  # memory so odd that `target` had to be a copy
            weight.permute(0, *inner).copy_(target.view(len(weight), *(weight.shape[d] for d in inner)))
        low, high = torch.stack(extremes).aminmax()
        most = torch.finfo(weight.dtype).max
        return bool(low >= -most) and bool(high <= most)  # both false for NaN

    def _buffer(self, device: torch.device, size: int) -> torch.Tensor:
        if device not in self._buffers:
            self._buffers[device] = torch.empty(size, device=device)
        return self._buffers[device]


def check_finite(loras: Mapping[str, Lora]) -> None:
    """Read every LoRA once.

    Raises:
        LoraFileError: one holds NaN or infinity.
    """
    for lora in loras.values():
        with lora.opened() as halves:
            for layer in lora.layers:
                halves(layer)


def check_room(layers: Mapping[str, nn.Module], touched: set[str], keep: Keep) -> int:
    """Bytes that the originals of the touched layers will take.

    Raises:
        PipelineError: they are to be kept on disk, and there is not room enough.
    """
    total = sum(
        weight.nbytes
        for name, layer in layers.items()
        if keep and name in touched and isinstance(weight := layer.weight, torch.Tensor)
    )
    if keep == "disk":
        folder = Path(tempfile.gettempdir())
        stat = os.statvfs(folder)
        free = stat.f_bavail * stat.f_frsize
        if free < total:
            raise PipelineError(
                f"keep='disk' needs {total / 2**20:.0f} MiB in {folder}, and {free / 2**20:.0f} are free: set TMPDIR "
                "to a folder with room, or keep='memory'."
            )
    return total
