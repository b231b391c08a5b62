"""Pictures as training gets them: scaled, cropped, perhaps mirrored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .examples import Example

Size = tuple[int, int]
"""(height, width)."""


def bucket_sizes(resolution: int) -> tuple[Size, ...]:
    """The sizes that pictures of every shape are brought to: at most resolution ** 2 pixels, with sides from half the
    resolution to twice (shapes from 1:4 to 4:1).

    Sides are multiples of 64, as in kohya's and NovelAI's buckets; of less, but of 8, where the resolution is below
    512.
    """
    step = min(64, max(8, resolution // 64 * 8))
    sizes = set()
    for side in range(math.ceil(resolution / 2 / step) * step, 2 * resolution + 1, step):
        other = min(resolution**2 // side, 2 * resolution) // step * step
        sizes |= {(side, other), (other, side)} if other else set()
    return tuple(sorted(sizes)) or ((resolution, resolution),)


class Pictures(Dataset[dict[str, Any]]):
    """Examples by (index, turn), as `ResumableBatchSampler` gives them.

    A row has `pixels` (3, height, width) in [-1, 1], `text`, `original_size` (height, width) and `crop_top_left` (top,
    left; where the crop lies in the scaled picture), `index` and `turn`. What is random about it is drawn from (seed,
    index, turn), so that a resumed run sees the same.

    Args:
        examples: with pictures.
        resolution: side of the squares that pictures are brought to.
        random_flip: mirror every second picture.
        seed: of crops and mirroring.
        center_crop: crop the middle, not a random place.
        buckets: sizes to bring each picture to the one nearest in shape of, instead of squares: see `bucket_sizes`.

    Attributes:
        buckets_of: each example's place in `buckets`; None without.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        resolution: int,
        random_flip: bool,
        seed: int,
        center_crop: bool = False,
        buckets: Sequence[Size] | None = None,
    ) -> None:
        self.examples, self.resolution, self.random_flip, self.seed = examples, resolution, random_flip, seed
        self.center_crop, self.buckets = center_crop, buckets
        self.buckets_of = None if buckets is None else [_nearest(one, buckets) for one in examples]

    def __len__(self) -> int:
        return len(self.examples)

    def size(self, index: int) -> Size:
        """The (height, width) in which an example is trained on."""
        if self.buckets is None or self.buckets_of is None:
            return (self.resolution, self.resolution)
        return self.buckets[self.buckets_of[index]]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """One example.

        Raises:
            DataError: its picture can't be read any more.
        """
        index, turn = key
        example, (height, width) = self.examples[index], self.size(index)
        rng = np.random.default_rng((self.seed, index, turn))
        picture = example.open()
        original = (picture.height, picture.width)
        scale = max(height / picture.height, width / picture.width)
        scaled = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        room = (scaled[0] - width, scaled[1] - height)
        left, top = (r // 2 if self.center_crop else int(rng.integers(0, r + 1)) for r in room)
        across, down = picture.width / scaled[0], picture.height / scaled[1]
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS, box)  # of a long one, only what is seen
        if self.random_flip and rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            left = room[0] - left
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float().div(127.5).sub(1)
        row = {"pixels": pixels, "text": example.text, "original_size": original, "crop_top_left": (top, left)}
        return {**row, "index": index, "turn": turn}


def _nearest(example: Example, buckets: Sequence[Size]) -> int:
    """The bucket whose shape is nearest to a picture's, by the ratio of the two ratios."""
    opened = example.open() if example.size is None else None
    height, width = (opened.height, opened.width) if opened else example.size or (1, 1)
    return min(range(len(buckets)), key=lambda i: abs(math.log(buckets[i][0] / buckets[i][1] * width / height)))


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: pixels (batch, 3, height, width), the rest as lists."""
    return {key: [row[key] for row in rows] for key in rows[0]} | {
        "pixels": torch.stack([row["pixels"] for row in rows])
    }
