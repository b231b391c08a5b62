"""`lcmlora distill`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import click

from .group import Say, command
from .options import FOLDER, THERE


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
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@click.argument("output", type=FOLDER)
@click.option("--validation-prompts", type=THERE, help="A file of prompts, one a line, for validation sheets.")
def distill(
    teacher: str, data: Path, output: Path, validation_prompts: Path | None, say: Say, **settings: Any
) -> None:
    """Distil an LCM-LoRA from TEACHER (a pipeline's folder or repository id, or 'pocket') and DATA (pictures with
    metadata.jsonl, or what else `lcmlora.distill` takes) into the folder OUTPUT.

    Run it again with the same OUTPUT to resume. For several processes: accelerate launch -m lcmlora distill ...

    \b
    lcmlora distill my-model pictures my-lora --rank 64 --steps 1000
    """
    config = _config(settings)
    from ..distillation import distill as run
    from ..pictures import require_writable

    require_writable(output)
    more: dict[str, Any] = {}
    if validation_prompts is not None:
        lines = validation_prompts.read_text(encoding="utf-8").splitlines()
        more["validation_prompts"] = [line.strip() for line in lines if line.strip()]
    with say.loading(teacher):
        pipe = _teacher(teacher)
    file = run(pipe, data, output, config, progress=not say.quiet, **more)
    say.tell(f"{file}: loads back, and accelerates its teacher with lcmlora.accelerate(pipe, lora={str(output)!r})")
    say.result(str(file), {"file": str(file)})


def _teacher(name: str) -> Any:
    if name.partition(":")[0] != "pocket" or Path(name).exists():
        return name
    from ..loading import load

    return load(name)
