"""Base and accelerated pipe take turns, so that whatever else the machine does meets both."""

from __future__ import annotations

import dataclasses
import gc
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.utils import BaseOutput
from PIL import Image
from tqdm.auto import tqdm

from ..acceleration import accelerated
from ..calls import parameters_of
from ..compat import name_or_path, uncompiled
from ..devices import PeakMemory, device_of, synchronize
from ..errors import CallError, PipelineError, brief
from ..parameters import Parameters, is_text, refuse, whole
from ..state import status
from ..transition.records import pipe_record_of
from ..warn import warn
from .result import Row, Spread
from .stages import OTHER, STAGES, Stopwatch, watched

_TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
_SLOW_AT_FIRST = ("compile", "cache_prompts")
"""Settings with which the first call after `accelerate` is another than those that follow."""


@dataclasses.dataclass(frozen=True)
class Calls:
    """What the calls have in common.

    Attributes:
        takes: the parameters of the pipeline's call.
        steps, guidance: what it calls these; no guidance where it has none.
        prompt: of every picture.
        seed: of every call.
        batches: how many prompts a call has.
        common: further arguments.
    """

    takes: Parameters
    steps: str
    guidance: str
    prompt: str | None
    seed: int
    batches: tuple[int, ...]
    common: Mapping[str, Any]

    @classmethod
    def of(cls, pipe: Any, prompt: str | None, seed: int, batches: Iterable[int], common: Mapping[str, Any]) -> Calls:
        """
        Raises:
            PipelineError: the pipe can't be called with a number of steps. CallError: batches that can't be.
            TypeError: arguments that its call has not, or that are `benchmark`'s own.
        """
        takes = parameters_of(pipe)
        if takes.steps is None:
            raise PipelineError(f"{takes.owner}'s call takes no number of steps, so there is nothing to compare.")
        own = {takes.steps: "steps=(accelerated, base)", "generator": "seed", "prompt": "prompt"}
        for name in common.keys() & own.keys():
            refuse(name, "benchmark's call=", own[name])
        for name, near in takes.unknown({*common, *(() if prompt is None else ("prompt",))}):
            settings = inspect.signature(accelerated).parameters
            takes.refuse(name, f"accelerate={{{name!r}: ...}}" if name in settings else near)
        found = tuple(whole("batch_sizes", batch) for batch in batches)
        if prompt is not None and not is_text(prompt):
            raise CallError(f"prompt={brief(prompt)}: one text is expected.")
        common = {**common, **takes.numbers(common)}
        if not found or (prompt is None and found != (1,)):
            raise CallError("batch_sizes: at least one is expected, and more than one picture a call needs a prompt.")
        return cls(takes, takes.steps, takes.guidance or "", prompt, whole("seed", seed, 0), found, common)

    def arguments(self, batch: int, own: Mapping[str, Any]) -> dict[str, Any]:
        """Of one call. The generator is made anew, so that all calls draw the same pictures."""
        given = {**self.common, **own, **({} if self.prompt is None else {"prompt": self.prompt})}
        if batch > 1:
            given |= {name: [given[name]] * batch for name in _TEXTS if isinstance(given.get(name), str)}
        if "generator" in self.takes.defaults or self.takes.open:
            given["generator"] = torch.Generator("cpu").manual_seed(self.seed)
        return given

    def pictures(self, batch: int) -> int:
        """How many pictures a call makes."""
        return batch * int(self.common.get("num_images_per_prompt") or 1)


class Call(NamedTuple):
    """What one call took."""

    watch: Stopwatch
    peak_bytes: int | None


@dataclasses.dataclass(eq=False)
class State:
    """The pipe as it is, or accelerated in one way, and what was measured of it.

    Attributes:
        settings: arguments of `accelerate`; None for the base.
        own: arguments of its calls alone.
        name: of its rows.
        recipe, fused, unguided: of the accelerated pipe; the last is whether the recipe works without guidance.
        ran: the steps and guidance of its calls.
        calls: those that count, by batch.
        to_accelerate, to_restore: seconds of the turns that count.
    """

    settings: Mapping[str, Any] | None
    own: Mapping[str, Any]
    name: str = "base"
    recipe: str | None = None
    fused: bool | None = None
    unguided: bool = True
    ran: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    calls: dict[int, list[Call]] = dataclasses.field(default_factory=dict)
    to_accelerate: list[float] = dataclasses.field(default_factory=list)
    to_restore: list[float] = dataclasses.field(default_factory=list)

    def like(self, more: Mapping[str, Any] | None = None) -> State:
        """The same, nothing measured yet; with further arguments of `accelerate`."""
        return State({**(self.settings or {}), **(more or {})}, self.own)


def states_of(
    pipe: Any,
    calls: Calls,
    steps: tuple[int | None, int | None],
    base_guidance: float | None,
    said: Iterable[Mapping[str, Any]],
    own_steps: bool,
) -> list[State]:
    """The base, and the accelerated pipe in each of the ways that were said."""
    fast_steps, base_steps = steps
    fast: dict[str, Any] = {} if fast_steps is None or own_steps else {calls.steps: fast_steps}
    base: dict[str, Any] = {} if base_steps is None else {calls.steps: base_steps}
    if base_guidance is not None:
        base[calls.guidance or "guidance_scale"] = base_guidance
    for settings in said:
        accelerated(pipe, **settings)  # refuses unknown names; nothing is entered
    ran = {**calls.takes.defaults, **calls.common, **base}
    return [State(None, base, ran=ran), *(State(settings, fast) for settings in said)]


