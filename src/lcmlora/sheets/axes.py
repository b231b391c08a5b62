"""What the columns and lines of a sheet differ in."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ..acceleration import accelerate
from ..errors import CallError, brief
from ..parameters import Parameters
from ..transition.target import Style

Axis = Mapping[str, Iterable[Any]]
"""One name and its values: `{"steps": (1, 2, 4)}`; or labels, each with settings of its own."""

STATE = inspect.signature(accelerate).parameters.keys() - {"pipe", "steps", "guidance"} | {"accelerated", "scheduler"}
"""Settings that the pipe is brought to, before a call: arguments of `accelerate`; whether it is accelerated at all;
and the scheduler of the plain pipe.
"""
STYLE = "styles."
"""In front of a style's name: its weight."""


class Place(NamedTuple):
    """A column, or a place on the second axis.

    Attributes:
        label: as it is written on the sheet.
        asked: settings: of the pipe's state, of its call, and "seed".
        apart: whether steps, guidance and the state of the other axis are none of its business: the column "without".
    """

    label: str
    asked: Mapping[str, Any]
    apart: bool = False

    def beside(self, other: Place) -> dict[str, Any]:
        """Both places' settings; this one's count where both have one."""
        theirs = other.asked
        if self.apart:
            theirs = {name: value for name, value in theirs.items() if not (is_state(name) or name in _PACE)}
        return {**theirs, **self.asked}


_PACE = ("steps", "guidance", "num_inference_steps", "guidance_scale")
NOWHERE = Place("", {})


def is_state(name: str) -> bool:
    """Whether a setting is one that the pipe is brought to, and not one of its call."""
    return name in STATE or name.startswith(STYLE)


def places(axis: Axis | None, what: str) -> tuple[Place, ...]:
    """The places of an axis.

    Raises:
        CallError: it is none.
    """
    if axis is None:
        return (NOWHERE,)
    if not isinstance(axis, Mapping) or not axis or not all(isinstance(name, str) for name in axis):
        raise CallError(
            f"{what}={brief(axis)}: one name and its values are expected, such as {what}={{'steps': (1, 2)}}."
        )
    if all(isinstance(settings, Mapping) for settings in axis.values()):
        return tuple(Place(label, settings) for label, settings in axis.items() if isinstance(settings, Mapping))
    (name, values), *more = axis.items()
    if more or isinstance(values, str) or not isinstance(values, Iterable) or not (given := tuple(values)):
        raise CallError(
            f"{what}={brief(axis)}: one name with one or more values is expected, such as {what}={{'steps': (1, 2)}}, "
            f"or labels with settings: {what}={{'4 steps, tcd': {{'steps': 4, 'recipe': 'tcd'}}}}."
        )
    return tuple(Place(_label(name, value), {name: value}) for value in map(_plain, given))


def _plain(value: Any) -> Any:
    """A value; one number of numpy's or torch's as a plain number."""
    return value.item() if isinstance(value, np.generic | np.ndarray | torch.Tensor) and not value.shape else value


def _label(name: str, value: Any) -> str:
    number = f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    match name:
        case "steps" | "num_inference_steps":
            return in_steps(number)
        case "guidance" | "guidance_scale":
            return f"guidance {number}"
        case "accelerated":
            return "with" if value else "without"
        case "scheduler":
            named = value if isinstance(value, str | type) else type(value)
            return (named if isinstance(named, str) else named.__name__).removesuffix("Scheduler")
        case "styles":
            return ", ".join(f"{key}{_weight(one)}" for key, one in (value or {}).items()) or "no style"
        case "recipe":
            return str(value)
        case _ if name.startswith(STYLE):
            return f"{name.removeprefix(STYLE)} {number}"
    return f"{name} {number if isinstance(value, str | int | float | None) else brief(value)}"


def in_steps(count: Any) -> str:
    """A number of steps in words: "1 step", "4 steps"."""
    return f"{count} step{'' if str(count) == '1' else 's'}"


def _weight(wanted: Any) -> str:
    weight = wanted.weight if isinstance(wanted, Style) else wanted
    return f" {weight:g}" if isinstance(weight, int | float) else ""


def call_of(asked: Mapping[str, Any], takes: Parameters) -> dict[str, Any]:
    """The arguments of the call among settings, by the pipeline's own names."""
    own = {"steps": takes.steps, "guidance": takes.guidance}
    return {own.get(name) or name: value for name, value in asked.items() if not is_state(name) and name != "seed"}


def check_given_once(
    columns: Iterable[Place], down: Iterable[Place], fixed: Mapping[str, Any], takes: Parameters
) -> None:
    """Refuse a setting that has no effect, as another one stands in its place in every cell.

    Raises:
        CallError: there is one.
    """
    across, below = (_in_all(axis, takes) for axis in (columns, down))
    for name in sorted(across & below):
        raise CallError(f"{name}: x gives it, and y too: one is enough.")
    for name in sorted(_names(fixed, takes) & (across | below)):
        value = call_of(fixed, takes).get(name, fixed.get(name))
        each = "column" if name in across else "line"
        raise CallError(f"{name}={brief(value)} is given for all cells, and each {each} has its own: leave one out.")


def _in_all(axis: Iterable[Place], takes: Parameters) -> set[str]:
    return set.intersection(*(_names(place.asked, takes) for place in axis if not place.apart))


def _names(asked: Mapping[str, Any], takes: Parameters) -> set[str]:
    return call_of(asked, takes).keys() | {name for name in asked if is_state(name) or name == "seed"}


def labelled(label: str, asked: Mapping[str, Any], ran: Mapping[str, Any], takes: Parameters) -> str:
    """A place's label; with what ran in its place, where that is something else than what the place asks for."""
    wanted = call_of(asked, takes)
    other = [
        f"{ran[name]:g}" for name in wanted if isinstance(ran.get(name), int | float) and ran[name] != wanted[name]
    ]
    return ", ran ".join((label, *other))
