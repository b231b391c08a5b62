"""Drawing a sheet: any setting over any other, for the same prompts and seeds; with and without the LCM-LoRA."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from PIL import Image

from .. import pictures
from ..acceleration import accelerate as accelerate_verb
from ..calls import plain
from ..devices import PeakMemory, device_of, synchronize
from ..errors import CallError, DataError, PipelineError, brief
from ..lora.sources import Given
from ..parameters import Parameters, refuse
from ..progress import one_bar
from ..recipe import by_name as recipe_of
from ..state import is_accelerated, status
from ..transition.records import pipe_record_of
from ..warn import warn
from ..writing import require_writable
from .axes import STYLE, Axis, Place, in_steps, places
from .grid import Grid, Wanted
from .metrics import Metric, measured
from .sheet import Cell, Sheet
from .states import settings_of

SEED = 1337
LCM_STEPS = (1, 2, 3, 4, 5, 6, 7, 8)
BASE_STEPS = (1, 4, 8, 15, 20, 25, 30, 50)
GUIDANCE = (1.0, 1.25, 1.5, 2.0)
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


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


class SheetArguments(CallArguments, total=False):
    """What `sweep` takes beside its axes, and its short forms too."""

    without: bool | Mapping[str, Any]
    seed: int
    title: str
    folder: str | Path | None
    metrics: Mapping[str, Metric] | None
    accelerate: Mapping[str, Any] | None
    call: Mapping[str, Any] | None


def sweep(
    pipe: Any,
    prompts: str | Sequence[str],
    x: Axis,
    y: Axis | None = None,
    *,
    without: bool | Mapping[str, Any] = False,
    seed: int = SEED,
    title: str = "",
    folder: str | Path | None = None,
    metrics: Mapping[str, Metric] | None = None,
    accelerate: Mapping[str, Any] | None = None,
    call: Mapping[str, Any] | None = None,
    **more: Unpack[CallArguments],
) -> Sheet:
    """One picture for each prompt and each value of one or two settings.

    `x={"steps": (1, 2, 4, 8)}` goes to the right, `y={"guidance": (1, 1.5)}` down, for each prompt. A setting is
    "steps", "guidance", "seed", or any argument of the call; an argument of `accelerate` ("weight" of the LCM-LoRA,
    "styles", "recipe", "lora", ...); "styles.ink", the weight of one style; "accelerated"; or "scheduler", of the pipe
    without the LCM-LoRA. Labels with settings of their own are an axis too: `x={"base": {"accelerated": False,
    "steps": 25}, "4 steps": {"steps": 4}}`.

    A pipe that is not accelerated becomes so for the cells that need it. What needs a merge is done once, for all its
    cells. Afterwards the pipe is what it was, also where drawing fails. Ctrl-C stops, with a warning, and the sheet
    has what was drawn. Every picture gets a CPU generator of its own, so that a cell equals the same single call.

    Args:
        pipe: a pipeline of any class, accelerated or not.
        prompts: one or several.
        x: the axis to the right.
        y: the axis down.
        without: a first column of the pipe without the LCM-LoRA, at its own steps and guidance; or the settings of
            that column, such as `{"steps": 25}`.
        seed: of every picture that no axis gives another.
        title: a line above the sheet.
        folder: where each picture is kept as soon as it is drawn, in "cells", and the sheet at the end. What is there
            already, made by the same model, LoRAs and settings, is not drawn again.
        metrics: names of numbers to add to each row, with what measures them: see `lcmlora.sheets.metrics`.
        accelerate: arguments of `lcmlora.accelerate` for all accelerated cells.
        call: arguments of every call, those that only some pipelines take.
        more: arguments of every call.

    Returns:
        The sheet. Its rows have what ran; where an axis asks for something else, its label tells.

    Raises:
        TypeError: neither the call nor `accelerate` takes such an argument.
        CallError: no axis, or a contradiction.
        LcmLoraError: as `accelerate`, for what a cell asks for. Whatever is raised, nothing was drawn.
    """
    columns, down = places(x, "x"), places(y, "y")
    if without:
        base = {"accelerated": False, **(without if isinstance(without, Mapping) else {})}
        columns = (Place("without", base, apart=True), *columns)
    for name in more.keys() & (inspect.signature(accelerate_verb).parameters.keys() - {"pipe"}):
        refuse(name, f"{plain(type(pipe)).__name__}'s call", f"accelerate={{{name!r}: ...}}")
    for name, metric in (metrics or {}).items():
        if not callable(metric):
            raise CallError(
                f"metrics: {name!r} is {brief(metric)}; a function or one of lcmlora.sheets.metrics is expected."
            )
    grid = Grid.of(pipe, prompts, columns, down, seed, accelerate or {}, {**(call or {}), **more})
    kept = Path(folder) if folder is not None else None
    if kept is not None:
        require_writable(kept / "cells")
    sheet = grid.sheet(_drawn(grid, title or "sweep", kept), title)
    if metrics and sheet.images:
        sheet = _measured(sheet, metrics)
    if kept is not None and sheet.images:
        sheet.save(kept)
    return sheet


def _drawn(grid: Grid, what: str, folder: Path | None) -> dict[tuple[int, int], Cell]:
    """The cells by line and column; after Ctrl-C those that were drawn until then."""
    made: dict[tuple[int, int], Cell] = {}
    try:
        with one_bar(grid.pipe, len(grid.cells), what) as bar:
            for state, cells in grid.by_state():
                with state.block(grid.pipe) as pipe:
                    now = Now.of(pipe)
                    for cell in cells:
                        made[cell.line, cell.column] = _kept(grid, cell, now, folder)
                        bar.update()
    except KeyboardInterrupt:
        warn(f"stopped after {len(made)} of {len(grid.cells)} pictures: the sheet has those.")
    return made


def _measured(sheet: Sheet, metrics: Mapping[str, Metric]) -> Sheet:
    """The sheet with its numbers. Pictures that took an hour are not lost to a metric that fails."""
    try:
        return measured(sheet, metrics)
    except (Exception, KeyboardInterrupt) as error:
        warn(f"the sheet has no metrics, as one of them failed: {type(error).__name__}: {error}")
        return sheet


class Now(NamedTuple):
    """A pipe in one state, looked at once for all its cells: a look costs milliseconds.

    Attributes:
        pipe: it, or a copy that is in that state.
        about: what makes its pictures, apart from the call. Versions are left out: they may change in between.
        active: what a row says of it.
        device: where it computes.
    """

    pipe: Any
    about: Mapping[str, Any]
    active: Mapping[str, Any]
    device: torch.device

    @classmethod
    def of(cls, pipe: Any) -> Now:
        """As it is now."""
        about = {name: value for name, value in pictures.provenance(pipe).items() if name != "versions"}
        names = ("accelerated", "recipe", "weight", "styles", "lora", "fused")
        said = about["status"] or {"accelerated": False}
        active = {name: said[name] for name in names if name in said} | {"scheduler": about["scheduler"][0]}
        return cls(pipe, about, active, device_of(pipe))


def _kept(grid: Grid, cell: Wanted, now: Now, folder: Path | None) -> Cell:
    """A cell from the folder, or drawn and put there; a callback does not tell what it is, so such a cell is drawn."""
    if folder is None or pictures.untold(cell.call):
        return _draw(grid, cell, now)
    key = pictures.key({**now.about, "prompt": cell.prompt, "seed": cell.seed, "call": cell.call})
    file = folder / "cells" / f"{key}.png"
    with suppress(DataError):  # it is not there, or damaged
        image, record = pictures.load(file)
        return Cell(image, record["row"])
    drawn = _draw(grid, cell, now)
    pictures.save(drawn.image, file, {**now.about, "prompt": cell.prompt, "row": drawn.row})
    return drawn


def _draw(grid: Grid, cell: Wanted, now: Now) -> Cell:
    """Call the pipe once, and measure it."""
    generator = torch.Generator("cpu").manual_seed(cell.seed)
    synchronize(now.device)
    peak, began = PeakMemory(now.device), time.perf_counter()
    output = now.pipe(prompt=cell.prompt, generator=generator, **cell.call)
    synchronize(now.device)
    seconds = time.perf_counter() - began
    image, ran = picture_of(output), _ran(now.pipe, grid.takes, cell)
    steps = ran.get(grid.takes.steps or "")
    return Cell(
        image,
        {
            "seed": cell.seed,
            **pictures.described({**cell.call, **ran}),
            **now.active,
            "seconds": seconds,
            "seconds_per_step": seconds / steps if isinstance(steps, int) and steps else None,
            "peak_bytes": peak.bytes(),
            "flag": "flat" if np.ptp(np.asarray(image.convert("RGB")), axis=(0, 1)).max() == 0 else None,
        },
    )


def _ran(pipe: Any, takes: Parameters, cell: Wanted) -> dict[str, Any]:
    """Steps and guidance as they ran: the pipeline's own defaults, what a strength leaves of them, or clamped."""
    record = pipe_record_of(pipe)
    own = [name for name in (takes.steps, takes.guidance) if name]
    given = {name: cell.call.get(name, takes.defaults[name]) for name in own}
    if record is not None:
        given |= record.settings.policy.ran
    elif takes.steps and isinstance(given[takes.steps], int) and (strength := takes.strength_of(cell.call)):
        given[takes.steps] = min(given[takes.steps], int(given[takes.steps] * strength))
    return {name: given[name] for name in own if isinstance(given[name], int | float)}


