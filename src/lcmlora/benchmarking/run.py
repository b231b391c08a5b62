"""The verb: `benchmark`."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Unpack

from diffusers import DiffusionPipeline

from ..acceleration import restore
from ..compat import bars_hidden, shows_bars, without_bars
from ..devices import device_of, hardware
from ..errors import CallError, PipelineError, brief
from ..lora.sources import Given
from ..moving import require_unshared
from ..parameters import whole
from ..sheets.states import settings_of
from ..sheets.sweeping import SEED, CallArguments
from ..state import is_accelerated
from .advice import Facts, advise
from .result import Advice, Benchmark
from .turns import Calls, Turns, states_of

PROMPT = "a red fox in the snow"


def benchmark(
    pipe: Any,
    steps: tuple[int | None, int | None] = (4, 25),
    *,
    prompt: str | None = PROMPT,
    repeats: int = 3,
    warmup: int = 1,
    batch_sizes: int | Iterable[int] = (1,),
    base_guidance: float | None = None,
    recipes: str | Iterable[str] | Mapping[str, Given | None] = (),
    fused: bool | Iterable[bool] = (),
    accelerate: Mapping[str, Any] | None = None,
    load: Mapping[str, Any] | None = None,
    try_advice: bool = False,
    seed: int = SEED,
    progress: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    call: Mapping[str, Any] | None = None,
    **more: Unpack[CallArguments],
) -> Benchmark:
    """How much faster the accelerated pipe is here, where the time goes, and what to try. The pipe is given back.

    In each turn the pipe is called as it is, then accelerated, called and restored, so that base and accelerated calls
    alternate in one run and accelerating and restoring are measured too. The same pipe does both: no second UNet takes
    memory, and the originals wait where `accelerate={"keep": ...}` says. Every setting is tried once before the first
    call, and the first turn does not count. At the border of each stage the device is waited for.

    Ctrl-C gives the pipe back and returns what was measured, with a warning, as soon as each row has one call that
    counts; before that it stays a KeyboardInterrupt.

    Args:
        pipe: a pipeline that is not accelerated; or the folder or repository id of one, whose loading is measured.
        steps: of the accelerated pipe and of the base. None is the recipe's own, or the pipeline's own default.
        prompt: of every picture. None passes none, for pipelines without one or `call={"prompt_embeds": ...}`.
        repeats: turns that count.
        warmup: turns before that do not.
        batch_sizes: pictures a call. Each is measured, the first is what the summary and the advice are about.
        base_guidance: `guidance_scale` of the base; None is the pipeline's own default.
        recipes: recipes to have a row each in the place of the one that `accelerate` names, at their own steps; where
            they map to files, with these.
        fused: (True, False) measures merged LoRAs and PEFT adapters; empty is as `accelerate` says.
        accelerate: arguments of `lcmlora.accelerate`.
        load: arguments of `from_pretrained`, where a folder or repository is given.
        try_advice: try what the advice says, in turns of its own, where `accelerate` can do it.
        seed: of every call.
        progress: show a bar over all calls, where the pipe's own are not switched off.
        clock: gives seconds. `time.process_time` leaves out what others do on a CPU.
        call: further arguments of every call, those that only some pipelines take.
        more: further arguments of every call.

    Returns:
        The figures, as text (`print`), JSON, CSV, a page, a matplotlib figure.

    Raises:
        PipelineError: the pipe is accelerated already, can't be accelerated, called or loaded.
        CallError: steps, repeats or batch sizes that can't be run.
        TypeError: neither `accelerate` nor the pipeline takes such an argument. Whatever is raised, nothing was drawn,
            and the pipe is as it was.
    """
    load_seconds = None
    if isinstance(pipe, str | os.PathLike):
        began = clock()
        pipe = _loaded(pipe, load or {})
        load_seconds = clock() - began
    require_unshared(pipe)
    if is_accelerated(pipe):
        raise PipelineError(
            "benchmark needs the pipe as it was: lcmlora.restore(pipe) first. lcmlora.compare(pipe, prompt) times an "
            "accelerated one with and without the LCM-LoRA, and leaves it accelerated."
        )
    calls = Calls.of(pipe, prompt, seed, _several(batch_sizes), {**(call or {}), **more})
    said = _settings(accelerate or {}, _several(recipes), _several(fused))
    states = states_of(pipe, calls, _pair(steps), base_guidance, said, own_steps=bool(recipes))
    turns = Turns(pipe, calls, states, whole("repeats", repeats), whole("warmup", warmup, 0), clock)
    bars = progress and shows_bars(pipe)
    with _given_back(pipe):
        for state in states[1:]:
            turns.begin(state)
        facts = Facts.of(pipe, said[0], states[1].unguided and calls.guidance not in calls.common)
        interrupted = turns.run(bars)
        rows = turns.rows()
        advice = advise(rows, facts)
        if try_advice and not interrupted:
            advice, interrupted = _tried(turns, advice, bars)
    return Benchmark(turns.described(), hardware(device_of(pipe)), rows, advice, load_seconds, interrupted)


def _loaded(source: str | os.PathLike[str], options: Mapping[str, Any]) -> Any:
    try:
        with bars_hidden():
            return DiffusionPipeline.from_pretrained(os.fspath(source), **options)
    except Exception as error:  # the hub and diffusers raise many kinds
        raise PipelineError(f"{os.fspath(source)!r} could not be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _pair(steps: Any) -> tuple[int | None, int | None]:
    """
    Raises:
        CallError: it is none.
    """
    if not isinstance(steps, tuple | list) or len(steps) != 2:
        raise CallError(
            f"steps={brief(steps)}: two numbers are expected, of the accelerated pipe and of the base: steps=(4, 25)."
        )
    fast, base = (None if one is None else whole("steps", one) for one in steps)
    return fast, base


def _several(given: Any) -> Any:
    """What was given, or a tuple of the one thing."""
    return given if isinstance(given, Iterable) and not isinstance(given, str) else (given,)


def _settings(
    accelerate: Mapping[str, Any], recipes: Iterable[str] | Mapping[str, Given | None], fused: Iterable[bool]
) -> list[dict[str, Any]]:
    """Arguments of `accelerate` for each row."""
    said = settings_of(recipes) or [{}]
    ways: list[dict[str, Any]] = [{"fuse": one} for one in fused] or [{}]
    return [{**accelerate, **recipe, **way} for recipe in said for way in ways]


@contextmanager
def _given_back(pipe: Any) -> Iterator[None]:
    """A pipe for the length of a block, without bars of its own; afterwards it is not accelerated."""
    try:
        with without_bars(pipe):
            yield
    finally:
        if is_accelerated(pipe):
            restore(pipe)


def _tried(turns: Turns, advice: tuple[Advice, ...], bars: bool) -> tuple[tuple[Advice, ...], bool]:
    """The advice with what it brought, in turns with the accelerated pipe as it was; whether that was interrupted."""
    first, calls = turns.states[1], dataclasses.replace(turns.calls, batches=turns.calls.batches[:1])
    without, failed = first.like(), dict[str, str]()
    states = {one.rule: first.like(one.settings) for one in advice if one.settings is not None}
    again = Turns(turns.pipe, calls, [without, *states.values()], turns.repeats, 0, turns.clock)
    try:
        for rule, state in list(states.items()):
            try:
                again.turn(state, counts=False)
            except Exception as error:  # a VAE or a compiler that is not there, no memory: the others can be tried
                failed[rule] = _first_line(error)
                del states[rule]
        again.states = [without, *states.values()]
        interrupted = bool(states) and again.run(bars)
    except KeyboardInterrupt:
        return advice, True
    told = []
    for one in advice:
        if one.rule in states:
            one = dataclasses.replace(one, tried=again.seconds(states[one.rule]), without=again.seconds(without))
        told.append(dataclasses.replace(one, failed=failed.get(one.rule, "")))
    return tuple(told), interrupted
