"""One picture with its text; and a look at all of them before training starts."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from ...errors import DataError
from ...warn import warn


class Skipped(NamedTuple):
    """A picture that can't be trained on."""

    what: str
    why: str


@dataclasses.dataclass(frozen=True)
class Member:
    """A picture inside a tar file, read when it is needed. Nothing stays open, so worker processes may read it too."""

    file: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The encoded picture."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"


def encoded(cell: Any) -> bytes:
    """The file of a picture as `datasets.Image(decode=False)` gives it: {"bytes": ..., "path": ...}, one of them None.
    The path may be one on the hub.

    Raises:
        ValueError: there is none. OSError: it can't be read.
    """
    if not cell:
        raise ValueError("no picture is given")
    if cell["bytes"] is None:
        import fsspec  # datasets depends on it

        with fsspec.open(cell["path"], "rb") as file:
            return bytes(file.read())
    return bytes(cell["bytes"])


@dataclasses.dataclass(frozen=True)
class Row:
    """A picture in a row of a `datasets.Dataset`, which is cast so that it gives encoded pictures."""

    dataset: Any = dataclasses.field(repr=False)
    index: int
    column: str

    def read(self) -> bytes:
        """The encoded picture."""
        return encoded(self.dataset[self.index][self.column])

    def __str__(self) -> str:
        return f"row {self.index}"


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A picture as the bytes of its file."""

    data: bytes = dataclasses.field(repr=False)
    name: str

    def read(self) -> bytes:
        """The encoded picture."""
        return self.data

    def __str__(self) -> str:
        return self.name


Picture = Path | Image.Image | Member | Row | Encoded


@dataclasses.dataclass(frozen=True)
class Example:
    """A text, and the picture it describes.

    Attributes:
        text: the caption, or the prompt.
        picture: a file, a PIL image, or something that is read when it is needed; None where there is only a prompt.
        size: the upright picture's (height, width), where somebody has looked.
    """

    text: str
    picture: Picture | None = None
    size: tuple[int, int] | None = None

    def open(self) -> Image.Image:
        """The picture as RGB: turned upright by its EXIF orientation, on white where it is transparent.

        Raises:
            DataError: it can't be read.
        """
        try:
            return _upright_rgb(self._opened())
        except Exception as error:  # PIL and its decoders raise many kinds
            raise DataError(f"{self} can't be read as a picture: {_why(error)}") from error

    def _opened(self) -> Image.Image:
        if self.picture is None:
            raise ValueError("there is only a prompt")
        return self.picture if isinstance(self.picture, Image.Image) else Image.open(io.BytesIO(self._file()))

    def _file(self) -> bytes:
        picture: Any = self.picture
        return bytes(picture.read_bytes() if isinstance(picture, Path) else picture.read())

    @cached_property
    def content(self) -> str | None:
        """A digest of the picture: of its file, or of what it shows if it is a PIL image; None of a prompt alone.

        Raises:
            DataError: it can't be read any more.
        """
        if self.picture is None:
            return None
        if isinstance(self.picture, Image.Image):
            shown = self.open()
            data = repr(shown.size).encode() + shown.tobytes()
        else:
            try:
                data = self._file()
            except OSError as error:
                raise DataError(f"{self} can't be read any more: {error}") from error
        return hashlib.sha256(data).hexdigest()

    def look(self) -> Example | Skipped:
        """The example with its size, after its picture was decoded once; or why that is not possible."""
        try:
            image = _upright_rgb(self._opened())
        except Exception as error:  # as above
            return Skipped(str(self), _why(error))
        return dataclasses.replace(self, size=(image.height, image.width))

    def __str__(self) -> str:
        if isinstance(self.picture, Image.Image):
            return str(getattr(self.picture, "filename", "") or f"the picture of {self.text!r}")
        return repr(self.text) if self.picture is None else str(self.picture)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What `read` found.

    Attributes:
        examples: all that can be trained on.
        pictures: whether they have pictures, or are prompts only.
        skipped: what can't be trained on, each with the reason.
    """

    examples: tuple[Example, ...]
    pictures: bool
    skipped: tuple[Skipped, ...] = ()


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: nothing says which is white")
    if image.mode.startswith("I"):  # as a rule 16 bits a pixel, which PIL cuts off at 255
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((values >> 8 if values.max() > 255 else values).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    if isinstance(error, UnidentifiedImageError):
        return "it is no picture that PIL knows"
    return str(error) or type(error).__name__


def look_at_all(found: Sequence[Example | Skipped], strict: bool, progress: bool) -> Dataset:
    """Decode every picture once, before anything is trained.

    Args:
        found: examples with pictures, and what was found to be none on the way.
        strict: refuse the whole where one can't be used.
        progress: show a progress bar.

    Raises:
        DataError: none can be used, or not all and `strict`.
    """
    with ThreadPoolExecutor() as pool:  # decoding and reading release the interpreter
        looks = pool.map(lambda one: one if isinstance(one, Skipped) else one.look(), found)
        looked = list(tqdm(looks, "looking at the pictures", len(found), disable=not progress))
    good = tuple(one for one in looked if isinstance(one, Example))
    bad = tuple(one for one in looked if isinstance(one, Skipped))
    if bad:
        count = "the only picture" if len(found) == 1 else f"{len(bad)} of {len(found)} pictures"
        first = ", ".join(f"{one.what} ({one.why})" for one in bad[:3]) + (", ..." if len(bad) > 3 else "")
        if strict or not good:
            raise DataError(f"{count} can't be used: {first}.")
        warn(f"{count} can't be used and are left out: {first}.")
    return Dataset(good, True, bad)
