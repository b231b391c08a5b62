"""Contact sheets: the same prompts and seed over steps, over guidance, with and without the LCM-LoRA."""

from __future__ import annotations

import inspect
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import torch

from ..acceleration import accelerated
from ..calls import plain
from ..errors import PipelineError
from ..lora.sources import Given
from ..parameters import Parameters, refuse
from ..state import is_accelerated, status
from ..transition.records import pipe_record_of
from .sheet import Cell, Line, Sheet

SEED = 1337
LCM_STEPS = (1, 2, 3, 4, 5, 6, 7, 8)
BASE_STEPS = (1, 4, 8, 15, 20, 25, 30, 50)
GUIDANCE = (1.0, 1.25, 1.5, 2.0)


class CallArguments(TypedDict, total=False):
    """The arguments of most pipelines' calls. Those that are one pipeline's own go into `call={...}`."""

    negative_prompt: str | list[str] | None
    num_inference_steps: int
    guidance_scale: float | None
    guidance_rescale: float
    height: int | None
    width: int | None
    image: Any
    mask_image: Any
    control_image: Any
    ip_adapter_image: Any
    strength: float
    controlnet_conditioning_scale: Any
    cross_attention_kwargs: dict[str, Any] | None
    clip_skip: int | None


def _checked(
    pipe: Any,
    cells: Iterable[Mapping[str, Any]],
    call: Mapping[str, Any] | None,
    more: Mapping[str, Any],
    settings: Collection[str] = (),
) -> dict[str, Any]:
    """The arguments that all cells have in common; theirs and these have to be the pipeline's, and not `settings`.

    Raises:
        PipelineError: it can't be called.
        TypeError: it takes no such argument.
    """
    if not callable(pipe):
        raise PipelineError(f"{type(pipe).__name__} has no __call__ that draws.")
    common = {**(call or {}), **more}
    takes = Parameters.of(plain(type(pipe)), "__call__")
    for name, near in takes.unknown({"prompt", "generator", *common}.union(*cells)):
        refuse(name, f"{takes.owner}'s call", f"accelerate={{{name!r}: ...}}" if name in settings else near)
    return common


def _label(label: str, asked: Mapping[str, Any], ran: Mapping[str, Any]) -> str:
    """The column's label; with what ran in its place, where that is something else than what the column asks for."""
    other = [f"{ran[name]:g}" for name in asked if isinstance(ran.get(name), int | float) and ran[name] != asked[name]]
    return ", ran ".join((label, *other))


