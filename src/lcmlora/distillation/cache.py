"""What is computed once and kept: safetensors shards, each entry under a key made of what it was computed from.

A store is a folder for one kind of thing made by one encoder with one set of settings. Its shards can be written by
many processes and runs at once: each is whole when it gets its name, which is made of its keys.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from ..errors import DataError
from ..layers import ModuleIndex
from ..transition.records import parameters_of, views
from ..writing import require_writable, whole

logger = logging.getLogger(__name__)
SHARD_ENTRIES = 256
SHARD_BYTES = 64 * 2**20
GB = 1e9
Entry = dict[str, torch.Tensor]


def digest(*parts: Any) -> str:
    """A short name for anything: modules by their configs and sampled weights, pictures by their bytes."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            config: Any = getattr(part, "config", None)
            known = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
            total.update(repr(sorted((k, repr(v)) for k, v in known.items() if not k.startswith("_"))).encode())
            for name, view in sorted(views(parameters_of(ModuleIndex.of(part))).items()):
                total.update(f"{name} {view.dtype}".encode() + view.detach().float().cpu().numpy().tobytes())
        elif isinstance(part, torch.Tensor):
            total.update(f"{part.dtype} {tuple(part.shape)}".encode() + part.detach().float().cpu().numpy().tobytes())
        else:
            total.update(part if isinstance(part, bytes) else repr(part).encode())
        total.update(b"|")
    return total.hexdigest()[:24]


class Store:
    """Entries of one kind.

    Args:
        root: the cache's folder.
        kind: "latents", "texts" or "paths".
        made_by: everything that decides what an entry is, apart from its key.
        limit: GB that the whole cache may take.

    Attributes:
        folder: where its shards are.
    """

    def __init__(self, root: Path, kind: str, made_by: Sequence[Any], limit: float) -> None:
        self.root, self.kind, self.limit = root, kind, limit
        self.folder = root / f"{kind}-{digest(*made_by)}"
        self._open: dict[Path, Any] = {}
        self._where: dict[str, tuple[Path, list[str]]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look for shards that came since. One that is damaged is as good as missing."""
        for file in sorted(self.folder.glob("*.safetensors")):
            if file in self._open:
                continue
            try:
                opened = safe_open(file, "pt")
                keys: list[str] = list(opened.keys())  # type: ignore[no-untyped-call]
            except (SafetensorError, OSError) as error:
                logger.warning("%s is damaged (%s): what it held is computed anew.", file, error)
                continue
            self._open[file] = opened
            fields: dict[str, list[str]] = {}
            for name in keys:
                key, _, field = name.partition("/")
                fields.setdefault(key, []).append(field)
            self._where.update((key, (file, names)) for key, names in fields.items())

    def missing(self, keys: Sequence[str]) -> list[str]:
        """The keys that have no entry, each once."""
        return [key for key in dict.fromkeys(keys) if key not in self._where]

    def __getitem__(self, key: str) -> Entry:
        """The tensors of an entry.

        Raises:
            DataError: somebody has deleted or damaged its shard.
        """
        file, fields = self._where[key]
        try:
            return {field: self._open[file].get_tensor(f"{key}/{field}") for field in fields}
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file} can't be read any more ({error}): run it again, it is made anew.") from error

    def fill(
        self,
        wanted: Sequence[str],
        make: Callable[[list[int]], list[Entry]],
        *,
        batch: int,
        accelerator: Any,
        progress: bool,
    ) -> float:
        """Compute what is missing, each process its share.

        Args:
            wanted: the keys.
            make: gives the entries of some places in `wanted`.
            batch: how many at once.
            accelerator: of the run.
            progress: show a progress bar.

        Returns:
            Seconds that it took.

        Raises:
            DataError: there is not room for it within the limit, or on the disk.
        """
        began, place = time.monotonic(), {key: i for i, key in reversed(list(enumerate(wanted)))}
        todo = self.missing(wanted)
        accelerator.wait_for_everyone()  # all have looked at the same shards
        mine = [place[key] for key in todo[accelerator.process_index :: accelerator.num_processes]]
        shard: dict[str, Entry] = {}
        bar = tqdm(total=len(mine), desc=f"caching {self.kind}", disable=not (progress and mine), unit="it")
        try:
            for begin in range(0, len(mine), batch):
                places = mine[begin : begin + batch]
                entries = make(places)
                if not begin:
                    self._tell(entries[0], len(todo), (time.monotonic() - began) / len(places), len(mine), bar)
                shard.update((wanted[i], entry) for i, entry in zip(places, entries, strict=True))
                if len(shard) >= SHARD_ENTRIES or sum(map(_bytes, shard.values())) >= SHARD_BYTES:
                    self._write(shard)
                    shard = {}
                bar.update(len(places))
        finally:
            bar.close()
            if shard:  # after Ctrl-C too: what was computed is kept
                self._write(shard)
        accelerator.wait_for_everyone()
        self.refresh()
        if left := self.missing(wanted):
            raise DataError(f"{len(left)} {self.kind} are missing in {self.folder} after they were computed.")
        return time.monotonic() - began

    def _tell(self, entry: Entry, count: int, seconds: float, mine: int, bar: Any) -> None:
        """Say what is coming, or refuse it where there is no room."""
        size, there = count * _bytes(entry), sum(file.stat().st_size for file in self.root.rglob("*.safetensors"))
        require_writable(self.root)
        self.root.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(self.root).free
        logger.info("%d %s to compute: %.1f MB, about %.0f s", count, self.kind, size / 1e6, seconds * mine)
        bar.set_postfix_str(f"{size / 1e6:.0f} MB in all")
        if size + there > self.limit * GB:
            raise DataError(
                f"{count} {self.kind} take {size / GB:.3g} GB, {self.root} holds {there / GB:.3g} GB already: more "
                f"than cache_limit={self.limit:g}. Raise it, delete what is old there, or give fewer examples."
            )
        if size > room:
            raise DataError(f"{count} {self.kind} take {size / GB:.3g} GB; on {self.root} are {room / GB:.3g} free.")

    def _write(self, shard: dict[str, Entry]) -> None:
        tensors = {
            f"{key}/{field}": t.cpu().contiguous() for key, entry in shard.items() for field, t in entry.items()
        }
        file = self.folder / f"{digest(*sorted(shard))}.safetensors"
        with whole(file) as partial:
            save_file(tensors, partial, metadata={"kind": self.kind, "entries": json.dumps(len(shard))})


def _bytes(entry: Entry) -> int:
    return sum(tensor.nbytes for tensor in entry.values())
