"""The page that closes a run: the loss, the sheets, the settings and the cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from ..pages import picture_uri, render
from ..pages import write as write_page
from ..sheets.axes import in_steps

PAGE = "report.html"
SHEETS = 6
"""How many validation sheets a page shows at most: the first, the last, and some in between."""


def closing_page(output: Path) -> Path:
    """Write `report.html` from what a run left in its folder: log, settings, result and validation sheets.

    Raises:
        DataError: it can't be written.
    """
    lines = [json.loads(line) for line in _text(output / "log.jsonl").splitlines()]
    settings: dict[str, Any] = json.loads(_text(output / "settings.json") or "{}")
    result: dict[str, Any] = json.loads(_text(output / "result.json") or "{}")
    best = (result.get("best") or {}).get("sheet")
    page = render(
        "distillation.html.j2",
        title=output.resolve().name,
        loss={"loss": [(line["step"], line["loss"]) for line in lines if "loss" in line]},
        distance=_distances(lines),
        sheets=[
            {"name": file.stem, "best": file.name == best, "uri": picture_uri(Image.open(file), quality=90)}
            for file in _some(sorted((output / "validation").glob("*.png")), best)
        ],
        settings=settings.get("settings", settings),
        result={name: value for name, value in result.items() if name != "best"},
    )
    return write_page(output / PAGE, page)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _distances(lines: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Name -> (step, distance) of each number of steps that the sheets were drawn in."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for steps, distance in line.get("rel", {}).items():
            found.setdefault(in_steps(steps), []).append((line["step"], distance))
    return found


def _some(files: list[Path], best: str | None) -> list[Path]:
    """At most SHEETS of them, evenly, with the first, the last and the best."""
    last = len(files) - 1
    places = {round(i * last / (SHEETS - 1)) for i in range(SHEETS)} if last > 0 else set(range(len(files)))
    return [file for place, file in enumerate(files) if place in places or file.name == best]
