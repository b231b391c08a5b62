"""accelerate and restore: plan, then apply inside one transaction whose undo is what `restore` runs."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from . import adapters, calls, compiling, decoders, merge, plan
from .compiling import Compile
from .errors import LcmLoraWarning, PipelineError
from .merge import Keep
from .plan import LCM, Fuse, Part, Request, Style, Styles
from .prompts import PromptCache
from .registry import Base
from .unets import layers, unet_of

logger = logging.getLogger(__name__)

Pipe = TypeVar("Pipe")
_RECORD = "_lcmlora"  # the attribute that holds our record, on the UNet and on each accelerated pipe
_SPOILED = "_lcmlora_spoiled"  # on a UNet whose weights are neither the old nor the new ones
_LOST = (
    "some of the UNet's weights are merged and some are not, and with keep=None no originals were kept. Load the pipe "
    "anew with from_pretrained."
)
_lock = threading.RLock()


class _Undo:
    """The steps back, newest first. Bound methods and partials only, so that a deep copy of a pipe undoes the copy."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []

    def push(self, step: Callable[..., Any], *args: Any) -> None:
        """Register a step *before* doing what it undoes: an interruption in between must not lose it."""
        self._steps.append(functools.partial(step, *args))

    def run(self) -> None:
        """Go back. A step that raises stays, with those after it: another call goes on there."""
        while self._steps:
            self._steps[-1]()
            self._steps.pop()

    def roll_back(self) -> None:
        """Go back as far as possible: a step that raises does not keep the others from running."""
        failed: BaseException | None = None
        while self._steps:
            try:
                self._steps.pop()()
            except BaseException as error:
                failed = failed or error
        if failed:
            raise failed

    def __enter__(self) -> _Undo:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None:
            self.roll_back()


@dataclasses.dataclass
class _UnetRecord:
    """What was done to the weights. `pipes` are the shells that rely on it; the last one restored gives them back."""

    request: Request
    base: Base | None
    lcm: Path
    parts: dict[str, Part]
    weights: dict[str, float]
    originals: merge.Originals
    undo: _Undo
    schedulers: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)  # (ours, the one it stands for)
    pipes: weakref.WeakSet[Any] = dataclasses.field(default_factory=weakref.WeakSet)

    @property
    def fused(self) -> bool:
        return self.parts["unet"].merged

    def settle(self, parts: dict[str, Part], weights: dict[str, float]) -> None:
        """What is in the parts now."""
        self.parts, self.weights = parts, weights

    def __deepcopy__(self, memo: dict[int, Any]) -> _UnetRecord:
        names = [field.name for field in dataclasses.fields(self) if field.name != "pipes"]
        return _UnetRecord(**{name: deepcopy(getattr(self, name), memo) for name in names})


@dataclasses.dataclass
class _Shell:
    """What the caller of `accelerate` asked of one pipe, apart from its UNet."""

    policy: calls.Policy
    vae: decoders.Vae
    cache_prompts: int


@dataclasses.dataclass
class _PipeRecord:
    """What was done to one shell."""

    asked: _Shell
    undo: _Undo

    @property
    def policy(self) -> calls.Policy:
        return self.asked.policy


