"""Files of rows that people write: JSON lines, and CSV with commas, semicolons or tabs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DataError


def text_of(path: Path) -> str:
    """A file's text, without the mark that some editors put in front.

    Raises:
        DataError: it can't be read, or is no text in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}.") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}.") from error


def prompts(text: str) -> Iterator[tuple[int, str]]:
    """The number of each line that is not empty, and its prompt. Not `splitlines`: a text may hold U+2028."""
    return ((number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def json_lines(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """The number of each line that is not empty, and what it holds; a `DataError` where that is no JSON."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, DataError(f"line {number} of {name} is no JSON: {error}.")


def table(text: str, path: Path) -> Iterator[tuple[int, dict[str, str | None] | DataError]]:
    """The number of each line that has a cell, and its cells by column, None for one that is not there.

    Tabs stand between them in a `.tsv` file, semicolons where the first line has more of these than commas: so
    spreadsheets write it where the comma is the decimal mark. A `DataError` stands for a line of too many cells.

    Raises:
        DataError: two columns have one name, or the file is no CSV.
    """
    head = text.partition("\n")[0]
    separator = "\t" if path.suffix.lower() == ".tsv" else ";" if head.count(";") > head.count(",") else ","
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        names = [name.strip() for name in rows.fieldnames or () if name.strip()]
        if twice := {name for name in names if names.count(name) > 1}:
            raise DataError(f"{path} has several columns of one name: {', '.join(sorted(twice))}.")
        for cells in rows:
            if None in cells:
                reason = f"there are more cells than columns ({', '.join(names)}): quote what holds a {separator!r}."
                yield rows.line_num, DataError(f"line {rows.line_num} of {path.name}: {reason}")
            elif any(cell and cell.strip() for cell in cells.values()):  # spreadsheets end in rows of empty cells
                yield rows.line_num, {key.strip(): cell for key, cell in cells.items() if key.strip()}
    except csv.Error as error:
        raise DataError(f"{path} can't be read: {error}.") from error
