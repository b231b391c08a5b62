"""What a picture's record says, so that another process can tell the picture, or make it again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import pictures
from ..devices import device_of, hardware
from ..layers import unet_of
from ..lora.sources import Source
from ..parameters import as_weight
from ..pictures import file_digest
from ..transition.records import PipeRecord, pipe_record_of, stands_for
from ..transition.snapshot import COMPONENTS
from ..transition.target import Style, is_strength
from .rows import Row

FORMAT = 1
_BESIDE = ("controlnet", "adapter", "image_encoder", "motion_adapter")
"""What else a picture is drawn with."""
_NOT_SEEN = ("steps", "guidance", "fuse", "compile")
"""What tells no picture from another: the settings have the first two, the others change the last bits at most."""


class MadeBy:
    """What the pictures of a pipe are made by, apart from their rows.

    Args:
        pipe: as it is when the pictures are asked for.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe, self._record = pipe, pipe_record_of(pipe)
        found = pictures.provenance(pipe)
        self._status = found["status"] or {"styles": {}, "lora": None}  # None without a UNet
        self._active = _Active(self._status["styles"], {n: one["sha256"] for n, one in found["loras"].items()})
        mine = self._record.unet.applied if self._record and not self._record.baked else None
        lora = found["loras"].get(mine.target.adapter_name, {}) if mine else {}
        self._facts = {
            "pipeline": found["pipeline"],
            "model": model_of(pipe),
            "dtype": str(getattr(unet_of(pipe), "dtype", None) or pipe.dtype).removeprefix("torch."),
            "scheduler": scheduler_of(pipe),
            "fingerprint": fingerprint(pipe),
            "accelerated": _accelerated(pipe, self._record) if self._record else None,
        }
        how = {name: value for name, value in (self._facts["accelerated"] or {}).items() if name not in _NOT_SEEN}
        self._look(found)
        self._key_facts = {**self._facts, "accelerated": how, "lora": lora.get("sha256") or self._status["lora"]}
        del self._key_facts["model"]  # a place; the fingerprint tells models
        if self._record is None:
            self._key_facts["weights"] = found["weights"]

    def look(self) -> None:
        """See the pipe as it is now, which later records tell of: its styles may have changed."""
        self._look(pictures.provenance(self._pipe))

    def _look(self, now: Mapping[str, Any]) -> None:
        device = device_of(self._pipe)
        loras = _with_sources(now["loras"], self._record)
        self._now = {**now, **self._facts, "loras": loras, "device": device.type, "hardware": hardware(device)}

    def key(self, row: Row, settings: Mapping[str, Any]) -> str:
        """What tells this row's picture from others: all that determines it, versions and places left out."""
        files = {name: file_digest(path) for name, path in row.files.items()}
        styles = self._active.styles if row.styles is None else self._active.of(row.styles, self._record)
        asked = {"settings": settings, "seed": row.seed, "files": files, "fit": row.fit, "styles": styles}
        return pictures.key({**asked, **self._key_facts})

    def settings(self, row: Row, takes: Any) -> dict[str, Any]:
        """The call's arguments, with the steps and guidance that it has by default."""
        policy = self._record.settings.policy if self._record else None
        settings = dict(row.call)
        own = {takes.steps: policy.steps, takes.guidance: policy.guidance} if policy else {}
        if {"timesteps", "sigmas"} & settings.keys():
            own.pop(takes.steps, None)
        for name in (takes.steps, takes.guidance):
            value = own.get(name, takes.defaults.get(name)) if name else None
            if name and isinstance(value, int | float):
                settings.setdefault(name, value)
        return settings

    def record(self, row: Row, settings: Mapping[str, Any], batch: int, key: str) -> dict[str, Any]:
        """What stands in the picture. The pipe has the row's styles, and was looked at with them."""
        policy = self._record.settings.policy if self._record else None
        shown = {name: value for name, value in settings.items() if name != "prompt"}
        return {
            "format": FORMAT,
            "key": key,
            "prompt": settings.get("prompt"),
            "seed": row.seed,
            "settings": shown,
            "ran": dict(policy.ran) if policy else {},
            "files": {n: {"path": str(path), "sha256": file_digest(path)} for n, path in row.files.items()},
            "fit": row.fit,
            "in_memory": sorted(name for name, value in settings.items() if not _plain(value)),
            "batch": batch,
            **self._now,
        }


