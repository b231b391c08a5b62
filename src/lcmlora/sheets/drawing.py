"""The picture of a sheet: cells between labelled axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from ..errors import DataError
from . import fonts

if TYPE_CHECKING:
    from .sheet import Cell, Sheet

_SMALL = 128
"""Pictures below this width are enlarged, to give the labels room."""
_MOST_PIXELS = 80_000_000
"""Larger sheets are made smaller: from 89 million pixels on Pillow warns of whoever opens a picture."""
_INK, _PALE, _FRAME = "#000000", "#5a5a5a", "#b4b4b4"


def drawn(sheet: Sheet) -> Image.Image:
    """The sheet as one picture: the title, the columns' labels above, the lines' labels and prompts on the left.

    Raises:
        DataError: it has no picture.
    """
    need_pictures(sheet)
    layout = _Layout(sheet)
    image = Image.new("RGB", layout.size, "white")
    for place, text, colour in layout.texts():
        fonts.draw(image, place, text, layout.points, colour)
    for line, cells in enumerate(sheet.cells):
        for column, cell in enumerate(cells):
            x, y, wide, high = layout.slot(line, column)
            if cell is None:
                ImageDraw.Draw(image).rectangle((x, y, x + wide - 1, y + high - 1), outline=_FRAME)
                continue
            size = layout.scaled(cell.image.size)
            filter_ = Image.Resampling.BICUBIC if layout.scale >= 1 else Image.Resampling.LANCZOS
            shown = cell.image.convert("RGB")
            shown = shown if shown.size == size else shown.resize(size, filter_)
            image.paste(shown, (x + (wide - size[0]) // 2, y + (high - size[1]) // 2))
    return image


def need_pictures(sheet: Sheet) -> None:
    """Refuse a sheet of gaps alone where a picture is needed."""
    if not sheet.images:
        raise DataError("This sheet has no picture to show: it was stopped before its first one was drawn.")


class _Layout:
    """Where everything on a sheet lies."""

    def __init__(self, sheet: Sheet) -> None:
        self.sheet, self.scale = sheet, 1.0
        widest = max(image.width for image in sheet.images)
        self.scale = max(1, round(_SMALL / widest))
        self._measure()
        if (pixels := math.prod(self.size)) > _MOST_PIXELS:
            self.scale *= math.sqrt(_MOST_PIXELS / pixels)
            self._measure()

    def _measure(self) -> None:
        sheet = self.sheet
        self.widths = self._sides(zip(*sheet.cells, strict=True), 0)
        self.heights = self._sides(sheet.cells, 1)
        self.points = max(12, min(max(self.widths), max(self.heights)) // 16)
        self.gap = max(4, self.points // 3)
        self.step = round(self.points * 1.4)
        self.gutter = self._gutter(max(self.widths))
        room = self.gutter + sum(self.widths) + self.gap * len(self.widths)
        self.title = fonts.wrapped(sheet.title, self.points, room - self.gap, 3)
        self.labels = [
            fonts.wrapped(label, self.points, wide, 3) for label, wide in zip(sheet.columns, self.widths, strict=True)
        ]
        self.top = self.gap + self.step * (len(self.title) + max(map(len, self.labels), default=0))
        self.top += self.gap if self.title else 0
        self.size = (room + self.gap, self.top + sum(self.heights) + self.gap * len(self.heights))

    def scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        return max(1, round(size[0] * self.scale)), max(1, round(size[1] * self.scale))

    def _sides(self, groups: Iterable[Sequence[Cell | None]], side: int) -> list[int]:
        """The largest width of each column, or height of each line; of one without pictures, that of the whole."""
        found = [[self.scaled(cell.image.size)[side] for cell in group if cell is not None] for group in groups]
        most = max(max(sides) for sides in found if sides)
        return [max(sides, default=most) for sides in found]

    def _gutter(self, widest: int) -> int:
        """Room on the left: what the longest label or prompt takes, at most 16 letters or so and a cell's width."""
        texts = [text for line in self.sheet.lines for text in line if text]
        most = max(self.points * 10, min(widest, self.points * 16))
        wanted = max((fonts.width(text[:most], self.points) for text in texts), default=0)
        return math.ceil(min(wanted, most)) + 2 * self.gap if wanted else self.gap

    def slot(self, line: int, column: int) -> tuple[int, int, int, int]:
        """Left, top, width and height of a cell's place."""
        x = self.gutter + sum(self.widths[:column]) + self.gap * column
        y = self.top + sum(self.heights[:line]) + self.gap * line
        return x, y, self.widths[column], self.heights[line]

    def texts(self) -> Iterator[tuple[tuple[int, int], str, str]]:
        """Each line of text with the place where it begins, and its colour."""
        for row, text in enumerate(self.title):
            yield (self.gap, self.gap + self.points + row * self.step), text, _INK
        for column, label_lines in enumerate(self.labels):
            for row, text in enumerate(label_lines[::-1]):
                x, y, wide, _ = self.slot(0, column)
                left = x + max(0, wide - math.ceil(fonts.width(text, self.points))) // 2
                yield (left, y - self.step // 3 - row * self.step), text, _INK
        before, room = "", self.gutter - 2 * self.gap
        for number, (prompt, label) in enumerate(self.sheet.lines):
            _, y, _, high = self.slot(number, 0)
            rows = max(1, high // self.step)
            labels = fonts.wrapped(label, self.points, room, rows)
            again = bool(label) and prompt == before
            prompts = [] if again else fonts.wrapped(prompt, self.points, room, rows - len(labels))
            for row, text in enumerate((*labels, *prompts)):
                yield (self.gap, y + self.points + row * self.step), text, _INK if row < len(labels) else _PALE
            before = prompt
