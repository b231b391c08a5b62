"""Text in any script: the fonts of this system stand in where Pillow's own has no glyph."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

from PIL import Image, ImageDraw, ImageFont

_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
    "C:/Windows/Fonts",
)
_ONE_SIZE = (109, 160, 128, 136)
"""The sizes that bitmap fonts of emoji come in: Noto's, Apple's, others'."""
_NO_GLYPH = "\ue000"
"""For private use: what a font draws for it, it draws for whatever it lacks."""


_JOINING = ("Cf", "Mn", "Me")
"""Categories of characters that belong to the one before them, and have no glyph or need none."""

_CONTROL = ("Cc", "Cs", "Zl", "Zp")


class Face(NamedTuple):
    """A font's file and its place in it. None is Pillow's own."""

    file: str | None
    number: int = 0


@functools.lru_cache(maxsize=64)
def _loaded(face: Face, points: int) -> tuple[ImageFont.FreeTypeFont, float]:
    """The font, and by how much its glyphs are to be enlarged: a bitmap font has one size."""
    if face.file is None:
        return cast("ImageFont.FreeTypeFont", ImageFont.load_default(points)), 1.0
    for size in (points, *_ONE_SIZE):
        try:
            return ImageFont.truetype(face.file, size, face.number), points / size
        except OSError as error:
            if "pixel size" not in str(error):
                raise
    raise OSError(f"{face.file}: no size of this font is known.")


@functools.lru_cache(maxsize=1 << 14)
def _has(face: Face, character: str) -> bool:
    """Whether a font has a glyph of its own for a character."""
    try:
        font, _ = _loaded(face, 16)
        mine, none = font.getmask(character), font.getmask(_NO_GLYPH)
    except OSError:
        return False
    return (mine.size, bytes(mine)) != (none.size, bytes(none)) and bool(mine.getbbox())


@functools.lru_cache(maxsize=1)
def _files() -> tuple[str, ...]:
    """The fonts of the folders that systems keep them in."""
    folders = [os.path.expanduser(folder) for folder in _FOLDERS]
    found = (file for folder in folders for file in sorted(Path(folder).rglob("*")))
    return tuple(str(file) for file in found if file.suffix.lower() in (".ttf", ".otf", ".ttc"))


@functools.lru_cache(maxsize=1 << 12)
def _system_face(character: str) -> Face | None:
    """A font of this system that has a character: fontconfig's choice, else the first that is found."""
    faces: Iterator[Face] | list[Face] = (Face(file) for file in _files())
    if command := shutil.which("fc-match"):
        asked = [command, "-f", "%{file}\t%{index}", f"sans:charset={ord(character):x}"]
        answer = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.partition("\t")
        if answer[2].isdigit():
            faces = [Face(answer[0], int(answer[2]) & 0xFFFF)]
    return next((face for face in faces if _has(face, character)), None)


_OWN = Face(None)


def _faces(text: str) -> Iterator[tuple[Face, str]]:
    """For each character the font that draws it. Within a word one that serves goes on serving, and a space between
    two words of one font is of that font too, for scripts that are written from right to left.
    """
    known, last = [_OWN], _OWN
    for number, word in enumerate(text.split(" ")):
        now, found = _OWN, []
        for character in word:
            if unicodedata.category(character) not in _JOINING and not _has(now, character):
                other = next((face for face in known if _has(face, character)), None) or _system_face(character)
                now = other or now
                known += [] if now in known else [now]
            found.append((now, character))
        if number:
            yield (last if found and found[0][0] == last else _OWN), " "
        yield from found
        last = found[-1][0] if found else _OWN


def _runs(text: str) -> Iterator[tuple[Face, str]]:
    """The text in pieces of one font each. What is no character of a line, such as its end, is a space."""
    text = "".join(" " if unicodedata.category(c) in _CONTROL else c for c in text)
    for face, pieces in itertools.groupby(_faces(text), key=lambda one: one[0]):
        yield face, "".join(character for _, character in pieces)


def width(text: str, points: int) -> float:
    """How many pixels wide a line of text is."""
    total = 0.0
    for face, run in _runs(text):
        font, zoom = _loaded(face, points)
        total += font.getlength(run) * zoom
    return total


def draw(image: Image.Image, place: tuple[int, int], text: str, points: int, fill: str) -> None:
    """Draw a line of text; `place` is where its first baseline begins."""
    canvas, (x, y) = ImageDraw.Draw(image), (float(place[0]), place[1])
    for face, run in _runs(text):
        font, zoom = _loaded(face, points)
        if zoom == 1:
            canvas.text((x, y), run, fill, font, anchor="ls")
        else:
            _paste_bitmaps(image, (round(x), y), run, font, zoom, fill)
        x += font.getlength(run) * zoom


def _paste_bitmaps(
    image: Image.Image, place: tuple[int, int], text: str, font: ImageFont.FreeTypeFont, zoom: float, fill: str
) -> None:
    """Text of a font that has one size, drawn at that size and made smaller."""
    ascent, descent = font.getmetrics()
    large = Image.new("RGBA", (max(1, round(font.getlength(text))), ascent + descent))
    ImageDraw.Draw(large).text((0, ascent), text, fill, font, anchor="ls", embedded_color=True)
    small = large.resize((max(1, round(large.width * zoom)), max(1, round(large.height * zoom))), Image.Resampling.BOX)
    image.paste(small, (place[0], place[1] - round(ascent * zoom)), small)


def wrapped(text: str, points: int, room: int, lines: int) -> list[str]:
    """The text in at most so many lines of `room` pixels: broken at spaces, or anywhere where a word is longer, as in
    scripts without spaces, and ended by an ellipsis where it is cut short.
    """
    made: list[str] = []
    rest = " ".join(text.split())
    while rest and len(made) < lines:
        count = _fitting(rest, points, room)
        if count < len(rest) and len(made) == lines - 1:
            while count > 1 and width(rest[:count].rstrip() + "…", points) > room:
                count -= 1
            made.append(rest[:count].rstrip() + "…")
            break
        space = rest.rfind(" ", 1, count + 1)
        if count < len(rest) and space > 0:
            count = space
        made.append(rest[:count].rstrip())
        rest = rest[count:].lstrip()
    return made


def _fitting(text: str, points: int, room: int) -> int:
    """How many characters of a text fit, one at least."""
    low, high = 1, min(len(text), room)  # hardly a letter is narrower than a pixel
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if width(text[:middle], points) <= room else (low, middle - 1)
    return low
