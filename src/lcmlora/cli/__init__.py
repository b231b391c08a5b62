"""The command line: every command is a public function with its arguments from the shell."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click

from .. import __version__


class _Group(click.Group):
    """Shows a refusal of the library as one line, not as a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        from ..errors import LcmLoraError

        try:
            return super().invoke(ctx)
        except LcmLoraError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group)
@click.version_option(__version__, prog_name="lcmlora")
def main() -> None:
    """LCM-LoRA on any fine-tune: four steps instead of fifty, and the way back."""
    # transformers' hints on optional packages are none of our users' concern
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@main.command()
@click.option("--out", "folder", type=click.Path(file_okay=False, path_type=Path), default="demo", show_default=True)
def demo(folder: Path) -> None:
    """Make the embedded model four-step and write contact sheets to see it by. No network."""
    from ..demo import run

    click.echo("lcmlora demo: about a minute on two cores")
    made = run(folder, progress=lambda text: click.echo(f"  {text} ..."))
    times = made.timings
    click.echo("\nseconds per picture (64 x 64 pixels, this machine)")
    click.echo(f"  base, 50 steps      {times['base_50_steps']:7.3f}")
    click.echo(f"  base,  4 steps      {times['base_4_steps']:7.3f}   (look at what it draws)")
    click.echo(f"  LCM-LoRA, 4 steps   {times['lcm_4_steps']:7.3f}   {times['ratio']:.1f} times faster than 50 steps")
    click.echo("\nsheets:")
    for name in made.sheets:
        click.echo(f"  {folder / name}.png")


@main.command(name="bases")
def bases_command() -> None:
    """List the bases and their LCM-LoRAs."""
    from ..base import bases
    from ..recipe import LCM

    for base in bases():
        source = LCM.on(base).loras.get(base.name)
        click.echo(f"{base.name:8} {base.title:22} {base.layers:4} layers   {source.lora if source else 'none'}")


@main.command(name="recipes")
def recipes_command() -> None:
    """List the recipes: how other few-step LoRAs are driven."""
    from ..recipe import recipes

    for one in recipes():
        licence = one.licence or "no licence given"
        click.echo(f"{one.name:16} {one.scheduler:22} {one.steps_in_words:>7} steps   {', '.join(one.loras)}")
        click.echo(f"{'':16} guidance {one.guidance_in_words}; {licence}{f'; {one.note}' if one.note else ''}")


@main.command()
@click.argument("source")
@click.option("--weight-name", help="the file's name in a repository or folder")
def inspect(source: str, weight_name: str | None) -> None:
    """Tell what a LoRA file (or folder, or repository) holds, from its header."""
    from ..lora.files import inspect_lora

    info = inspect_lora(source, weight_name)
    click.echo(info.describe())
    click.echo(
        f"format {info.format}; alphas {', '.join(f'{a:g}' for a in info.alphas)}; "
        f"{sum(map(len, info.text_modules.values()))} text-encoder modules"
    )
    for note in info.notes:
        click.echo(f"left out, as diffusers does: {note}")


def _settings(command: Any) -> Any:
    """An option for each field of `DistillConfig`, read from its annotations and docstring without importing torch."""
    from ..distillation.config import DistillConfig

    hints = get_type_hints(DistillConfig)
    for field in reversed(dataclasses.fields(DistillConfig)):
        kind = hints[field.name]
        choices = [a for a in get_args(kind) if isinstance(a, str)]
        plain = next((a for a in get_args(kind) if a in (int, float)), kind)
        name = "--" + field.name.replace("_", "-")
        option = (
            click.option(f"{name}/--no-{name[2:]}", default=field.default, show_default=True)
            if kind is bool
            else click.option(
                name, type=click.Choice(choices) if choices else plain, default=field.default, show_default=True
            )
        )
        command = option(command)
    return command


class _Late(click.Command):
    """A command whose options are made when it is used, so that `lcmlora --help` stays instant."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not getattr(self, "_complete", False):
            self._complete = True
            holder = _settings(lambda: None)
            self.params += list(reversed(getattr(holder, "__click_params__", [])))
        return super().get_params(ctx)


@main.command(cls=_Late)
@click.argument("teacher")
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
def distill(teacher: str, data: Path, output: Path, **settings: Any) -> None:
    """Distil an LCM-LoRA from TEACHER (a pipeline's folder or repository id) and DATA (pictures with metadata.jsonl).

    Run it again with the same OUTPUT to resume. For several processes: accelerate launch -m lcmlora.cli distill ...
    """
    from ..distillation import DistillConfig
    from ..distillation import distill as run

    file = run(teacher, data, output, DistillConfig(**settings))
    click.echo(f"{file}: loads back, and accelerates its teacher with lcmlora.accelerate(pipe, lora={str(output)!r})")


if __name__ == "__main__":
    sys.exit(main())
