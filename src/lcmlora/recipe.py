"""How a few-step LoRA has to be driven: its scheduler, steps, guidance and the arguments of a call. A table.

Each entry is from notes of the file's card; docs/recipes.md names the cards, and what is inferred. Nothing else in
the package knows a recipe by its name: a new one is a new entry here, or one that a user registers.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import base as bases
from .base import Base
from .errors import BaseModelError, brief, near_match

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class LoraSource:
    """Where a recipe's LoRA for one base is.

    Args:
        lora: a repository of the hub, a folder or a file.
        weight_name: the file's name inside the repository or folder, where it is not diffusers' usual one.
        rank: the rank of that LoRA, where it is known.
        weight: what it counts with, where that is not the recipe's.
        licence: its licence, where that is not the recipe's.
    """

    lora: str
    weight_name: str | None = None
    rank: int | None = None
    weight: float | None = None
    licence: str | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a few-step LoRA is driven.

    Args:
        name: what `accelerate(recipe=...)` takes. What stands before the first "-" is looked for in file names.
        title: the kind of LoRA in words, with its article.
        scheduler: the name of a scheduler class of diffusers.
        settings: what that scheduler needs beside the pipe's own betas and prediction type.
        steps: `num_inference_steps` where a call passes none.
        within: the least and the most steps that the file was made for; equal for a file of one number of steps.
        good_steps: above this quality falls again; None where nothing says so.
        guidance: `guidance_scale` where a call passes none.
        guidance_range: where the file works; 1 and below is off.
        weight: what the LoRA counts with where `accelerate(weight=)` is not given.
        timesteps: the call's `timesteps`, for as many steps as there are.
        eta: the call's `eta`; None leaves the pipeline's.
        covers: whether the file has to cover all layers that an LCM-LoRA adapts, or may cover any of them.
        motion: whether it is made for UNets with motion modules (AnimateDiff's).
        beta_schedule: the noise schedule that it needs, where that is not the pipe's own.
        licence: what the source gives; None where it gives none.
        commercial: whether that licence allows commercial use; None where nobody says.
        of_bases: whether a base's own `lora` is a file of this recipe.
        likeness: what it does to identity adapters (IP-Adapter FaceID, InstantID), where that is known to be bad.
        note: what else has to be said of it.
        loras: its files, by the base's name.
    """

    name: str
    title: str
    scheduler: str = "LCMScheduler"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 4
    within: tuple[int, int] = (1, 50)
    good_steps: int | None = None
    guidance: float = 1.0
    guidance_range: Range = (1.0, 1.0)
    weight: float = 1.0
    timesteps: tuple[int, ...] = ()
    eta: float | None = None
    covers: bool = False
    motion: bool = False
    beta_schedule: str | None = None
    licence: str | None = None
    commercial: bool | None = None
    of_bases: bool = False
    likeness: str | None = None
    note: str = ""
    loras: Mapping[str, LoraSource] = dataclasses.field(default_factory=dict)

    @property
    def bound(self) -> bool:
        """Whether its file is made for one number of steps."""
        return self.within[0] == self.within[1]

    @property
    def steps_in_words(self) -> str:
        """The steps it is made for: "4", "1 to 8"."""
        least, most = self.within
        return f"{least}" if self.bound else f"{least} to {most}"

    @property
    def guidance_in_words(self) -> str:
        """Where guidance works: "0 to 1 (off)", "1 to 2"."""
        low, high = self.guidance_range
        return "0 to 1 (off)" if high <= 1 else f"{low:g} to {high:g}"

    def on(self, base: Base | None) -> Recipe:
        """The recipe for a base that may bring its own file and noise schedule."""
        if base is None or not (base.beta_schedule or (base.lora and self.of_bases)):
            return self
        own = {base.name: LoraSource(base.lora, base.weight_name, base.rank, base.weight)} if base.lora else {}
        loras = {**self.loras, **own} if self.of_bases else self.loras
        return dataclasses.replace(self, loras=loras, beta_schedule=self.beta_schedule or base.beta_schedule)

    def licence_of(self, base: Base | None) -> str:
        """The licence of its file for a base, in words."""
        source = self.loras.get(base.name) if base else None
        return (source and source.licence) or self.licence or "none given by its source"


_TRAILING = {"timestep_spacing": "trailing"}
_PCM = {**_TRAILING, "clip_sample": False, "set_alpha_to_one": False}
_POCKET = LoraSource(str(Path(__file__).parent / "pocket/model/lcm-lora"), rank=8, licence="apache-2.0")
_OPEN: dict[str, Any] = {"licence": "openrail++", "commercial": True}


def _files(pattern: str, **names: str) -> dict[str, LoraSource]:
    """A repository's files by base, of "owner/name file": `names` stand in the place of {}."""
    parts = {base: [part.replace("{}", name) for part in pattern.split()] for base, name in names.items()}
    return {base: LoraSource(place, file[0] if file else None) for base, (place, *file) in parts.items()}


