"""Every form that pictures with texts, or prompts alone, come in."""

from __future__ import annotations

import dataclasses
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from ... import tables
from ...errors import DataError, brief
from .examples import Dataset, Encoded, Example, Member, Row, Skipped, encoded, look_at_all

PICTURES = (".avif", ".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".jxl", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""How files that are taken for pictures end."""
_TEXT = ("text", "caption", "prompt")
_IMAGE = ("image", "file_name", "picture", "path")
_SIDECARS = (".txt", ".caption")
Found = Iterator[Example | Skipped]


@dataclasses.dataclass(frozen=True)
class _Columns:
    """What the columns of a table are called; None: one of the usual names."""

    text: str | None
    image: str | None

    def of(self, names: Iterable[str], where: str) -> tuple[str, str | None]:
        """The names in force: of the text, and of the picture if there is any.

        Raises:
            DataError: there is none for the text, or not the one that was named.
        """
        names = list(names)
        text, image = (next((n for n in usual if n in names), None) for usual in (_TEXT, _IMAGE))
        for asked, argument in ((self.text, "text_column"), (self.image, "image_column")):
            if asked is not None and asked not in names:
                raise DataError(f"{where} has no {argument}={asked!r}, but {', '.join(map(repr, names)) or 'none'}.")
        text, image = self.text or text, self.image or image
        if text is None:
            has = ", ".join(map(repr, names)) or "none"
            raise DataError(f"{where}: a 'text' is expected, its columns are {has}; text_column= says which it is.")
        return text, image


def read(
    source: Any,
    *,
    strict: bool = False,
    text_column: str | None = None,
    image_column: str | None = None,
    progress: bool = False,
) -> Dataset:
    """Find the pictures and texts of a source, whatever its form, and decode each picture once.

    Args:
        source: one of

            - a folder with `metadata.jsonl` or `metadata.csv` (`file_name`, `text`), or with a `.txt` (`.caption`)
              beside each picture, or with webdataset shards (`*.tar`), or saved by `datasets`;
            - a `.jsonl`, `.csv` or `.tsv` file of pictures and texts, or of prompts; a `.txt` file, one prompt a line;
              a `.tar` shard;
            - a `datasets.Dataset`, or an `IterableDataset` or `DatasetDict` (its "train");
            - any iterable of (picture, text), of mappings, or of prompts. A picture is a path or a PIL image;
            - what `read` has given.
        strict: refuse where a picture can't be used, instead of leaving it out with a warning.
        text_column: what the texts are called. None: "text", "caption" or "prompt".
        image_column: what the pictures are called. None: "image", "file_name", "picture" or "path".
        progress: show a progress bar while the pictures are looked at.

    Raises:
        DataError: there is nothing in it, a line or row is not as it should be, or no picture can be used.
    """
    if isinstance(source, Dataset):
        return source
    columns, named = _Columns(text_column, image_column), str(source) if isinstance(source, Path) else brief(source)
    try:
        found = list(_find(source, columns))
    except OSError as error:
        raise DataError(f"{named} can't be read: {error}") from error
    if not found:
        raise DataError(f"{named} holds no picture and no prompt.")
    prompts = [one for one in found if isinstance(one, Example) and one.picture is None]
    if not prompts:
        return look_at_all(found, strict, progress)
    if len(prompts) < len(found):
        raise DataError(f"{named} mixes prompts without a picture, such as {prompts[0]}, with pictures.")
    if all(Path(one.text).suffix.lower() in PICTURES for one in prompts):
        raise DataError(f"{named} holds pictures without texts, such as {prompts[0]}; a text each is expected.")
    return Dataset(tuple(prompts), False)


def _find(source: Any, columns: _Columns) -> Found:
    if isinstance(source, str | os.PathLike):
        return _find_path(Path(source), columns)
    if type(source).__module__.partition(".")[0] == "datasets":
        return _find_hf(source, columns)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError(
            f"{brief(source)} is no data: a folder, a file, a datasets.Dataset, or (picture, text) pairs are expected."
        )
    return (_of_item(item, number, columns) for number, item in enumerate(source))


def _find_path(path: Path, columns: _Columns) -> Found:
    if path.is_dir():
        return _find_folder(path, columns)
    readers: dict[str, Callable[[Path, _Columns], Found]] = {
        ".jsonl": _find_table,
        ".csv": _find_table,
        ".tsv": _find_table,
        ".txt": _find_prompts,
        ".tar": lambda file, names: _find_shards([file], names),
    }
    if not path.is_file():
        hint = ""
        if path.suffix not in readers and len(path.parts) == 2:
            hint = f"; for a data set of the hub pass datasets.load_dataset({str(path)!r}, split='train')"
        raise DataError(f"{path} is not there{hint}.")
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: a folder, or a file that ends in {', '.join(readers)}, is expected.")
    return readers[path.suffix.lower()](path, columns)


def _find_folder(folder: Path, columns: _Columns) -> Found:
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).is_file():
            return _find_table(folder / name, columns)
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _find_hf(_saved(folder), columns)
    if shards := sorted(folder.glob("*.tar")):
        return _find_shards(shards, columns)
    return _find_sidecars(folder)


