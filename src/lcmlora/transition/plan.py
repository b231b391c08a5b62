"""From a snapshot and a target to what goes into each model, or a refusal. Nothing here changes the pipe."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers

from .. import base as bases
from .. import recipe as recipes
from ..errors import BaseModelError, LoraFileError, LoraMismatchError, PipelineError
from ..layers import ModuleIndex
from ..lora.files import Coverage, LoraInfo, cover, read
from ..lora.merge import FileLora, Lora, Weight, contributions, parameter_of
from ..lora.originals import check_room
from ..lora.sources import LoraFile, Source
from ..recipe import Recipe
from ..warn import warn
from .records import AS_FOUND, Applied, Content, stands_for
from .snapshot import Component, Snapshot, check_rules, identity_adapter, not_in_memory, signs_of_speed
from .target import Target

Files = dict[str, dict[str, FileLora]]
"""The LoRA files of each component, by name."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be done, all of it checked.

    Attributes:
        applied: what the UNet is made to be.
        contents: what goes into each component.
    """

    applied: Applied
    contents: Mapping[str, Content]


def make_plan(snapshot: Snapshot, target: Target, anew: Collection[str] = ()) -> Plan:
    """Check everything that can be checked without touching the pipe.

    Args:
        snapshot: the pipe.
        target: what it shall be.
        anew: the names of the LoRAs whose sources were given just now. The others' files have to be what they were.

    Raises:
        PipelineError, BaseModelError, LoraFileError, LoraMismatchError: see `accelerate`.
    """
    check_rules(snapshot)
    before = snapshot.unet.record.applied if snapshot.unet.record else None
    known = {name: file for name, file in (before.files if before else {}).items() if name not in anew}
    stays = before if target.adapter_name not in anew else None
    recipe, given = _recipe(target, before, stays)
    base = _base(snapshot, target, recipe, before)
    recipe = recipe.on(base)
    same_lcm = stays is not None and (base, recipe) == (stays.base, stays.recipe)
    lcm_file = given or (
        stays.lcm.file if stays and same_lcm else lcm_source(base, recipe, target.lora).find(target.hub)
    )
    lcm = lcm_lora(snapshot.unet.index, base, lcm_file, recipe)
    _check_adapter_name(snapshot, target)
    files: Files = {"unet": {target.adapter_name: lcm}}
    for name in target.sources:
        if name in target.styles:
            known[name] = known.get(name) or target.sources[name].find(target.hub)
            for part, lora in style_loras(snapshot, name, known[name]).items():
                files.setdefault(part, {})[name] = lora
    weight = target.weight if target.weight is not None else _own_weight(base, recipe)
    weights = {**target.styles, target.adapter_name: weight}
    if snapshot.unet.record is None:
        _warn_if_doubtful(snapshot, recipe)
    contents = _contents(snapshot, target, files, weights)
    _check_room(snapshot, contents, target)
    if not same_lcm and target.lora.where is not None and not _is_own(recipe, base, lcm_file):
        _warn_of_name(recipe, lcm_file)
    if recipe.commercial is False and (before is None or before.recipe.name != recipe.name):
        warn(f"{recipe.title}, recipe {recipe.name!r}, is licensed {recipe.licence_of(base)}: no commercial use.")
    target = dataclasses.replace(target, recipe=recipe.name)
    return Plan(Applied(target, base, recipe, lcm, float(weight), known), contents)


def _recipe(target: Target, before: Applied | None, stays: Applied | None) -> tuple[Recipe, LoraFile | None]:
    """The recipe said, or the one that a file of one's own names, else what is there; and that file.

    Raises:
        BaseModelError: there is no such recipe. LoraFileError: the file can't be read.
    """
    if target.lora.where is None:
        return _named(target.recipe or (before.recipe.name if before else recipes.LCM.name), before), None
    file = stays.lcm.file if stays and stays.target.lora == target.lora else target.lora.find(target.hub)
    name = target.recipe or read(file).recipe or (before.recipe.name if before else recipes.LCM.name)
    return _named(name, before), file


def _named(name: str, before: Applied | None) -> Recipe:
    """The recipe of that name; the one that is in use also where it was unregistered since."""
    gone = before is not None and before.recipe.name == name and all(name != one.name for one in recipes.recipes())
    return before.recipe if before is not None and gone else recipes.by_name(name)


def _own_weight(base: bases.Base | None, recipe: Recipe) -> float:
    source = recipe.loras.get(base.name) if base else None
    return recipe.weight if source is None or source.weight is None else source.weight


def _is_own(recipe: Recipe, base: bases.Base | None, file: LoraFile) -> bool:
    """Whether a file is the recipe's own for this base, from this machine: that may be called as it likes."""
    own = recipe.loras.get(base.name) if base else None
    if own is not None and os.path.exists(own.lora):
        with suppress(LoraFileError):  # nobody asked for that one
            return lcm_source(base, recipe, Source.of(None)).find().path == file.path
    return False


