"""Which examples each step sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

_GOLDEN = 0.6180339887498949


class ResumableBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (index, turn): an example, and the place of this look at it in the stream of the whole run.

    The stream is the same for one process with batches of 8 as for two with 4, and so is what is drawn from (seed,
    index, turn). It is computed from a step's number, so that a run resumes in the middle of an epoch without saving
    anything. Every epoch has a new order.

    With buckets, all processes' batches of a step come from one of them, and each bucket has epochs of its own: no
    example is left out or seen twice to fill a batch. Buckets take turns in proportion to their sizes.

    Args:
        examples: how many there are.
        batch: examples a step and process.
        seed: of the orders.
        first: the step to begin with.
        last: the step to end before.
        process: this process's number.
        processes: how many there are.
        buckets: each example's bucket (`Pictures.buckets_of`); None for one that holds all.
    """

    def __init__(
        self,
        examples: int,
        batch: int,
        seed: int,
        first: int,
        last: int,
        process: int = 0,
        processes: int = 1,
        buckets: Sequence[int] | None = None,
    ) -> None:
        self.batch, self.seed, self.first, self.last = batch, seed, first, last
        self.process, self.processes = process, processes
        of = np.zeros(examples, dtype=int) if buckets is None else np.asarray(buckets)
        self._members = [np.flatnonzero(of == bucket) for bucket in np.unique(of)]
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        whole = self.batch * self.processes
        chosen = self._buckets()
        done = np.bincount(chosen[: self.first], minlength=len(self._members))
        for step in range(self.first, self.last):
            bucket = int(chosen[step])
            begin = int(done[bucket]) * whole + self.process * self.batch
            turn = step * whole + self.process * self.batch
            yield [(self._example(bucket, begin + i), turn + i) for i in range(self.batch)]
            done[bucket] += 1

    def _buckets(self) -> np.ndarray:
        """Each step's bucket. Steps of the golden ratio round a circle fall on any part of it as often as is its
        share, give or take a few.
        """
        borders = np.cumsum([len(members) for members in self._members])
        places = (self.seed % 2**32 + np.arange(self.last)) * _GOLDEN % 1
        return np.searchsorted(borders / borders[-1], places, side="right").clip(max=len(borders) - 1)

    def _example(self, bucket: int, position: int) -> int:
        """The example at a position of a bucket's own stream."""
        members = self._members[bucket]
        epoch, place = divmod(position, len(members))
        known, order = self._orders.get(bucket, (-1, members))
        if known != epoch:
            order = np.random.default_rng((self.seed, bucket, epoch)).permutation(members)
            self._orders[bucket] = (epoch, order)
        return int(order[place])
