"""A sheet as one page: pictures, a slider over the columns, a wipe between any two, a table that sorts."""

from __future__ import annotations

import json
from typing import Any

from ..errors import DataError
from ..pages import picture_uri, render
from .drawing import need_pictures
from .sheet import Sheet, flat, summary

_LOSSLESS_PIXELS = 16_000_000
_QUALITY = 90


def page(sheet: Sheet, quality: int | None = None) -> str:
    """The page's HTML. `Sheet.to_html` says what is on it.

    Raises:
        DataError: the sheet has no picture, or there is no such quality.
    """
    need_pictures(sheet)
    if quality is None:
        pixels = sum(image.width * image.height for image in sheet.images)
        quality = 100 if pixels <= _LOSSLESS_PIXELS else _QUALITY
    if type(quality) is not int or not 1 <= quality <= 100:
        raise DataError(f"quality={quality!r} is none of a picture: pass 1 to 100; 100 keeps every pixel.")
    columns, rows, same = _table(sheet)
    widest = max(image.width for image in sheet.images)
    return render(
        "sheet.html.j2",
        title=sheet.title or "Contact sheet",
        about=summary(sheet),
        columns=sheet.columns,
        lines=_lines(sheet, widest, None if quality == 100 else quality),
        widest=widest,
        names=columns,
        rows=rows,
        same=same,
        quality=quality,
    )


def _lines(sheet: Sheet, widest: int, quality: int | None) -> list[dict[str, Any]]:
    """Prompt, label and cells of each line, for the template."""
    number, lines = 0, []
    for (prompt, label), cells in zip(sheet.lines, sheet.cells, strict=True):
        shown: list[dict[str, Any] | None] = []
        for cell in cells:
            if cell is None:
                shown.append(None)
                continue
            number += 1
            shown.append(
                {
                    "number": number,
                    "uri": picture_uri(cell.image, quality),
                    "size": cell.image.size,
                    "share": round(100 * cell.image.width / widest),
                    "seconds": cell.row.get("seconds"),
                    "flag": cell.row.get("flag"),
                }
            )
        lines.append({"prompt": prompt, "label": label, "cells": shown})
    return lines


def _table(sheet: Sheet) -> tuple[list[str], list[list[Any]], list[tuple[str, Any]]]:
    """The names of the table's columns, its rows, and apart from them what is the same for every picture."""
    rows = [flat(row) for row in sheet.to_dict()["pictures"]]
    places = [
        (line.label, sheet.columns[column])
        for line, cells in zip(sheet.lines, sheet.cells, strict=True)
        for column, cell in enumerate(cells)
        if cell is not None
    ]
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if name not in ("line", "column")]
    same, kept = [], []
    for name in names:
        values = {json.dumps(row.get(name)) for row in rows}
        if len(values) > 1 or len(rows) == 1:
            kept.append(name)
        elif rows[0].get(name) is not None:
            same.append((name, rows[0][name]))
    kept.sort(key=lambda name: name == "prompt")  # it is long, and stands above the pictures
    labelled = any(line.label for line in sheet.lines)
    table = [
        [number, column, *([label] if labelled else []), *(row.get(name) for name in kept)]
        for number, ((label, column), row) in enumerate(zip(places, rows, strict=True), 1)
    ]
    return ["picture", "column", *(["line"] if labelled else []), *kept], table, same
