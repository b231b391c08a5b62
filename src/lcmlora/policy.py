"""What becomes of a call's arguments: the recipe's defaults where the caller gave none, guidance kept in its range."""

from __future__ import annotations

import dataclasses
import inspect
import math
import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch

from .errors import CallError
from .parameters import Parameters, is_split, meant
from .recipe import LCM, Recipe
from .warn import warn

MAX_STEPS = 50
"""LCMScheduler's `original_inference_steps`: more steps than that it can't place (scheduling_lcm.py, l. 520)."""
_NOT_BY_NAME = {"seed": "generator=torch.Generator().manual_seed(...)"}
_NEED_GUIDANCE = {"guidance_rescale", "image_guidance_scale", "editing_prompt", "source_embeds"}
"""Arguments beside `negative_...` and `guidance_scale_...` that do nothing in a call without guidance."""


class Call(NamedTuple):
    """A call's arguments, completed, and three facts about them.

    Attributes:
        args, kwargs: what the pipeline is called with.
        ran: the steps that are run, and the guidance that is used, by their arguments' names.
        stretched: whether the steps were raised for a strength. A call inside this one must not raise them again.
        unguided: whether classifier-free guidance is off.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ran: Mapping[str, Any] = MappingProxyType({})
    stretched: bool = False
    unguided: bool = False


@dataclasses.dataclass
class Policy:
    """What an accelerated pipe does with the arguments of a call. Two equal policies do the same.

    Args:
        steps: `num_inference_steps` where the caller gives none, 1 to 50.
        guidance: `guidance_scale` where the caller gives none, in the recipe's range (up to 2 for LCM); 1 and below is
            off. None leaves every call's guidance alone.
        strict: raise `CallError` where guidance would be clamped, or fewer steps run than were asked for.
        enforce_inference_steps: image-to-image runs the steps asked for. False is diffusers' own meaning:
            `num_inference_steps` of the whole schedule, of which a strength runs its part.
        recipe: the rules of the few-step LoRA: its steps, range of guidance, `timesteps` and `eta`.

    Raises:
        CallError: no call could use these defaults.
    """

    steps: int = 4
    guidance: float | None = 1.0
    strict: bool = False
    enforce_inference_steps: bool = True
    ran: Mapping[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)
    recipe: Recipe = LCM
    ran_unguided: bool = dataclasses.field(default=False, init=False, repr=False, compare=False)
    _told: set[str] = dataclasses.field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.steps = _whole("num_inference_steps", self.steps)
        if self.strict:
            self._check_within("steps", self.steps)
        if self.guidance is None:
            return
        self.guidance = _number("guidance_scale", self.guidance, self.recipe.guidance_in_words)
        low, high = self.recipe.guidance_range
        if not (low if low > 1 else 0) <= self.guidance <= high:
            off = "" if low > 1 else "; 0 is off, as is 1"
            words = f"{self.recipe.guidance_in_words} works with {self.recipe.title}{off}."
            raise CallError(f"guidance={self.guidance:g}: {words}")

    def under(self, recipe: Recipe, said: Mapping[str, Any]) -> Policy:
        """This policy with what is said now; under another recipe with that one's steps and guidance.

        Raises:
            CallError: no call could use that.
        """
        if recipe == self.recipe and not said:
            return self
        own = {} if recipe == self.recipe else {"steps": recipe.steps, "guidance": recipe.guidance}
        return dataclasses.replace(self, recipe=recipe, **{**own, **said})

    def complete(
        self, takes: Parameters, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outer: list[bool]
    ) -> Call:
        """The call's arguments, completed and checked.

        Args:
            takes: the parameters of the method that is called.
            pipe: whose method it is.
            args, kwargs: what the caller gave.
            outer: for each call of this pipe that this one is made from, whether it raised the steps for a strength.

        Raises:
            CallError: steps outside 1 to 50, a strength or denoising split with which no step is left, or, when
                strict, guidance or steps that the recipe's file was not made for, or fewer steps than asked for.
        """
        given = takes.given(args, kwargs)
        if given is None:
            return Call(args, kwargs)  # the pipeline's own TypeError says what is wrong
        changes: dict[str, Any] = {}
        runs: dict[str, int] = {}
        stretched = any(outer)
        if takes.steps and given.get("timesteps") is None and given.get("sigmas") is None:
            value = given.get(takes.steps)
            wanted = self.steps if value is None else _whole(takes.steps, value)
            strength = takes.strength_of(given)
            if not stretched:
                self._check_within(takes.steps, wanted)
            if fixed := self._timesteps(takes, given, wanted, strength):
                asked, runs[takes.steps] = wanted, len(fixed) if strength is None else int(wanted * min(strength, 1))
                changes["timesteps"] = fixed
            else:
                asked, runs[takes.steps] = self._steps(wanted, strength, given, stretched)
            changes[takes.steps] = asked
            stretched |= asked != wanted
            if is_split(given.get("denoising_start")) or is_split(given.get("denoising_end")):
                runs[takes.steps] = _steps_in_split(given, asked, strength, pipe)
        if self.recipe.eta is not None and given.get("eta") is None:
            if "eta" in takes.defaults:
                changes["eta"] = self.recipe.eta
            elif not outer:
                self._once(
                    "no eta", f"{takes.owner} takes no eta, and recipe {self.recipe.name!r} wants {self.recipe.eta:g}."
                )
        if self.guidance is not None:
            changes.update(self._guidance(takes, given))
        unguided = takes.guidance is not None and _is_off(changes.get(takes.guidance, given.get(takes.guidance)))
        if not outer:
            self._tell_what_is_lost(takes, given, unguided, pipe)
        return Call(*takes.replaced(args, kwargs, changes), {**changes, **runs}, stretched, unguided)

    def _check_within(self, name: str, wanted: int) -> None:
        """Object to a number of steps that the file was not made for."""
        least, most = self.recipe.within
        if not least <= wanted <= most:
            self._object(
                "within",
                f"{name}={wanted}: the file of recipe {self.recipe.name!r} was made for {self.recipe.steps_in_words} "
                "steps, and others give blurred or burnt pictures",
                f"{wanted} are run. recipe='lcm' takes any number.",
            )

    def _timesteps(
        self, takes: Parameters, given: Mapping[str, Any], wanted: int, strength: float | None
    ) -> list[int] | None:
        """The recipe's own timesteps, for as many steps as there are, of which a strength runs its part."""
        fixed = list(self.recipe.timesteps)
        if len(fixed) != wanted:
            return None
        made_for = f"the file of recipe {self.recipe.name!r} was made for the start timesteps {fixed}"
        split = any(is_split(given.get(name)) for name in ("denoising_start", "denoising_end"))
        if "timesteps" not in takes.defaults or split:
            self._once("start", f"{made_for}, which {takes.owner} can't be told here: the scheduler's own are run.")
            return None
        if strength is None or strength >= _WHOLE:
            return fixed
        runs = int(wanted * strength)
        if runs < 1:
            raise CallError(f"strength={strength:g}: {made_for}, all above it; pass {1 / wanted:g} or more.")
        fault = f"strength={strength:g} starts at {fixed[wanted - runs]} and runs {runs} of {wanted} steps: {made_for}"
        self._object("start", fault, "the others are left out.")
        return fixed

    def _steps(self, wanted: int, strength: float | None, given: dict[str, Any], stretched: bool) -> tuple[int, int]:
        """The number that makes the pipeline run `wanted` steps, or as many as fit, and how many are run.

        `stretched`: it does already.
        """
        if given.get("enforce_inference_steps") or stretched:  # the former is AnimateDiff's own way to the same end
            strength = None
        asked = runs = wanted
        if strength is not None:
            most = self._most
            asked = steps_at_strength(wanted, strength, most) if self.enforce_inference_steps else wanted
            runs = int(asked * strength)
            if runs < 1:
                least = steps_at_strength(1, strength, most)
                raise CallError(f"strength={strength:g} leaves none of {wanted} steps: pass {least} or more.")
            if self.enforce_inference_steps and runs < wanted:
                self._object(
                    "room",
                    f"strength={strength:g} leaves room for {runs} of {most} steps, and {wanted} were asked "
                    f"for: pass {runs} or less, or a strength of {wanted / most:g} or more",
                    f"{runs} are run. accelerate(enforce_inference_steps=False) gives num_inference_steps diffusers' "
                    "own meaning.",
                )
        title, good = self.recipe.title, self.recipe.good_steps
        if good and runs > good and not stretched:
            self._once(
                "steps", f"num_inference_steps={wanted}: {title} is best at 4 to {good} steps and gets worse above."
            )
        return asked, runs

    @property
    def _most(self) -> int:
        """How many steps the recipe's scheduler can place on its whole schedule."""
        scheduler = getattr(diffusers, self.recipe.scheduler)
        known = inspect.signature(scheduler).parameters
        return MAX_STEPS if "original_inference_steps" in known else known["num_train_timesteps"].default

    def _guidance(self, takes: Parameters, given: dict[str, Any]) -> dict[str, Any]:
        """Guidance where none was given, clamped where it was; the same for second arguments of the same meaning."""
        changes = {}
        if takes.guidance:
            value = given.get(takes.guidance)
            changes[takes.guidance] = self._clamped(takes.guidance, self.guidance if value is None else value)
        for name in takes.more_guidance:
            value = given.get(name, takes.defaults[name])
            low, high = self.recipe.guidance_range
            if name not in given and isinstance(value, int | float) and value > high:
                changes[name] = max(self.guidance or 0, low)  # a default made for 50 steps
            elif name in given and not isinstance(value, bool | str | dict | None):
                changes[name] = self._clamped(name, value)
        return changes

    def _clamped(self, name: str, value: Any) -> Any:
        """A guidance, or lists of them (one for each tile, region or prompt), kept within the range."""
        low, high = self.recipe.guidance_range
        if isinstance(value, list | tuple):
            return type(value)([None if one is None else self._clamped(name, one) for one in value])
        if isinstance(value, np.ndarray | torch.Tensor) and value.ndim:
            self._object_to_guidance(name, float(value.max()))
            return value.clip(low, high)
        number = _number(name, value, self.recipe.guidance_in_words)
        self._object_to_guidance(name, number)
        return min(max(number, low), high)  # 1 and below is "off": the same picture as at 1, and no cost

    def _object_to_guidance(self, name: str, guidance: float) -> None:
        low, high = self.recipe.guidance_range
        works = f"{self.recipe.guidance_in_words} works"
        if guidance > high:
            self._object(
                name,
                f"{name}={guidance:g} burns pictures made with {self.recipe.title}, which has guidance distilled in; "
                f"{works}",
                f"{high:g} is used. accelerate(guidance=None) turns this off.",
            )
        elif guidance < low and low > 1:
            self._object(
                name,
                f"{name}={guidance:g}: {self.recipe.title} is made for guidance; {works}",
                f"{low:g} is used. accelerate(guidance=None) turns this off.",
            )

    def _object(self, kind: str, fault: str, instead: str) -> None:
        """Refuse when strict; otherwise say, once, what is done instead."""
        if self.strict:
            raise CallError(fault + ".")
        self._once(kind, f"{fault}: {instead}")

    def _tell_what_is_lost(self, takes: Parameters, given: dict[str, Any], unguided: bool, pipe: Any) -> None:
        """Warn of arguments that do nothing here, or something else than the caller may think."""
        for name, near in takes.unknown(given):
            words = f"{takes.owner} names no such argument, so it may have no effect."
            self._once(name, f"{name}: {words}{meant(name, _NOT_BY_NAME.get(name, near))}")
        for name, value in given.items():
            if name == "eta" and "eta" not in inspect.signature(type(pipe.scheduler).step).parameters:
                message = f"eta has no effect: {type(pipe.scheduler).__name__} takes none."
            elif unguided and (name.startswith(("negative_", "guidance_scale_")) or name in _NEED_GUIDANCE):
                message = f"{name} has no effect at guidance_scale 1: {self._how_to_guide()}"
            else:
                continue
            if _says_something(value, takes.defaults.get(name)):
                self._once(f"{name}, lost", message)
        attention = given.get("cross_attention_kwargs")
        if isinstance(attention, Mapping) and attention.get("scale") is not None:
            merged = not any(hasattr(module, "lora_A") for module in pipe.unet.modules())
            self._once(
                "scale",
                'cross_attention_kwargs["scale"] '
                + ("has no effect on merged LoRAs" if merged else "scales the LCM-LoRA together with the styles")
                + ": lcmlora.set_styles(pipe, {name: weight}) changes the styles alone.",
            )

    def _how_to_guide(self) -> str:
        low, high = self.recipe.guidance_range
        if high <= 1:
            return f"{self.recipe.title} works without guidance alone."
        return (
            f"pass guidance_scale={(low + high) / 2:g} (up to {high:g}) with it. Each step then takes two UNet passes "
            "instead of one."
        )

    def _once(self, kind: str, message: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            warn(message)


_WHOLE = 0.999  # SDXL inpainting's default of 0.9999 stands for 1


def steps_at_strength(steps: int, strength: float, most: int = MAX_STEPS) -> int:
    """The `num_inference_steps` with which an image-to-image pipeline runs `steps` steps at this strength; no more
    than the scheduler can place.

    Those pipelines run int(num_inference_steps * strength) of the steps they are asked for
    (pipeline_stable_diffusion_img2img.py, get_timesteps).

    Raises:
        CallError: the strength is not in (0, 1], or so small that none of the scheduler's steps lies below it.
    """
    if not 0 < strength <= 1:
        raise CallError(f"strength={strength!r}: a number above 0 and up to 1 is expected.")
    if int(most * strength) < 1:
        raise CallError(f"strength={strength:g} changes nothing: the least that makes a step is {1 / most:g}.")
    asked = steps if strength >= _WHOLE else math.ceil(steps / strength)
    asked += int(asked * strength) < steps  # 3 / 0.6 and its like, a hair below the whole number in floating point
    return min(asked, most)


def timesteps_of(scheduler: Any, steps: int) -> list[int]:
    """The timesteps that a scheduler visits, descending; it is left as it is."""
    own = type(scheduler).from_config(scheduler.config)
    own.set_timesteps(steps)
    return [int(t) for t in own.timesteps]


def _steps_in_split(given: Mapping[str, Any], steps: int, strength: float | None, pipe: Any) -> int:
    """How many steps a split between two pipelines leaves this one (SDXL, get_timesteps; pipeline_..._xl, l. 1195).

    Raises:
        CallError: none.
    """
    split = (given.get("denoising_start"), given.get("denoising_end"))
    start, end = (value if is_split(value) else None for value in split)
    timesteps = timesteps_of(pipe.scheduler, steps)
    if strength is not None:
        timesteps = timesteps[steps - min(int(steps * strength), steps) :]
    total = pipe.scheduler.config.num_train_timesteps
    left = [
        t
        for t in timesteps
        if (start is None or t < round(total - start * total)) and (end is None or t >= round(total - end * total))
    ]
    if not left:
        raise CallError(
            f"denoising_start={start!r}, denoising_end={end!r}: none of the {steps} timesteps {timesteps} "
            "lies there. Pass more num_inference_steps, or split elsewhere."
        )
    return len(left)


def _whole(name: str, value: Any) -> int:
    """A number of steps, of whatever integer type.

    Raises:
        CallError: it is none, or LCMScheduler can't place so many.
    """
    try:
        steps = 0 if isinstance(value, bool | np.bool_) or _is_bool_tensor(value) else operator.index(value)
    except TypeError:
        steps = 0
    if not 1 <= steps <= MAX_STEPS:
        raise CallError(
            f"{name}={value!r}: an accelerated pipe takes whole numbers from 1 to {MAX_STEPS}; 4 is usual."
        )
    return steps


def _number(name: str, value: Any, limits: str) -> float:
    """A guidance, of whatever type that counts as a number.

    Raises:
        CallError: it is none.
    """
    try:
        number = math.nan if isinstance(value, bool | np.bool_ | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number) or _is_bool_tensor(value):
        raise CallError(f"{name}={value!r}: a number from {limits} is expected.")
    return number


def _is_bool_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool


def _is_off(guidance: Any) -> bool:
    """Whether a guidance, or each of several, is too small to be applied. Not so where nobody knows."""
    if isinstance(guidance, list | tuple):
        return all(_is_off(one) for one in guidance)
    try:
        return bool(guidance.max() <= 1) if hasattr(guidance, "max") else bool(guidance <= 1)
    except TypeError:  # None: the pipeline's own default, above 1
        return False


def _says_something(value: Any, default: Any) -> bool:
    """Whether an argument asks for anything: not None, empty, zero, or what it is by default."""
    if isinstance(value, list | tuple):
        return any(_says_something(one, None) for one in value)
    if isinstance(value, str | int | float):
        return bool(value) and value != default
    return value is not None