class Turns:
    """Measures the states of a pipe in turns.

    Args:
        pipe: not accelerated.
        calls: what all calls have in common.
        states: what to measure, in the order of a turn.
        repeats, warmup: turns that count, and turns before that do not.
        clock: gives seconds.
    """

    def __init__(
        self, pipe: Any, calls: Calls, states: list[State], repeats: int, warmup: int, clock: Callable[[], float]
    ) -> None:
        self.pipe, self.calls, self.states = pipe, calls, states
        self.repeats, self.warmup, self.clock = repeats, warmup, clock
        self._size = ""

    def begin(self, state: State) -> None:
        """Accelerate and restore once, which refuses what can't be done or called, and see what the state is."""
        assert state.settings is not None
        with accelerated(self.pipe, **state.settings):
            found, record = status(self.pipe), pipe_record_of(self.pipe)
            assert record is not None
            state.recipe, state.fused = found.recipe, found.fused
            policy, arguments = record.settings.policy, self.calls.arguments(self.calls.batches[0], state.own)
            policy.complete(self.calls.takes, self.pipe, (), arguments, [])
            state.unguided = policy.recipe.guidance_range[0] <= 1
        alike = sum(other.settings is not None for other in self.states) > 1
        ways = {True: ", merged", False: ", adapters"} if alike and "fuse" in state.settings else {}
        state.name = f"{state.recipe}{ways.get(bool(state.fused), '')}"

    def run(self, bars: bool) -> bool:
        """All turns; returns whether they were interrupted.

        Raises:
            KeyboardInterrupt: before each state had a call that counts.
        """
        gc.collect()  # not at each call: it takes longer than a call of a small model
        total = (self.warmup + self.repeats) * len(self.states) * len(self.calls.batches)
        try:
            with tqdm(total=total, desc="benchmark", unit="call", disable=not bars) as bar:
                for turn in range(-self.warmup, self.repeats):
                    for state in self.states:
                        self.turn(state, turn >= 0, bar.update)
        except KeyboardInterrupt:
            if not all(state.calls.get(batch) for state in self.states for batch in self.calls.batches):
                raise
            warn("the benchmark was stopped: its figures are of the turns that were over.")
            return True
        return False

    def turn(self, state: State, counts: bool, done: Callable[[], object] = lambda: None) -> None:
        """One turn of one state."""
        with ExitStack() as stack:
            if state.settings is not None:
                took = self._seconds(lambda: stack.enter_context(accelerated(self.pipe, **(state.settings or {}))))
                state.to_accelerate += [took] * counts
            for batch in self.calls.batches:
                if any((state.settings or {}).get(name) for name in _SLOW_AT_FIRST):
                    self._call(state, batch)
                measured = self._call(state, batch)
                if counts:
                    state.calls.setdefault(batch, []).append(measured)
                done()
            if state.settings is not None:
                state.to_restore += [self._seconds(stack.close)] * counts

    def _seconds(self, work: Callable[[], object]) -> float:
        began = self.clock()
        work()
        synchronize(device_of(self.pipe))
        return self.clock() - began

    def _call(self, state: State, batch: int) -> Call:
        """One call, watched."""
        arguments, device = self.calls.arguments(batch, state.own), device_of(self.pipe)
        watch = Stopwatch(self.clock, partial(synchronize, device))
        peak = PeakMemory(device)
        with watched(self.pipe, watch), watch.stage(OTHER):
            made = self.pipe(**arguments)
        if record := pipe_record_of(self.pipe):
            state.ran = dict(record.settings.policy.ran)
        self._size = _size(made)
        return Call(watch, peak.bytes())

    def seconds(self, state: State) -> float:
        """The median of a state's calls at the first batch size."""
        return Spread.of(call.watch.total for call in state.calls[self.calls.batches[0]]).median

    def rows(self) -> tuple[Row, ...]:
        """What was measured."""
        several = len(self.calls.batches) > 1
        return tuple(
            self._row(state, batch, f"{state.name}, batch {batch}" if several else state.name)
            for batch in self.calls.batches
            for state in self.states
        )

    def _row(self, state: State, batch: int, name: str) -> Row:
        calls = state.calls[batch]
        watches = [call.watch for call in calls]
        peaks = [call.peak_bytes for call in calls if call.peak_bytes is not None]
        stages = [stage.name for stage in STAGES if any(stage.name in watch.seconds for watch in watches)]
        guidance = state.ran.get(self.calls.guidance)
        return Row(
            name=name,
            accelerated=state.settings is not None,
            recipe=state.recipe,
            fused=state.fused,
            steps=state.ran.get(self.calls.steps),
            guidance=float(guidance) if isinstance(guidance, int | float) else None,
            batch=self.calls.pictures(batch),
            passes=watches[-1].passes.get("unet", 0),
            samples=watches[-1].samples.get("unet", 0),
            seconds=Spread.of(watch.total for watch in watches),
            stages={stage: Spread.of(watch.seconds.get(stage, 0.0) for watch in watches) for stage in stages},
            peak_bytes=max(peaks, default=None),
            to_accelerate=Spread.of(state.to_accelerate) if state.to_accelerate else None,
            to_restore=Spread.of(state.to_restore) if state.to_restore else None,
        )

    def described(self) -> str:
        """The pipeline in a line."""
        where, dtype = "/".join(Path(name_or_path(self.pipe)).parts[-2:]), uncompiled(self.pipe.unet).dtype
        kind = type(self.pipe).__name__ + (f" of {where}" if where else "")
        return ", ".join(word for word in (kind, str(dtype).removeprefix("torch."), self._size) if word)


def _size(made: Any) -> str:
    """The size of the first picture, where there is any."""
    while isinstance(made, BaseOutput | list | tuple) and len(made):
        made = made[0]
    return f"{made.width} x {made.height}" if isinstance(made, Image.Image) else ""
