"""accelerate and restore: plan, then apply inside one transaction whose undo is what `restore` runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from . import adapters, calls, compiling, decoders, merge, plan
from .compiling import Compile
from .errors import PipelineError
from .merge import Keep
from .plan import Fuse, Request, Style, Styles
from .prompts import PromptCache
from .records import (
    LOST,
    RECORD,
    SPOILED,
    Pipe,
    PipeRecord,
    Shell,
    Undo,
    UnetRecord,
    cache_of,
    change,
    forget,
    lock,
    pipe_record_of,
    policy_of,
    record_of,
    require_originals,
)
from .state import is_accelerated
from .unets import unet_of
from .warn import warn

logger = logging.getLogger(__name__)


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
    enforce_inference_steps: bool = True,
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
        strict: raise `CallError` instead of clamping guidance or running fewer steps than were asked for.
        enforce_inference_steps: image-to-image runs the steps asked for, at any strength. False gives
            `num_inference_steps` diffusers' own meaning: of so many steps a strength runs its part.
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
        styles=tuple((name, Style.of(source)) for name, source in (styles or {}).items()),
        fuse=fuse,
        keep=keep,
        compile=compile,
        hub=tuple(hub.items()),
    )
    policy = calls.Policy(
        steps=steps, guidance=guidance, strict=strict, enforce_inference_steps=enforce_inference_steps
    )
    asked = Shell(policy, vae, cache_prompts)
    _check(pipe, request, asked)
    with lock:
        if _already(pipe, request, asked):
            return pipe
        with Undo() as undo:
            record = record_of(pipe)
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


def _check(pipe: Any, request: Request, asked: Shell) -> None:
    if request.fuse not in ("auto", True, False):
        raise PipelineError(f"fuse={request.fuse!r}: 'auto', True or False is expected.")
    if request.keep not in ("memory", "disk", None):
        raise PipelineError(f"keep={request.keep!r}: 'memory', 'disk' or None is expected.")
    if request.compile not in (True, False, "regional", "whole"):
        raise PipelineError(f"compile={request.compile!r}: False, True, 'regional' or 'whole' is expected.")
    if isinstance(asked.cache_prompts, bool) or not isinstance(asked.cache_prompts, int) or asked.cache_prompts < 0:
        raise PipelineError(f"cache_prompts={asked.cache_prompts!r}: a number of prompts is expected, 0 for none.")
    if asked.cache_prompts and not hasattr(type(pipe), "encode_prompt"):
        raise PipelineError(f"cache_prompts={asked.cache_prompts}: {type(pipe).__name__} has no encode_prompt to ask.")
    if request.weight is not None:
        plan.check_weight("the LCM-LoRA", request.weight)
    for name, style in request.styles:
        plan.check_weight(f"style {name!r}", style.weight)


def _already(pipe: Any, request: Request, asked: Shell) -> bool:
    """Whether this very acceleration is in place; another one is an error."""
    if getattr(unet_of(pipe), SPOILED, False):
        raise PipelineError(f"an accelerate(keep=None) was stopped in the middle: {LOST}")
    record = record_of(pipe)
    if record is None:
        return False
    if record.request != request:
        raise PipelineError(
            "this pipe's UNet is accelerated with other settings already: lcmlora.set_styles(pipe, ...) changes "
            "styles, lcmlora.restore(pipe) makes way for everything else."
        )
    mine = pipe_record_of(pipe)
    if mine is not None and mine.asked != asked:
        raise PipelineError(
            "this pipe is accelerated with other steps, guidance, vae or cache already; lcmlora.restore(pipe) first."
        )
    return mine is not None


def _new_record(made: plan.Plan, request: Request) -> UnetRecord:
    if made.kept_bytes:
        logger.info(
            "the originals of the merged layers take %.0f MiB (keep=%r)", made.kept_bytes / 2**20, request.keep
        )
    return UnetRecord(
        request=request,
        base=made.base,
        lcm=made.lcm,
        parts={part.name: part for part in made.parts},
        weights=dict(made.weights),
        originals=merge.Originals(request.keep),
        undo=Undo(),
    )


def _own_up(unet: Any, originals: merge.Originals) -> None:
    """Where a failure could not be undone, because nothing was kept, say so, and let nobody go on with the rest."""
    if originals.lost:
        unet.__dict__[SPOILED] = True
        warn(f"accelerate(keep=None) was stopped in the middle: {LOST}")


def _apply_to_unet(unet: Any, record: UnetRecord) -> None:
    record.undo.push(forget, unet)  # the last to run: a restore that is interrupted can be called again
    record.undo.push(record.originals.forget)
    if record.request.keep is None:  # all that can be found before the first change, as there is no way back from it
        for part in record.parts.values():
            merge.check_finite(part.loras if part.merged else {})
    for part in record.parts.values():
        change(part, {}, record.weights, record.originals, record.undo)
    for module in compiling.regions(unet, record.request.compile):
        record.undo.push(compiling.undo, module)
        module.compile()
    unet.__dict__[RECORD] = record


def _apply_to_pipe(
    pipe: Any, scheduler: Any, vae: nn.Module | None, asked: Shell, record: UnetRecord, undo: Undo
) -> None:
    # A sibling made from an accelerated pipe has our scheduler: restore gives it the one that ours stands for.
    before = next((theirs for ours, theirs in record.schedulers if ours is pipe.scheduler), pipe.scheduler)
    mine = PipeRecord(asked, Undo(), PromptCache(asked.cache_prompts) if asked.cache_prompts else None)
    mine.undo.push(forget, pipe)
    mine.undo.push(setattr, pipe, "scheduler", before)
    mine.undo.push(setattr, pipe, "__class__", type(pipe))
    undo.push(setattr, pipe, "scheduler", pipe.scheduler)
    pipe.scheduler = scheduler
    undo.push(setattr, pipe, "__class__", type(pipe))
    calls.install(pipe, policy_of, cache_of)
    if vae is not None:
        mine.undo.push(setattr, pipe, "vae", pipe.vae)
        undo.push(setattr, pipe, "vae", pipe.vae)
        pipe.vae = vae
    undo.push(forget, pipe)
    pipe.__dict__[RECORD] = mine
    record.schedulers.append((scheduler, before))
    record.pipes.add(pipe)


def restore(pipe: Pipe) -> Pipe:
    """Give back what `accelerate` found: weights, adapters, their scales, scheduler object and class, bit for bit.

    Where several pipes share the UNet and were accelerated, the weights come back with the last of them.

    Raises:
        PipelineError: the pipe is not accelerated, or its originals were not kept (keep=None).
    """
    with lock:
        mine, record = pipe_record_of(pipe), record_of(pipe)
        if mine is None:
            raise PipelineError(f"this {type(pipe).__name__} is not accelerated, so there is nothing to restore.")
        if record is not None:
            others = [other for other in record.pipes if other is not pipe]
            if not others:
                require_originals(record, "restore the weights")
                _tell_what_goes(record)
                record.undo.run()
            record.pipes.discard(pipe)
        mine.undo.run()
    return pipe


def _tell_what_goes(record: UnetRecord) -> None:
    """Warn of adapters that somebody loaded in the meantime: `restore` gives back what `accelerate` found."""
    late = {
        name
        for part in record.parts.values()
        for name in adapters.Adapters(part.module).names - set(part.loras) - part.adapters.names
    }
    if late:
        warn(
            f"restore removes {sorted(late)}, loaded while the pipe was accelerated. set_styles, or loading before "
            "accelerate, keeps LoRAs."
        )


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
    with lock:
        record = record_of(pipe)
        assert record is not None
        with Undo() as undo:
            originals = merge.Originals("memory")
            for name in ("unet", *plan.TEXT_ENCODERS):
                part = plan.part_for(pipe, name, True) if getattr(pipe, name, None) is not None else None
                if part is not None and part.loras:
                    if not part.merged:
                        raise PipelineError(f"the LoRAs of this pipe's {name} can't be merged into its weights.")
                    change(part, {}, part.adapters.weights, originals, undo)
            try:
                yield
            finally:
                undo.run()
