"""What a pipe is brought to for the cells of a sheet, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import diffusers

from ..acceleration import accelerated, rehearse
from ..errors import CallError, brief
from ..lora.sources import Given
from ..meanwhile import plainly, varied
from ..moving import require_originals, require_unshared
from ..policy import Policy
from ..state import is_accelerated, status
from ..transition.records import pipe_record_of
from ..transition.target import Style
from .axes import STYLE, is_state


@dataclasses.dataclass(frozen=True)
class State:
    """What a pipe shall be for some cells.

    Attributes:
        accelerated: whether it is accelerated.
        settings: arguments of `accelerate`; none for a pipe that is accelerated already and stays as it is.
        scheduler: of the plain pipe; None for its own.
    """

    accelerated: bool
    settings: Mapping[str, Any]
    scheduler: Any = None

    @classmethod
    def of(cls, pipe: Any, asked: Mapping[str, Any], fixed: Mapping[str, Any]) -> State:
        """Of a cell that asks for these settings; `fixed` are arguments of `accelerate` for every accelerated cell.

        Raises:
            CallError: they contradict each other.
        """
        own = {name: value for name, value in asked.items() if is_state(name)}
        scheduler = own.pop("scheduler", None)
        default = bool(own or fixed or is_accelerated(pipe)) and scheduler is None
        fast = own.pop("accelerated", default)
        if not isinstance(fast, bool):
            raise CallError(f"accelerated={brief(fast)}: True or False is expected.")
        if not fast and own:
            raise CallError(
                f"{', '.join(sorted(own))}: the pipe as it was, without the LCM-LoRA, has no such setting."
            )
        if fast and scheduler is not None:
            raise CallError(
                "scheduler is of the plain pipe: an accelerated one has its recipe's. Vary recipe instead."
            )
        return cls(fast, _with_styles(pipe, {**fixed, **own}) if fast else {}, _scheduler(scheduler))

    def check(self, pipe: Any) -> Policy | None:
        """Refuse what can't be, before anything is drawn.

        Returns:
            What the accelerated pipe does with its calls' arguments.

        Raises:
            LcmLoraError: as `accelerate` or `restore`.
        """
        record = pipe_record_of(pipe)
        if self.accelerated and (self.settings or record is None):
            return rehearse(pipe, **self.settings)
        if not self.accelerated:
            require_unshared(pipe)
        if not self.accelerated and record is not None:
            for module in record.modules.values():
                require_originals(module, "show the pipe without the LCM-LoRA")
        return record.settings.policy if self.accelerated and record is not None else None

    def block(self, pipe: Any) -> AbstractContextManager[Any]:
        """The pipe in this state, or a copy that is, for the length of a block."""
        if not is_accelerated(pipe):
            return accelerated(pipe, **self.settings) if self.accelerated else _scheduled(pipe, self.scheduler)
        if self.accelerated:
            return varied(pipe, self.settings) if self.settings else nullcontext(pipe)
        return _plain_again(pipe, self.scheduler)


def settings_of(recipes: Iterable[str] | Mapping[str, Given | None]) -> list[dict[str, Any]]:
    """Arguments of `accelerate` for each recipe; where they map to files, with these."""
    files = recipes if isinstance(recipes, Mapping) else dict.fromkeys(recipes)
    return [{"recipe": name, **({} if file is None else {"lora": file})} for name, file in files.items()]


def _with_styles(pipe: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of single styles as one mapping of all styles."""
    weights = {name.removeprefix(STYLE): value for name, value in settings.items() if name.startswith(STYLE)}
    rest = {name: value for name, value in settings.items() if not name.startswith(STYLE)}
    if not weights:
        return rest
    styles = dict(rest["styles"] if "styles" in rest else status(pipe).styles)
    for name, weight in weights.items():
        known = styles.get(name)
        given = None if known is None or isinstance(known, int | float) else Style.of(known)
        styles[name] = dataclasses.replace(given, weight=weight) if given else weight
    return {**rest, "styles": styles}


def _scheduler(wanted: Any) -> Any:
    """The scheduler that is meant: an object, or a class, which may be named, with or without "Scheduler"."""
    named = wanted
    if isinstance(wanted, str):
        named = getattr(diffusers, wanted, None) or getattr(diffusers, f"{wanted}Scheduler", None)
    if wanted is not None and not hasattr(named, "set_timesteps"):
        raise CallError(f"scheduler={brief(wanted)}: a scheduler of diffusers is expected, such as 'EulerDiscrete'.")
    return named


@contextmanager
def _scheduled(pipe: Any, scheduler: Any) -> Iterator[Any]:
    if scheduler is None:
        yield pipe
        return
    found = pipe.scheduler
    pipe.scheduler = scheduler if hasattr(scheduler, "timesteps") else scheduler.from_config(found.config)
    try:
        yield pipe
    finally:
        pipe.scheduler = found


@contextmanager
def _plain_again(pipe: Any, scheduler: Any) -> Iterator[Any]:
    with plainly(pipe) as twin, _scheduled(twin, scheduler):
        yield twin