def _warn_of_name(recipe: Recipe, file: LoraFile) -> None:
    """Say what in its name or metadata speaks against driving a file so."""
    written = read(file).recipe
    name = f"{Path(file.given).name} {file.path.name if file.path else ''}"
    wrong = f"it names recipe {written!r}" if written not in (None, recipe.name) else None
    if wrong := wrong or (None if written else recipes.told_apart(recipe, name)):
        warn(
            f"{file.label} is driven as {recipe.title}, recipe {recipe.name!r}, and may be none: {wrong}. A few-step "
            "LoRA under another's scheduler or steps gives blurred or burnt pictures; accelerate(recipe=) says which."
        )


def _check_adapter_name(snapshot: Snapshot, target: Target) -> None:
    for component in snapshot.components.values():
        if target.adapter_name in component.found.names:
            raise PipelineError(
                f"adapter_name={target.adapter_name!r}: this pipe has an adapter of that name already; give another."
            )


def _warn_if_doubtful(snapshot: Snapshot, recipe: Recipe) -> None:
    """Warn where the pipe is none that few-step LoRAs are made for, but may work."""
    config = stands_for(snapshot.pipe.scheduler).config
    if config.get("prediction_type", "epsilon") != "epsilon":
        warn(
            f"this pipe predicts {config['prediction_type']!r}; the official LCM-LoRAs were distilled for epsilon, "
            "so pictures may be poor. One distilled from this pipe (lcmlora.distill) is the way out."
        )
    if signs := signs_of_speed(snapshot):
        warn(
            f"this pipe may be a few-step model already ({', '.join(signs)}): an LCM-LoRA on top of Turbo, Lightning, "
            "Hyper or another LCM spoils pictures."
        )
    if recipe.likeness and (adapter := identity_adapter(snapshot)):
        warn(f"this pipe has {adapter}, and {recipe.title} costs likeness: {recipe.likeness}.")


def _base(snapshot: Snapshot, target: Target, recipe: Recipe, before: Applied | None) -> bases.Base | None:
    """The base found and, where one is named, that it is the one. None: a UNet and LoRA of their own."""
    used = before.base if before is not None else None
    has_motion = snapshot.unet.index.has_motion
    if recipe.motion and not has_motion:
        raise BaseModelError(f"recipe={recipe.name!r} is for UNets with motion modules (AnimateDiff), this has none.")
    if used is not None and target.base in ("auto", used.name) and used not in bases.bases():
        return used  # it was unregistered since
    if target.base != "auto":
        return bases.check_named(target.base, snapshot.structure, has_motion)
    found = bases.find_base(snapshot.structure)
    if found is None and target.lora.where is None:
        found = bases.unsupported(snapshot.structure)  # by LCM-LoRAs
        if found is None or found.name not in recipe.loras:
            raise BaseModelError(bases.unknown(snapshot.structure) + _other_recipes(found))
    return found


def lcm_source(base: bases.Base | None, recipe: Recipe, source: Source) -> Source:
    """Where the few-step LoRA asked for, or the recipe's own for this base, is.

    Raises:
        BaseModelError: the recipe's own is asked for, and there is none.
    """
    if source.where is not None:
        return source
    own = recipe.loras.get(base.name) if base else None
    if own is None:
        kind, name = recipe.title.partition(" ")[2], base.name if base else "unknown"
        once = f"lcmlora.register(lcmlora.LoraSource(file), recipe={recipe.name!r}, base={name!r})"
        raise BaseModelError(
            f"base {name!r} has no {kind}; pass lora=, or say once where its file is: {once}.{_other_recipes(base)}"
        )
    return Source.of(own.lora, source.weight_name or own.weight_name, source.subfolder, source.revision)


def _other_recipes(base: bases.Base | None) -> str:
    """What there is for a base."""
    names = [recipe.name for recipe in recipes.recipes() if base and base.name in recipe.loras]
    return f" It has files for recipes {', '.join(map(repr, names))}: pass recipe=." if names else ""


