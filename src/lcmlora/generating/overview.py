"""Pictures from disk on one contact sheet, by what their records say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import pictures
from ..errors import DataError
from ..sheets.sheet import Cell, Line, Sheet


def overview(files: Sequence[Path], title: str = "") -> Sheet:
    """A line for each prompt, a column for each combination of the settings that differ.

    Raises:
        DataError: there is no picture, or one can't be read.
    """
    if not files:
        raise DataError("no picture was drawn, so there is nothing to show.")
    loaded = [pictures.load(file) for file in files]
    told = [_settings(record) for _, record in loaded]
    names = [name for name in dict.fromkeys(name for one in told for name in one) if _differ(told, name)]
    labels = [", ".join(f"{name} {one[name]}" for name in names if name in one) for one in told]
    prompts = [str(record.get("prompt") or "") for _, record in loaded]
    if len({*zip(prompts, labels, strict=True)}) < len(files):  # what differs is in no record
        labels = [file.stem for file in files]
    places = {place: n for n, place in enumerate(zip(prompts, labels, strict=True))}
    lines, columns = (list(dict.fromkeys(place[i] for place in places)) for i in (0, 1))

    def cell(prompt: str, column: str) -> Cell | None:
        if (n := places.get((prompt, column))) is None:
            return None
        return Cell(loaded[n][0], {"prompt": prompt, "column": column, "file": str(files[n]), **told[n]})

    cells = tuple(tuple(cell(prompt, column) for column in columns) for prompt in lines)
    return Sheet(cells, tuple(columns), tuple(Line(prompt) for prompt in lines), title)


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """What may differ between pictures, flat and short."""
    styles = (record.get("status") or {}).get("styles") or {}
    files = {name: Path(file["path"]).name for name, file in (record.get("files") or {}).items()}
    found = {"seed": record["seed"], **record["settings"], **files, **styles}
    return {name: f"{value:g}" if isinstance(value, float) else value for name, value in found.items()}


def _differ(told: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(one.get(name) != told[0].get(name) for one in told)
