"""The command line: every command is a public function with its arguments from the shell.

`group` what all commands share, `words` the shell's words for Python's, `options` what several commands take; a module
for each family of commands. Nothing here loads torch before a command runs.
"""

from __future__ import annotations

import io
import os
import sys

import click

from .. import __version__
from .drawing import generate
from .group import Commands
from .measuring import benchmark, compare, sweep
from .models import bake, bases, inspect, recipes
from .serving import live
from .showing import demo
from .training import distill

__all__ = ["main"]

_EPILOG = """\b
Exit codes: 0 done; 1 refused, or some pictures not drawn; 2 wrong usage; 130 Ctrl-C.
LCMLORA_TRACEBACK=1 shows where a refusal came from.
Shell completion: eval "$(_LCMLORA_COMPLETE=bash_source lcmlora)"
"""


@click.group(cls=Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lcmlora")
def main() -> None:
    """LCM-LoRA on any fine-tune: four steps instead of fifty, and the way back."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a prompt in a file's name, where the locale is not UTF-8
    # transformers' hints on optional packages are none of our users' concern
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


for command in (generate, sweep, compare, benchmark, inspect, bases, recipes, bake, distill, demo, live):
    main.add_command(command)
