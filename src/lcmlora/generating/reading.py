"""Rows as they are given: dicts, or a file of them. What can't be read stands in its place as an error."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import tables
from ..errors import DataError, brief
from ..parameters import as_weight
from ..transition.target import Strength, Style, is_strength

Given = Mapping[str, Any] | str | DataError
"""A row: a dict, a prompt alone, or why a line is no row."""

Numbered = tuple[int | None, Given]
"""A row and its line in the file; None where it is from none, or from a file without lines."""

MOST_SEEDS = 100_000
_SEED_RANGE = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")
_TEXTS = re.compile(r"prompt(_\d)?$|^(negative|name|file|styles?|seeds?|size)$|(image|mask)$")
"""Columns of a CSV whose cells stay text."""


def read(rows: Any) -> tuple[list[Numbered], Path]:
    """The rows with their lines, and the folder that paths in them are relative to.

    Args:
        rows: dicts or prompts, or the path of a `.jsonl`, `.json`, `.csv`, `.tsv` or `.txt` file (one prompt a line).

    Raises:
        DataError: there is no such file, it is no text, or of another kind.
    """
    if not isinstance(rows, str | os.PathLike):
        if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
            raise DataError(
                f"rows={brief(rows)}: dicts or a file of them are expected, such as [{{'prompt': '...'}}]."
            )
        return [(None, _row(row)) for row in rows], Path.cwd()
    path = Path(rows).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        expected = "a list of prompts, or a .jsonl, .json, .csv, .tsv or .txt file, is expected"
        raise DataError(f"rows={brief(os.fspath(rows))}: {expected}.")
    return list(reader(tables.text_of(path), path)), path.absolute().parent


def _row(row: Any) -> Given:
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
        return DataError(f"{brief(row)} is no row: a dict is expected, such as {{'prompt': '...', 'seed': 1}}.")
    return row


def _json_lines(text: str, path: Path) -> Iterator[Numbered]:
    for line, row in tables.json_lines(text, path.name):
        yield line, row if isinstance(row, DataError) else _row(row)


def _json_list(text: str, path: Path) -> Iterator[Numbered]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}.") from error
    if not isinstance(found, list):
        raise DataError(f"{path} holds {brief(found)}: a list of rows is expected.")
    yield from ((None, _row(row)) for row in found)


def _table(text: str, path: Path) -> Iterator[Numbered]:
    for line, row in tables.table(text, path):
        if isinstance(row, DataError):
            yield line, row
            continue
        found = {key: cell.strip() for key, cell in row.items() if cell is not None and cell.strip()}
        yield line, {key: cell if _TEXTS.search(key) else _number_or_text(cell) for key, cell in found.items()}


def _number_or_text(cell: str) -> Any:
    """A cell of a column that holds something else than texts: JSON where it is."""
    try:
        return json.loads(cell.lower() if cell.lower() in ("true", "false") else cell)
    except ValueError:
        return cell


def _prompts(text: str, path: Path) -> Iterator[Numbered]:
    return tables.prompts(text)


_READERS = {".jsonl": _json_lines, ".json": _json_list, ".csv": _table, ".tsv": _table, ".txt": _prompts}


def seeds_of(value: Any) -> list[int]:
    """The seeds that "1-8", "3,7", 5 or a list of numbers stand for.

    Raises:
        DataError: it stands for none.
    """
    expected = "a whole number from 0, or several such as '1-8' or '3,7', is expected"
    if isinstance(value, list | tuple | range):
        if not len(value):
            raise DataError(f"seed={brief(value)}: {expected}.")
        return [seed for one in value for seed in seeds_of(one)]
    if not isinstance(value, bool) and hasattr(value, "__index__"):
        if not 0 <= int(value) < 2**63:
            raise DataError(f"seed={value}: {expected}.")
        return [int(value)]
    seeds: list[int] = []
    for part in value.split(",") if isinstance(value, str) else [""]:
        found = _SEED_RANGE.fullmatch(part)
        if found is None:
            raise DataError(f"seed={brief(value)}: {expected}.")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < min(2**63, first + MOST_SEEDS):
            raise DataError(f"seed={value!r}: {part.strip()} is no range of up to {MOST_SEEDS} seeds.")
        seeds += range(first, last + 1)
    return seeds


def size_of(value: Any) -> tuple[int, int]:
    """Width and height of "512x768".

    Raises:
        DataError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+)\s*[x×X]\s*(\d+)\s*", value) if isinstance(value, str) else None  # noqa: RUF001
    if found is None:
        raise DataError(f"size={brief(value)}: width and height are expected, such as '512x768'.")
    return int(found[1]), int(found[2])


Wanted = Strength | Style | None
"""A style as a row wants it: at a weight, from a source, or, with None, as it is known."""


def styles_of(value: Any, folder: Path) -> dict[str, Wanted]:
    """The styles that a row names: a dict of weights and sources, or text such as "ink:0.8,chalk=chalk.safetensors".

    Args:
        value: as it stands in the row.
        folder: where sources may lie.

    Raises:
        DataError, LoraFileError: it is nothing of the kind.
    """
    if isinstance(value, str) and value.strip().lower() == "none":
        return {}  # an empty cell of a CSV is the default
    if isinstance(value, str):
        return dict(style_of(part, folder) for part in value.split(",") if part.strip())
    if isinstance(value, list | tuple):
        value = dict.fromkeys(value)
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise DataError(f"styles={brief(value)}: names and weights are expected, such as {{'ink': 0.8}} or 'ink:0.8'.")
    return {name: _wanted(one, folder) for name, one in value.items()}


def style_of(text: str, folder: Path) -> tuple[str, Wanted]:
    """One style in the shell's words: `name`, `name:weight`, `name=source` or `name=source:weight`."""
    front, _, tail = text.strip().rpartition(":")
    try:
        weight, rest = float(tail), front
    except ValueError:
        weight, rest = None, text.strip()
    if not rest or "=" not in rest:
        return rest.strip(), weight
    name, _, source = rest.partition("=")
    return name.strip(), _style(source.strip(), folder, **({} if weight is None else {"weight": weight}))


def _wanted(value: Any, folder: Path) -> Wanted:
    if isinstance(value, Mapping) and "source" in value:
        known = ("source", "weight", "weight_name", "subfolder", "revision")
        if odd := sorted(map(str, value.keys() - set(known))):
            raise DataError(f"a style takes no {odd[0]!r}: {', '.join(known)} are known.")
        return _style(**{"folder": folder, **value})
    if value is None or isinstance(value, Style) or is_strength(value):
        return value
    weight = as_weight(value)
    return _style(value, folder) if weight is None else weight


def _style(source: Any, folder: Path, **more: Any) -> Style:
    beside = folder / os.path.expanduser(source) if isinstance(source, str | os.PathLike) else None
    return Style(str(beside) if beside is not None and beside.exists() else source, **more)