class _Active:
    """The styles that count now, each with its file's digest and weight."""

    def __init__(self, styles: Mapping[str, Any], digests: Mapping[str, str | None]) -> None:
        self._digests = digests
        self.styles = {name: [digests.get(name), _rounded(weight)] for name, weight in styles.items()}

    def of(self, wanted: Mapping[str, Any], record: PipeRecord | None) -> dict[str, Any]:
        """The same of styles that are asked for."""
        target = record.unet.applied.target if record and record.unet.applied else None
        assert target is not None, "or no styles could be asked for"
        found: dict[str, Any] = {}
        for name, one in wanted.items():
            weight = one if is_strength(one) else as_weight(one)
            source = target.sources.get(name)
            if weight is None:
                style = Style.of(one)
                weight, source = style.weight, style.origin
            digest = self._digests.get(name) if source is None else pictures.sha256(source.find(target.hub))
            if weight:
                found[name] = [digest, _rounded(weight)]
        return found


def _rounded(weight: Any) -> Any:
    number = as_weight(weight)
    return weight if number is None else round(number, 6)


def _accelerated(pipe: Any, record: PipeRecord) -> dict[str, Any]:
    """How the pipe was accelerated, as arguments of `accelerate`."""
    settings = record.settings
    if record.baked:
        return {"baked": True, "enforce_inference_steps": settings.policy.enforce_inference_steps}
    applied = record.unet.applied
    assert applied is not None
    vae = settings.vae if settings.vae is None or isinstance(settings.vae, str | os.PathLike) else "a module"
    return {
        "recipe": applied.recipe.name,
        "weight": applied.weight,
        "fuse": applied.target.fuse,
        "compile": applied.target.compile,
        "vae": vae if vae is None else os.path.abspath(vae) if os.path.exists(vae) else os.fspath(vae),
        "vae_digest": None if vae is None else vae_of(pipe),
        "steps": settings.policy.steps,
        "guidance": settings.policy.guidance,
        "enforce_inference_steps": settings.policy.enforce_inference_steps,
    }


def fingerprint(pipe: Any) -> str:
    """A digest of what no LoRA touches: the models' norms and biases, without what lcmlora put in. A fine-tune has
    others.
    """
    return _digest_of(*(getattr(pipe, name, None) for name in (*COMPONENTS, *_BESIDE)), _own_vae(pipe))


def vae_of(pipe: Any) -> str:
    """The same of the VAE that is in the pipe now."""
    return _digest_of(getattr(pipe, "vae", None))


def _own_vae(pipe: Any) -> Any:
    record, now = pipe_record_of(pipe), getattr(pipe, "vae", None)
    return record.found.vae if record is not None and now is record.made.vae else now


def _digest_of(*models: Any) -> str:
    found = []
    for model in models:
        parameters = model.named_parameters() if isinstance(model, nn.Module) else ()
        own = [p.detach() for name, p in parameters if p.ndim == 1 and len(p) and not _ADDED.search(name)]
        some = [vector[:: max(1, len(vector) // 8)].double() for vector in own if not vector.is_meta]
        found += [torch.cat(some).cpu()] if some else []
    return pictures.key({"vectors": found})


_ADDED = re.compile(r"lora_|modules_to_save")


def model_of(pipe: Any) -> str | None:
    """What a pipe was loaded from; a folder by its absolute path."""
    name = getattr(pipe, "name_or_path", None)
    return os.path.abspath(name) if name and os.path.exists(name) else str(name) if name else None


def scheduler_of(pipe: Any) -> dict[str, Any] | None:
    """The scheduler of the pipe as it is without lcmlora."""
    scheduler = stands_for(getattr(pipe, "scheduler", None))
    if scheduler is None or not hasattr(scheduler, "to_json_string"):
        return None
    config = {key: value for key, value in json.loads(scheduler.to_json_string()).items() if not key.startswith("_")}
    return {"class": type(scheduler).__name__, "config": config}


def _with_sources(loras: Mapping[str, Any], record: PipeRecord | None) -> dict[str, Any]:
    """The LoRAs' files with where they were asked for: a repository outlives the cache that its file lies in."""
    applied = record.unet.applied if record and not record.baked else None
    if applied is None:
        return dict(loras)
    sources: dict[str, Source] = {applied.target.adapter_name: applied.target.lora, **applied.target.sources}
    return {
        name: {**one, "source": _place(sources.get(name)), "few_step": name == applied.target.adapter_name}
        for name, one in loras.items()
    }


def _place(source: Source | None) -> dict[str, Any] | None:
    if source is None or not isinstance(source.where, str):
        return None
    return {
        "where": source.where,
        "weight_name": source.weight_name,
        "subfolder": source.subfolder,
        "revision": source.revision,
    }


def _plain(value: Any) -> bool:
    """Whether JSON gives a value back."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(_plain(one) for one in value)
    return value is None or isinstance(value, bool | int | float | str)
