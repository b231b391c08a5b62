"""Everything lcmlora raises or warns with.

    LcmLoraError
     ├─ PipelineError      this pipeline, or its present state, can't be accelerated (or restored) as asked
     ├─ BaseModelError     the base is unknown, unsupported, or not the one that was named
     ├─ LoraFileError      the LoRA can't be found, or is not a LoRA file that can be read safely
     ├─ LoraMismatchError  the LoRA is a good file, but made for another UNet
     ├─ CallError          steps, guidance, a weight or another argument of a call that can't work
     └─ DataError          pictures, texts, settings or files that can't be read, trained on or written

    LcmLoraWarning         something works, but not as the caller may expect

Each refusal comes before anything was changed.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from typing import Any


class LcmLoraError(Exception):
    """The root: `except LcmLoraError` catches every refusal of this library."""


class PipelineError(LcmLoraError):
    """This pipeline, or the state it is in, can't be accelerated or restored as asked."""


class BaseModelError(LcmLoraError):
    """The pipe's base is unknown or unsupported, or is not the base that was named."""


class LoraFileError(LcmLoraError):
    """The LoRA can't be found, or is not a LoRA file that can be read safely."""


class LoraMismatchError(LcmLoraError):
    """The LoRA file is fine, but was made for another UNet than the pipe's."""


class CallError(LcmLoraError, ValueError):
    """Steps, guidance, a weight or another argument of a call that can't work."""


class DataError(LcmLoraError):
    """Pictures, texts or settings that can't be read, trained on or written."""


def brief(value: Any) -> str:
    """A value as a sentence can name it: a module's own repr has hundreds of lines."""
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"


def near_match(name: str, known: Iterable[str]) -> str:
    """The known name that a misspelt one may stand for, or ""."""
    return (difflib.get_close_matches(name, known, 1) or [""])[0]


def how_to_load(thing: Any) -> str:
    """What to type where the name of a model was given in a pipe's place; "" for everything else."""
    named = isinstance(thing, str | os.PathLike)
    return f": lcmlora.load({os.fspath(thing)!r}) makes a pipe of a folder, file or repository" if named else ""


class LcmLoraWarning(UserWarning):
    """Something works, but not as the caller may expect."""