def _hyper(name: str, file: str, steps: int, **changes: Any) -> Recipe:
    made = {"scheduler": "DDIMScheduler", "settings": _TRAILING, "within": (steps, steps), **changes}
    loras = _files(f"ByteDance/Hyper-SD Hyper-{{}}-{file}-lora.safetensors", sdxl="SDXL", sd15="SD15")
    return Recipe(name, f"a Hyper-SD LoRA ({file.replace('step', ' step')})", steps=steps, loras=loras, **made)


def _hyper_cfg(n: int) -> Recipe:
    guided = {"guidance": 5.0, "guidance_range": (5.0, 8.0), "note": "its card names no scheduler: DDIM is inferred"}
    return _hyper(f"hyper-{n}-cfg", f"{n}steps-CFG", n, **guided)


def _lightning(n: int) -> Recipe:
    loras = _files(f"ByteDance/SDXL-Lightning sdxl_lightning_{n}step_lora.safetensors", sdxl="")
    title, scheduler = f"a Lightning LoRA ({n} steps)", "EulerDiscreteScheduler"
    return Recipe(f"lightning-{n}", title, scheduler, _TRAILING, n, (n, n), loras=loras, **_OPEN)


def _pcm(name: str, kind: str, n: int, guidance: float, limits: Range, note: str = "") -> Recipe:
    file = f"wangfuyun/PCM_Weights {{}}/pcm_{{}}_{kind}_{n}step_converted.safetensors"
    made: dict[str, Any] = {"guidance": guidance, "guidance_range": limits, "note": note}
    title, loras = f"a PCM LoRA ({kind}, {n} steps)", _files(file, sdxl="sdxl", sd15="sd15")
    return Recipe(name, title, "DDIMScheduler", _PCM, n, (n, n), loras=loras, **made)


_LIKENESS = (
    "face similarity was 0.55 at 8 LCM steps, 0.80 with Hyper-SD's 4 steps, 0.78 undistilled (one published "
    "comparison, 2026-06). recipe='hyper-4' serves better; with LCM, 8 steps at guidance 1.5 to 1.8"
)
LCM = Recipe(  # the diffusers docs, latent_consistency_models.md: 1 to 2, as it has guidance distilled in already
    "lcm",
    "an LCM-LoRA",
    guidance_range=(1.0, 2.0),
    covers=True,
    of_bases=True,
    likeness=_LIKENESS,
    **_OPEN,
    good_steps=8,  # PCM paper, tables 1 to 7: FID of LCM on SDXL 11.2 at 4 steps, 23.3 at 16
    loras={
        **_files("latent-consistency/lcm-lora-{}", **{"sd15": "sdv1-5", "sdxl": "sdxl", "ssd-1b": "ssd-1b"}),
        "vega": LoraSource("segmind/Segmind-VegaRT", rank=128, licence="apache-2.0"),
        "pocket": _POCKET,
    },
)
"""The default, and what the package's name promises."""
_TABLE = (
    LCM,
    Recipe(
        "animatelcm",
        "an AnimateLCM LoRA",
        steps=6,
        good_steps=8,
        guidance=2.0,
        guidance_range=(1.0, 2.0),
        weight=0.8,
        covers=True,
        motion=True,
        beta_schedule="linear",
        loras=_files("wangfuyun/AnimateLCM AnimateLCM_sd15_t2v_lora.safetensors", sd15=""),
    ),
    Recipe(
        "tcd",
        "a TCD LoRA",
        "TCDScheduler",
        eta=0.3,
        licence="mit",
        commercial=True,
        loras={**_files("h1t/TCD-{}-LoRA", sdxl="SDXL", sd15="SD15", sd2="SD21-base"), "pocket": _POCKET},
    ),
    _hyper("hyper-1", "1step", 1, scheduler="TCDScheduler", settings={}, eta=1.0, within=(1, 8)),
    *(_hyper(f"hyper-{n}", f"{n}steps", n) for n in (2, 4, 8)),
    *map(_hyper_cfg, (8, 12)),
    *map(_lightning, (2, 4, 8)),
    Recipe(
        "dmd2",
        "a DMD2 LoRA",
        within=(4, 8),
        guidance_range=(1.0, 1.8),
        timesteps=(999, 749, 499, 249),
        licence="cc-by-nc-4.0",
        commercial=False,
        note="a weight of 0.7 is seen with community models",
        loras=_files("tianweiy/DMD2 dmd2_sdxl_4step_lora_fp16.safetensors", sdxl=""),
    ),
    *(_pcm(f"pcm-{n}", "smallcfg", n, 1.0, (1.0, 2.0)) for n in (2, 4, 8, 16)),
    _pcm("pcm-normalcfg-4", "normalcfg", 4, 3.0, (2.5, 3.5)),
    _pcm("pcm-normalcfg-8", "normalcfg", 8, 4.5, (3.0, 6.0)),
    _pcm("pcm-normalcfg-16", "normalcfg", 16, 4.5, (3.0, 6.0), "its guidance is inferred from the 8-step file's"),
    Recipe(
        "pcm-lcm",
        "a PCM LoRA (LCM's way)",
        within=(4, 4),
        loras=_files("wangfuyun/PCM_Weights sdxl/pcm_sdxl_lcmlike_lora_converted.safetensors", sdxl=""),
    ),
    Recipe(
        "flash",
        "a Flash Diffusion LoRA",
        settings=_TRAILING,
        within=(4, 4),
        licence="cc-by-nc-nd-4.0",
        commercial=False,
        loras=_files("jasperai/flash-{}", sdxl="sdxl", sd15="sd"),
    ),
    Recipe(
        "tdd",
        "a TDD LoRA",
        "TCDScheduler",
        within=(4, 8),
        guidance=1.7,
        guidance_range=(1.0, 2.0),
        eta=0.2,
        licence="apache-2.0",
        commercial=True,
        note="untested: TCDScheduler in the place of a scheduler of its own",
        loras=_files("RED-AIGC/TDD sdxl_tdd_lora_weights.safetensors", sdxl=""),
    ),
)
_registered: dict[str, Recipe] = {recipe.name: recipe for recipe in _TABLE}


