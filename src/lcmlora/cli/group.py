"""What all commands share: refusals in a line, exit codes, what goes to standard output."""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import click

from ..quiet import IMPORTING, hushed
from .words import in_shell_words

INTERRUPTED = 130
ROWS = "lcmlora.rows"
"""Noted in a command's context: rows come from a file."""
_HELP = {"help_option_names": ["-h", "--help"]}


class Commands(click.Group):
    """Shows a refusal of the library as one line, not as a traceback, and Ctrl-C as its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        from ..errors import LcmLoraError  # no import of torch: errors has none

        try:
            with _warnings_as_lines(), hushed(*IMPORTING):
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Stopped.", err=True)
            ctx.exit(INTERRUPTED)
        except (LcmLoraError, OSError) as error:
            if os.environ.get("LCMLORA_TRACEBACK") or isinstance(error, BrokenPipeError):
                raise
            raise click.ClickException(in_shell_words(str(error))) from error


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """The library's warnings as lines, in the shell's words; of others only what may concern the result."""
    from ..errors import LcmLoraWarning

    def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        text = str(message)
        of_a_file = ROWS in click.get_current_context().meta and re.search(r"\b[Rr]ow \d", text)
        ours = issubclass(category, LcmLoraWarning) and not of_a_file  # whose keys are not options
        click.echo(f"Warning: {in_shell_words(text) if ours else text}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", LcmLoraWarning)
        for kind in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", kind)
        warnings.showwarning = show
        yield


class Say:
    """Where a command's words go: the result to standard output, the rest to standard error.

    Args:
        as_json: whether the result is one JSON document.
        quiet: whether there is nothing but the result.
    """

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet

    def tell(self, text: str) -> None:
        """What is going on."""
        if not self.quiet:
            click.echo(text, err=True)

    @contextmanager
    def loading(self, what: str | None) -> Iterator[None]:
        """Say that something is loaded; with `--quiet` hide the hub's bars too."""
        if what is None or not self.quiet:
            self.tell(f"loading {what}") if what else None
            yield
            return
        from ..loading import downloads_hidden

        with downloads_hidden():
            yield

    def result(self, text: str, data: Any) -> None:
        """What came out, for people or for programs."""
        if self.as_json or text:
            click.echo(json.dumps(data, indent=1, default=str) if self.as_json else text)


def leave(code: int) -> None:
    """End the command with this exit code, where it is not 0."""
    if code:
        click.get_current_context().exit(code)


def command(name: str | None = None, **settings: Any) -> Callable[[Any], click.Command]:
    """A command with `--json` and `--quiet`, whose function gets a `Say` as `say`."""

    def make(function: Any) -> click.Command:
        @functools.wraps(function)
        def run(as_json: bool, quiet: bool, **given: Any) -> Any:
            return function(say=Say(as_json, quiet), **given)

        decorate: Any = click.command(name or function.__name__, context_settings=_HELP, **settings)
        made = cast(click.Command, decorate(run))
        made.params += [
            click.Option(["--json", "as_json"], is_flag=True, help="The result as JSON on standard output."),
            click.Option(["--quiet", "-q"], is_flag=True, help="No progress, no hints: nothing but the result."),
        ]
        return made

    return make