@dataclasses.dataclass(frozen=True)
class Status:
    """What is active in a pipe now, read from its modules.

    Attributes:
        accelerated: whether this pipe was accelerated. A sibling that shares the UNet may be, when this one is not.
        base: the base's name, "custom" for a UNet of no known structure; None if its UNet is not accelerated.
        lora: the LCM-LoRA's file.
        weight: the weight that it counts with.
        fused: whether the LoRAs are merged into the weights; False where they are PEFT adapters.
        styles: the styles' weights by name: those that were there before and those that lcmlora loaded.
        adapters: the PEFT adapters active in the UNet, with their weights (none when fused).
        scheduler: the scheduler's class name.
        steps, guidance: what a call gets that passes none. None if not accelerated, or left to the caller.
        keep: where the merged layers' originals are: "memory", "disk" or None.
        kept_bytes: how many bytes they take there.
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
    keep: str | None
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
    weight: float | None = None,
    styles: Styles | None = None,
    fuse: Fuse = "auto",
    keep: Keep = "memory",
    steps: int = 4,
    guidance: float | None = 1.0,
    strict: bool = False,
    vae: decoders.Vae = None,
    compile: Compile = False,
    cache_prompts: int = 0,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Pipe:
    """Make a Stable Diffusion or SDXL pipeline need 4 to 8 steps: LCM-LoRA, `LCMScheduler` and fitting call defaults.

    LoRAs that are active in the pipe already stay so, at their weights. Everything is checked before the pipe is
    touched, and whatever fails afterwards is rolled back. The same call twice does nothing the second time.

    Args:
        pipe: a diffusers pipeline with a `UNet2DConditionModel` or `UNetMotionModel`.
        base: "auto" finds the base from the UNet's structure; a name (see `bases()`) is checked against it.
        lora: the LCM-LoRA, where it is not the base's own: repository id, folder or safetensors file. A UNet that is
            no known base needs it; any UNet will do whose LCM layers the file covers.
        weight_name: the file's name inside that repository or folder, where it is not
            `pytorch_lora_weights.safetensors`.
        weight: what the LCM-LoRA counts with; None is the base's own, 1.0 as a rule.
        styles: name -> source or `Style`: style LoRAs to load beside it.
        fuse: "auto" merges the LoRAs into the weights wherever those are plain floats (no cost per step), True insists
            on it, False leaves PEFT adapters.
        keep: where the merged layers' originals wait for `restore`: "memory" (host memory), "disk" (a temporary file,
            in TMPDIR), or None: nothing is kept, `restore` and `set_styles` refuse, and a failure in the middle of
            the merge (out of memory, Ctrl-C) leaves a spoiled UNet, which a warning says.
        steps: `num_inference_steps` of calls that pass none, 1 to 50.
        guidance: `guidance_scale` of calls that pass none. What a call passes is kept within 1 to 2, with a warning.
            None leaves guidance alone altogether.
        strict: raise `CallError` instead of clamping guidance.
        vae: another VAE for as long as the pipe is accelerated: "tiny" (the base's AutoencoderTiny: faster by far,
            a little less detail), "fp16-fix" (SDXL's, which half precision does not overflow), a repository, a
            folder, or a module.
        compile: compile the UNet in place: "regional" (also True; its transformer blocks, soon done) or "whole". With
            merged LoRAs `set_styles` needs no new compilation.
        cache_prompts: how many prompts' embeddings to remember; 0 for none.
        revision, cache_dir, token, local_files_only: as in `huggingface_hub.hf_hub_download`.

    Returns:
        The same pipe.

    Raises:
        PipelineError: this pipe or its state can't be accelerated (no UNet, fused LoRAs, quantised and fuse=True,
        ...). BaseModelError: the base is unknown, has no LCM-LoRA, or is not the one named. LoraFileError: a LoRA is
        not there, not safetensors, damaged, or no plain LoRA. LoraMismatchError: a LoRA is made for another UNet.
        CallError: steps or guidance are outside what works.
    """
    hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    request = Request(
        base=base,
        lora=lora,
        weight_name=weight_name,
        weight=weight,
        styles=tuple((name, _style(source)) for name, source in (styles or {}).items()),
        fuse=fuse,
        keep=keep,
        compile=compile,
        hub=tuple(hub.items()),
    )
    policy = calls.Policy(steps=steps, guidance=guidance, strict=strict)
    policy.check()
    asked = _Shell(policy, vae, cache_prompts)
    _check(request, asked)
    with _lock:
        if _already(pipe, request, asked):
            return pipe
        with _Undo() as undo:
            record = _record_of(pipe)
            if record is None:
                made = plan.make(pipe, request)
                new_vae = decoders.load(pipe, made.base, vae, hub)
                record, scheduler = _new_record(made, request), made.scheduler
                undo.push(_own_up, unet_of(pipe), record.originals)
                undo.push(record.undo.run)
                _apply_to_unet(unet_of(pipe), record)
            else:  # a sibling made the shared UNet fast already
                new_vae = decoders.load(pipe, record.base, vae, hub)
                scheduler = plan.lcm_scheduler(pipe, record.base)
            _apply_to_pipe(pipe, scheduler, new_vae, asked, record, undo)
    return pipe


def _style(source: str | Path | Style) -> Style:
    return source if isinstance(source, Style) else Style(source)


def _record_of(pipe: Any) -> _UnetRecord | None:
    return getattr(unet_of(pipe), _RECORD, None)


def _pipe_record_of(pipe: Any) -> _PipeRecord | None:
    record = getattr(pipe, "__dict__", {}).get(_RECORD)
    return record if isinstance(record, _PipeRecord) else None


def _forget(thing: Any) -> None:
    thing.__dict__.pop(_RECORD, None)


def _check(request: Request, asked: _Shell) -> None:
    if request.fuse not in ("auto", True, False):
        raise PipelineError(f"fuse={request.fuse!r}: 'auto', True or False is expected.")
    if request.keep not in ("memory", "disk", None):
        raise PipelineError(f"keep={request.keep!r}: 'memory', 'disk' or None is expected.")
    if request.compile not in (True, False, "regional", "whole"):
        raise PipelineError(f"compile={request.compile!r}: False, True, 'regional' or 'whole' is expected.")
    if isinstance(asked.cache_prompts, bool) or not isinstance(asked.cache_prompts, int) or asked.cache_prompts < 0:
        raise PipelineError(f"cache_prompts={asked.cache_prompts!r}: a number of prompts is expected, 0 for none.")
    if request.weight is not None:
        plan.check_weight("the LCM-LoRA", request.weight)
    for name, style in request.styles:
        plan.check_weight(f"style {name!r}", style.weight)


def _already(pipe: Any, request: Request, asked: _Shell) -> bool:
    """Whether this very acceleration is in place; another one is an error."""
    if getattr(unet_of(pipe), _SPOILED, False):
        raise PipelineError(f"an accelerate(keep=None) was stopped in the middle: {_LOST}")
    record = _record_of(pipe)
    if record is None:
        return False
    if record.request != request:
        raise PipelineError(
            "this pipe's UNet is accelerated with other settings already: lcmlora.set_styles(pipe, ...) changes "
            "styles, "
            "lcmlora.restore(pipe) makes way for everything else."
        )
    mine = _pipe_record_of(pipe)
    if mine is not None and mine.asked != asked:
        raise PipelineError(
            "this pipe is accelerated with other steps, guidance, vae or cache already; lcmlora.restore(pipe) first."
        )
    return mine is not None


def _new_record(made: plan.Plan, request: Request) -> _UnetRecord:
    if made.kept_bytes:
        logger.info(
            "the originals of the merged layers take %.0f MiB (keep=%r)", made.kept_bytes / 2**20, request.keep
        )
    return _UnetRecord(
        request=request,
        base=made.base,
        lcm=made.lcm,
        parts={part.name: part for part in made.parts},
        weights=dict(made.weights),
        originals=merge.Originals(request.keep),
        undo=_Undo(),
    )


def _own_up(unet: Any, originals: merge.Originals) -> None:
    """Where a failure could not be undone, because nothing was kept, say so, and let nobody go on with the rest."""
    if originals.lost:
        unet.__dict__[_SPOILED] = True
        warnings.warn(f"accelerate(keep=None) was stopped in the middle: {_LOST}", LcmLoraWarning, stacklevel=2)


def _apply_to_unet(unet: Any, record: _UnetRecord) -> None:
    record.undo.push(_forget, unet)  # the last to run: a restore that is interrupted can be called again
    record.undo.push(record.originals.forget)
    if record.request.keep is None:  # all that can be found before the first change, as there is no way back from it
        for part in record.parts.values():
            merge.check_finite(part.loras if part.merged else {})
    for part in record.parts.values():
        _change(part, {}, record.weights, record.originals, record.undo)
    for module in compiling.regions(unet, record.request.compile):
        record.undo.push(compiling.undo, module)
        module.compile()
    unet.__dict__[_RECORD] = record


def _change(
    part: Part, there: Mapping[str, Any], weights: Mapping[str, float], originals: merge.Originals, undo: _Undo
) -> None:
    """Bring a part to the weights given; `there` are the LoRAs that are in it already, none the first time."""
    if not there:
        _push_return(part, originals, undo)
    if part.merged:
        if not there:
            part.adapters.park()
        merge.merge(layers(part.module), part.loras, weights, originals)
        return
    for name, lora in part.loras.items():
        if isinstance(lora, merge.FileLora) and name not in there:
            adapters.inject(part.module, name, lora)
    adapters.activate(part.module, {name: w for name, w in weights.items() if name in part.loras})


def _push_return(part: Part, originals: merge.Originals, undo: _Undo) -> None:
    """Register the way back of a part: its weights first, then PEFT's layers around them."""
    undo.push(part.adapters.restore)
    if part.merged:
        undo.push(merge.merge, layers(part.module), {}, {}, originals)


