"""The verbs: accelerate, set_styles, restore, and both for the length of a block. Each is one transition."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

from . import baked
from . import recipe as recipes
from .compat import uncompiled
from .compiling import Compile
from .errors import PipelineError
from .lora.originals import Keep
from .lora.sources import Given, HubOptions, Source
from .moving import move, plan_for, require_originals
from .parameters import as_weight, block_of, spelled
from .policy import Policy
from .state import by_style, status
from .transition import transaction
from .transition.records import (
    Gate,
    ModuleRecord,
    PipeRecord,
    Shell,
    baked_of,
    lock,
    module_record_of,
    pipe_record_of,
)
from .transition.snapshot import COMPONENTS, Component, Snapshot
from .transition.target import UNSET, Fuse, PipeSettings, Styles, Target, Unset, is_strength, with_styles
from .transition.verification import (
    check_way_back,
    warn_of_lost_adapters,
)
from .vae import Vae
from .warn import warn

Pipe = TypeVar("Pipe")
_ELSEWHERE = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "lora_path": "lora",
    "lora_scale": "weight",
}
"""How diffusers names what `accelerate` sets."""


@spelled(_ELSEWHERE)
def accelerate(
    pipe: Pipe,
    base: str | Unset = UNSET,
    *,
    recipe: str | Unset | None = UNSET,
    lora: Given | Unset | None = UNSET,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    weight: float | Unset | None = UNSET,
    styles: Styles | Unset | None = UNSET,
    fuse: Fuse | Unset = UNSET,
    keep: Keep | Unset = UNSET,
    steps: int | Unset = UNSET,
    guidance: float | Unset | None = UNSET,
    strict: bool | Unset = UNSET,
    enforce_inference_steps: bool | Unset = UNSET,
    vae: Vae | Unset = UNSET,
    compile: Compile | Unset = UNSET,
    cache_prompts: int | Unset = UNSET,
    adapter_name: str | Unset = UNSET,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Pipe:
    """Make a Stable Diffusion or SDXL pipeline need 4 to 8 steps: LCM-LoRA, `LCMScheduler` and fitting call defaults.
    With `recipe`, another few-step LoRA with its own scheduler and defaults.

    It says what the pipe shall be. On a pipe that is accelerated already it moves the pipe there at the least cost:
    other steps or guidance need no merge, other styles or weights one merge from the originals, and the same again
    does nothing. What a call leaves out stays as it is. LoRAs that are active in the pipe already stay so, at their
    weights, layer by layer. A pipe of a baked one's parts gets its call defaults, and nothing is merged. Everything is
    checked before the pipe is touched, and whatever fails afterwards is rolled back.

    Args:
        pipe: a diffusers pipeline with a `UNet2DConditionModel` or `UNetMotionModel`. Its siblings that share the
            UNet change with it, apart from their own steps, guidance, strict, vae and cache_prompts.
        base: "auto" (the default) finds the base from the UNet's structure; a name (see `bases()`) is checked.
        recipe: how the few-step LoRA is driven, "lcm" by default: "tcd", "hyper-8", "lightning-4", "dmd2", ... (see
            `recipes()`). Where it is left out, a file whose metadata names its recipe is followed. Another recipe
            brings its own file, weight, steps and guidance, where the call does not say these too.
        lora: the LCM-LoRA, where it is not the base's own (None, the default): repository id, folder, safetensors
            file or dict of tensors. A UNet that is no known base needs it; any UNet will do whose LCM layers the file
            covers. With another recipe, that recipe's file.
        weight_name: the file's name in that repository or folder, where it is not
            `pytorch_lora_weights.safetensors`.
        subfolder: the folder inside that repository or folder.
        revision: the repository's branch, tag or commit.
        weight: what the LCM-LoRA counts with; None (the default) is the base's own, 1.0 as a rule.
        styles: name -> source or `Style`: style LoRAs to have beside it; a name alone that is known takes a weight.
        fuse: "auto" (the default) merges the LoRAs into the weights wherever those are plain floats (no cost per
            step), True insists on it, False leaves PEFT adapters.
        keep: where the merged layers' originals wait for `restore`: "memory" (the default: host memory), "disk" (a
            temporary file, in TMPDIR), "source" (weights that equal what stands in the file the model was loaded from
            are read from there, the others wait in memory), or None: nothing is kept, `restore` and `set_styles`
            refuse, and a failure in the middle of the merge (out of memory, Ctrl-C) leaves a spoiled UNet, which a
            warning says.
        steps: `num_inference_steps` of calls that pass none, 1 to 50; 4 by default.
        guidance: `guidance_scale` of calls that pass none; 1 by default. What a call passes is kept within 1 to 2
            (or the recipe's own range), with a warning. None leaves guidance alone altogether.
        strict: raise `CallError` where a call would otherwise be changed with a warning.
        enforce_inference_steps: image-to-image runs the steps asked for (the default); False is diffusers' own
            meaning, `int(num_inference_steps * strength)` of them.
        vae: another VAE for as long as the pipe is accelerated: "tiny" (the base's AutoencoderTiny: faster by far,
            a little less detail), "fp16-fix" (SDXL's, which half precision does not overflow), a repository, a
            folder, or a module.
        compile: compile the UNet in place: "regional" (also True; its transformer blocks, soon done) or "whole". With
            merged LoRAs `set_styles` needs no new compilation.
        cache_prompts: how many prompts' embeddings to remember; 0 for none.
        adapter_name: the LCM-LoRA's name among PEFT's adapters (fuse=False), for programs that call `set_adapters`
            themselves; "lcmlora_lcm" by default.
        cache_dir: the hub's cache, as in `huggingface_hub.hf_hub_download`.
        token: the hub's token, as there.
        local_files_only: ask no network, as there.

    Returns:
        The same pipe.

    Raises:
        PipelineError: this pipe or its state can't be accelerated (no UNet, fused LoRAs, quantised and fuse=True,
            ...).
        BaseModelError: the base is unknown, has no LCM-LoRA, or is not the one named.
        LoraFileError: a LoRA is not there, not safetensors, damaged, or no LoRA.
        LoraMismatchError: a LoRA is made for another UNet.
        CallError: steps, guidance or a weight are outside what works.
    """
    wish = {name: value for name, value in locals().items() if name != "pipe"}
    with alone(pipe):
        now = Snapshot.of(pipe)
        if (written := baked_of(pipe)) is not None:
            baked.dress(now, written, baked.settings_for(now, written, _said(wish)))
        else:
            move(now, *_wanted(now, wish))
    return pipe


def _wanted(now: Snapshot, wish: Mapping[str, Any]) -> tuple[Target, PipeSettings, set[str], bool, dict[str, Any]]:
    """What `accelerate` is asked for: the last five arguments of `move`."""
    lora, where = wish["lora"], (wish["weight_name"], wish["subfolder"], wish["revision"])
    source = UNSET if lora is UNSET and not any(where) else Source.of(None if lora is UNSET else lora, *where)
    recipe = None if wish["recipe"] is UNSET and source is not UNSET else wish["recipe"]  # a new file may name its own
    options = (wish["cache_dir"], wish["token"], wish["local_files_only"])
    names = ("base", "weight", "fuse", "keep", "compile", "adapter_name")
    weights = {name: wish[name] for name in names} | {"recipe": recipe, "lora": source}
    before = _target(now)
    other = recipe is not UNSET and recipe is not None and recipe != before.recipe
    afresh = {"lora": Source.of(None), "weight": None} if other else {}
    hub = {"hub": HubOptions(*options)} if any(options) else {}
    target = dataclasses.replace(before, **{**afresh, **_said(weights), **hub})
    target.check()
    if other:  # one that is in use may have been unregistered
        recipes.by_name(wish["recipe"])
    if target.weight is not None:
        target = dataclasses.replace(target, weight=as_weight(target.weight))
    anew = {target.adapter_name} if source is not UNSET or other else set()
    if (styles := wish["styles"]) is not UNSET:
        anew |= _given_sources(styles)
        found: dict[str, None] = dict.fromkeys(_found(now))
        target = with_styles(target, _as_kept(now, styles or {}), _known(now), found)
    elif target != before:  # what somebody loaded meanwhile stays on
        late = {name: None for name in _late(now) if name not in target.styles}
        target = dataclasses.replace(target, styles={**target.styles, **late})
    shell = _said({name: wish[name] for name in ("vae", "cache_prompts")})
    settings = dataclasses.replace(now.record.settings if now.record else PipeSettings(), **shell)
    settings.check(now.pipe)
    policy = _said({name: wish[name] for name in ("steps", "guidance", "strict", "enforce_inference_steps")})
    return target, settings, anew, styles is not UNSET or wish["weight"] is not UNSET, policy


def rehearse(pipe: Any, **settings: Any) -> Policy:
    """Refuse what `accelerate` with these settings would refuse before it touches the pipe. Nothing is changed.

    Returns:
        What its calls would do with their arguments.

    Raises:
        LcmLoraError: as `accelerate`.
    """
    given = inspect.signature(accelerate).bind(pipe, **settings)
    given.apply_defaults()
    with alone(pipe):
        now = Snapshot.of(pipe)
        if (written := baked_of(pipe)) is not None:
            said = {name: value for name, value in _said(given.arguments).items() if name != "pipe"}
            return baked.settings_for(now, written, said).policy
        target, kept, anew, _, policy = _wanted(now, given.arguments)
        return kept.policy.under(plan_for(now, target, anew).applied.recipe, policy)


def set_styles(pipe: Pipe, styles: Styles) -> Pipe:
    """Say which styles an accelerated pipe has, and how strongly they count. The LCM-LoRA stays.

    Merged weights are computed anew from the originals, so any number of changes leaves exactly what `accelerate` with
    these styles would have made, in the same memory (a compiled UNet needs no recompilation). What is so already costs
    nothing.

    Args:
        pipe: an accelerated pipe; its siblings that share the UNet change with it.
        styles: all the styles wanted. name -> a weight, for a style that is known (loaded before `accelerate`, or
            given once to lcmlora); name -> source or `Style`, for a new one. Styles that are not named are off; an
            empty dict turns all off. What `status(pipe).styles` gives can be given back.

    Returns:
        The same pipe.

    Raises:
        PipelineError: the pipe is not accelerated, its originals were not kept, or a name can't be used.
        CallError: a weight can't be used.
        LoraFileError: as for `accelerate`. Nothing is changed then.
        LoraMismatchError: as for `accelerate`. Nothing is changed then.
    """
    with alone(pipe):
        record = pipe_record_of(pipe)
        if record is None:
            raise PipelineError("set_styles changes an accelerated pipe; lcmlora.accelerate(pipe, styles=...) first.")
        if record.baked:
            baked.check_styles(record.baked, styles)
            return pipe
        now = Snapshot.of(pipe)
        target = with_styles(_target(now), _as_kept(now, styles), _known(now), {})
        move(now, target, record.settings, _given_sources(styles))
    return pipe


def restore(pipe: Pipe, *, force: bool = False) -> Pipe:
    """Give back what `accelerate` found: weights, adapters, their scales, scheduler object and class, bit for bit.

    Where several pipes share a model and were accelerated, its weights come back with the last of them. Before
    anything is touched it verifies that the way back is exact.

    Args:
        pipe: an accelerated pipe; or one that was not accelerated itself, where the pipes that were, around the same
            UNet, are all gone (garbage-collected, not restored) and left it merged.
        force: give back what can be given back where the way back is not exact, and warn of the rest.

    Returns:
        The same pipe.

    Raises:
        PipelineError: there is nothing to restore (neither the pipe is accelerated, nor its UNet by pipes that are
            all gone), the originals were not kept (keep=None), or somebody changed the weights so that the way back is
            not exact (`force=True` goes it nevertheless).
    """
    with alone(pipe):
        record = pipe_record_of(pipe)
        if record is not None and record.baked and record.found.cls is record.made.cls:  # it was loaded so
            raise PipelineError("this pipe was baked: the LCM-LoRA is in its file, and there is nothing to restore.")
        if record is not None and record.gate.is_called_here():
            raise PipelineError(
                "restore can't be called from inside a call (a callback): the rest of it needs the LoRA."
            )
        modules = dict(record.modules) if record is not None else _orphans(pipe)
        last = {
            name: Component.of(name, module.module) for name, module in modules.items() if module.is_for_none_but(pipe)
        }
        for name, component in last.items():
            require_originals(modules[name], "restore the weights")
            if left := check_way_back(component, "restore the weights", force):
                warn(f"restore(force=True) gave back what it could; {left}")
            warn_of_lost_adapters(component)
        if record is not None:
            _warn_of_replaced(pipe, record)
        for component in last.values():
            transaction.give_back(component)
        for module in modules.values():
            module.pipes.discard(pipe)
        if record is not None:
            transaction.undress(pipe, record)
    return pipe


def _orphans(pipe: Any) -> dict[str, ModuleRecord]:
    """The changed models of a pipe that was not accelerated itself, all pipes around which are gone."""
    found = module_record_of(getattr(pipe, "unet", None))
    if found is None or found.pipes:
        whose = " Its UNet is, through another pipe: restore that one." if found else ""
        raise PipelineError(f"this {type(pipe).__name__} is not accelerated, so there is nothing to restore.{whose}")
    records = {name: module_record_of(getattr(pipe, name, None)) for name in COMPONENTS}
    return {name: record for name, record in records.items() if record is not None and not record.pipes}


def _warn_of_replaced(pipe: Any, record: PipeRecord) -> None:
    """Tell of what somebody put into the pipe since: `restore` gives back what was found."""
    made, found = record.made, record.found  # what is back already was put back by a restore that was interrupted
    for name, module in record.modules.items():
        if (here := uncompiled(getattr(pipe, name, None))) is not None and here is not module.module:
            warn(f"pipe.{name} was replaced while the pipe was accelerated: restore leaves the new one as it is.")
    if not isinstance(pipe.scheduler, type(made.scheduler)) and pipe.scheduler is not found.scheduler:
        warn(f"restore takes the {type(pipe.scheduler).__name__} out that was set while the pipe was accelerated.")
    if made.vae is not found.vae and pipe.vae not in (made.vae, found.vae):
        warn("restore takes the VAE out that was set while the pipe was accelerated with another one.")


@block_of(accelerate, _ELSEWHERE)
def accelerated(pipe: Any, *args: Any, **settings: Any) -> Iterator[Any]:
    """`accelerate`, same arguments, for the length of a `with` block; restores also when the block raises.

    Raises:
        PipelineError: the pipe is accelerated already. What else `accelerate` raises.
    """
    mine = False
    try:
        with alone(pipe):  # two threads don't both find it plain
            if pipe_record_of(pipe) is not None:
                raise PipelineError(
                    "this pipe is accelerated already, and `with accelerated(pipe)` would not know what to give back: "
                    "lcmlora.styled(pipe, styles) changes styles for a block; or lcmlora.restore(pipe) first."
                )
            mine = True
            accelerate(pipe, *args, **settings)
        yield pipe
    finally:
        if mine:
            _surely(lambda: restore(pipe) if pipe_record_of(pipe) is not None else None)  # else restored in the block


@contextmanager
def styled(pipe: Pipe, styles: Styles) -> Iterator[Pipe]:
    """An accelerated pipe with these styles, for one thread alone; afterwards with those it had.

    Calls, `styled` blocks and changes of other threads on any pipe that shares the UNet wait for the block's end. This
    is how a server serves requests of different styles with one UNet.

    Args:
        pipe: an accelerated pipe, or a baked one.
        styles: as for `set_styles`. A baked pipe takes {}, or the styles that are in its weights.

    Raises:
        PipelineError: as for `set_styles`.
    """
    record = pipe_record_of(pipe)
    if record is None:
        raise PipelineError("styled changes an accelerated pipe for a while; lcmlora.accelerate(pipe) first.")
    with kept(pipe):
        if not record.baked or styles != {}:
            set_styles(pipe, styles)
        yield pipe


@contextmanager
def kept(pipe: Any) -> Iterator[None]:
    """An accelerated pipe for this thread alone; whatever a block makes of it, afterwards it is what it was."""
    record = pipe_record_of(pipe)
    assert record is not None, "the pipe is accelerated"
    with record.gate.changing(), as_it_was(pipe):
        yield


@contextmanager
def as_it_was(pipe: Any) -> Iterator[None]:
    """Whatever a block makes of a pipe, afterwards it is what it was: plain, or accelerated as before.

    A pipe that was accelerated and is restored in the block stays so: the caller of `restore` meant it.
    """
    record, before = pipe_record_of(pipe), Before.of(pipe)

    def same(one: PipeRecord, other: PipeRecord) -> bool:
        models = [one.unet.module if one.modules else None for one in (one, other)]  # a baked pipe has none
        return models[0] is models[1]

    def back() -> None:
        mine = pipe_record_of(pipe)
        if before is None and mine is not None:
            restore(pipe)
        elif before is not None and record is not None and mine is not None and same(mine, record):
            before.again(pipe)

    try:
        yield
    finally:
        _surely(back)


def _surely(back: Callable[[], object]) -> None:
    """Go a way back to its end. Ctrl-C on the way counts after it; a second one stops there."""
    try:
        back()
    except KeyboardInterrupt:
        back()
        raise


class Before(NamedTuple):
    """What an accelerated pipe was made to be. A record changes with the pipe, so it can't be asked later."""

    target: Target
    settings: PipeSettings
    made: Shell
    here: Shell

    @classmethod
    def of(cls, pipe: Any) -> Before | None:
        """Of a pipe as it is now; None for one that is not accelerated."""
        record = pipe_record_of(pipe)
        if record is None:
            return None
        now = Snapshot.of(pipe)
        target = _target(now)
        styles = {**dict.fromkeys(_late(now)), **target.styles}
        return cls(dataclasses.replace(target, styles=styles), record.settings, record.made, Shell.of(pipe))

    def again(self, pipe: Any) -> None:
        """Make the pipe so. Styles that were given since stay known."""
        with alone(pipe):
            now = Snapshot.of(pipe)
            if now.record is not None and now.record.baked:
                baked.dress(now, now.record.baked, self.settings)
                return
            target = _target(now)
            anew = {name for name, source in self.target.sources.items() if target.sources.get(name) != source}
            if (self.target.lora, self.target.recipe) != (target.lora, target.recipe):
                anew.add(self.target.adapter_name)
            sources = {**target.sources, **self.target.sources}
            move(now, dataclasses.replace(self.target, sources=sources), self.settings, anew, back=True)
            transaction.dress_again(pipe, self.made, self.here)


@contextmanager
def alone(pipe: Any) -> Iterator[None]:
    """For the length of a block, no call of a pipe with this UNet in another thread, and no other transition."""
    gate = _gate(pipe)
    with gate.changing() if gate is not None else nullcontext(), lock:
        if (now := _gate(pipe)) is gate or now is None:
            yield
            return
    with alone(pipe):  # another thread accelerated it in between: its calls have to be waited for
        yield


def _gate(pipe: Any) -> Gate | None:
    changed = pipe_record_of(pipe) or module_record_of(getattr(pipe, "unet", None))
    return changed.gate if changed is not None else None


def _said(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not UNSET}


def _target(now: Snapshot) -> Target:
    """What the pipe's UNet is made to be; on a plain one, the default beside what is active."""
    unet = now.unet.record or (now.record.modules.get("unet") if now.record else None)  # the UNet may be another
    return unet.applied.target if unet and unet.applied else Target(styles=dict.fromkeys(_found(now)))


def _found(now: Snapshot) -> list[str]:
    """The user's own adapters that were active before."""
    return sorted({name for component in now.components.values() for name in component.found.active})


def _late(now: Snapshot) -> list[str]:
    """The adapters that somebody loaded since, and that are active."""
    late = [lora for component in now.components.values() for lora in component.late.items()]
    return sorted({name for name, lora in late if any(lora.found.values())})


def _known(now: Snapshot) -> dict[str, Source | None]:
    """The styles that a weight may be given for; None for those that are adapters in the pipe."""
    names = {name for component in now.components.values() for name in component.found.names}
    return {**dict.fromkeys([*names, *_late(now)]), **_target(now).sources}


def _given_sources(styles: Any) -> set[str]:
    """The styles that a call gives a source for, and not a weight."""
    given = styles.items() if isinstance(styles, Mapping) else ()
    return {name for name, wanted in given if as_weight(wanted) is None and not is_strength(wanted)}


def _as_kept(now: Snapshot, styles: Any) -> Any:
    """Styles as the caller gave them; what `status` gives by component stands for the style as it was found.

    Raises:
        PipelineError: it is neither what is there nor what was found.
    """
    given = {name: w for name, w in styles.items() if is_strength(w)} if isinstance(styles, Mapping) else {}
    if not given:
        return styles
    found = by_style({name: component.found.ranges for name, component in now.components.items()})
    there = status(now.pipe).styles
    for name, strength in given.items():
        limits = {component: tuple(pair) for component, pair in strength.items()}
        if limits not in (found.get(name), there.get(name)):
            raise PipelineError(
                f"style {name!r}: {limits} is a weight by component as status gives it, and not the one that is there "
                f"({there.get(name, found.get(name))}): one number is expected."
            )
    return {**styles, **dict.fromkeys(given, UNSET)}
