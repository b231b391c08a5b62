"""`lcmlora demo`."""

from __future__ import annotations

from pathlib import Path

import click

from .group import Say, command
from .options import FOLDER


@command()
@click.option("--out", "folder", type=FOLDER, default="demo", show_default=True, help="The folder for the sheets.")
def demo(folder: Path, say: Say) -> None:
    """Write contact sheets of the embedded model. No network."""
    from ..demo import run
    from ..writing import require_writable

    require_writable(folder)
    say.tell("lcmlora demo: about half a minute on two cores")
    with say.loading(None):  # what is loaded is told by the run
        made = run(folder, progress=lambda text: say.tell(f"  {text} ..."))
    times = made.timings
    sheets = [str(folder / f"{name}.png") for name in made.sheets]
    lines = (
        "seconds per picture (this machine)",
        f"  base, 50 steps      {times['base_50_steps']:7.3f}",
        f"  base,  4 steps      {times['base_4_steps']:7.3f}   (look at what it draws)",
        f"  LCM-LoRA, 4 steps   {times['lcm_4_steps']:7.3f}   {times['ratio']:.1f} times faster than 50 steps",
        "",
        "sheets:",
        *(f"  {sheet}" for sheet in sheets),
    )
    say.result("\n".join(lines), {"seconds_per_picture": times, "sheets": sheets})