def _apply_to_pipe(
    pipe: Any, scheduler: Any, vae: nn.Module | None, asked: _Shell, record: _UnetRecord, undo: _Undo
) -> None:
    # A sibling made from an accelerated pipe has our scheduler: restore gives it the one that ours stands for.
    before = next((theirs for ours, theirs in record.schedulers if ours is pipe.scheduler), pipe.scheduler)
    mine = _PipeRecord(asked, _Undo())
    mine.undo.push(_forget, pipe)
    mine.undo.push(setattr, pipe, "scheduler", before)
    mine.undo.push(setattr, pipe, "__class__", type(pipe))
    undo.push(setattr, pipe, "scheduler", pipe.scheduler)
    pipe.scheduler = scheduler
    undo.push(setattr, pipe, "__class__", type(pipe))
    calls.install(pipe, asked.policy, PromptCache(asked.cache_prompts) if asked.cache_prompts else None)
    if vae is not None:
        mine.undo.push(setattr, pipe, "vae", pipe.vae)
        undo.push(setattr, pipe, "vae", pipe.vae)
        pipe.vae = vae
    undo.push(_forget, pipe)
    pipe.__dict__[_RECORD] = mine
    record.schedulers.append((scheduler, before))
    record.pipes.add(pipe)


def restore(pipe: Pipe) -> Pipe:
    """Give back what `accelerate` found: weights, adapters, their scales, scheduler object and class, bit for bit.

    Where several pipes share the UNet and were accelerated, the weights come back with the last of them.

    Raises:
        PipelineError: the pipe is not accelerated, or its originals were not kept (keep=None).
    """
    with _lock:
        mine, record = _pipe_record_of(pipe), _record_of(pipe)
        if mine is None:
            raise PipelineError(f"this {type(pipe).__name__} is not accelerated, so there is nothing to restore.")
        if record is not None:
            others = [other for other in record.pipes if other is not pipe]
            if not others:
                _require_originals(record, "restore the weights")
                _tell_what_goes(record)
                record.undo.run()
            record.pipes.discard(pipe)
        mine.undo.run()
    return pipe