def lcm_lora(index: ModuleIndex, base: bases.Base | None, file: LoraFile, recipe: Recipe = recipes.LCM) -> FileLora:
    """A few-step LoRA; it has to cover what its recipe says, and no other UNet's layers.

    Raises:
        LoraFileError, LoraMismatchError: see `accelerate`.
    """
    info = read(file)
    if info.text_modules:
        raise LoraMismatchError(
            f"{info.describe()} has text-encoder keys, which {recipe.title} has not: is it a style LoRA? Pass styles=."
        )
    coverage = cover("unet", info.modules, index.own)
    notes = (*info.notes, *coverage.notes)
    left_out = [name for name in index.lcm if name not in coverage.pairs]
    missing = left_out if recipe.covers else [] if coverage.pairs else left_out
    if (
        not recipe.covers
        and base
        and bases.made_for(info.cross_attention_dim, len(info.modules))
        not in (
            None,
            base.title,
        )
    ):
        missing = left_out  # a smaller base's file, all of which fits
    if missing or coverage.clashes or coverage.foreign:
        dropped = f" Left out, as diffusers does: {'; '.join(notes)}." if notes else ""
        words = _mismatch(info, bases.structure_of(index), base, recipe, left_out, coverage)
        raise LoraMismatchError(words + dropped)
    if notes:
        warn(f"the few-step LoRA, {info.describe()}: left out, as diffusers does: {'; '.join(notes)}.")
    return FileLora(file, coverage.pairs)


def _mismatch(
    info: LoraInfo,
    structure: bases.Structure,
    base: bases.Base | None,
    recipe: Recipe,
    left_out: list[str],
    coverage: Coverage,
) -> str:
    total, clashes, foreign = structure.layers or 0, coverage.clashes, coverage.foreign
    has_to = "has to" if recipe.covers else "can"
    parts = [f"covers {total - len(left_out)} of the {total} layers {recipe.title} of this UNet {has_to} cover"]
    if clashes:
        parts.append(f"has other shapes in {len(clashes)} (such as {clashes[0]})")
    if foreign:
        parts.append(f"names {len(foreign)} modules that the UNet has not, or names twice (such as {foreign[0]})")
    fits = bases.made_for(info.cross_attention_dim, len(info.modules))
    own = recipe.loras.get(base.name) if base else None
    way_out = f" For this pipe use {own.lora}." if own else " Pass lora= with a file made for this UNet."
    title = base.title if base else bases.title_of(structure)
    return (
        f"{info.file.label if info.file else info.path} does not fit this pipe, {title}: it {', '.join(parts)}."
        + (f" It looks like an LCM-LoRA of {fits}." if fits and fits != title else "")
        + way_out
    )


def style_loras(snapshot: Snapshot, name: str, file: LoraFile) -> dict[str, FileLora]:
    """A style's LoRA for each part of the pipe. It may cover little, but not nothing, and must not clash.

    What it has for a text encoder that is not there, or for more layers than that has, is left out with a warning.

    Raises:
        LoraFileError, LoraMismatchError: see `accelerate`.
    """
    info = read(file)
    loras: dict[str, FileLora] = {}
    notes = [f"left out, as diffusers does: {note}" for note in info.notes]
    for part, modules in {"unet": info.modules, **info.text_modules}.items():
        component = snapshot.components.get(part)
        coverage = cover(part, modules, component.index.layers if component else {})
        skipped = None if part == "unet" else _skipped(part, component, coverage)
        if coverage.clashes or (coverage.foreign and not skipped):
            raise LoraMismatchError(_style_mismatch(snapshot, name, info, part, coverage))
        notes += [f"left out, as diffusers does: {note}" for note in coverage.notes]
        notes += [skipped] if skipped else []
        if coverage.pairs:
            loras[part] = FileLora(file, coverage.pairs)
    if not loras:
        raise LoraMismatchError(f"style {name!r}, {info.describe()}, has nothing for this pipe: {'; '.join(notes)}.")
    if notes:
        warn(f"style {name!r}, {info.describe()}: {'; '.join(notes)}.")
    return loras


def _skipped(part: str, component: Component | None, coverage: Coverage) -> str | None:
    """What of a style's text keys is left out and why; None where nothing is, or where nothing fits at all."""
    count = len(coverage.foreign)
    if component is None:
        return f"{count} modules are left out, as this pipe has no {part}"
    if not count or not (coverage.pairs or all(_beyond(name, component) for name in coverage.foreign)):
        return None
    return (
        f"{count} modules are left out, as this pipe's {part} has no such layers (it may be cut for clip skip), such "
        f"as {coverage.foreign[0]}"
    )


def _beyond(name: str, component: Component) -> bool:
    """Whether a module's name in a file counts more layers than the text encoder has."""
    number = r"layers[._](\d+)[._]"
    have = [int(m[1]) for own in component.index.layers if (m := re.search(number, own))]
    wanted = re.search(number, name)
    return bool(have and wanted and int(wanted[1]) > max(have))


def _style_mismatch(snapshot: Snapshot, name: str, info: LoraInfo, part: str, coverage: Coverage) -> str:
    odd = (*coverage.clashes, *coverage.foreign)
    return (
        f"style {name!r}, {info.describe()}, does not fit this pipe's {part} (text width of the UNet "
        f"{snapshot.structure.cross_attention_dim}): {len(coverage.pairs)} modules fit, {len(coverage.clashes)} have "
        f"other shapes, {len(coverage.foreign)} do not exist, such as {odd[0]}."
    )


