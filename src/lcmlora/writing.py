"""Writing files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import DataError

PARTIAL = ".partial"


@contextmanager
def whole(file: Path, sync: bool = True) -> Iterator[Path]:
    """A path to write to. What is there at the end takes the file's place at once; nothing does after an error.

    Args:
        file: where it shall be; the folders that it lies in are made.
        sync: wait until the disk has it, so that it outlives a loss of power too.

    Raises:
        DataError: the disk is full, or can't be written to.
    """
    # nothing reads such files; processes in two containers may have one number
    partial = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        with _said(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            usual = partial.stat().st_mode
            yield partial
            partial.chmod(usual)  # safetensors lets nobody else read what it writes
            if sync:
                with partial.open("rb+") as written:
                    os.fsync(written.fileno())
            partial.replace(file)
    finally:
        with suppress(OSError):
            partial.unlink()


def write_text(file: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        DataError: the disk is full, or can't be written to.
    """
    with whole(file) as partial:
        partial.write_text(text, encoding="utf-8")


def in_the_making(partial: Path) -> bool:
    """Whether another process of this machine is writing this file, or has its number. Only POSIX systems say so."""
    pid = partial.name.rsplit(".", 2)[1].partition("-")[0]
    if os.name != "posix" or not pid.isdecimal() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)  # signal 0 is none: it only asks
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def append(file: Path, line: str) -> None:
    """Add a line to a text file.

    Raises:
        DataError: the disk is full, or can't be written to.
    """
    with _said(file), file.open("a", encoding="utf-8") as text:
        text.write(line + "\n")


@contextmanager
def _said(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if reason := _disk(error):
            raise DataError(f"{file} can't be written: {reason}.") from error
        raise


_FULL = ("no space left", "file write failed", "os error 28", "unexpected pos", "iostream error")


def _disk(error: Exception) -> str | None:
    """What the disk has against it; None where the error is another's. torch and safetensors hide the system's own."""
    if isinstance(error, OSError):
        return "the disk is full" if error.errno == errno.ENOSPC else str(error.strerror or error)
    words = str(error).lower()
    if any(said in words for said in _FULL):
        return "the disk is full"
    if "os error" in words or "enforce fail" in words:
        return str(error).splitlines()[0]
    return None


def require_writable(folder: Path) -> None:
    """See that files can be written to a folder. One that is not there is made, and taken away again.

    Raises:
        DataError: they can't.
    """
    new = list(itertools.takewhile(lambda one: not one.exists(), (folder, *folder.parents)))
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} can't be written to: it is a file, and a folder is expected.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(f"{folder} can't be written to: {_disk(error)}.") from error
    finally:
        with contextlib.suppress(OSError):  # not there, or used by another process already
            for one in new:
                one.rmdir()
