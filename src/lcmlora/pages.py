"""Pages that stand alone: one HTML file made from a template, which asks for nothing else."""

from __future__ import annotations

import base64
import functools
import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .writing import whole

if TYPE_CHECKING:
    import jinja2
    from PIL import Image

_WEBP_SIDE = 16383  # the format holds no more


def render(template: str, **context: Any) -> str:
    """The page that a template of this package makes. Everything in `context` is escaped.

    A template extends `base.html.j2`: it fills the blocks `title` and `body`, and `style` and `script` where it has
    some. `macros.html.j2` holds tables and line charts.

    Args:
        template: its file name, such as "sheet.html.j2".
        context: what it names. A name that is missing is an error.
    """
    return _environment().get_template(template).render(context)


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("lcmlora"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["shown"] = shown
    made.tests["numeric"] = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    made.globals.update(version=__version__, chart=chart)
    return made


def picture_uri(image: Image.Image, quality: int | None = None) -> str:
    """A picture as a data URI, for an `img` of a page.

    Args:
        image: the picture.
        quality: of a WebP, 1 to 100, with loss; None keeps every pixel. Of three pictures, 64 to 1024 pixels wide, a
            WebP without loss was 9 to 43 % smaller than a PNG.
    """
    stream = io.BytesIO()
    kind = "webp" if max(image.size) <= _WEBP_SIDE else "png"
    options: dict[str, Any] = {"lossless": True} if quality is None else {"quality": quality}
    image = image if image.mode in ("RGB", "RGBA") else image.convert("RGB")
    image.save(stream, kind, **(options if kind == "webp" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def write(path: str | Path, content: str | bytes) -> Path:
    """Write a file, and the folders it lies in. It appears under its name only when it is whole.

    Raises:
        DataError: it can't be written there.
    """
    path = Path(path)
    with whole(path, sync=False) as partial:
        partial.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)
    return path


def shown(value: Any) -> str:
    """A value as a table shows it: four digits of a number."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case list() | tuple() | dict():
            return json.dumps(value, ensure_ascii=False)
    return str(value)


def chart(
    series: Mapping[str, Iterable[tuple[float, float]]], width: int = 640, height: int = 240, log: bool = False
) -> dict[str, Any]:
    """What the macro `line_chart` draws: each series as an SVG's points, and both axes' ticks with their places.

    Args:
        series: name -> (x, y) of its points. Values that are not finite are left out.
        width, height: of the plotting area.
        log: y is logarithmic; values of 0 and below are left out.
    """
    kept = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)]
        for name, points in series.items()
    }
    every = [point for points in kept.values() for point in points] or [(0.0, 1.0)]
    x_ticks = _ticks([x for x, _ in every])
    y_ticks = _log_ticks([y for _, y in every]) if log else _ticks([y for _, y in every])

    def place(value: float, ticks: list[float], length: int, log: bool = False) -> float:
        low, high, at = (math.log(one) if log else one for one in (ticks[0], ticks[-1], value))
        return round((at - low) / (high - low) * length, 1)

    lines = [
        (name, " ".join(f"{place(x, x_ticks, width)},{height - place(y, y_ticks, height, log)}" for x, y in points))
        for name, points in kept.items()
    ]
    return {
        "width": width,
        "height": height,
        "lines": lines,
        "x": [(place(tick, x_ticks, width), f"{tick:g}") for tick in x_ticks],
        "y": [(height - place(tick, y_ticks, height, log), f"{tick:g}") for tick in y_ticks],
    }


def _ticks(values: list[float]) -> list[float]:
    """About five round numbers; the first and last enclose the values."""
    low, high = min(values), max(values)
    low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(s * power for s in (1, 2, 5, 10) if (high - low) / (s * power) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _log_ticks(values: list[float]) -> list[float]:
    """Powers of ten that enclose the values."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return [float(f"1e{power}") for power in range(low, max(high, low + 1) + 1)]
