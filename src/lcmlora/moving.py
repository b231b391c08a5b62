"""One transition: a pipe and its models are brought from what they are to what they shall be."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Collection, Mapping
from typing import Any

from . import calls
from . import vae as vaes
from .calling import HOOKS
from .errors import LcmLoraError, PipelineError
from .layers import unet_of
from .prompts import PromptCache
from .transition import transaction
from .transition.plan import Plan, make_plan, scheduler_for
from .transition.records import (
    LOST,
    Applied,
    Content,
    ModuleRecord,
    PipeRecord,
    Shell,
    StandIn,
    module_record_of,
    pipe_record_of,
    put,
    stands_for,
)
from .transition.snapshot import Component, Snapshot, baked_into
from .transition.target import PipeSettings, Target
from .transition.transaction import Undo
from .transition.verification import (
    check_way_back,
    drifted,
    require_way_back,
    why_lora_is_off,
    why_not_fast,
)
from .warn import warn

_NOTHING: Mapping[str, Any] = {}


def move(
    now: Snapshot,
    target: Target,
    settings: PipeSettings,
    anew: Collection[str],
    said: bool = True,
    policy: Mapping[str, Any] = _NOTHING,
    back: bool = False,
) -> None:
    """Bring a pipe and its models to what they shall be, all or nothing.

    Args:
        now: the pipe as it is.
        target: what its models shall be.
        settings: what else it shall be.
        anew: the names of the LoRAs whose sources were given just now.
        said: whether styles or weights were said: then what others did to them meanwhile is undone.
        policy: what the caller says of the policy; where the recipe changes, the rest is the recipe's.
        back: whether this is the way back to what was, of which nobody needs to be told.

    Raises:
        PipelineError, BaseModelError, LoraFileError, LoraMismatchError, CallError: see `lcmlora.accelerate`.
    """
    record, unet = now.record, now.unet.record
    if unet is not None and unet.spoiled:
        raise PipelineError(LOST)
    applied = unet.applied if unet is not None else None
    off = unet is not None and why_lora_is_off(unet) is not None
    stays = record is not None and applied is not None and not (off or anew or said or target != applied.target)
    plan = Plan(applied, {}) if stays and applied else plan_for(now, target, anew)
    settings = dataclasses.replace(settings, policy=settings.policy.under(plan.applied.recipe, policy))
    if stays and record and settings == record.settings and why_not_fast(now.pipe, record) is None:
        return
    vae = _vae(now, plan.applied, settings)
    changes = _changes(now, plan, off, said)
    gone = _left_behind(now)
    for component in gone:
        check_way_back(component, "give the replaced model back")
    if applied is not None and not back:
        _tell_of_siblings(now, applied, plan.applied)
    with Undo() as undo:
        modules = {name: transaction.record_for(component, undo) for name, component in now.components.items()}
        for name, content in changes.items():
            transaction.change(modules[name], now.components[name], content, target.keep, undo)
        transaction.compile_as(modules["unet"], target.compile, undo)
        undo.push(setattr, modules["unet"], "applied", modules["unet"].applied)
        modules["unet"].applied = plan.applied
        mine = _pipe_record(now, modules, plan.applied, settings, vae)
        for module in modules.values():
            undo.push(_give_up, module, now.pipe, now.pipe in module.pipes)
            module.pipes.add(now.pipe)
        transaction.dress(now.pipe, mine, undo)
    for component in gone:
        transaction.give_back(component)
    for module in record.modules.values() if record is not None else ():
        if module not in modules.values():  # the pipe has another model now
            module.pipes.discard(now.pipe)


def _tell_of_siblings(now: Snapshot, before: Applied, after: Applied) -> None:
    """Warn where other pipes get another few-step LoRA, as they share the UNet."""
    assert now.unet.record is not None, "what was applied stands there"
    others = [type(other).__name__ for other in now.unet.record.pipes if other is not now.pipe]
    was, gets = (f"{one.lcm.label} (recipe {one.recipe.name!r})" for one in (before, after))
    same_file = (before.lcm.file.stamp, before.lcm.file.tensors) == (after.lcm.file.stamp, after.lcm.file.tensors)
    if others and not (same_file and before.recipe.name == after.recipe.name):
        warn(
            f"another accelerated pipe, a {others[0]}, shares this one's UNet and gets {gets} with it, in place of "
            f"{was}: pipe.unet = copy.deepcopy(pipe.unet) before accelerate keeps them apart."
        )


def plan_for(now: Snapshot, target: Target, anew: Collection[str]) -> Plan:
    """The plan for a target; refused with the truest reason."""
    try:
        return make_plan(now, target, anew)
    except LcmLoraError:
        if now.unet.record is not None:  # what somebody did to the UNet meanwhile is the truer reason
            require_way_back(now.unet, "change the LoRAs")
        raise


def require_unshared(pipe: Any) -> None:
    """Refuse a pipe that can't be without the LCM-LoRA: it was baked, or another one that does not wait for it has it.

    Raises:
        PipelineError: it is so.
    """
    if baked_into(pipe) is not None:
        raise PipelineError(
            "this pipe was baked: there is no base, the pipe without the LCM-LoRA, to compare it with. "
            "lcmlora.sweep(lcmlora.load_baked(folder), prompt, x={'steps': (2, 4, 8)}) draws and times it alone."
        )
    mine, record = pipe_record_of(pipe), module_record_of(unet_of(pipe))
    if mine is None and record is not None and record.pipes:
        raise PipelineError(
            "another pipe that shares this one's UNet is accelerated, so there is none without the LCM-LoRA: "
            "lcmlora.restore that one first, or give it in this one's place."
        )
    for name, module in mine.modules.items() if mine is not None else ():
        theirs = [pipe_record_of(other) for other in module.pipes]
        if mine is not None and any(other is not None and other.unet is not mine.unet for other in theirs):
            raise PipelineError(
                f"pipe.{name} is shared with an accelerated pipe of another UNet, which needs what is in it: "
                f"pipe.{name} = copy.deepcopy(pipe.{name}) before accelerate keeps them apart."
            )


def require_originals(record: ModuleRecord, purpose: str) -> None:
    """Refuse what needs originals that were not kept.

    Raises:
        PipelineError: `purpose` needs them.
    """
    if record.spoiled:
        raise PipelineError(LOST)
    if record.content.merged and record.originals.keep is None:
        raise PipelineError(
            f"the LoRAs were merged with keep=None, so the originals are gone and lcmlora can't {purpose}: load the "
            "pipe anew with from_pretrained. accelerate(pipe, keep='memory') or keep='disk' makes it possible."
        )


def _changes(now: Snapshot, plan: Plan, off: bool, said: bool) -> dict[str, Content]:
    """The components that have to change, all of which can be changed.

    Raises:
        PipelineError: originals are missing, another pipe relies on what is there, or the way back is not exact.
    """
    changes = {}
    for name, content in plan.contents.items():
        component = now.components[name]
        record = component.record
        if record is None:
            if content.touched:
                changes[name] = content
            continue
        keep = plan.applied.target.keep
        same = record.content == content and not (content.merged and record.originals.keep != keep)
        stale = (off and name == "unet") or (said and drifted(component))
        if (same and not stale) or _stays_for_others(now, name, record, content):
            continue
        require_originals(record, "change what is merged")
        check_way_back(component, "change the LoRAs")
        changes[name] = content
    return changes


def _stays_for_others(now: Snapshot, name: str, record: ModuleRecord, content: Content) -> bool:
    """Whether a text encoder is left as it is for pipes with another UNet that rely on it.

    Raises:
        PipelineError: they rely on other styles in it.
    """
    others = [other for other in record.pipes if other is not now.pipe and _relies(other, name, record, now)]
    if not others or name == "unet":
        return False
    there = f"styles {sorted(record.content.weights)}" if record.content.weights else "no styles"
    words = f"pipe.{name} is shared with another accelerated pipe, which has {there} in it"
    if content.touched or now.record is not None:
        raise PipelineError(
            f"{words}: give both the same styles, or this one a text encoder of its own "
            f"(pipe.{name} = copy.deepcopy(pipe.{name}) before accelerate)."
        )
    warn(f"{words}: they count in this pipe too. copy.deepcopy(pipe.{name}) before accelerate keeps them apart.")
    return True


def _relies(other: Any, name: str, record: ModuleRecord, now: Snapshot) -> bool:
    theirs = pipe_record_of(other)
    return theirs is not None and theirs.modules.get(name) is record and theirs.unet is not now.unet.record


def _left_behind(now: Snapshot) -> list[Component]:
    """Models that were accelerated, that the pipe no longer has, and that no other pipe relies on."""
    here = [component.module for component in now.components.values()]
    return [
        Component.of(name, module.module)
        for name, module in (now.record.modules if now.record else {}).items()
        if all(module.module is not model for model in here) and module.is_for_none_but(now.pipe)
    ]


def _give_up(module: ModuleRecord, pipe: Any, relied: bool) -> None:
    if not relied:
        module.pipes.discard(pipe)


def _vae(now: Snapshot, applied: Applied, settings: PipeSettings) -> Any:
    """The VAE that the pipe gets."""
    record = now.record
    own = _found_shell(now).vae
    if record is not None and settings.vae == record.settings.vae:
        if settings.vae is not None and all(now.pipe.vae is not vae for vae in (record.made.vae, record.found.vae)):
            warn("pipe.vae was replaced: lcmlora puts the one of vae= back. accelerate(pipe, vae=None) leaves it out.")
        return own if settings.vae is None else record.made.vae
    return vaes.load(now.pipe, own, applied.base, settings.vae, applied.target.hub) or own


def _found_shell(now: Snapshot) -> Shell:
    """What the pipe was before, apart from its models; a VAE that the user set where we set none is the user's."""
    here, old = Shell.of(now.pipe), now.record
    if old is None:
        return dataclasses.replace(here, cls=calls.plain(here.cls), scheduler=stands_for(here.scheduler))
    return dataclasses.replace(old.found, vae=here.vae) if old.made.vae is old.found.vae else old.found


