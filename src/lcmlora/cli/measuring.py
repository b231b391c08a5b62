"""`lcmlora sweep`, `compare` and `benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .group import INTERRUPTED, Say, command, leave
from .options import (
    FILE,
    FOLDER,
    Axis,
    Call,
    Model,
    Numbers,
    Pixels,
    Speed,
    as_data,
    call_options,
    model_options,
    require_file,
    speed_options,
)

_SHEET = (
    click.option("--out", type=FOLDER, default="sheets", show_default=True, help="The folder for PNG, JSON and CSV."),
    click.option("--html", type=FILE, help="Also one page with everything in it."),
    click.option("--base-guidance", type=float, help="Without acceleration; the pipeline's own, 2.5 for pocket."),
    click.option("--seed", type=click.IntRange(0), help="Of every picture."),
    click.option("--title", default="", help="A line above the sheet."),
)


def _sheet_options(function: Any) -> Any:
    for option in reversed(_SHEET):
        function = option(function)
    return function


def _base_guidance(sheet: dict[str, Any], model: Model) -> float | None:
    return model.guidance if sheet["base_guidance"] is None else sheet["base_guidance"]


@command()
@click.argument("prompts", nargs=-1, required=True)
@click.option("--x", type=Axis(), required=True, help="Along a line: steps, guidance, weight, seed, recipe, ...")
@click.option("--y", type=Axis(), help="From line to line.")
@click.option("--without", is_flag=True, help="A column of the model as it is, too.")
@_sheet_options
@call_options
@model_options
@speed_options
def sweep(
    prompts: tuple[str, ...],
    x: tuple[str, list[Any]],
    y: tuple[str, list[Any]] | None,
    without: bool,
    model: Model,
    speed: Speed,
    call: Call,
    say: Say,
    **sheet: Any,
) -> None:
    """Draw PROMPTS over one axis or two.

    \b
    lcmlora sweep "a fox on a teal background" -m pocket --x steps=1-8
    lcmlora sweep "a fox" "an owl" -m my-model --x steps=2,4,8 --y guidance=1,1.5,2 --html sheet.html
    """
    speed.arguments()
    model.require()
    _require(sheet)
    pipe = speed.apply(model.load(say, call.kind), model.local_files_only)
    more = {"seed": sheet["seed"]} if sheet["seed"] is not None else {}
    axes = {"x": dict([x]), "y": dict([y]) if y else None}
    guidance = _base_guidance(sheet, model)
    base = without and (True if guidance is None else {"guidance": guidance})
    from ..sheets import sweep

    drawn = _called(
        sweep,
        pipe,
        list(prompts),
        **axes,
        **more,
        without=base,
        folder=sheet["out"],
        title=sheet["title"],
        call=call.arguments(),
    )
    _show(drawn, sheet, say)


@command()
@click.argument("prompts", nargs=-1, required=True)
@click.option("--base-steps", type=Numbers(), help="Of the model as it is, such as 1,4,25,50.")
@click.option("--lcm-steps", type=Numbers(), help="Of the accelerated model, such as 1-8.")
@click.option("--recipes", help="Several recipes side by side, such as lcm,hyper-8.")
@_sheet_options
@call_options
@model_options
@speed_options
def compare(
    prompts: tuple[str, ...],
    base_steps: list[int] | None,
    lcm_steps: list[int] | None,
    recipes: str | None,
    model: Model,
    speed: Speed,
    call: Call,
    say: Say,
    **sheet: Any,
) -> None:
    """Draw PROMPTS without and with acceleration, side by side.

    \b
    lcmlora compare "a fox on a teal background" -m pocket --base-steps 1,4,25,50 --lcm-steps 1-8
    """
    said = speed.arguments()
    if not speed.accelerate:
        raise click.UsageError("compare draws both ways: --no-accelerate leaves nothing to compare.")
    model.require()
    _require(sheet)
    pipe = model.load(say, call.kind)
    if model.local_files_only:
        said["local_files_only"] = True
    given = {"base_steps": base_steps, "lcm_steps": lcm_steps, "seed": sheet["seed"], "recipes": _names(recipes)}
    given["base_guidance"] = _base_guidance(sheet, model)
    given = {name: value for name, value in given.items() if value is not None}
    from ..sheets import compare

    more = {"title": sheet["title"], "folder": sheet["out"], "accelerate": said, "call": call.arguments()}
    drawn = _called(compare, pipe, list(prompts), **given, **more)
    _show(drawn, sheet, say)


@command()
@click.option("--steps", type=Numbers(), default="4,25", show_default=True, help="Of the accelerated model, the base.")
@click.option("--prompt", help="Of every picture.")
@click.option("--repeats", type=click.IntRange(1), help="Turns that count.")
@click.option("--batch-sizes", type=Numbers(), help="Pictures a call, such as 1,4.")
@click.option("--recipes", help="Several recipes, such as lcm,hyper-8.")
@click.option("--try-advice", is_flag=True, help="Try what the advice says, and tell what it brought.")
@click.option("--size", type=Pixels(), help="Width and height, such as 512x768.")
@click.option("--html", type=FILE, help="Write a page.")
@click.option("--csv", type=FILE, help="Write the figures as a table.")
@model_options
@speed_options
def benchmark(
    steps: list[int],
    size: str | None,
    html: Path | None,
    csv: Path | None,
    try_advice: bool,
    model: Model,
    speed: Speed,
    say: Say,
    **asked: Any,
) -> None:
    """Measure how much faster the accelerated model is here.

    It tells where the time goes, and what to try.

    \b
    lcmlora benchmark -m pocket
    lcmlora benchmark -m my-model --steps 4,50 --batch-sizes 1,4 --html benchmark.html
    """
    if len(steps) != 2:
        raise click.BadParameter("two numbers are expected, such as 4,25.", param_hint="--steps")
    said = speed.arguments()
    model.require()
    for path in (html, csv):
        require_file(path)
    asked["recipes"] = _names(asked["recipes"])
    given = {name: value for name, value in asked.items() if value is not None}
    nothing = Call(None, None, None, size, None, None, None)
    pipe = model.load(say)
    from ..benchmarking import benchmark

    found = _called(
        benchmark,
        pipe,
        tuple(steps),
        **given,
        accelerate=said,
        try_advice=try_advice,
        progress=not (say.quiet or say.as_json),
        call=nothing.arguments(),
    )
    for path, write in ((html, found.to_html), (csv, found.to_csv)):
        if path is not None:
            write(path)
    say.result(str(found), found.to_dict())


def _names(text: str | None) -> list[str] | None:
    return [part.strip() for part in text.split(",") if part.strip()] if text else None


def _called(function: Any, *args: Any, **given: Any) -> Any:
    """The result of a public function, which refuses arguments that a pipeline does not take by a TypeError."""
    try:
        return function(*args, **given)
    except TypeError as error:
        if "takes no argument" not in str(error):
            raise
        raise click.UsageError(str(error)) from error


def _require(sheet: dict[str, Any]) -> None:
    """See that the sheet can be written."""
    from ..writing import require_writable

    require_writable(sheet["out"])
    require_file(sheet["html"])


def _show(drawn: Any, sheet: dict[str, Any], say: Say) -> None:
    saved = drawn.save(sheet["out"])
    files = [saved, *([drawn.to_html(sheet["html"])] if sheet["html"] else [])]
    say.result("\n".join(map(str, files)), {"files": [str(file) for file in files], "rows": as_data(drawn.rows)})
    stopped = any(cell is None for line in drawn.cells for cell in line)
    leave(INTERRUPTED if stopped else 0)
