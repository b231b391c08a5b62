"""accelerate and restore: plan, then apply inside one transaction whose undo is what `restore` runs."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from . import calls, merge
from .errors import PipelineError
from .plan import LCM, Fuse, Keep, Plan, Request, Style, check_weight, lcm_scheduler, make
from .unets import layers, unet_of

logger = logging.getLogger(__name__)

Pipe = TypeVar("Pipe")
_RECORD = "_lcmlora"  # the attribute that holds our record, on the UNet and on each accelerated pipe
_lock = threading.RLock()


class _Undo:
    """The steps back, newest first. Bound methods and partials only, so that a deep copy of a pipe undoes the copy."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []

    def push(self, step: Callable[..., Any], *args: Any) -> None:
        """Register a step *before* doing what it undoes: an interruption in between must not lose it."""
        self._steps.append(functools.partial(step, *args))

    def run(self) -> None:
        while self._steps:
            self._steps[-1]()
            self._steps.pop()

    def __enter__(self) -> _Undo:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None:
            self.run()


@dataclasses.dataclass
class _UnetRecord:
    """What was done to the weights. `pipes` are the shells that rely on it; the last one restored gives them back."""

    request: Request
    plan: Plan
    undo: _Undo
    originals: merge.Originals
    pipes: weakref.WeakSet[Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> _UnetRecord:
        from copy import deepcopy

        return _UnetRecord(
            self.request, self.plan, deepcopy(self.undo, memo), deepcopy(self.originals, memo), weakref.WeakSet()
        )


@dataclasses.dataclass
class _PipeRecord:
    """What was done to one shell."""

    policy: calls.Policy
    undo: _Undo


@dataclasses.dataclass(frozen=True)
class Status:
    """What is active in a pipe now, read from its modules.

    Attributes:
        accelerated: whether this pipe was accelerated.
        base: the base's name, "custom" for a UNet of no known structure; None if not accelerated.
        lora: the LCM-LoRA's file.
        weight: the weight that it counts with.
        fused: whether the LoRAs are merged into the weights; False where they are PEFT adapters.
        styles: the styles' weights by name: those that were there before and those that `accelerate` loaded.
        adapters: the PEFT adapters active in the UNet, with their weights (none when fused).
        scheduler: the scheduler's class name.
        steps, guidance: what a call gets that passes none. None if not accelerated, or left to the caller.
        kept_bytes: host memory that holds the merged layers' originals for `restore`.
    """

    accelerated: bool
    base: str | None
    lora: str | None
    weight: float | None
    fused: bool
    styles: Mapping[str, float]
    adapters: Mapping[str, float]
    scheduler: str
    steps: int | None
    guidance: float | None
    kept_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON and for a picture's metadata."""
        return dataclasses.asdict(self)


def accelerate(
    pipe: Pipe,
    base: str = "auto",
    *,
    lora: str | Path | None = None,
    weight_name: str | None = None,
    weight: float = 1.0,
    styles: Mapping[str, str | Path | Style] | None = None,
    fuse: Fuse = "auto",
    keep: Keep = "memory",
    steps: int = 4,
    guidance: float | None = 1.0,
    strict: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Pipe:
    """Make a Stable Diffusion or SDXL pipeline need 4 to 8 steps: LCM-LoRA, `LCMScheduler` and fitting call defaults.

    LoRAs that are active in the pipe already stay so, at their weights. Everything is checked before the pipe is
    touched, and whatever fails afterwards is rolled back. The same call twice does nothing the second time.

    Args:
        pipe: a diffusers pipeline with a `UNet2DConditionModel`.
        base: "auto" finds the base from the UNet's structure; a name (see `bases()`) is checked against it.
        lora: the LCM-LoRA, where it is not the base's own: repository id, folder or safetensors file. A UNet that is
            no known base needs it; any UNet will do whose LCM layers the file covers.
        weight_name: the file's name inside that repository or folder, where it is not
            `pytorch_lora_weights.safetensors`.
        weight: what the LCM-LoRA counts with; 1.0 is as distilled.
        styles: name -> source or `Style`: style LoRAs to load beside it. They get names of their own in the UNet.
        fuse: "auto" merges the LoRAs into the weights wherever those are plain floats (no cost per step), True insists
            on it, False leaves PEFT adapters.
        keep: where the merged layers' originals wait for `restore`: "memory" (host memory), or None, and then
            `restore` refuses.
        steps: `num_inference_steps` of calls that pass none, 1 to 50.
        guidance: `guidance_scale` of calls that pass none. What a call passes is kept within 1 to 2, with a warning.
            None leaves guidance alone altogether.
        strict: raise `CallError` instead of clamping guidance.
        revision, cache_dir, token, local_files_only: as in `huggingface_hub.hf_hub_download`.

    Returns:
        The same pipe.

    Raises:
        PipelineError: this pipe or its state can't be accelerated (no UNet, fused LoRAs, quantised and fuse=True,
        ...). BaseModelError: the base is unknown, has no LCM-LoRA, or is not the one named. LoraFileError: a LoRA is
        not there, not safetensors, damaged, or no plain LoRA. LoraMismatchError: a LoRA is made for another UNet.
        CallError: steps or guidance are outside what works.
    """
    request = Request(
        base=base,
        lora=lora,
        weight_name=weight_name,
        weight=weight,
        styles=tuple((name, s if isinstance(s, Style) else Style(s)) for name, s in (styles or {}).items()),
        fuse=fuse,
        keep=keep,
        hub=tuple(
            {
                "revision": revision,
                "cache_dir": cache_dir,
                "token": token,
                "local_files_only": local_files_only,
            }.items()
        ),
    )
    _check(request)
    policy = calls.Policy(steps=steps, guidance=guidance, strict=strict)
    policy.check()
    with _lock:
        if _already(pipe, request, policy):
            return pipe
        unet = unet_of(pipe)
        record: _UnetRecord | None = getattr(unet, _RECORD, None)
        with _Undo() as undo:
            if record is None:
                plan = make(pipe, request)
                record = _apply_to_unet(pipe, plan, request)
                undo.push(record.undo.run)
                scheduler = plan.scheduler
            else:  # a sibling made the shared UNet fast already
                scheduler = lcm_scheduler(pipe)
            _apply_to_pipe(pipe, scheduler, policy)
        record.pipes.add(pipe)
    return pipe


def _forget(thing: Any) -> None:
    thing.__dict__.pop(_RECORD, None)


def _check(request: Request) -> None:
    if request.fuse not in ("auto", True, False):
        raise PipelineError(f"fuse={request.fuse!r}: 'auto', True or False is expected.")
    if request.keep not in ("memory", None):
        raise PipelineError(f"keep={request.keep!r}: 'memory' or None is expected.")
    check_weight("lora", request.weight)
    for name, style in request.styles:
        check_weight(f"style {name!r}", style.weight)


def _already(pipe: Any, request: Request, policy: calls.Policy) -> bool:
    """Whether this very acceleration is in place; another one is an error."""
    unet = unet_of(pipe)
    record: _UnetRecord | None = getattr(unet, _RECORD, None)
    if record is None:
        return False
    if record.request != request:
        raise PipelineError(
            "this pipe's UNet is accelerated with other settings already; lcmlora.restore(pipe) first."
        )
    mine: _PipeRecord | None = getattr(pipe, _RECORD, None)
    if mine is not None and mine.policy != policy:
        raise PipelineError(
            "this pipe is accelerated with other steps or guidance already; lcmlora.restore(pipe) first."
        )
    return mine is not None


def _apply_to_unet(pipe: Any, plan: Plan, request: Request) -> _UnetRecord:
    unet = unet_of(pipe)
    assert unet is not None
    originals = merge.Originals()
    with _Undo() as undo:
        _add_text_styles(pipe, plan, undo)
        before = merge.Adapters(unet)
        undo.push(before.restore)
        if plan.fuse:
            tuners = merge.tuner_layers(unet)
            merge.park(unet)
            undo.push(originals.restore)
            merge.merge(layers(unet), [plan.lcm, *plan.styles.values()], tuners, originals)
            logger.info("merged %s; %.0f MiB of originals kept", plan.lcm.path.name, originals.bytes / 2**20)
        else:
            for name, share in {LCM: plan.lcm, **plan.styles}.items():
                if share.pairs:
                    merge.inject(unet, name, share)
            weights = {name: share.weight for name, share in {LCM: plan.lcm, **plan.styles}.items() if share.pairs}
            merge.activate(unet, {**plan.adapters, **weights})
        record = _UnetRecord(request, plan, undo, originals, weakref.WeakSet())
        undo.push(_forget, unet)
        unet.__dict__[_RECORD] = record
    if plan.fuse and request.keep is None:
        originals.forget()
    return record


def _add_text_styles(pipe: Any, plan: Plan, undo: _Undo) -> None:
    """Load the text-encoder halves of the styles, as PEFT adapters whatever `fuse` says: they run once a picture."""
    if not plan.text_styles:
        return
    for part in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, part, None)
        if encoder is None:
            continue
        before = merge.Adapters(encoder)
        undo.push(before.restore)
        loaded = {}
        for name in plan.text_styles:
            state, alphas = pipe.lora_state_dict(str(plan.styles[name].path), unet_config=unet_of(pipe).config)  # type: ignore[union-attr]
            if any(key.startswith(f"{part}.") for key in state):
                pipe.load_lora_into_text_encoder(
                    state, network_alphas=alphas, text_encoder=encoder, prefix=part, adapter_name=name
                )
                loaded[name] = plan.styles[name].weight
        if loaded:
            from diffusers.utils import set_weights_and_activate_adapters

            weights = {**before.weights, **loaded}
            set_weights_and_activate_adapters(encoder, list(weights), list(weights.values()))


def _apply_to_pipe(pipe: Any, scheduler: Any, policy: calls.Policy) -> None:
    with _Undo() as undo:
        undo.push(setattr, pipe, "scheduler", pipe.scheduler)
        pipe.scheduler = scheduler
        undo.push(setattr, pipe, "__class__", type(pipe))
        calls.install(pipe, policy)
        undo.push(_forget, pipe)
        pipe.__dict__[_RECORD] = _PipeRecord(policy, undo)


def restore(pipe: Pipe) -> Pipe:
    """Give back what `accelerate` found: weights, adapters, their scales, scheduler object and class, bit for bit.

    Where several pipes share the UNet and were accelerated, the weights come back with the last of them.

    Raises:
        PipelineError: the pipe is not accelerated, or its originals were not kept (keep=None).
    """
    with _lock:
        mine: _PipeRecord | None = getattr(pipe, "__dict__", {}).get(_RECORD)
        if mine is None:
            raise PipelineError(f"this {type(pipe).__name__} is not accelerated, so there is nothing to restore.")
        unet = unet_of(pipe)
        record: _UnetRecord | None = getattr(unet, _RECORD, None)
        if record is not None:
            others = [other for other in record.pipes if other is not pipe]
            if record.plan.fuse and record.request.keep is None and not others:
                raise PipelineError(
                    "the weights were merged with keep=None, so the originals are gone: load the pipe anew with "
                    "from_pretrained. keep='memory' makes restore possible."
                )
            if not others:
                record.undo.run()
            record.pipes.discard(pipe)
        mine.undo.run()
    return pipe


@contextmanager
def accelerated(pipe: Pipe, *args: Any, **kwargs: Any) -> Iterator[Pipe]:
    """`accelerate`, same arguments, for the length of a `with` block; restores also when the block raises."""
    if is_accelerated(pipe):
        raise PipelineError(
            "this pipe is accelerated already; `with accelerated(pipe)` would not know what to give back."
        )
    accelerate(pipe, *args, **kwargs)
    try:
        yield pipe
    finally:
        restore(pipe)


def is_accelerated(pipe: Any) -> bool:
    """Whether `accelerate` was called on this pipe (and not yet `restore`)."""
    return _RECORD in getattr(pipe, "__dict__", {})


def status(pipe: Any) -> Status:
    """What is active in the pipe now.

    Raises:
        PipelineError: there is no UNet.
    """
    unet = unet_of(pipe)
    if unet is None:
        raise PipelineError(f"{type(pipe).__name__} has no UNet.")
    mine: _PipeRecord | None = getattr(pipe, "__dict__", {}).get(_RECORD)
    record: _UnetRecord | None = getattr(unet, _RECORD, None)
    active = merge.Adapters(unet).weights
    plan = record.plan if record else None
    fused = bool(plan and plan.fuse)
    styles = (
        {**plan.adapters, **{name: share.weight for name, share in plan.styles.items()}} if plan and fused else active
    )
    return Status(
        accelerated=mine is not None,
        base=plan.base if plan else None,
        lora=str(plan.lcm.path) if plan else None,
        weight=plan.lcm.weight if plan else None,
        fused=fused,
        styles={name: w for name, w in styles.items() if name != LCM},
        adapters=active,
        scheduler=type(pipe.scheduler).__name__,
        steps=mine.policy.steps if mine else None,
        guidance=mine.policy.guidance if mine else None,
        kept_bytes=record.originals.bytes if record else 0,
    )