def _require_originals(record: _UnetRecord, purpose: str) -> None:
    if record.request.keep is None and any(part.merged for part in record.parts.values()):
        raise PipelineError(
            f"the LoRAs were merged with keep=None, so the originals are gone and lcmlora can't {purpose}: load the "
            "pipe "
            "anew with from_pretrained. accelerate(pipe, keep='memory') or keep='disk' makes it possible."
        )


def _tell_what_goes(record: _UnetRecord) -> None:
    """Warn of adapters that somebody loaded in the meantime: `restore` gives back what `accelerate` found."""
    late = {
        name
        for part in record.parts.values()
        for name in adapters.Adapters(part.module).names - set(part.loras) - part.adapters.names
    }
    if late:
        warnings.warn(
            f"restore removes {sorted(late)}, loaded while the pipe was accelerated. set_styles, or loading before "
            "accelerate, keeps LoRAs.",
            LcmLoraWarning,
            stacklevel=calls.caller_depth(),
        )


def set_styles(pipe: Pipe, styles: Mapping[str, float | str | Path | Style]) -> Pipe:
    """Change the styles of an accelerated pipe: which there are, and how strongly they count. The LCM-LoRA stays.

    Merged weights are computed anew from the originals, so any number of changes leaves exactly what `accelerate` with
    these styles would have made, in the same memory (a compiled UNet needs no recompilation).

    Args:
        pipe: an accelerated pipe; its siblings that share the UNet change with it.
        styles: all the styles wanted. name -> a weight, for a style that is there (loaded before `accelerate`, or by
            lcmlora); name -> source or `Style`, for a new one. Styles that are not named are off.

    Returns:
        The same pipe.

    Raises:
        PipelineError: the pipe is not accelerated, its originals were not kept, or a name can't be used.
        LoraFileError, LoraMismatchError: as for `accelerate`. Nothing is changed then.
    """
    with _lock:
        record = _record_of(pipe)
        if record is None or _pipe_record_of(pipe) is None:
            raise PipelineError("set_styles changes an accelerated pipe; lcmlora.accelerate(pipe, styles=...) first.")
        _require_originals(record, "change styles")
        parts, weights = _restyled(pipe, record, styles)
        with _Undo() as undo:
            for name, part in parts.items():
                old = record.parts.get(name)
                if old is not None and part.merged:
                    undo.push(merge.merge, layers(part.module), old.loras, record.weights, record.originals)
                elif old is not None:
                    undo.push(adapters.Adapters(part.module).restore)
                _change(part, old.loras if old else {}, weights, record.originals, undo if old is None else _Undo())
            before = record.parts
            for name in parts.keys() - before.keys():
                _push_return(parts[name], record.originals, record.undo)
            undo.push(record.settle, before, record.weights)
            record.settle(parts, weights)
        for name, part in parts.items():
            if name in before and not part.merged:
                adapters.delete(part.module, set(before[name].loras) - set(part.loras))
    return pipe