def _find_sidecars(folder: Path) -> Found:
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    texts = {path: next((t for end in _SIDECARS if (t := path.with_suffix(end)).is_file()), None) for path in pictures}
    if not any(texts.values()):
        raise DataError(
            f"{folder} has {len(pictures)} pictures and no texts; write a metadata.jsonl with a line a picture, such "
            'as {"file_name": "a.png", "text": "a red fox"}, or a .txt beside each.'
        )
    for path, text in texts.items():
        yield Example(tables.text_of(text).strip(), path) if text else Skipped(str(path), "it has no .txt beside it")


def _find_prompts(file: Path, _: _Columns) -> Found:
    return (Example(text) for _, text in tables.prompts(tables.text_of(file)))


def _find_table(file: Path, columns: _Columns) -> Found:
    """A table's rows; paths in it are relative to its folder."""
    text, lines = tables.text_of(file), file.suffix.lower() == ".jsonl"
    for number, row in tables.json_lines(text, file.name) if lines else tables.table(text, file):
        where = f"{file}, line {number}"
        if isinstance(row, DataError):
            raise row
        if not isinstance(row, dict):
            expected = '{"file_name": ..., "text": ...} or {"text": ...}'
            raise DataError(f"{where}: {expected} is expected, got {brief(row)}.")
        if not lines and None in row.values():
            raise DataError(f"{where}: {len(row)} cells are expected.")
        yield _of_row(row, where, columns, file.parent)


def _text(told: Any, where: str) -> str:
    if not isinstance(told, str):
        raise DataError(f"{where}: a text is expected, got {brief(told)}.")
    try:
        told.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {brief(told)} is no text: it has half a character (a lone surrogate).") from error
    return told


def _example(text: Any, picture: Any, where: str, root: Path = Path()) -> Example | Skipped:
    """An example of what stands for its picture in a source."""
    text = _text(text, where)
    if isinstance(picture, str | os.PathLike) and str(picture):
        return Example(text, root / picture)
    if isinstance(picture, Image.Image):
        return Example(text, picture)
    if picture is None or isinstance(picture, str):
        return Skipped(where, "no picture is given")
    raise DataError(f"{where}: a path or a PIL image is expected, got {brief(picture)}.")


def _of_row(row: Mapping[str, Any], where: str, columns: _Columns, root: Path = Path()) -> Example | Skipped:
    text, image = columns.of(row, where)
    return _example(row[text], row[image], where, root) if image else Example(_text(row[text], where))