def sweep(
    pipe: Any,
    prompts: str | Sequence[str],
    cells: Mapping[str, Mapping[str, Any]],
    *,
    seed: int = SEED,
    title: str = "",
    call: Mapping[str, Any] | None = None,
    **more: Unpack[CallArguments],
) -> Sheet:
    """One picture for each prompt (row) and each cell (column): `cells` maps labels to the arguments in which columns
    differ.

    Every picture gets a fresh CPU generator of the same seed: LCM draws new noise in each step, so a shared generator
    would make a picture depend on those before it.

    Args:
        pipe: a pipeline, accelerated or not.
        prompts: one or several.
        cells: label -> keyword arguments of the pipe's call.
        seed: of every picture.
        title: a line above the sheet.
        call, more: further arguments of every call. Those that only some pipelines take go into `call`.

    Returns:
        The sheet. Its rows have the steps and guidance that ran; where a column asks for others, its label tells.

    Raises:
        TypeError: the pipeline takes no such argument. Nothing is drawn then.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    active = status(pipe).to_dict()
    common = _checked(pipe, cells.values(), call, more)
    lines = []
    for prompt in prompts:
        line = []
        for label, arguments in cells.items():
            settings = {**common, **arguments}
            began = time.perf_counter()
            image = pipe(prompt=prompt, generator=torch.Generator("cpu").manual_seed(seed), **settings).images[0]
            seconds = time.perf_counter() - began
            ran = record.settings.policy.ran if (record := pipe_record_of(pipe)) else {}
            row = {"prompt": prompt, "column": _label(label, arguments, ran), "seed": seed, "seconds": seconds}
            line.append(Cell(image, {**row, **settings, **ran, "status": active}))
        lines.append(tuple(line))
    columns = tuple(cell.row["column"] for cell in lines[0])
    return Sheet(tuple(lines), columns, tuple(map(Line, prompts)), title)


def sweep_steps(
    pipe: Any,
    prompts: str | Sequence[str],
    steps: Iterable[int] | None = None,
    *,
    seed: int = SEED,
    title: str = "",
    call: Mapping[str, Any] | None = None,
    **more: Unpack[CallArguments],
) -> Sheet:
    """The same pictures over steps: 1 to 8 for an accelerated pipe, 1 to 50 for another, unless `steps` says
    otherwise.

    Args and returns: see `sweep`.
    """
    steps = tuple(steps or (LCM_STEPS if is_accelerated(pipe) else BASE_STEPS))
    kind = "LCM-LoRA" if is_accelerated(pipe) else type(pipe.scheduler).__name__.removesuffix("Scheduler")
    cells = {f"{count} step{'s' * (count > 1)}": {"num_inference_steps": count} for count in steps}
    return sweep(pipe, prompts, cells, seed=seed, title=title or f"{kind} over steps", call=call, **more)


def sweep_guidance(
    pipe: Any,
    prompts: str | Sequence[str],
    guidance: Iterable[float] = GUIDANCE,
    *,
    seed: int = SEED,
    title: str = "",
    call: Mapping[str, Any] | None = None,
    **more: Unpack[CallArguments],
) -> Sheet:
    """The same pictures over guidance scales. Pass `negative_prompt` to see it come alive above 1.

    An accelerated pipe clamps guidance to 2, and the column says so; accelerate it with guidance=None to see what
    larger scales would do.

    Args and returns: see `sweep`.
    """
    cells = {f"guidance {scale:g}": {"guidance_scale": scale} for scale in guidance}
    return sweep(pipe, prompts, cells, seed=seed, title=title or "over guidance", call=call, **more)


def compare(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    steps: int = 4,
    base_steps: Iterable[int] = (4, 25, 50),
    base_guidance: float | None = None,
    seed: int = SEED,
    title: str = "",
    accelerate: Mapping[str, Any] | None = None,
    recipes: Iterable[str] | Mapping[str, Given | None] = (),
    call: Mapping[str, Any] | None = None,
    **more: Unpack[CallArguments],
) -> Sheet:
    """With and without, side by side: the pipe as it is at `base_steps`, then accelerated at `steps`. The pipe is
    given back.

    Args:
        pipe: a pipeline that is not accelerated.
        prompts: one or several.
        steps: for the accelerated picture.
        base_steps: for the pipe as it is.
        base_guidance: `guidance_scale` of the pipe as it is; None is the pipeline's own default.
        seed: of every picture.
        title: a line above the sheet.
        accelerate: arguments of `lcmlora.accelerate`.
        recipes: recipes to have a column each in the place of that one, at their own steps; where they map to files,
            with these.
        call, more: further arguments of every call, as for `sweep`.

    Raises:
        PipelineError: the pipe is accelerated already.
        TypeError: neither `accelerate` nor the pipeline takes such an argument. Nothing is drawn then.
    """
    if is_accelerated(pipe):
        raise PipelineError("compare needs the pipe as it was: lcmlora.restore(pipe) first.")
    settings = dict(accelerate or {})
    files = recipes if isinstance(recipes, Mapping) else dict.fromkeys(recipes)
    said = [{**settings, "recipe": name, **({} if file is None else {"lora": file})} for name, file in files.items()]
    blocks = [accelerated(pipe, **one) for one in said or [settings]]  # misspelt ones are refused here
    base = {} if base_guidance is None else {"guidance_scale": base_guidance}
    cells = {f"base, {count} steps": {"num_inference_steps": count, **base} for count in base_steps}
    common = _checked(pipe, cells.values(), call, more, inspect.signature(accelerated).parameters)
    sheet = sweep(pipe, prompts, cells, seed=seed, title=title or "without and with the LCM-LoRA", call=common)
    for block, name in zip(blocks, [*files] or [None], strict=True):
        with block:
            count = steps if name is None else status(pipe).steps or 0
            column = {f"{name or 'LCM'}, {count} steps": {"num_inference_steps": count}}
            sheet += sweep(pipe, prompts, column, seed=seed, call=common)
    return sheet
