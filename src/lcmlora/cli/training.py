"""`lcmlora distill`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import click

from .group import Say, command
from .options import THERE, sources


def _settings(holder: Any) -> Any:
    """An option for each field of `DistillConfig`, and for its presets where it has some; torch is not needed."""
    from ..distillation import config as settings

    hints = get_type_hints(settings.DistillConfig)
    for field in reversed(dataclasses.fields(settings.DistillConfig)):
        kind = hints[field.name]
        choices = [a for a in get_args(kind) if isinstance(a, str)]
        plain = next((a for a in get_args(kind) if a in (int, float)), kind)
        name = "--" + field.name.replace("_", "-")
        said = {"default": field.default, "show_default": True, "help": field.metadata.get("help")}
        if kind is bool:
            holder = click.option(f"{name}/--no-{name[2:]}", **said)(holder)
        else:
            holder = click.option(name, type=click.Choice(choices) if choices else plain, **said)(holder)
    if presets := getattr(settings, "PRESETS", None):
        choice = click.Choice(sorted(presets))
        holder = click.option("--preset", type=choice, help="Settings by name; the other options change them.")(holder)
    return holder


def _config(given: dict[str, Any]) -> Any:
    """The settings; what was not said is the preset's own, where one is named."""
    from ..distillation.config import DistillConfig

    preset = given.pop("preset", None)
    if preset is None:
        return DistillConfig(**given)
    source, maker = click.get_current_context().get_parameter_source, cast(Any, DistillConfig)
    return maker.preset(preset, **{name: v for name, v in given.items() if source(name) is not _DEFAULT})


_DEFAULT = click.core.ParameterSource.DEFAULT


class _Late(click.Command):
    """A command whose options are made when it is used, so that `lcmlora --help` stays instant."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not getattr(self, "_complete", False):
            self._complete = True
            holder = _settings(lambda: None)
            self.params += list(reversed(getattr(holder, "__click_params__", [])))
        return super().get_params(ctx)


@command(cls=_Late)
@click.argument("teacher")
@click.argument("places", nargs=-1, required=True, metavar="[DATA] OUTPUT", type=click.Path(path_type=Path))
@click.option("--prompts", type=THERE, help="In the place of DATA: a file of prompts, one a line.")
@click.option("--style", multiple=True, help="A style to distil in, name=source or name=source:weight; several.")
@click.option("--strict", is_flag=True, help="Refuse pictures that can't be used, instead of leaving them out.")
@click.option("--text-column", help="What DATA calls its texts, if not text, caption or prompt.")
@click.option("--image-column", help="What DATA calls its pictures, if not image, file_name, picture or path.")
@click.option("--validation-prompts", type=THERE, help="A file of prompts, one a line, for validation sheets.")
def distill(
    teacher: str,
    places: tuple[Path, ...],
    prompts: Path | None,
    style: tuple[str, ...],
    strict: bool,
    text_column: str | None,
    image_column: str | None,
    validation_prompts: Path | None,
    say: Say,
    **settings: Any,
) -> None:
    """Distil a few-step LoRA from a model of your own.

    TEACHER is a pipeline's folder, repository id or checkpoint, or 'pocket'; DATA is pictures with metadata.jsonl, a
    file of prompts, or what else `lcmlora.distill` takes; OUTPUT is a folder.

    Run it again with the same OUTPUT to resume. For several processes: accelerate launch -m lcmlora distill ...

    \b
    lcmlora distill my-model pictures my-lora --rank 64 --steps 1000
    lcmlora distill pocket --prompts prompts.txt my-lora --preset paths --steps 50
    """
    data, output = _places(places, prompts)
    config = _config(settings)
    from ..distillation import distill as run
    from ..distillation.data import read
    from ..writing import require_writable

    require_writable(output)
    more: dict[str, Any] = {"strict": strict, "styles": sources(style), "progress": not (say.quiet or say.as_json)}
    if validation_prompts is not None:
        more["validation_prompts"] = [one.text for one in read(validation_prompts).examples]
    found: Any = data
    if text_column or image_column:
        found = read(data, strict=strict, text_column=text_column, image_column=image_column)
    with say.loading(teacher):
        pipe = _teacher(teacher)
    file = run(pipe, found, output, config, **more)
    say.tell(f"{file}: loads back, and accelerates its teacher with lcmlora.accelerate(pipe, lora={str(output)!r})")
    say.tell(f"{output / 'report.html'}: what was learned, and what it cost")
    say.result(str(file), {"file": str(file)})


def _places(places: tuple[Path, ...], prompts: Path | None) -> tuple[Path, Path]:
    """The data and the folder to write to."""
    if len(places) != (2 if prompts is None else 1):
        raise click.UsageError("DATA and OUTPUT are expected after TEACHER; OUTPUT alone where --prompts is given.")
    data = places[0] if prompts is None else prompts
    if not data.exists():
        raise click.UsageError(f"DATA: there is nothing at {str(data)!r}.")
    if places[-1].is_file():
        raise click.UsageError(f"OUTPUT: {str(places[-1])!r} is a file; a folder is expected.")
    return data, places[-1]


def _teacher(name: str) -> Any:
    if name.partition(":")[0] != "pocket" or Path(name).exists():
        return name
    from ..loading import load

    return load(name)
