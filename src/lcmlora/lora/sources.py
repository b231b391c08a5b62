"""Where a LoRA comes from, finding it, and opening it: the one place where LoRA files are read.

The first bytes tell what a file is, not its name. A file that was found is remembered as it was: opened later and
gone or changed, it is an error.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..compat import version_of
from ..errors import LoraFileError

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
"""diffusers' usual name of a LoRA file."""

Given = str | os.PathLike[str] | Mapping[str, torch.Tensor]
"""What a LoRA can be given as: a file, a folder, a repository of the hub, or a dict of tensors."""

READ_ERRORS = (SafetensorError, OSError, ValueError, RuntimeError, TypeError)
"""What reading a damaged or vanished file can raise."""

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""The id of a repository of the hub."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclasses.dataclass(frozen=True)
class HubOptions:
    """How the hub is asked, whatever it is asked for; as in `huggingface_hub.hf_hub_download`.

    Raises:
        LoraFileError: `cache_dir` is no path.
    """

    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = dataclasses.field(default=None, repr=False)
    local_files_only: bool = False

    def __post_init__(self) -> None:
        if self.cache_dir is not None:
            object.__setattr__(self, "cache_dir", _absolute(_text("cache_dir", self.cache_dir)))


_NO_OPTIONS = HubOptions()


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a LoRA comes from. Two spellings of one place are equal, a dict of tensors only to itself.

    Attributes:
        where: an absolute path, a repository id, tensors, or None for the base's own LCM-LoRA.
        weight_name: the file's name in a folder or repository; None is diffusers' usual one.
        subfolder: the folder inside that folder or repository.
        revision: the repository's branch, tag or commit.
    """

    where: str | Tensors | None
    weight_name: str | None = None
    subfolder: str | None = None
    revision: str | None = None

    @classmethod
    def of(
        cls,
        given: Given | None,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
    ) -> Source:
        """What a caller gave, checked and made independent of the working folder.

        Raises:
            LoraFileError: it is nothing that a LoRA can be given as.
        """
        names = {"weight_name": weight_name, "subfolder": subfolder, "revision": revision}
        checked = {key: _text(key, value) or None for key, value in names.items() if value is not None}
        if isinstance(given, Mapping):
            return cls(Tensors(given), **checked)
        path = os.fspath(given) if isinstance(given, os.PathLike) else given
        if path is not None and (not isinstance(path, str) or not path):
            raise not_a_source(given)
        return cls(_place(path) if path else None, **checked)

    def find(self, hub: HubOptions = _NO_OPTIONS) -> LoraFile:
        """The file, or the right file of a folder, or one fetched from (or cached of) the hub.

        Raises:
            LoraFileError: it is nowhere, or no safetensors file; the message says where was looked.
        """
        if isinstance(self.where, Tensors):
            return LoraFile(repr(self.where), None, tensors=self.where)
        assert self.where is not None, "the base's own, which only the base knows"
        if os.path.isfile(self.where):
            return LoraFile.at(self.where, self.where)
        if os.path.isdir(self.where):
            return LoraFile.at(_file_in(Path(self.where, self.subfolder or ""), self.weight_name), self.where)
        if not REPOSITORY.fullmatch(self.where):
            raise LoraFileError(
                f"LoRA {self.where!r} is no file, no folder and no repository id like 'owner/name'."
                + _if_number(os.path.basename(self.where))
            )
        return LoraFile.at(self._download(hub), self.where)

    def _download(self, hub: HubOptions) -> str:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.constants import HF_HUB_CACHE

        repository, name = str(self.where), self.weight_name or WEIGHT_NAME
        options: dict[str, Any] = {"subfolder": self.subfolder, "revision": self.revision, **vars(hub)}
        try:
            return str(hf_hub_download(repository, name, **options))
        except Exception as error:  # the hub raises many kinds, none of them tells what to type
            name = f"{self.subfolder}/{name}" if self.subfolder else name
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise LoraFileError(
                f"LoRA {repository}/{name} was not found: there is no such file or folder here, it is not in the "
                f"hub's cache ({hub.cache_dir or HF_HUB_CACHE}), and the hub client says: {reason} Once online, type: "
                f"hf download {repository} {name}{f' --revision {self.revision}' if self.revision else ''}; "
                "or give a local file."
            ) from error


def not_a_source(given: Any) -> LoraFileError:
    """The error to raise for what no LoRA can be given as."""
    return LoraFileError(
        f"{_short(given)} is no LoRA source: give a file, a folder, a repository id like 'owner/name' or a dict of "
        "tensors; with a weight, type lcmlora.Style(source, weight)."
    )


def _if_number(name: str) -> str:
    try:
        float(name)
    except ValueError:
        return ""
    return f" Is the number {name} meant, a weight? Then type it without quotes."


def _text(what: str, value: Any) -> str:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise LoraFileError(f"{what}={_short(value)}: a string is expected. A weight: lcmlora.Style(source, weight).")
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"


def _absolute(path: str) -> str:
    try:
        return os.path.abspath(os.path.expanduser(path))
    except OSError as error:
        raise LoraFileError(
            f"{path!r} is relative to a working folder that is gone: give an absolute path."
        ) from error


def _place(path: str) -> str:
    """A repository id as it is, anything else as an absolute path. What exists here is a path."""
    is_id = REPOSITORY.fullmatch(path) and not path.endswith(".safetensors") and not path.startswith((".", "~"))
    return path if is_id and not os.path.exists(path) else _absolute(path)


def _file_in(folder: Path, weight_name: str | None) -> Path:
    wanted = folder / (weight_name or WEIGHT_NAME)
    if wanted.is_file():
        return wanted
    there = sorted(p.name for p in folder.glob("*.safetensors"))
    if weight_name is None and len(there) == 1:
        return folder / there[0]
    nested = sorted(p.parent.name for p in folder.glob("*/*.safetensors"))
    raise LoraFileError(
        f"folder {folder} holds no {wanted.name}; its safetensors files: {there or 'none'}. Pass weight_name="
        + (f" or subfolder= (such as {nested[0]!r})." if nested else ".")
    )


class _Slice(NamedTuple):
    shape: tuple[int, ...]
    dtype: str

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype


class Tensors:
    """A dict of tensors, read as `safe_open` reads a file. Equal by the dict's identity.

    Raises:
        LoraFileError: a key is no string, or a value no tensor with values.
    """

    def __init__(self, given: Mapping[str, torch.Tensor]) -> None:
        self._given = given
        self._tensors = dict(given)
        for key, tensor in self._tensors.items():
            if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
                raise LoraFileError(
                    f"a dict given as a LoRA maps names to tensors, not {_short(key)} to {type(tensor).__name__}."
                )
            if tensor.is_meta or tensor.layout != torch.strided:
                raise LoraFileError(f"{self!r}: {key} has no values of its own (on the meta device, or sparse).")
        self._versions = self._written()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tensors) or other._given is not self._given:
            return False
        mine, theirs = self._tensors, other._tensors
        same = mine.keys() == theirs.keys() and all(mine[key] is theirs[key] for key in mine)
        return same and self._versions == other._versions

    def __hash__(self) -> int:
        return id(self._given)

    def __repr__(self) -> str:
        return f"a dict of {len(self._tensors)} tensors"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensors:
        """For a deep copy of a pipe: the same dict."""
        return self

    def _written(self) -> list[int]:
        """How often each tensor was written to."""
        return [version_of(tensor) for tensor in self._tensors.values()]

    def changed(self) -> bool:
        """Whether a tensor was written to since."""
        return self._written() != self._versions

    def keys(self) -> list[str]:
        """As of `safe_open`."""
        return list(self._tensors)

    def metadata(self) -> None:
        """As of `safe_open`; a dict has none."""

    def get_slice(self, key: str) -> _Slice:
        """As of `safe_open`: shape and type."""
        tensor = self._tensors[key]
        return _Slice(tuple(tensor.shape), "F32" if tensor.is_floating_point() else str(tensor.dtype))

    def get_tensor(self, key: str) -> torch.Tensor:
        """As of `safe_open`: in host memory."""
        return self._tensors[key].detach().to("cpu")


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """A LoRA that was found, as it was then.

    Attributes:
        given: what it was found for.
        path: the file's absolute path; None for tensors.
        stamp: its real path, size and time of change.
        tensors: the dict, where it is no file.
    """

    given: str
    path: Path | None
    stamp: tuple[str, int, int] | None = None
    tensors: Tensors | None = None

    @classmethod
    def at(cls, path: str | Path, given: str) -> LoraFile:
        """The file there.

        Raises:
            LoraFileError: it can't be read, or its first bytes are those of something else.
        """
        path = Path(os.path.abspath(path))
        try:
            stamp = _stamp(path)
            with path.open("rb") as file:
                head = file.read(512)
        except OSError as error:
            raise LoraFileError(f"{path} can't be read: {error.strerror or error}.") from error
        if odd := _not_safetensors(path, head, stamp[1]):
            raise LoraFileError(f"{path} {odd}")
        return cls(given, path, stamp)

    @property
    def label(self) -> str:
        """Its path, or what it is."""
        return self.given if self.path is None else str(self.path)

    def check(self) -> None:
        """Whether it still is what was found.

        Raises:
            LoraFileError: it is gone, or was written to.
        """
        again = "give the source again, as lcmlora.Style(source, weight)"
        if self.path is None:
            if self.tensors is not None and self.tensors.changed():
                raise LoraFileError(f"{self.label} given as a LoRA was written to since it was read: {again}.")
            return
        whose = "" if self.given == self.label else f" (of {self.given})"
        try:
            now = _stamp(self.path)
        except OSError as error:
            raise LoraFileError(
                f"{self.path}{whose} is gone since it was read (deleted or moved): put it back, or {again}."
            ) from error
        if now != self.stamp:
            raise LoraFileError(f"{self.path}{whose} was changed since it was read: to take the new content, {again}.")

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """What `safe_open` gives, or the same of a dict.

        Raises:
            LoraFileError: it is gone, was written to, or can't be read.
        """
        self.check()
        with ExitStack() as stack:
            if self.tensors is not None:
                yield self.tensors
                return
            try:
                file = stack.enter_context(safe_open(self.path, "pt"))
            except READ_ERRORS as error:
                raise self.unreadable(error) from error
            yield file

    def unreadable(self, error: Exception) -> LoraFileError:
        """The error to raise for what reading it raised."""
        return LoraFileError(f"{self.label} can't be read as safetensors (truncated or corrupt?): {error}")


def _stamp(path: Path) -> tuple[str, int, int]:
    stat = os.stat(path)
    return os.path.realpath(path), stat.st_size, stat.st_mtime_ns


_MAGIC = {
    b"\x1f\x8b": "is compressed with gzip: unpack it first.",
    b"BZh": "is compressed with bzip2: unpack it first.",
    b"\xfd7zXZ": "is compressed with xz: unpack it first.",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: unpack it first.",
    b"7z\xbc\xaf": "is a 7z archive: unpack it first.",
    b"Rar!": "is a RAR archive: unpack it first.",
    b"GGUF": "is a GGUF file; LoRAs are read from safetensors files.",
    b"\x89PNG": "is a PNG picture, no LoRA.",
    b"\xff\xd8\xff": "is a JPEG picture, no LoRA.",
    b"\x89HDF": "is an HDF5 file; LoRAs are read from safetensors files.",
}
_PICKLE = "is a pickle, no safetensors file; pickled weights can run code when loaded and are refused."
_DOWNLOAD = "download the file itself"


def _not_safetensors(path: Path, head: bytes, size: int) -> str | None:
    """What a file is, told from its first bytes, with what to do; None where it may be safetensors.

    That format begins with the length of its header, eight bytes, and the header itself with a brace.
    """
    if int.from_bytes(head[:8], "little") <= size - 8 and head[8:9] == b"{":
        return None
    if not size:
        return f"is empty: its download was interrupted, perhaps; {_DOWNLOAD} again."
    if head.startswith(b"PK"):
        return _PICKLE if b".pkl" in head else "is a zip archive, no safetensors file: unpack it first."
    if (head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5" and any(head[2:8])) or path.suffix.lower() in _PICKLES:
        return _PICKLE
    if words := next((words for magic, words in _MAGIC.items() if head.startswith(magic)), None):
        return words
    return _text_file(head)


def _text_file(head: bytes) -> str | None:
    text = head.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n")
    if not text or not all(letter.isprintable() or letter in "\t\r\n" for letter in text):
        return None
    low = text.lower()
    if low.startswith("version https://git-lfs"):
        return f"is a Git LFS pointer, which only names the file: run `git lfs pull` there, or {_DOWNLOAD}."
    if low.startswith("<") and ("<html" in low or "<!doctype html" in low):
        return f"is an HTML page (of a login or an error, perhaps), no LoRA: {_DOWNLOAD}."
    kind = "an XML document" if low.startswith("<") else "JSON" if low.startswith(("{", "[")) else "a text file"
    return f"is {kind}, no LoRA ({_short(text.splitlines()[0])}): {_DOWNLOAD}."
