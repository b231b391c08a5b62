"""A contact sheet: pictures in lines and columns, and what made each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ..pictures import described

_GAP = 4


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


@dataclasses.dataclass(frozen=True)
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
        return tuple(cell.image for line in self.cells for cell in line if cell is not None)

    @property
    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """What made each of `images`, in the same order."""
        return tuple(cell.row for line in self.cells for cell in line if cell is not None)

    @property
    def image(self) -> Image.Image:
        """The labelled contact sheet."""
        return _drawn(self)

    def seconds(self, column: str) -> float:
        """Mean seconds per picture of a column, its first picture (which warms up) left out where there are more."""
        times = [row["seconds"] for row in self.rows if row["column"] == column]
        kept = times[1:] or times
        return float(sum(kept) / len(kept))

    def save(self, folder: str | Path, name: str = "sheet") -> Path:
        """Write `name`.png, the labelled sheet, and `name`.json, what made each picture; returns the PNG's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.image.save(folder / f"{name}.png")
        text = json.dumps({"title": self.title, "pictures": described(self.rows)}, indent=1)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
        return folder / f"{name}.png"

    def __add__(self, other: Sheet) -> Sheet:
        """Another sheet's columns to the right of these; the lines must be the same.

        Raises:
            ValueError: they are not.
        """
        if self.lines != other.lines:
            raise ValueError(f"sheets of other prompts can't stand side by side: {self.lines} and {other.lines}")
        cells = tuple((*mine, *theirs) for mine, theirs in zip(self.cells, other.cells, strict=True))
        return Sheet(cells, self.columns + other.columns, self.lines, self.title)


def _drawn(sheet: Sheet) -> Image.Image:
    """Small pictures are enlarged to about 128 pixels, to give the labels room."""
    zoom = max(1, round(128 / sheet.images[0].width))
    width, height = (side * zoom for side in sheet.images[0].size)
    points = max(11, height // 11)
    font, line = ImageFont.load_default(points), round(points * 1.5)
    top = line * (2 if sheet.title else 1)
    sheet_width = len(sheet.columns) * (width + _GAP) + _GAP
    image = Image.new("RGB", (sheet_width, top + len(sheet.lines) * (height + line + _GAP)), "white")
    draw = ImageDraw.Draw(image)
    if sheet.title:
        draw.text((_GAP, 2), _fitted(sheet.title, font, sheet_width), fill="black", font=font)
    for column, label in enumerate(sheet.columns):
        place = _GAP + column * (width + _GAP)
        draw.text((place, top - line + 2), _fitted(label, font, width), fill="black", font=font)
    for row, (prompt, label) in enumerate(sheet.lines):
        y = top + row * (height + line + _GAP)
        for column, cell in enumerate(sheet.cells[row]):
            if cell is not None:
                picture = cell.image.resize((width, height), Image.Resampling.BICUBIC)
                image.paste(picture, (_GAP + column * (width + _GAP), y))
        text = _fitted(f"{label}  {prompt}" if label else prompt, font, sheet_width)
        draw.text((_GAP, y + height + 2), text, fill=(90, 90, 90), font=font)
    return image


def _fitted(text: str, font: Any, width: int) -> str:
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip() + "…" if not text.endswith("…") else text[:-2] + "…"
        if text == "…":
            break
    return text