def _contents(snapshot: Snapshot, target: Target, files: Files, weights: Mapping[str, Weight]) -> dict[str, Content]:
    """What goes into each component. The UNet first: whether it is merged decides for the others."""
    contents: dict[str, Content] = {}
    for name, component in snapshot.components.items():
        loras: dict[str, Lora] = {
            **component.found.loras,
            **_absorbed(component),
            **component.late,
            **files.get(name, {}),
        }
        if clash := sorted(component.late.keys() & {*component.found.names, *files.get(name, {})}):
            raise PipelineError(
                f"an adapter {clash[0]!r} was loaded while the pipe was accelerated, and another LoRA here has that "
                f"name: pipe.delete_adapters({clash[0]!r}), or load it under another name."
            )
        here = {n: w for n, w in weights.items() if n in loras}
        fuse = target.fuse is not False and (name == "unet" or contents["unet"].merged)
        given_up = any(any(lora.found.values()) and n not in here for n, lora in component.late.items())
        differs = bool(files.get(name)) or given_up or _differs(component, here)
        if not differs and not (fuse and component.found.active):
            contents[name] = AS_FOUND
            continue
        untouched = component.record is None or component.record.content is AS_FOUND
        if untouched and (why := not_in_memory(component)):
            raise PipelineError(why)
        why_not = _why_not_mergeable(component, loras, here) if target.fuse is not False else None
        if why_not and target.fuse is True:
            raise PipelineError(f"fuse=True is impossible here: {why_not}. fuse=False leaves PEFT adapters instead.")
        merged = fuse and why_not is None
        if not merged:
            _check_weights(component, here)
        contents[name] = Content(loras, here, merged)
    return contents


def _absorbed(component: Component) -> dict[str, Lora]:
    """Those of them that lcmlora has taken in since."""
    there = component.record.content.loras if component.record else {}
    return {name: lora for name, lora in there.items() if not isinstance(lora, FileLora)}


def _differs(component: Component, weights: Mapping[str, Weight]) -> bool:
    """Whether these weights are others than what PEFT's adapters were found at."""
    wanted = {name for name, weight in weights.items() if weight is None}
    return any(weight is not None for weight in weights.values()) or wanted != set(component.found.active)


def _why_not_mergeable(component: Component, loras: Mapping[str, Lora], weights: Mapping[str, Weight]) -> str | None:
    reasons = (getattr(loras[name], "why_not_mergeable", None) for name in weights)
    return component.why_not_mergeable or next((reason for reason in reasons if reason), None)


def _check_weights(component: Component, weights: Mapping[str, Weight]) -> None:
    for name, weight in weights.items():
        if weight is not None and (layer := component.found.only_as_found(name)):
            raise PipelineError(
                f"style {name!r} has no weight that could be set in {layer} of the {component.name}: it can be left "
                "as it was found, or switched off by leaving its name out."
            )


def _check_room(snapshot: Snapshot, contents: Mapping[str, Content], target: Target) -> None:
    touched = [
        parameter_of(snapshot.components[name].index.layers[layer])
        for name, content in contents.items()
        if content.merged
        for layer, here in contributions(
            snapshot.components[name].index.layers, content.loras, content.weights
        ).items()
        if here
    ]
    check_room(touched, target.keep)


_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
_OF_THE_MODEL = {"num_train_timesteps", *_BETAS, "prediction_type", "set_alpha_to_one", "steps_offset"}
"""What a scheduler's config says of the model it is for, and not of the sampler it is."""


def scheduler_for(found: Any, recipe: Recipe) -> Any:
    """The recipe's scheduler in the place of another: its betas and prediction type, and what the recipe sets.

    Sampler settings of the one found (Karras sigmas, spacing) would change the steps the file was made for.
    `clip_sample` and `thresholding` would clamp latents; `rescale_betas_zero_snr` makes alpha 0 at the first step, by
    which an epsilon prediction is divided (scheduling_lcm.py, step).
    """
    cls = getattr(diffusers, recipe.scheduler)
    config = {key: value for key, value in found.config.items() if key in _OF_THE_MODEL}
    config.update({"clip_sample": False, "thresholding": False})
    if config.get("prediction_type", "epsilon") == "epsilon":
        config["rescale_betas_zero_snr"] = False
    if recipe.beta_schedule:
        config["beta_schedule"] = recipe.beta_schedule
    known = inspect.signature(cls.__init__).parameters
    return cls.from_config({key: value for key, value in {**config, **recipe.settings}.items() if key in known})