def _of_item(item: Any, number: int, columns: _Columns) -> Example | Skipped:
    where = f"item {number}"
    if isinstance(item, str):
        return Example(_text(item, where))
    if isinstance(item, Mapping):
        return _of_row(item, where, columns)
    if isinstance(item, tuple | list) and len(item) == 2:
        return _example(item[1], item[0], where)
    raise DataError(f"{where}: (picture, text), a mapping or a prompt is expected, got {brief(item)}.")


# -- webdataset -------------------------------------------------------------------------------------------------------


def _find_shards(files: Iterable[Path], columns: _Columns) -> Found:
    """Samples are neighbours in a tar file that share all before the first dot of the name."""
    for file in files:
        try:
            with tarfile.open(file, "r:") as tar:
                members = (member for member in tar if member.isfile())
                for key, sample in groupby(members, lambda member: _split(member.name)[0]):
                    yield from _sample(file, tar, key, {_split(m.name)[1]: m for m in sample}, columns)
        except tarfile.TarError as error:
            raise DataError(f"{file} can't be read as an uncompressed tar file: {error}") from error


def _split(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    stem, _, end = path.name.partition(".")
    return str(path.parent / stem), "." + end.lower()


def _sample(file: Path, tar: tarfile.TarFile, key: str, parts: dict[str, tarfile.TarInfo], columns: _Columns) -> Found:
    where = f"{file}: {key}"
    picture = next((member for end, member in parts.items() if end in PICTURES), None)
    told = next((end for end in (*_SIDECARS, ".json") if end in parts), None)
    if picture is None:
        if told:
            yield Skipped(where, "it has no picture")
        return
    if told is None:
        yield Skipped(where, "it has no .txt or .json")
        return
    opened = tar.extractfile(parts[told])
    assert opened is not None
    try:
        text: Any = opened.read().decode("utf-8-sig")
        if told == ".json":
            row = json.loads(text)
            text = row[columns.of(row, where)[0]]
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{where}{told}: {error}") from error
    yield Example(_text(text, where).strip(), Member(file, picture.name, picture.offset_data, picture.size))


# -- Hugging Face datasets --------------------------------------------------------------------------------------------


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("this folder was saved by `datasets`: pip install 'lcmlora[data]'") from error
    return datasets


def _saved(folder: Path) -> Any:
    try:
        return _datasets().load_from_disk(str(folder))
    except DataError:
        raise
    except Exception as error:  # datasets and pyarrow raise many kinds
        raise DataError(f"{folder} can't be read as a saved data set: {' '.join(str(error).split())}") from error


def _find_hf(source: Any, columns: _Columns) -> Found:
    datasets = _datasets()
    if isinstance(source, dict):  # a DatasetDict
        if "train" not in source and len(source) != 1:
            raise DataError(f"the data set has the splits {', '.join(map(repr, source))}: pass one of them.")
        source = source["train"] if "train" in source else next(iter(source.values()))
    if not source.features:  # a stream of which nothing is known beforehand
        yield from (_of_row(row, f"row {number}", columns) for number, row in enumerate(source))
        return
    text, image = columns.of(source.features, "the data set")
    is_encoded = image is not None and isinstance(source.features[image], datasets.Image)
    if image is not None and is_encoded:  # a tenth of the memory of decoded ones
        source = source.cast_column(image, datasets.Image(decode=False))
        if isinstance(source, datasets.Dataset):  # and these need not be in memory at all
            texts = source.select_columns([text])[:][text]
            yield from (Example(_text(t, f"row {n}"), Row(source, n, image)) for n, t in enumerate(texts))
            return
    for number, row in enumerate(source):
        where = f"row {number}"
        cell = row[image] if image else None
        if image is None:
            yield Example(_text(row[text], where))
        elif is_encoded:
            yield _streamed(_text(row[text], where), cell, where)
        else:
            yield _example(row[text], cell, where)


def _streamed(text: str, cell: Any, where: str) -> Example | Skipped:
    try:
        return Example(text, Encoded(encoded(cell), where))
    except (OSError, ValueError) as error:
        return Skipped(where, str(error))