def picture_of(output: Any) -> Image.Image:
    """The one picture of a call's output; of a video its middle frame.

    Raises:
        PipelineError: there is no picture in it.
    """
    found = getattr(output, "images", getattr(output, "frames", None))
    if isinstance(found, np.ndarray | torch.Tensor):
        found = list(found)
    while isinstance(found, list | tuple) and found:
        found = found[len(found) // 2] if len(found) > 1 else found[0]
    if not isinstance(found, Image.Image):
        raise PipelineError(f"a sheet needs pictures: {type(output).__name__} has none. Leave output_type as it is.")
    return found


def sweep_steps(
    pipe: Any,
    prompts: str | Sequence[str],
    steps: Iterable[int] | None = None,
    **more: Unpack[SheetArguments],
) -> Sheet:
    """The same pictures over steps: those that the recipe of an accelerated pipe is made for, up to 8, and 1 to 50 for
    another pipe, unless `steps` says otherwise.

    Args and returns: see `sweep`.
    """
    record = pipe_record_of(pipe)
    if record is None:
        own: Iterable[int] = BASE_STEPS
        kind = type(getattr(pipe, "scheduler", None)).__name__.removesuffix("Scheduler")
    else:
        recipe = record.settings.policy.recipe
        least, most = recipe.within
        own, kind = range(least, max(least, min(most, 8)) + 1), recipe.title.partition(" ")[2]
    more.setdefault("title", f"{kind} over steps")
    return sweep(pipe, prompts, {"steps": own if steps is None else steps}, **more)


def sweep_guidance(
    pipe: Any,
    prompts: str | Sequence[str],
    guidance: Iterable[float] = GUIDANCE,
    **more: Unpack[SheetArguments],
) -> Sheet:
    """The same pictures over guidance scales. Pass `negative_prompt` to see it come alive above 1.

    An accelerated pipe clamps guidance to 2, and the column says so; accelerate it with guidance=None to see what
    larger scales would do.

    Args and returns: see `sweep`.
    """
    more.setdefault("title", "over guidance")
    return sweep(pipe, prompts, {"guidance": guidance}, **more)


def sweep_weights(
    pipe: Any,
    prompts: str | Sequence[str],
    lcm: Iterable[float] = WEIGHTS,
    style: Iterable[float] | Mapping[str, Iterable[float]] | None = None,
    **more: Unpack[SheetArguments],
) -> Sheet:
    """The same pictures over weights: of the LCM-LoRA to the right, of a style down.

    Args:
        lcm: weights of the LCM-LoRA.
        style: weights of the pipe's style; `{"ink": (0, 0.5, 1)}` where it has several, or none for no second axis.

    Other args, returns and raises: see `sweep`. CallError: which style is meant is not clear.
    """
    y = None
    if isinstance(style, Mapping):
        y = {f"{STYLE}{name}": weights for name, weights in style.items()}
    elif style is not None:
        known = [
            *((more.get("accelerate") or {}).get("styles") or (status(pipe).styles if is_accelerated(pipe) else {}))
        ]
        if len(known) != 1:
            raise CallError(
                f"style: which one is meant? Type style={{'{known[0] if known else 'ink'}': (0, 0.5, 1)}}."
            )
        y = {f"{STYLE}{known[0]}": style}
    more.setdefault("title", "over weights")
    return sweep(pipe, prompts, {"weight": lcm}, y, **more)


def compare(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    base_steps: Iterable[int] = BASE_STEPS,
    lcm_steps: Iterable[int] = LCM_STEPS,
    base_guidance: float | None = None,
    recipes: Iterable[str] | Mapping[str, Given | None] = (),
    **more: Unpack[SheetArguments],
) -> Sheet:
    """With and without, side by side: the pipe without the LCM-LoRA at `base_steps`, then with it at `lcm_steps`.

    Args:
        pipe: a pipeline, accelerated or not. It is given back as it was.
        prompts: one or several.
        base_steps: of the pipe without the LCM-LoRA; by default those of 1, 4, 8, 15, 20, 25, 30 and 50 that a
            strength leaves a step.
        lcm_steps: of the accelerated pipe; 1 to 8 by default.
        base_guidance: `guidance_scale` without the LCM-LoRA; None is the pipeline's own default.
        recipes: recipes to have a column each, in the place of `lcm_steps`, at their own steps; where they map to
            files, with these.

    Other args, returns and raises: see `sweep`.
    """
    _check_counts(more, base_steps=base_steps, lcm_steps=lcm_steps)
    guided = {} if base_guidance is None else {"guidance": base_guidance}
    settings = more.get("accelerate") or {}
    columns: dict[str, Mapping[str, Any]] = {}
    if base_steps is BASE_STEPS and callable(pipe):
        strength = Parameters.of(plain(type(pipe)), "__call__").strength_of({**(more.get("call") or {}), **more})
        base_steps = [count for count in BASE_STEPS if strength is None or int(count * strength)]
    for count in base_steps:
        columns[f"base, {in_steps(count)}"] = {"accelerated": False, "steps": count, **guided}
    said = settings_of(recipes)
    for one in said:
        count = settings.get("steps", recipe_of(one["recipe"]).steps)
        columns[f"{one['recipe']}, {in_steps(count)}"] = one
    if not said:
        recipe = settings.get("recipe") or (status(pipe).recipe if is_accelerated(pipe) else None)
        kind = "LCM" if recipe in (None, "lcm") else recipe
        columns |= {f"{kind}, {in_steps(n)}": {"accelerated": True, "steps": n} for n in lcm_steps}
    more.setdefault("title", "without and with the LCM-LoRA")
    return sweep(pipe, prompts, columns, **more)


def _check_counts(more: Mapping[str, Any], **given: Any) -> None:
    if "steps" in more:
        refuse("steps", "compare", "lcm_steps")
    for name, counts in given.items():
        if not isinstance(counts, Iterable):
            one = brief(counts)
            raise CallError(f"{name}={one}: several numbers are expected, such as {name}=({one},).")
