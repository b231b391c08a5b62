"""`lcmlora generate`."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import click

from .group import INTERRUPTED, ROWS, Say, command, leave
from .options import FOLDER, THERE, Call, Model, Seeds, Speed, call_options, model_options, speed_options

_OF_ROWS = (".jsonl", ".json", ".csv", ".tsv", ".txt")


@command()
@click.argument("prompts", nargs=-1)
@click.option("--rows", type=THERE, help="A file of rows: .jsonl, .json, .csv, .tsv, or .txt with a prompt a line.")
@click.option("--again", multiple=True, type=THERE, help="Make the picture again from this PNG; several times.")
@click.option("--out", type=FOLDER, default="pictures", show_default=True, help="The folder for the pictures.")
@click.option("--seed", "--seeds", "seeds", type=Seeds(), help="One, or several such as 1-8; 0 by default.")
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Pictures in one call.")
@click.option("--resume/--no-resume", default=True, help="Keep what is there already of the same settings.")
@click.option("--overwrite", is_flag=True, help="Replace pictures that are there of other settings.")
@click.option("--strict", is_flag=True, help="Stop at the first row that can't be drawn.")
@call_options
@model_options
@speed_options
def generate(
    prompts: tuple[str, ...],
    rows: Path | None,
    again: tuple[Path, ...],
    out: Path,
    seeds: list[int] | None,
    call: Call,
    model: Model,
    speed: Speed,
    say: Say,
    **how: Any,
) -> None:
    """Draw PROMPTS, or the rows of a file, into PNG files.

    Each file says what made it.

    The same command again goes on where it was stopped. For several processes:
    accelerate launch --num_processes 2 -m lcmlora generate ...

    \b
    lcmlora generate "a fox on a teal background" -m pocket --seeds 1-8
    lcmlora generate --rows rows.csv -m my-model --style ink=ink.safetensors:0.8
    lcmlora generate "a castle" -m my-model --image sketch.png --strength 0.6
    lcmlora generate --again pictures/a-fox-1.png --out again
    """
    if files := [prompt for prompt in prompts if Path(prompt).suffix in _OF_ROWS and Path(prompt).is_file()]:
        raise click.UsageError(f"{files[0]} is a file: type --rows {files[0]} to draw its rows.")
    if sum(map(bool, (prompts, rows, again))) != 1:
        raise click.UsageError("Give prompts, or --rows FILE, or --again PICTURE.")
    _check_said(again, model)
    speed.arguments()
    if not again:
        model.require()
    from ..writing import require_writable

    require_writable(out)
    if again:
        from_pictures(again, out, model, how["overwrite"], say)
        return
    given, kind = _rows(prompts, rows, seeds, call)
    pipe = speed.apply(model.load(say, kind), model.local_files_only)
    asked = {**call.row(), **({"seed": seeds} if seeds and rows else {})}
    made = _generate(pipe, given, out, asked, how, say)
    if not _first():
        return
    say.tell(f"{made!r}".removeprefix("Generated(").removesuffix(")"))
    say.result("\n".join(map(str, made.files)), made.to_dict())
    leave(INTERRUPTED if made.interrupted else 1 if made.failed else 0)


def _generate(pipe: Any, rows: Any, out: Path, call: Any, how: Any, say: Say) -> Any:
    from ..generating import generate

    return generate(pipe, rows, out, call=call, progress=not say.quiet, **how)


_WITH_AGAIN = {"again", "out", "overwrite", "as_json", "quiet", *Model.__annotations__}


def _check_said(again: tuple[Path, ...], model: Model) -> None:
    """Refuse options that would do nothing: a picture made again takes everything from what it says."""
    if not again:
        return
    context = click.get_current_context()
    said = {p for p in context.params if context.get_parameter_source(p) is not click.core.ParameterSource.DEFAULT}
    useless = said - (_WITH_AGAIN if model.model else _WITH_AGAIN - Model.__annotations__.keys())
    for option in (parameter.opts[0] for parameter in context.command.params if parameter.name in useless):
        name = option.strip("-").replace("-", "_")
        lone = " without --model" if name in Model.__annotations__ else ""
        raise click.UsageError(f"--again takes everything from the picture: {option} has no effect{lone}.")


def _first() -> bool:
    """Whether this is the process that speaks for all."""
    from ..generating.processes import Processes

    return Processes.speaks()


def _rows(prompts: tuple[str, ...], rows: Path | None, seeds: list[int] | None, call: Call) -> tuple[Any, str | None]:
    """What to draw, and the kind of pipeline that it needs."""
    if rows is None:
        return [
            {"prompt": prompt, "seed": seed, "name": f"{name}-{seed}"}
            for prompt, name in zip(prompts, _names(prompts), strict=True)
            for seed in seeds or [0]
        ], call.kind
    from ..generating.reading import read

    click.get_current_context().meta[ROWS] = True
    keys = {key for _, row in read(rows)[0] if isinstance(row, dict) for key in row}
    return rows, call.kind or ("inpaint" if "mask_image" in keys else "img2img" if "image" in keys else None)


def _names(prompts: tuple[str, ...]) -> list[str]:
    """File names that tell prompts: their words."""
    names: list[str] = []
    for number, prompt in enumerate(prompts, 1):
        name = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:50].rstrip("-") or f"prompt-{number}"
        numbered = (f"{name}-{more}" for more in itertools.count(number))
        names.append(next(one for one in (name, *itertools.islice(numbered, len(prompts))) if one not in names))
    return names


def from_pictures(files: tuple[Path, ...], out: Path, model: Model, overwrite: bool, say: Say) -> None:
    """Make pictures again from what they say, with the model that is named, or that they name."""
    from .. import pictures
    from ..errors import DataError
    from ..generating import again

    targets = [_beside(file, out) for file in files]
    for path in targets if not overwrite else ():
        if path.exists() or targets.count(path) > 1:
            raise DataError(f"{path} is there: give another --out, or --overwrite.")
    pipe = None if model.model is None else model.load(say)
    made: list[dict[str, Any]] = []
    for file, path in zip(files, targets, strict=True):
        was, record = pictures.load(file)
        with say.loading(None if pipe is not None else f"what made {file}"):
            image = again(file, pipe)
        same = image.tobytes() == was.tobytes()
        pictures.save(image, path, {**record, "batch": 1, "versions": pictures.versions()})
        say.tell(f"{path} {'is identical to' if same else 'differs from'} {file}")
        made.append({"file": str(path), "of": str(file), "identical": same})
    say.result("\n".join(one["file"] for one in made), made)


def _beside(file: Path, out: Path) -> Path:
    """Where a picture made again goes: its own file stays."""
    path = out / file.name
    return out / f"{file.stem}-again.png" if path.exists() and path.samefile(file) else path
