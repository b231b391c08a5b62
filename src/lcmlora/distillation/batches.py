"""What the steps learn from: pictures or prompts, with what is computed of each, from the cache where it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from . import paths
from .cache import Entry, Store, digest
from .config import DistillConfig
from .data import Dataset, Pictures, ResumableBatchSampler, bucket_sizes, collate
from .draws import seed_of
from .objectives import Batch, needs_paths
from .teacher import Conditions, Teacher, Text

Key = tuple[int, int]
"""(index of the example, its turn: its place in the run's stream)."""


class Step(NamedTuple):
    """One micro step's batch, and where its examples stand in the run's stream."""

    batch: Batch
    turns: list[int]


class Batches:
    """The run's batches, for any stretch of its steps.

    Args:
        teacher: what encodes and draws.
        dataset: pictures with captions, or prompts alone.
        config: the run's settings.
        output: the run's folder, which holds the cache where `cache_dir` names no other.
        accelerator: of the run.
        progress: show progress bars.

    Attributes:
        seconds: what computing the cache took.
    """

    def __init__(
        self, teacher: Teacher, dataset: Dataset, config: DistillConfig, output: Path, accelerator: Any, progress: bool
    ) -> None:
        self.teacher, self.dataset, self.config = teacher, dataset, config
        self.accelerator, self.progress, self.seconds = accelerator, progress, 0.0
        self.root = Path(config.cache_dir).expanduser() if config.cache_dir else output / "cache"
        self.grid = paths.grid()
        self.pictures = self._pictures() if dataset.pictures else None
        pipe, encoders = teacher.pipe, ("text_encoder", "text_encoder_2")
        text = [pipe.config.get("force_zeros_for_empty_prompt"), *(getattr(pipe, name, None) for name in encoders)]
        text += _vocabulary(pipe)
        self._texts = self._store("texts", *text)
        self._latents = self._store("latents", pipe.vae)
        self._paths = self._store(
            "paths", paths.SOLVER, self.grid, *text, teacher.unet, teacher.solver.alphas_cumprod,
            teacher.solver.prediction_type, config.w, teacher.latents_shape(),
        )  # fmt: skip
        self._empty = teacher.encode_text([""])[1]

    def _pictures(self) -> Pictures:
        config, side = self.config, self.teacher.side
        buckets = bucket_sizes(side) if config.buckets else None
        examples = self.dataset.examples
        return Pictures(examples, side, config.random_flip, config.seed, config.center_crop, buckets)

    def _store(self, kind: str, *made_by: Any) -> Store:
        return Store(self.root, kind, made_by, self.config.cache_limit)

    # -- what is computed once ----------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Compute what the run's objectives need and the cache has not.

        Raises:
            DataError: there is no room for it, or a picture can't be read.
        """
        examples, config = self.dataset.examples, self.config
        needed = [needs_paths(name, config) for name, *_ in config.stages]
        if config.cache or any(needed) or self.pictures is None:
            self.seconds += self.embed([example.text for example in examples])
        if any(needed) or self.pictures is None:
            self.seconds += self.draw(self._prompts)
        if config.cache and self.pictures is not None and not all(needed):
            self.seconds += self._fill(self._latents, self._latents_keys, self._encode)

    def _fill(self, store: Store, keys: list[str], make: Callable[[list[int]], list[Entry]], batch: int = 0) -> float:
        batch = batch or self.config.batch_size
        return store.fill(keys, make, batch=batch, accelerator=self.accelerator, progress=self.progress)

    def embed(self, prompts: Sequence[str]) -> float:
        """Keep the embeddings of prompts; returns the seconds that it took."""
        unique = list(dict.fromkeys(prompts))

        def make(places: list[int]) -> list[Entry]:
            text, _ = self.teacher.encode_text([unique[i] for i in places])
            return [
                {"embeds": text.embeds[row]} | ({} if text.pooled is None else {"pooled": text.pooled[row]})
                for row in range(len(places))
            ]

        return self._fill(self._texts, [digest(prompt) for prompt in unique], make)

    @cached_property
    def _prompts(self) -> list[tuple[str, int]]:
        """Each prompt with a number for each path of it: a prompt that comes twice has two."""
        counts: dict[str, int] = {}
        named = []
        for example in self.dataset.examples:
            for _ in range(self.config.paths):
                named.append((example.text, counts.get(example.text, 0)))
                counts[example.text] = named[-1][1] + 1
        return named

    def draw(self, prompts: Sequence[tuple[str, int]]) -> float:
        """Keep the teacher's paths of (prompt, number); returns the seconds that it took. The prompts are embedded."""

        def make(places: list[int]) -> list[Entry]:
            noise = torch.stack([self.noise(*prompts[i]) for i in places]).to(self.teacher.device)
            drawn = paths.draw(self.teacher, noise, self.cached([prompts[i][0] for i in places]))
            return [{"path": path} for path in drawn.half()]

        return self._fill(self._paths, [self._path_key(*prompt) for prompt in prompts], make)

    def _path_key(self, prompt: str, number: int) -> str:
        return digest(prompt, number, self.config.seed)

    def noise(self, prompt: str, number: int) -> torch.Tensor:
        """Where the path of a prompt begins."""
        generator = torch.Generator().manual_seed(seed_of("path", self.config.seed, prompt, number))
        return torch.randn(self.teacher.latents_shape(), generator=generator, dtype=torch.float32)

    def path(self, prompt: str, number: int) -> torch.Tensor:
        """A kept path, float32."""
        return self._paths[self._path_key(prompt, number)]["path"].float()

    @cached_property
    def _latents_keys(self) -> list[str]:
        """A key for each view of each picture, made of its bytes and of what decides the crop."""
        assert self.pictures is not None
        config, keys = self.config, []
        for index, example in enumerate(self.dataset.examples):
            for view in range(config.views):
                chance = (config.seed, index, view, config.random_flip, config.center_crop)
                keys.append(digest(example.content, self.pictures.size(index), chance))
        return keys

    def _encode(self, places: list[int]) -> list[Entry]:
        assert self.pictures is not None
        rows = [self.pictures[divmod(place, self.config.views)] for place in places]
        latents: dict[int, Entry] = {}
        for shape in {row["pixels"].shape for row in rows}:
            same = [i for i, row in enumerate(rows) if row["pixels"].shape == shape]
            encoded = self.teacher.encode_pictures(torch.stack([rows[i]["pixels"] for i in same]))
            latents.update(
                (i, {"z": z, "sizes": torch.tensor(_sizes(rows[i]))}) for i, z in zip(same, encoded, strict=True)
            )
        return [latents[i] for i in range(len(rows))]

    # -- what the steps get -------------------------------------------------------------------------------------------

    def of(self, objective: str, first: int, last: int) -> Iterator[Step]:
        """This process's batches of the micro steps from `first` to before `last`."""
        config, from_paths = self.config, needs_paths(objective, self.config)
        pictured = self.pictures is not None and not from_paths
        sampler = ResumableBatchSampler(
            len(self.dataset.examples), config.batch_size, config.seed, first, last,
            self.accelerator.process_index, self.accelerator.num_processes,
            self.pictures.buckets_of if self.pictures is not None and pictured else None,
        )  # fmt: skip
        if pictured and not config.cache:
            assert self.pictures is not None
            loader = DataLoader(self.pictures, batch_sampler=sampler, collate_fn=collate, num_workers=config.workers)
            for rows in loader:
                yield Step(self._live(rows), list(rows["turn"]))
            return
        for keys in sampler:
            yield Step(self._kept(keys) if pictured else self._of_paths(keys), [turn for _, turn in keys])

    def _live(self, rows: dict[str, Any]) -> Batch:
        text, empty = self.teacher.encode_text(rows["text"])
        sizes = [_sizes(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]
        return Batch(self.teacher.conditions(text, empty, sizes), self.teacher.encode_pictures(rows["pixels"]))

    def _kept(self, keys: list[Key]) -> Batch:
        count, views = len(self.dataset.examples), self.config.views
        chosen = [self._latents_keys[index * views + turn // count % views] for index, turn in keys]
        entries = [self._latents[key] for key in chosen]
        conditions = self.cached(
            [self.dataset.examples[index].text for index, _ in keys], [entry["sizes"].tolist() for entry in entries]
        )
        return Batch(conditions, torch.stack([entry["z"] for entry in entries]).to(self.teacher.device))

    def _of_paths(self, keys: list[Key]) -> Batch:
        count, each = len(self.dataset.examples), self.config.paths
        chosen = [self._prompts[index * each + turn // count % each] for index, turn in keys]
        path = torch.stack([self.path(*prompt) for prompt in chosen]).to(self.teacher.device)
        return Batch(self.cached([prompt for prompt, _ in chosen]), path[:, -1], path, self.grid)

    def cached(self, prompts: Sequence[str], sizes: Sequence[Sequence[int]] | None = None) -> Conditions:
        """What the UNet is told for prompts that were embedded."""
        kept = [self._texts[digest(prompt)] for prompt in prompts]
        pooled = torch.stack([entry["pooled"] for entry in kept]) if "pooled" in kept[0] else None
        return self.teacher.conditions(
            Text(torch.stack([entry["embeds"] for entry in kept]), pooled), self._empty, sizes
        )


def _sizes(row: dict[str, Any]) -> list[int]:
    """SDXL's original size, crop corner and target size."""
    return [*map(int, row["original_size"]), *map(int, row["crop_top_left"]), *row["pixels"].shape[-2:]]


def _vocabulary(pipe: Any) -> list[Any]:
    """The tokens that were added to a pipe's tokenizers, such as textual inversions, each with its embedding."""
    found: list[Any] = []
    for names in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        tokenizer, encoder = (getattr(pipe, name, None) for name in names)
        if tokenizer is not None and encoder is not None:
            added = sorted(tokenizer.get_added_vocab().items())
            found += [added, encoder.get_input_embeddings().weight[[number for _, number in added]]]
    return found
