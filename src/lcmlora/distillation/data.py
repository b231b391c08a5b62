"""Pictures with captions, and which of them each step sees."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from ..errors import DataError


@dataclasses.dataclass(frozen=True)
class Example:
    """One line of `metadata.jsonl`."""

    file: Path
    text: str


def read_folder(folder: str | Path) -> list[Example]:
    """The pictures of a folder in the form of the hub's `imagefolder`: `metadata.jsonl` with `file_name` and `text`
    lines.

    Raises:
        DataError: no metadata, a line without those two, a picture that is not there, or no line at all.
    """
    folder = Path(folder)
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise DataError(
            f'{folder} has no metadata.jsonl; write one line a picture: {{"file_name": "a.png", "text": "a red fox"}}'
        )
    examples = []
    for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            example = Example(folder / row["file_name"], row["text"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f'{metadata}, line {number}: {{"file_name": ..., "text": ...}} is expected, got {line[:80]!r}'
            ) from error
        if not isinstance(example.text, str) or not example.file.is_file():
            raise DataError(f"{metadata}, line {number}: {example.file} is not there, or its text is no string.")
        examples.append(example)
    if not examples:
        raise DataError(f"{metadata} names no picture.")
    return examples


class Pictures(Dataset[dict[str, Any]]):
    """Squares of `resolution` pixels in [-1, 1], with caption, original size (height, width) and crop corner (top,
    left).

    What is random about an example (crop place, mirroring) is drawn from the seed and the example's turn, so that a
    resumed run sees the same pictures.
    """

    def __init__(self, examples: list[Example], resolution: int, random_flip: bool, seed: int) -> None:
        self.examples, self.resolution, self.random_flip, self.seed = examples, resolution, random_flip, seed

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, turn = key
        example, side = self.examples[index], self.resolution
        rng = np.random.default_rng((self.seed, index, turn))
        try:
            picture = Image.open(example.file).convert("RGB")
        except OSError as error:
            raise DataError(f"{example.file} can't be read as a picture: {error}") from error
        width, height = picture.size
        scale = side / min(width, height)
        picture = picture.resize(
            (max(side, round(width * scale)), max(side, round(height * scale))), Image.Resampling.LANCZOS
        )
        left, top = (int(rng.integers(0, room + 1)) for room in (picture.width - side, picture.height - side))
        picture = picture.crop((left, top, left + side, top + side))
        if self.random_flip and rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            left = round(width * scale) - side - left
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float().div(127.5).sub(1)
        return {"pixels": pixels, "text": example.text, "original_size": (height, width), "corner": (top, left)}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: pixels (batch, 3, side, side), the rest as lists."""
    return {"pixels": torch.stack([row["pixels"] for row in rows])} | {
        key: [row[key] for row in rows] for key in ("text", "original_size", "corner")
    }


class Turns(Sampler[list[tuple[int, int]]]):
    """Which examples each step of each process sees: every epoch a new order, drawn from the seed.

    Computed from the step's number alone, so a run resumes in the middle of an epoch without saving anything.
    """

    def __init__(
        self, examples: int, batch: int, seed: int, first: int, last: int, process: int = 0, processes: int = 1
    ) -> None:
        self.examples, self.batch, self.seed, self.first, self.last = examples, batch, seed, first, last
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, torch.empty(0)
        for step in range(self.first, self.last):
            place = (step * self.processes + self.process) * self.batch
            turns = []
            for position in range(place, place + self.batch):
                if position // self.examples != epoch:
                    epoch = position // self.examples
                    order = torch.randperm(
                        self.examples, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    )
                turns.append((int(order[position % self.examples]), position))
            yield turns
