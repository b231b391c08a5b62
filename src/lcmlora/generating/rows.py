"""What each row asks for: read, checked and named before the first picture is drawn."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from diffusers.utils import load_image
from PIL import Image, ImageOps

from ..acceleration import rehearse
from ..calls import parameters_of
from ..errors import DataError, LcmLoraError, LcmLoraWarning, brief
from ..parameters import is_text, meant, whole
from ..state import status
from ..transition.records import pipe_record_of
from ..transition.target import Style
from .reading import Given, Wanted, seeds_of, size_of, styles_of

SEED = 0
"""The seed of a row that gives none."""
_SHORT = {"negative": "negative_prompt", "file": "name", "seeds": "seed", "style": "styles"}
_OURS = ("name", "seed", "size", "styles")
_SET_BY_US = {
    "generator": "give seed",
    "num_images_per_prompt": "give several seeds, such as '1-4'",
    "output_type": "PNG files are written",
    "return_dict": "leave it out",
}
_FILTER = Image.Resampling.LANCZOS
_PAIRS = re.compile(r"_size$|_coords_")  # SDXL's
_LONGEST_NAME = 200  # bytes; most file systems allow 255, and a name in the making is longer
Styles = Mapping[str, Any] | None


class Failed(NamedTuple):
    """A row that was not drawn.

    Attributes:
        row: its number, from 1.
        name: its file's name; None where the row was not understood so far.
        reason: why, in a sentence.
        refused: whether the row itself is at fault, and fails again until it is mended. False: the pipe failed while
            it drew, for want of memory perhaps; the same call tries it again.
        line: where it ends in the file of rows; None for rows from no file, or from a `.json` one.
    """

    row: int
    name: str | None
    reason: str
    refused: bool = True
    line: int | None = None

    @property
    def told(self) -> str:
        """The row as a sentence names it."""
        return f"row {self.row}" + (f" (line {self.line})" if self.line is not None else "")


@dataclasses.dataclass(frozen=True)
class Row:
    """One picture to draw.

    Attributes:
        number: of the row that asks for it, from 1.
        name: of its file, below the output folder.
        seed: of its generator.
        call: the call's arguments, files of pictures left out.
        files: the arguments that are files of pictures.
        fit: what these are cropped and scaled to; None leaves them.
        styles: the styles to have, as for `set_styles`; None leaves those that the pipe has.
    """

    number: int
    name: str
    seed: int
    call: Mapping[str, Any]
    files: Mapping[str, Path]
    fit: tuple[int, int] | None = None
    styles: Styles = None

    def arguments(self) -> dict[str, Any]:
        """The arguments of the call, pictures loaded, and tuples where JSON has lists only."""
        pairs = {n: tuple(v) for n, v in self.call.items() if isinstance(v, list) and _PAIRS.search(n)}
        return {**self.call, **pairs, **{name: picture(path, self.fit) for name, path in self.files.items()}}


def picture(path: Path, fit: tuple[int, int] | None = None) -> Image.Image:
    """A picture in RGB, turned as its camera noted, and of the size asked for.

    Raises:
        DataError: it can't be read.
    """
    try:
        image = load_image(str(path))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"picture {path} can't be read: {error}") from error
    return ImageOps.fit(image, fit, _FILTER) if fit else image


class Rows:
    """What rows are checked against.

    Args:
        pipe: that draws them.
        out: the output folder.
        folder: which paths in rows are relative to.
        call: arguments of every row that does not give them itself.
        styles: those of the rows that name none, and what names of others stand for.
    """

    def __init__(self, pipe: Any, out: Path, folder: Path, call: Mapping[str, Any], styles: Styles) -> None:
        self._pipe, self._out, self._folder = pipe, out, folder
        self.takes = parameters_of(pipe)
        record = pipe_record_of(pipe)
        self._policy = dataclasses.replace(record.settings.policy) if record else None
        self._call = dict(call)
        self._styles = styles
        self._active = status(pipe).styles if record else {}
        self._checked: list[tuple[Styles, str]] = []
        self._names: dict[str, int] = {}

    def check(self, number: int, given: Given) -> tuple[list[Row], list[Failed]]:
        """The pictures that a row asks for, and what is wrong with it."""
        try:
            rows = list(self._rows(number, given))
        except (LcmLoraError, OSError) as error:
            return [], [Failed(number, None, str(error))]
        good: list[Row] = []
        bad: list[Failed] = []
        for row in rows:
            other = self._names.setdefault(row.name.casefold(), number)
            if other == number and not any(row.name.casefold() == one.name.casefold() for one in good):
                good.append(row)
            else:
                whose = "this row" if other == number else f"row {other}"
                bad.append(Failed(number, row.name, f"{row.name} is the file of {whose} already: give another name."))
        return good, bad

    def _rows(self, number: int, given: Given) -> Iterator[Row]:
        if isinstance(given, DataError):
            raise given
        own = self._named({"prompt": given} if isinstance(given, str) else given)
        asked = {**self._named(self._call), **own}
        seeds, name = seeds_of(asked.pop("seed", SEED)), own.pop("name", None)
        asked.pop("name", None)
        styles = self._settled(asked.pop("styles", None))
        self._check_styles(styles)
        fit = self._sized(asked)
        self._check_names(asked)
        if fit:
            asked |= {k: ImageOps.fit(v, fit, _FILTER) for k, v in asked.items() if isinstance(v, Image.Image)}
        files = {key: self._file(key, asked.pop(key)) for key in [*asked] if _is_file(key, asked[key])}
        self._check_call(asked, files)
        for seed in seeds:
            front = f"{number:04d}" if name is None else name
            file = self._file_name(front, None if name is not None and len(seeds) == 1 else seed)
            yield Row(number, file, seed, asked, files, fit if files else None, styles)

    def _named(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A row with the call's own names. What is None is left out."""
        short = {**_SHORT, "steps": self.takes.steps or "steps", "guidance": self.takes.guidance or "guidance"}
        found: dict[str, Any] = {}
        for key, value in given.items():
            name = short.get(key, key)
            if name in found:
                raise DataError(f"{name} is given twice, once as {key}.")
            if value is not None:
                found[name] = value.item() if isinstance(value, np.generic) else value
        return found

    def _check_names(self, asked: Mapping[str, Any]) -> None:
        for name in asked.keys() & _SET_BY_US.keys():
            raise DataError(f"{name} can't stand in a row: {_SET_BY_US[name]}.")
        for name, near in self.takes.unknown(asked, (*_OURS, *_SHORT, "steps", "guidance")):
            raise DataError(f"{self.takes.owner}'s call takes no {name!r}.{meant(name, near)}")
        needs_prompt = "prompt" in self.takes.defaults and "prompt_embeds" not in asked
        if needs_prompt and not is_text(asked.get("prompt")):
            given = f"prompt={brief(asked['prompt'])}: one text is expected." if "prompt" in asked else "no prompt."
            raise DataError(given)

    def _check_call(self, asked: dict[str, Any], files: Mapping[str, Path]) -> None:
        """Refuse numbers that no call could use, and what the pipe's policy, where it has one, would refuse."""
        asked |= self.takes.numbers(asked)
        if self._policy is None:
            return
        with warnings.catch_warnings():  # the call warns itself
            warnings.simplefilter("ignore", LcmLoraWarning)
            self._policy.complete(self.takes, self._pipe, (), {**asked, **files}, [])

    def _sized(self, asked: dict[str, Any]) -> tuple[int, int] | None:
        """Put a size into width and height; where the call takes none, it is that of the pictures given."""
        if "size" in asked:
            if {"width", "height"} & asked.keys():
                raise DataError("size is given, and width or height too: one is enough.")
            asked["width"], asked["height"] = size_of(asked.pop("size"))
        if not {"width", "height"} & asked.keys() or {"width", "height"} <= self.takes.defaults.keys():
            return None
        if not {"width", "height"} <= asked.keys() or "image" not in asked:
            raise DataError(f"{self.takes.owner} draws in the size of its picture: give width, height and image.")
        return whole("width", asked.pop("width"), of=8), whole("height", asked.pop("height"), of=8)

    def _file(self, key: str, given: Any) -> Path:
        if key not in self.takes.defaults:  # some pipelines swallow what they do not know
            raise DataError(f"{self.takes.owner}'s call takes no {key!r}.{meant(key, '')}")
        path = self._folder / Path(given).expanduser()
        if not path.is_file():
            raise DataError(f"{key}={os.fspath(given)!r}: there is no such file ({path}).")
        try:
            with Image.open(path):
                return Path(os.path.abspath(path))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{key}: {path} can't be read as a picture: {error}") from error

    def _file_name(self, front: Any, seed: int | None) -> str:
        if not isinstance(front, str) or not front.strip() or any(ord(letter) < 32 for letter in front):
            raise DataError(f"name={brief(front)}: a file name is expected.")
        suffix = re.search(r"\.(png|jpe?g|webp|gif|tiff?|bmp)$", front, re.IGNORECASE)
        if suffix and suffix[1].lower() != "png":
            raise DataError(f"name={front!r}: only PNG files are written, as they say what made them.")
        front = front[:-4] if suffix else front
        name = f"{front}.png" if seed is None else f"{front}-{seed}.png"
        inside = os.path.realpath(self._out / name).startswith(os.path.realpath(self._out) + os.sep)
        if os.path.isabs(name) or not inside or ".." in Path(name).parts:
            raise DataError(f"name={front!r} would leave the folder {self._out}.")
        if len(os.path.basename(name).encode()) > _LONGEST_NAME:
            raise DataError(f"name={brief(front)} is too long for a file.")
        return Path(os.path.normpath(name)).as_posix()

    def _settled(self, value: Any) -> Styles:
        """The styles of a row as `set_styles` takes them: what a name alone stands for is filled in."""
        if value is None:
            return self._styles
        return {name: self._style(name, one) for name, one in styles_of(value, self._folder).items()}

    def _style(self, name: str, wanted: Wanted) -> Any:
        known = (self._styles or {}).get(name)
        if wanted is None:
            wanted = known if known is not None else self._active.get(name)
            if wanted is None and why_not(self._pipe, {name: 1.0}):
                raise DataError(f"style {name!r} is not known here: give its source, or name it in styles=.")
            if wanted is None:
                raise DataError(f"style {name!r} is off here: give its weight, {name}:0.8, or name it in styles=.")
        elif isinstance(wanted, float) and isinstance(known, str | os.PathLike | Style):
            return dataclasses.replace(Style.of(known), weight=wanted)
        return wanted

    def _check_styles(self, styles: Styles) -> None:
        if styles is None:
            return
        fault = next((fault for other, fault in self._checked if other == styles), _NOT_YET)
        if fault == _NOT_YET:
            fault = why_not(self._pipe, styles)
            self._checked.append((styles, fault))
        if fault:
            raise DataError(fault)


_NOT_YET = "not checked yet"


def why_not(pipe: Any, styles: Mapping[str, Any]) -> str:
    """Why the pipe can't have these styles; empty where it can."""
    record = pipe_record_of(pipe)
    if record is None:
        return "styles are an accelerated pipe's; lcmlora.accelerate(pipe) first."
    if record.baked:
        return "this pipe was baked: its styles are in its weights, and none can be given."
    with warnings.catch_warnings():  # set_styles warns itself
        warnings.simplefilter("ignore", LcmLoraWarning)
        try:
            rehearse(pipe, styles=styles)
        except LcmLoraError as error:
            return str(error)
    return ""


def _is_file(name: str, value: Any) -> bool:
    return isinstance(value, str | os.PathLike) and name.endswith(("image", "mask"))
