"""Chance, drawn for each example from the seed and its place in the run: it does not matter which process sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def seed_of(*parts: object) -> int:
    """A seed for torch from anything with a plain repr. 63 bits: equal ones do not happen."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


class Draws:
    """Random numbers for a batch, each row from a generator of its own.

    Args:
        seed: of the run.
        places: of each example in the run's stream of examples.
    """

    def __init__(self, seed: int, places: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed_of(seed, place)) for place in places]

    def below(self, high: int | Sequence[int]) -> torch.Tensor:
        """(batch,) whole numbers from 0 to below `high`, one for all or one for each."""
        highs = [high] * len(self._generators) if isinstance(high, int) else high
        drawn = [torch.randint(h, (1,), generator=g) for h, g in zip(highs, self._generators, strict=True)]
        return torch.cat(drawn)

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        """Standard normal noise of the shape (batch, ...), device and dtype of `like`."""
        rows = [
            torch.randn(like.shape[1:], generator=generator, dtype=torch.float32) for generator in self._generators
        ]
        return torch.stack(rows).to(like)
