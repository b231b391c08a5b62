"""A baked pipe, and pipes of its parts: the LoRAs are in the weights for good, and how it is called can be said."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any

from . import calls
from . import recipe as recipes
from .calling import HOOKS
from .errors import BaseModelError, PipelineError
from .moving import carry_over
from .policy import Policy
from .transition import transaction
from .transition.plan import scheduler_for
from .transition.records import PipeRecord, Shell, StandIn, put, stands_for
from .transition.snapshot import Snapshot, already_in, check_drivable
from .transition.target import LCM, PipeSettings
from .transition.verification import why_not_fast

_POLICY = ("steps", "guidance", "strict", "enforce_inference_steps")
_CALLS = (*_POLICY, "cache_prompts")
_NO_MATTER = ("keep", "cache_dir", "token", "local_files_only")
"""Arguments of `accelerate` about originals and downloads, of which there are none."""


def settings_for(now: Snapshot, written: Mapping[str, Any], said: Mapping[str, Any]) -> PipeSettings:
    """How a baked pipe is called, where `accelerate` is asked for this.

    Args:
        now: the pipe.
        written: what `bake` wrote of its folder.
        said: the arguments that were given.

    Raises:
        PipelineError: another thing is asked for than what its weights are, or this pipe can't be driven.
        BaseModelError: its recipe is not registered.
        CallError: steps or guidance are outside what works.
    """
    if now.record is not None and not now.record.baked:
        raise PipelineError(
            "this pipe was accelerated with another UNet than this baked one: lcmlora.restore(pipe) first."
        )
    merged = written["merged"]
    so: dict[str, tuple[Any, ...]] = dict.fromkeys(said, (None,))
    so |= {"base": ("auto", merged.get("base")), "recipe": (None, merged.get("recipe")), "compile": (False,)}
    so |= {"weight": (None, merged.get("weight")), "fuse": ("auto", True), "adapter_name": (LCM,)}
    so |= {"styles": (merged.get("styles") or {}, *((None,) if not merged.get("styles") else ()))}
    asked = said.keys() - {*_CALLS, *_NO_MATTER}
    if odd := sorted(name for name in asked if said[name] not in so[name]):
        raise PipelineError(
            f"{already_in(written)} accelerate(pipe) gives them to a pipe of its parts too, and takes "
            f"{', '.join(_CALLS)}, but not {', '.join(odd)}."
        )
    if now.record is None:
        check_drivable(now)
    settings = now.record.settings if now.record else PipeSettings(policy_of(written))
    policy = settings.policy.under(settings.policy.recipe, {n: said[n] for n in _POLICY if n in said})
    cache = said.get("cache_prompts", settings.cache_prompts)
    settings = dataclasses.replace(settings, policy=policy, cache_prompts=cache)
    settings.check(now.pipe)
    return settings


def policy_of(written: Mapping[str, Any]) -> Policy:
    """What the calls of a baked pipe get by default.

    Raises:
        BaseModelError: its recipe is not registered.
    """
    call, name = written["call"], written["merged"].get("recipe") or recipes.LCM.name
    try:
        recipe = recipes.by_name(name)
    except BaseModelError as error:
        raise BaseModelError(
            f"this model was baked with recipe {name!r}, which is not registered here: type "
            f"lcmlora.register(lcmlora.Recipe({name!r}, ...)) first, as it was where the model was baked."
        ) from error
    steps = call.get("num_inference_steps", recipe.steps)
    return Policy(steps=steps, guidance=call.get("guidance_scale"), recipe=recipe)


def check_styles(written: Mapping[str, Any], styles: Any) -> None:
    """Refuse other styles than those that are in a baked pipe's weights.

    Raises:
        PipelineError: they are others.
    """
    there = dict(written["merged"].get("styles") or {})
    if styles != there:
        raise PipelineError(
            f"this pipe was baked {f'with styles {there}' if there else 'without styles'}, and no other can be set. "
            "Accelerate the model that it was baked from."
        )


def dress(now: Snapshot, written: Mapping[str, Any], settings: PipeSettings) -> PipeRecord:
    """Have a baked pipe called so. No weight is touched; `restore` takes it back.

    Returns:
        Its record.
    """
    pipe, old = now.pipe, now.record
    if old is not None and settings == old.settings and why_not_fast(pipe, old) is None:
        return old
    here, recipe = Shell.of(pipe), settings.policy.recipe
    if old is not None:
        found, cls, scheduler = old.found, old.made.cls, here.scheduler
        if not isinstance(scheduler, type(old.made.scheduler)):
            scheduler = old.made.scheduler
    else:
        found = dataclasses.replace(here, cls=calls.plain(here.cls), scheduler=stands_for(here.scheduler))
        cls, same = calls.governed(found.cls, HOOKS), type(found.scheduler).__name__ == recipe.scheduler
        scheduler = copy.deepcopy(found.scheduler)  # the one found may serve another pipe's calls
        if not same:
            scheduler = scheduler_for(found.scheduler, recipe)
            put(scheduler, StandIn(found.scheduler, now.unet.module))
    found = dataclasses.replace(found, vae=here.vae)
    made = Shell(cls, scheduler, here.vae, here.fused)
    record = PipeRecord(weakref.ref(pipe), settings, {}, found, made, baked=written)
    carry_over(record, old)
    with transaction.Undo() as undo:
        transaction.dress(pipe, record, undo)
    return record