def _restyled(
    pipe: Any, record: _UnetRecord, styles: Mapping[str, float | str | Path | Style]
) -> tuple[dict[str, Part], dict[str, float]]:
    """The parts and weights that an accelerated pipe gets with these styles, all of it checked."""
    there = {name: lora for part in record.parts.values() for name, lora in part.loras.items() if name != LCM}
    weights = {LCM: record.weights[LCM]}
    files: dict[str, dict[str, merge.FileLora]] = {}
    for name, wanted in styles.items():
        if isinstance(wanted, str | Path | Style):
            style = _style(wanted)
            plan.check_style_name(name, set(there) | set(weights))
            for part_name, lora in plan.style_loras(pipe, name, style, dict(record.request.hub)).items():
                files.setdefault(part_name, {})[name] = lora
            weights[name] = style.weight
        elif name not in there:
            raise PipelineError(
                f"there is no style {name!r}; those that are there: {sorted(there)}. Give its source, or "
                "lcmlora.Style(source, weight)."
            )
        else:
            weights[name] = wanted
        plan.check_weight(f"style {name!r}", weights[name])
    parts = {}
    for part_name in {**record.parts, **files}:
        part = record.parts.get(part_name) or plan.part_for(pipe, part_name, record.fused)
        kept = {
            name: lora for name, lora in part.loras.items() if name in weights or not isinstance(lora, merge.FileLora)
        }
        parts[part_name] = dataclasses.replace(part, loras={**kept, **files.get(part_name, {})})
    return parts, weights


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


@contextmanager
def merged(pipe: Any) -> Iterator[None]:
    """An accelerated pipe with every LoRA in its weights, for as long as the block lasts, however it was accelerated.

    Raises:
        PipelineError: its weights can't be merged (quantised, DoRA).
    """
    with _lock:
        record = _record_of(pipe)
        assert record is not None
        with _Undo() as undo:
            originals = merge.Originals("memory")
            for name in ("unet", *plan.TEXT_ENCODERS):
                part = plan.part_for(pipe, name, True) if getattr(pipe, name, None) is not None else None
                if part is not None and part.loras:
                    if not part.merged:
                        raise PipelineError(f"the LoRAs of this pipe's {name} can't be merged into its weights.")
                    _change(part, {}, part.adapters.weights, originals, undo)
            try:
                yield
            finally:
                undo.run()


def is_accelerated(pipe: Any) -> bool:
    """Whether `accelerate` was called on this pipe (and not yet `restore`)."""
    return _pipe_record_of(pipe) is not None


def status(pipe: Any) -> Status:
    """What is active in the pipe now.

    Raises:
        PipelineError: there is no UNet.
    """
    unet = unet_of(pipe)
    if not isinstance(unet, nn.Module):
        raise PipelineError(f"{type(pipe).__name__} has no UNet.")
    mine, record = _pipe_record_of(pipe), _record_of(pipe)
    active = adapters.Adapters(unet).weights
    fused = bool(record and record.fused)
    weights = {**(record.weights if record and fused else {}), **active}
    return Status(
        accelerated=mine is not None,
        base=(record.base.name if record.base else "custom") if record else None,
        lora=str(record.lcm) if record else None,
        weight=weights.get(LCM) if record else None,
        fused=fused,
        styles={name: w for name, w in weights.items() if name != LCM and w},
        adapters=active,
        scheduler=type(pipe.scheduler).__name__,
        steps=mine.policy.steps if mine else None,
        guidance=mine.policy.guidance if mine else None,
        keep=record.request.keep if record and fused else None,
        kept_bytes=record.originals.bytes if record else 0,
    )