def recipes() -> tuple[Recipe, ...]:
    """Every recipe that `accelerate(recipe=...)` takes, the user's own included."""
    return tuple(_registered.values())


def by_name(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        BaseModelError: there is none.
    """
    if not isinstance(name, str) or name not in _registered:
        near = near_match(name, _registered) if isinstance(name, str) else ""
        meant = f" Is {near!r} meant?" if near else ""
        known = ", ".join(map(repr, _registered))
        raise BaseModelError(f"recipe={brief(name)} is not known.{meant} Give one of {known}, or register your own.")
    return _registered[name]


def register(entry: Base | Recipe | LoraSource, *, recipe: str | None = None, base: str | None = None) -> None:
    """Add a base or recipe of one's own, or a file for known ones. `unregister` undoes the former two.

    Args:
        entry: the base, the recipe, or the file.
        recipe: for a file: the recipe that it is of.
        base: for a file: the base that it is for. It takes the place of the one that the recipe had there.

    Raises:
        BaseModelError: the name is taken, a base of the same structure is there, or the recipe can't be driven.
    """
    if isinstance(entry, LoraSource):
        known, name = by_name(recipe or ""), bases.by_name(base or "").name
        _registered[known.name] = dataclasses.replace(known, loras={**known.loras, name: entry})
        return
    if not isinstance(entry, Base | Recipe):
        raise BaseModelError(f"register takes a Base, a Recipe or a LoraSource, not {brief(entry)}.")
    if entry.name in _registered or (isinstance(entry, Recipe) and entry.name in {b.name for b in bases.bases()}):
        raise BaseModelError(f"{entry.name!r} can't be registered: a recipe or base has that name already.")
    if isinstance(entry, Base):
        return bases.register(entry)
    _check(entry)
    _registered[entry.name] = entry


def _check(recipe: Recipe) -> None:
    """Refuse a recipe that no pipe could be driven by."""
    import diffusers

    scheduler = getattr(diffusers, recipe.scheduler, None)
    takes = inspect.signature(scheduler).parameters if scheduler and hasattr(scheduler, "set_timesteps") else {}
    if odd := sorted(recipe.settings.keys() - takes.keys()) or not takes:
        raise BaseModelError(
            f"recipe {recipe.name!r}: diffusers has no scheduler {recipe.scheduler!r}"
            + (f" that takes {', '.join(odd)}." if isinstance(odd, list) else ".")
        )
    (least, most), (low, high) = recipe.within, recipe.guidance_range
    if not 1 <= least <= recipe.steps <= most <= 50 or not low <= max(recipe.guidance, 1.0) <= high:
        raise BaseModelError(f"recipe {recipe.name!r}: its steps or guidance lie outside its own range.")


def unregister(name: str) -> Base | Recipe:
    """Take a base or recipe out of its table again; returns it.

    Raises:
        BaseModelError: there is none of that name.
    """
    return _registered.pop(name) if name in _registered else bases.unregister(name)


_FAMILIES = {recipe.name.partition("-")[0] for recipe in _TABLE}


def told_apart(recipe: Recipe, name: str) -> str | None:
    """What a file's name says against its being a file of this recipe; None where nothing does."""
    found = {family for family in _FAMILIES if re.search(rf"(?<![a-z]){family}(?![a-z])", name, re.IGNORECASE)}
    if found and found.isdisjoint(recipe.name.split("-")):
        return f"its name says {' and '.join(sorted(found))}"
    steps = re.search(r"(?<!\d)(\d+)[-_ ]?steps?(?![a-z])", name, re.IGNORECASE)
    if steps and recipe.bound and int(steps[1]) != recipe.steps:
        return f"its name says {steps[1]} steps"
    return None