def _pipe_record(
    now: Snapshot, modules: dict[str, ModuleRecord], applied: Applied, settings: PipeSettings, vae: Any
) -> PipeRecord:
    pipe, old = now.pipe, now.record
    here, found = Shell.of(pipe), _found_shell(now)
    scheduler, wanted = old.made.scheduler if old else None, scheduler_for(found.scheduler, applied.recipe)
    if old is not None and type(here.scheduler) is type(wanted):
        scheduler = here.scheduler  # one of the user's own is as good
    same_recipe = old is not None and old.settings.policy.recipe == settings.policy.recipe
    if scheduler is None or not same_recipe or type(scheduler) is not type(wanted):
        scheduler = wanted
        put(scheduler, StandIn(found.scheduler, now.unet.module))
    made = Shell(old.made.cls if old else calls.governed(found.cls, HOOKS), scheduler, vae, here.fused)
    record = PipeRecord(weakref.ref(pipe), settings, modules, found, made)
    carry_over(record, old)
    return record


def carry_over(record: PipeRecord, old: PipeRecord | None) -> None:
    """Give a pipe's new record what goes on from its old one: the call under way, the prompts that are remembered."""
    if old is not None:
        record.running = old.running  # a call of this pipe may be running in this very thread
    if count := record.settings.cache_prompts:
        same = old is not None and old.settings.cache_prompts == count
        record.cache = old.cache if same and old is not None else PromptCache(count)
