"""A contact sheet: pictures in lines and columns, and what made each."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import math
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..errors import DataError
from ..pages import picture_uri, write
from ..pictures import described
from .drawing import drawn

_NOTEBOOK = 1200
"""The widest that a notebook is given: it keeps every picture in its file."""


class Cell(NamedTuple):
    """One picture and what made it.

    Attributes:
        image: the picture; of a video its middle frame.
        row: "prompt", "column", "line", "seed", the call's settings as they ran, "accelerated", "recipe", "weight",
            "styles", "scheduler", "seconds", "seconds_per_step", "peak_bytes" (None where the system has no such
            figure), "flag" ("flat" for a picture of one colour, which is what NaN becomes; else None), and metrics.
            All of it is fit for JSON.
    """

    image: Image.Image
    row: Mapping[str, Any]


class Line(NamedTuple):
    """A row of a sheet: a prompt, and where a second axis runs down the sheet, its label there."""

    prompt: str
    label: str = ""


@dataclasses.dataclass(frozen=True, repr=False)
class Sheet:
    """Pictures in lines and columns, and what made each.

    Attributes:
        cells: `cells[line][column]`; None where a sheet was stopped before that picture.
        columns: the columns' labels.
        lines: prompt and label of each line.
        title: a line above the sheet.
    """

    cells: tuple[tuple[Cell | None, ...], ...]
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    title: str = ""

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The pictures that were drawn, line by line."""
        return tuple(cell.image for cell in self._drawn())

    @property
    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """What made each of `images`, in the same order."""
        return tuple(cell.row for cell in self._drawn())

    def _drawn(self) -> Iterator[Cell]:
        return (cell for line in self.cells for cell in line if cell is not None)

    @functools.cached_property
    def image(self) -> Image.Image:
        """The labelled contact sheet, drawn once: title, columns above, labels and prompts on the left.

        Pictures below 128 pixels are enlarged; a sheet of more than 80 million pixels is made smaller. Scripts that
        Pillow's font lacks are drawn by a font of this system.

        Raises:
            DataError: no picture was drawn yet.
        """
        return drawn(self)

    def __repr__(self) -> str:
        return f"Sheet({summary(self)}{f', {self.title!r}' if self.title else ''})"

    def _small(self) -> Image.Image | None:
        image = self.image.copy() if self.images else None
        if image is not None:
            image.thumbnail((_NOTEBOOK, 4 * _NOTEBOOK))
        return image

    def _repr_png_(self) -> bytes | None:
        """The sheet in a notebook, at most 1,200 pixels wide; None where nothing was drawn."""
        if (image := self._small()) is None:
            return None
        stream = io.BytesIO()
        image.save(stream, "png")
        return stream.getvalue()

    def _repr_html_(self) -> str:
        said = escape(repr(self))
        if (image := self._small()) is None:
            return f"<p>{said}</p>"
        picture = f'<img src="{picture_uri(image, 85)}" alt="{said}" style="max-width:100%">'
        return f"<figure>{picture}<figcaption>{said}</figcaption></figure>"

    def seconds(self, column: str) -> float:
        """Mean seconds per picture of a column, its first picture (which warms up) left out where there are more.

        Raises:
            DataError: no picture of such a column was drawn.
        """
        times = [row["seconds"] for row in self.rows if row["column"] == column]
        if not times:
            raise DataError(f"No picture of column {column!r} was drawn: the columns are {', '.join(self.columns)}.")
        kept = times[1:] or times
        return float(sum(kept) / len(kept))

    def to_dict(self) -> dict[str, Any]:
        """Title, columns, lines, and the row of each picture, fit for JSON: a number that is none is None."""
        lines = [{"prompt": line.prompt, "label": line.label} for line in self.lines]
        pictures = [_finite(described(row)) for row in self.rows]
        return {"title": self.title, "columns": list(self.columns), "lines": lines, "pictures": pictures}

    def save(self, folder: str | Path, name: str = "sheet") -> Path:
        """Write `name`.png, the labelled sheet, and beside it `name`.json and `name`.csv, what made each picture.

        Args:
            folder: made where it is missing.
            name: of the files.

        Returns:
            The PNG's path.

        Raises:
            DataError: they can't be written there, or no picture was drawn yet.
        """
        stream, folder = io.BytesIO(), Path(folder)
        self.image.save(stream, "png")
        path = write(folder / f"{name}.png", stream.getvalue())
        write(folder / f"{name}.json", json.dumps(self.to_dict(), indent=1, ensure_ascii=False))
        self.to_csv(folder / f"{name}.csv")
        return path

    def to_csv(self, path: str | Path) -> Path:
        """Write a table of the rows, one a picture. What a row holds in a mapping has columns of its own, such as
        "styles.ink"; lists are JSON.

        Args:
            path: of the file.

        Returns:
            The path.

        Raises:
            DataError: it can't be written there.
        """
        rows = [flat(row) for row in self.to_dict()["pictures"]]
        stream = io.StringIO(newline="")
        table = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)))
        table.writeheader()
        table.writerows(
            {k: json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for k, v in row.items()}
            for row in rows
        )
        return write(path, stream.getvalue())

    def to_html(self, path: str | Path, *, quality: int | None = None) -> Path:
        """Write one page that needs nothing else: the pictures, a slider over the columns, any two compared by a wipe,
        and a table that sorts.

        Args:
            path: of the file.
            quality: of the pictures (WebP), 1 to 100; 100 keeps every pixel. None is 100 up to 16 million pixels in
                all, and 90 above: the page says which.

        Returns:
            The path.

        Raises:
            DataError: it can't be written there, no picture was drawn yet, or there is no such quality.
        """
        from .report import page

        return write(path, page(self, quality))

    def __add__(self, other: Sheet) -> Sheet:
        """Another sheet's columns to the right of these; the lines must be the same.

        Raises:
            ValueError: they are not.
        """
        if not isinstance(other, Sheet):
            return NotImplemented
        if self.lines != other.lines:
            raise ValueError(f"sheets of other prompts can't stand side by side: {self.lines} and {other.lines}")
        cells = tuple((*mine, *theirs) for mine, theirs in zip(self.cells, other.cells, strict=True))
        return Sheet(cells, self.columns + other.columns, self.lines, self.title)


def summary(sheet: Sheet) -> str:
    """How large a sheet is, and how much of it is there."""
    lines, columns = _count(len(sheet.lines), "line"), _count(len(sheet.columns), "column")
    places, there = len(sheet.lines) * len(sheet.columns), len(sheet.images)
    return f"{lines} x {columns}, {'' if there == places else f'{there} of '}{_count(places, 'picture')}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _finite(value: Any) -> Any:
    """A description without the numbers that JSON lacks."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(one) for key, one in value.items()}
        case list():
            return [_finite(one) for one in value]
    return value


def flat(row: Mapping[str, Any], front: str = "") -> dict[str, Any]:
    """A row without mappings: what one holds is named like "styles.ink"."""
    made: dict[str, Any] = {}
    for name, value in row.items():
        made |= flat(value, f"{front}{name}.") if isinstance(value, Mapping) else {f"{front}{name}": value}
    return made
