"""Merging LoRAs into a model's weights, and the exact way back.

W' = W + sum_i w_i * alpha_i / r_i * B_i @ A_i, computed in float32 and rounded once to the weight's dtype. Every merge
starts from the weight as it was, never from a merged one, so that a hundred merges are as exact as one. The way back
computes nothing: it copies the kept originals, so it is exact in every dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import nn

from ..errors import LoraFileError
from .files import LoraFile, Pair, load, load_magnitude
from .originals import Originals

Weight = float | None
"""What a LoRA counts with. None: as it was found, layer by layer."""


class Factors(NamedTuple):
    """What a LoRA adds to one layer at weight 1: scale * up @ down."""

    scale: float
    up: torch.Tensor
    """(out, rank), float32."""
    down: torch.Tensor
    """(rank, in * ...), float32."""


class Lora(Protocol):
    """What one LoRA adds to the layers of one model, wherever it comes from."""

    @property
    def layers(self) -> frozenset[str]:
        """The layers it touches."""

    @property
    def found(self) -> Mapping[str, float]:
        """The weight it was found at in each layer; empty for a file."""

    def opened(self) -> AbstractContextManager[Callable[[str], Factors]]:
        """Reads its factors, layer by layer, while the context lasts."""


def weight_in(lora: Lora, layer: str, weight: Weight) -> float:
    """What a LoRA counts with in one layer."""
    if layer not in lora.layers:
        return 0.0
    return lora.found.get(layer, 0.0) if weight is None else weight


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
    def found(self) -> Mapping[str, float]:
        """See `Lora.found`."""
        return {}

    @property
    def label(self) -> str:
        """Its file's path, or what else it is."""
        return self.file.label

    @property
    def why_not_mergeable(self) -> str | None:
        """Why it can't be merged into weights; None where it can."""
        dora = any(pair.magnitude for pair in self.pairs.values())
        return f"{self.label} is a DoRA, of which up @ down tells only a part" if dora else None

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Factors]]:
        """See `Lora.opened`.

        Raises:
            LoraFileError: the file is gone, was written to or is damaged; a half holds NaN or infinity.
        """
        with self.opened_whole() as read:
            yield lambda layer: read(layer)[0]

    @contextmanager
    def opened_whole(self) -> Iterator[Callable[[str], tuple[Factors, torch.Tensor | None]]]:
        """The same with DoRA's magnitudes beside, None where there are none.

        Raises:
            LoraFileError: as `opened`.
        """
        with self.file.opened() as file:

            def read(layer: str) -> tuple[Factors, torch.Tensor | None]:
                pair = self.pairs[layer]
                return Factors(pair.scale, *load(self.file, pair, file)), load_magnitude(self.file, pair, file)

            yield read


def merge(
    layers: Mapping[str, nn.Module], loras: Mapping[str, Lora], weights: Mapping[str, Weight], originals: Originals
) -> None:
    """Set every layer to its original plus what the LoRAs add to it; layers that none touches get their original back.

    The parameters stay the same objects, in the same memory.

    Args:
        layers: a model's layers by name (`lcmlora.layers.ModuleIndex.layers`).
        loras: by name.
        weights: what each of them counts with; those that are not named are off.
        originals: receives each weight before its first change.

    Raises:
        LoraFileError: a LoRA holds NaN or infinity, or its sum with a weight does.
    """
    parameters = {name: parameter_of(layer) for name, layer in layers.items()}
    inference = any(parameter.is_inference() for parameter in parameters.values())  # not writable otherwise
    mode = torch.inference_mode if inference else torch.no_grad
    mode()(_merge)(layers, parameters, loras, weights, originals)  # a `with` that is interrupted may stay on


def _merge(
    layers: Mapping[str, nn.Module],
    parameters: Mapping[str, nn.Parameter],
    loras: Mapping[str, Lora],
    weights: Mapping[str, Weight],
    originals: Originals,
) -> None:
    tiles = _Tiles()
    adding = contributions(layers, loras, weights)
    used = {lora for here in adding.values() for lora in here}
    with ExitStack() as stack:
        factors = {name: stack.enter_context(lora.opened()) for name, lora in loras.items() if name in used}
        originals.expect({name: parameters[name] for name, here in adding.items() if here})
        for layer, here in adding.items():
            weight = parameters[layer]
            if not here:
                originals.put_back(weight)
                continue
            up, down = _stacked([(w, factors[name](layer)) for name, w in here.items()], weight.device)
            if not tiles.add(originals.of(layer, weight), up, down, weight):
                raise LoraFileError(f"{' and '.join(here)} would make weights of {layer} infinite or NaN.")


def contributions(
    layers: Mapping[str, nn.Module], loras: Mapping[str, Lora], weights: Mapping[str, Weight]
) -> dict[str, dict[str, float]]:
    """For each layer the LoRAs that count in it, and what they count with.

    Sorted by name: the sum does not depend on the order in which styles came.
    """
    active = [(name, loras[name], weights[name]) for name in sorted(loras) if name in weights]
    return {
        layer: {name: w for name, lora, weight in active if (w := weight_in(lora, layer, weight))} for layer in layers
    }


def parameter_of(layer: nn.Module) -> nn.Parameter:
    """A layer's weight."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _stacked(parts: list[tuple[float, Factors]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """sum of w * scale * up @ down as one product: (out, r1 + r2 + ...) and (r1 + r2 + ..., in), float32."""
    up = torch.cat([w * own.scale * own.up for w, own in parts], dim=1)
    down = torch.cat([own.down for _, own in parts], dim=0)
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
            self._buffers[device] = torch.empty(size, device=device, dtype=torch.float32)
        return self._buffers[device]


def check_finite(loras: Mapping[str, Lora]) -> None:
    """Read every LoRA once.

    Raises:
        LoraFileError: one holds NaN or infinity.
    """
    for lora in loras.values():
        with lora.opened() as factors:
            for layer in lora.layers:
                factors(layer)
