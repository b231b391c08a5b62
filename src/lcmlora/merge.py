"""Merging LoRAs into a model's weights, and the exact way back.

W' = W + sum_i w_i * alpha_i / r_i * B_i @ A_i, computed in float32 and rounded once to the weight's dtype. Every merge
starts from the weight as it was, never from a merged one, so that a hundred merges are as exact as one. The way back
computes nothing: it copies the kept originals, so it is exact in every dtype.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import safe_open
from torch import nn

from .errors import LoraFileError, PipelineError
from .lorafile import Pair, load

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

    path: Path
    pairs: Mapping[str, Pair]

    @property
    def layers(self) -> frozenset[str]:
        """The layers it touches."""
        return frozenset(self.pairs)

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """See `Lora.opened`.

        Raises:
            LoraFileError: when a half holds NaN or infinity.
        """
        with safe_open(self.path, "pt") as file:
            yield lambda layer: (self.pairs[layer].scale, *load(self.path, self.pairs[layer], file))


class Originals:
    """The weights that merges change, as they were.

    Args:
        keep: "memory" copies them to host memory, "disk" to a temporary file that is mapped when it is read.
    """

    def __init__(self, keep: Keep) -> None:
        self._store: _Memory | _Disk = _Disk() if keep == "disk" else _Memory()
        self._kept: dict[int, tuple[nn.Parameter, Any]] = {}
        self.bytes = 0

    def of(self, parameter: nn.Parameter) -> torch.Tensor:
        """The weight as it was, on its own device; kept from the first time on that it is asked for."""
        if id(parameter) not in self._kept:
            self._kept[id(parameter)] = (parameter, self._store.save(parameter.detach()))
            self.bytes += parameter.nbytes
            return parameter.detach()  # as it is still unchanged, it need not come back from host memory or disk
        return self._store.load(self._kept[id(parameter)][1]).to(parameter.device)

    def put_back(self, parameter: nn.Parameter) -> None:
        """Put one original back, if it was ever changed."""
        if id(parameter) in self._kept:
            with torch.no_grad():
                parameter.copy_(self._store.load(self._kept[id(parameter)][1]))

    def forget(self) -> None:
        """Drop the originals; there is no way back then."""
        self._kept.clear()
        self._store.close()
        self.bytes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Originals:
        """For a deep copy of a pipe: its own parameters, the same kept bytes, which nothing ever changes."""
        twin = object.__new__(Originals)
        memo[id(self)] = twin
        from copy import deepcopy

        twin._store, twin.bytes = self._store, self.bytes
        copies = [(deepcopy(parameter, memo), token) for parameter, token in self._kept.values()]
        twin._kept = {id(parameter): (parameter, token) for parameter, token in copies}
        return twin


class _Memory:
    """Copies in host memory: an accelerator's own memory is the scarcer one."""

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("cpu", copy=True)

    def load(self, token: torch.Tensor) -> torch.Tensor:
        return token

    def close(self) -> None:
        """Nothing to do: memory goes with the last reference."""


class _Disk:
    """Copies in one temporary file, mapped back piece by piece. The file goes with the last reference to it."""

    def __init__(self) -> None:
        descriptor, self._path = tempfile.mkstemp(prefix="lcmlora-originals-")
        self._file = os.fdopen(descriptor, "wb")
        self._end = 0
        self._remove = weakref.finalize(self, _remove, self._file, self._path)

    def save(self, tensor: torch.Tensor) -> tuple[int, torch.dtype, torch.Size]:
        raw = tensor.to("cpu").contiguous().flatten().view(torch.uint8)
        place = self._end
        self._file.seek(place)
        self._file.write(raw.numpy().data)
        self._file.flush()
        self._end = place + -(-raw.numel() // 64) * 64  # aligned for every dtype
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


def merge(
    layers: Mapping[str, nn.Module], loras: Mapping[str, Lora], weights: Mapping[str, float], originals: Originals
) -> None:
    """Set every layer to its original plus what the LoRAs add to it; layers that none touches get their original back.

    The parameters stay the same objects.

    Args:
        layers: a model's layers by name (`lcmlora.unets.layers`).
        loras: by name.
        weights: what each of them counts with.
        originals: receives each weight before its first change.

    Raises:
        LoraFileError: a LoRA holds NaN or infinity, or its sum with a weight does.
    """
    with ExitStack() as stack, torch.no_grad():
        halves = {name: stack.enter_context(lora.opened()) for name, lora in loras.items()}
        for layer_name, layer in layers.items():
            weight: Any = layer.weight
            # sorted: the sum must not hang on the order in which styles came
            here = sorted(name for name, lora in loras.items() if layer_name in lora.layers and weights.get(name))
            if not here:
                originals.put_back(weight)
                continue
            parts = [(weights[name], *halves[name](layer_name)) for name in here]
            weight.copy_(_merged(originals.of(weight), parts))
            if not torch.isfinite(weight.sum(dtype=torch.float32)):
                raise LoraFileError(f"{' and '.join(here)} would make weights of {layer_name} infinite or NaN.")


def _merged(weight: torch.Tensor, parts: list[tuple[float, float, torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """weight + sum of w * scale * up @ down, float32, in one product: (out, r1 + r2 + ...) @ (r1 + r2 + ..., in)."""
    up = torch.cat([w * scale * up for w, scale, up, _ in parts], dim=1).to(weight.device)
    down = torch.cat([down for _, _, _, down in parts], dim=0).to(weight.device)
    return torch.addmm(weight.float().flatten(1), up, down).view_as(weight)


def check_room(layers: Mapping[str, nn.Module], touched: set[str], keep: Keep) -> int:
    """Bytes that the originals of the touched layers will take.

    Raises:
        PipelineError: they are to be kept on disk, and there is not room enough.
    """
    total = sum(
        weight.nbytes
        for name, layer in layers.items()
        if name in touched and isinstance(weight := layer.weight, torch.Tensor)
    )
    if keep == "disk":
        folder = Path(tempfile.gettempdir())
        stat = os.statvfs(folder)
        free = stat.f_bavail * stat.f_frsize
        if free < total:
            raise PipelineError(
                f"keep='disk' needs {total / 2**20:.0f} MiB in {folder}, and {free / 2**20:.0f} are free: set TMPDIR "
                "to "
                "a folder with room, or keep='memory'."
            )
    return total
