"""A benchmark for people: a text table, a page, a figure, lines of CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .result import Benchmark, Row, seconds
from .stages import STAGES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {stage.name: stage.title for stage in STAGES}
COLOURS = dict(
    zip(
        TITLES,
        ("#8e6bbf", "#b0b54a", "#d98a3d", "#3b7dd8", "#2f9e9e", "#c2557f", "#e0a526", "#7d8b57", "#a07d5f", "#8a9099"),
        strict=True,
    )
)
"""Of the stages; they stand out from each other on white and in the dark."""
_MIB = 2**20
_COLUMNS: dict[str, Callable[[Row], object]] = {
    "name": lambda row: row.name,
    "accelerated": lambda row: row.accelerated,
    "recipe": lambda row: row.recipe,
    "fused": lambda row: row.fused,
    "steps": lambda row: row.steps,
    "guidance": lambda row: row.guidance,
    "batch": lambda row: row.batch,
    "passes": lambda row: row.passes,
    "samples": lambda row: row.samples,
    "repeats": lambda row: row.seconds.repeats,
    "seconds": lambda row: row.seconds.median,
    "seconds_least": lambda row: row.seconds.least,
    "seconds_most": lambda row: row.seconds.most,
    "seconds_per_picture": lambda row: row.seconds_per_picture,
    "peak_bytes": lambda row: row.peak_bytes,
    "seconds_to_accelerate": lambda row: row.to_accelerate and row.to_accelerate.median,
    "seconds_to_restore": lambda row: row.to_restore and row.to_restore.median,
}


def comma_separated(found: Benchmark) -> str:
    """CSV: a line a row; seconds of its stages in columns of their own."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*_COLUMNS, "speedup", *(f"seconds_{stage}" for stage in found.stages)])
    for row in found.rows:
        values = [value(row) for value in _COLUMNS.values()]
        writer.writerow([*values, found.speedup_of(row), *map(row.of, found.stages)])
    return stream.getvalue()


def _shown(found: Benchmark) -> list[str]:
    """The stages that are more than nothing: a safety checker that is None takes its microseconds too."""
    return [name for name in found.stages if any(row.share(name) >= 0.0005 for row in found.rows)]


def table(found: Benchmark) -> list[list[str]]:
    """Lines of a table with a column for each row; the first line names them."""
    rows = found.rows

    def line(title: str, value: Callable[[Row], object]) -> list[str]:
        return [title, *("" if (said := value(row)) is None else str(said) for row in rows)]

    def stage(name: str) -> Callable[[Row], str]:
        return lambda row: f"{seconds(row.of(name))} {f'({row.share(name):.0%})':>5}" if name in row.stages else ""

    lines = [
        line("", lambda row: row.name),
        line("steps", lambda row: row.steps),
        line("guidance", lambda row: row.guidance if row.guidance is None else f"{row.guidance:g}"),
        line("UNet passes", lambda row: row.passes),
        line("seconds a call", lambda row: row.seconds),
        *(line(f"  {TITLES[name]}", stage(name)) for name in _shown(found)),
        line("seconds a UNet pass", lambda row: seconds(row.seconds_per_pass)),
        line("seconds a picture", lambda row: seconds(row.seconds_per_picture)),
        line("times faster", lambda row: f"{found.speedup_of(row):.2f}"),
        line("peak memory, MiB", lambda row: row.peak_bytes and f"{row.peak_bytes / _MIB:.0f}"),
        line("seconds to accelerate", lambda row: row.to_accelerate),
        line("seconds to restore", lambda row: row.to_restore),
    ]
    return [cells for cells in lines if cells is lines[0] or any(cells[1:])]


def summary(found: Benchmark) -> Iterator[str]:
    """What the rows say together, a sentence each."""
    if found.interrupted:
        yield "Stopped before all turns were over."
    if found.seconds_to_load is not None:
        yield f"Loaded in {seconds(found.seconds_to_load)} s."
    yield (
        f"{found.speedup:.2f} times faster. With the UNet's work shrunk from {found.base.samples} samples to "
        f"{found.fast.samples} and nothing else, the stages allow {found.possible_speedup:.2f}: "
        f"{found.reached:.0%} of it is reached."
    )
    lost = sorted(found.lost.items(), key=lambda item: -abs(item[1]))[:3]
    words = [f"{TITLES[name]} {value:+.{4 if abs(value) < 0.0095 else 3}f} s" for name, value in lost]
    yield f"A call differs from what they allow by {', '.join(words)}."


def text(found: Benchmark) -> str:
    """The table and all that it says, for a terminal."""
    lines = [found.pipeline, found.hardware, ""]
    cells = table(found)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for title, *values in cells:
        shown = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join((title.ljust(widths[0]), *shown)).rstrip())
    lines += ["", *summary(found)]
    for advice in found.advice:
        lines += ["", f"- {advice.text}.", f"    {advice.code}"]
        if advice.outcome:
            lines.append(f"    {advice.outcome}")
    lines += ["", "Published, SDXL at 1024 x 1024, seconds a picture: 25 steps, LCM-LoRA at 4 steps, times faster"]
    for row in found.published:
        lines.append(f"  {row.hardware:32}{row.base_25_steps:7g}{row.lcm_4_steps:7g}{row.speedup:7.1f}")
    return "\n".join(lines)


def bars(found: Benchmark) -> list[dict[str, Any]]:
    """For each row its stages' seconds a picture, and their share of the longest row."""
    longest = max(row.seconds_per_picture for row in found.rows)
    return [
        {
            "name": row.name,
            "seconds": seconds(row.seconds_per_picture),
            "stages": [
                {"title": TITLES[name], "colour": COLOURS[name], "seconds": seconds(value), "share": value / longest}
                for name in _shown(found)
                if (value := row.of(name) / row.batch)
            ],
        }
        for row in found.rows
    ]


def _values(found: Benchmark) -> dict[str, Any]:
    legend = [(TITLES[name], COLOURS[name]) for name in _shown(found)]
    return {"found": found, "table": table(found), "summary": [*summary(found)], "bars": bars(found), "legend": legend}


def page(found: Benchmark) -> str:
    """A self-contained HTML page."""
    from ..pages import render

    return render("benchmark.html.j2", **_values(found))


def fragment(found: Benchmark) -> str:
    """The same for a notebook, without the page around it."""
    from ..pages import render

    return render("benchmark_body.html.j2", **_values(found))


def figure(found: Benchmark) -> Figure:
    """Stacked bars: seconds a picture by stage, for each row.

    Raises:
        DataError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("figure() needs matplotlib: pip install 'lcmlora[plots]'.") from error
    names = [row.name for row in found.rows]
    drawn = Figure(figsize=(8, 1.8 + 0.4 * len(names)), layout="constrained")
    axes = drawn.subplots()
    left = [0.0] * len(names)
    for stage in _shown(found):
        widths = [row.of(stage) / row.batch for row in found.rows]
        axes.barh(range(len(names)), widths, left=left, label=TITLES[stage], color=COLOURS[stage])
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("seconds a picture")
    axes.set_title(f"{found.pipeline}\n{found.hardware}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    drawn.legend(fontsize=8, frameon=False, ncols=5, loc="outside lower center")
    return drawn
