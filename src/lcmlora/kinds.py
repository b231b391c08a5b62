"""A pipeline for something else, of the same parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image

from .acceleration import accelerate
from .errors import PipelineError
from .transition.records import pipe_record_of

KINDS: Mapping[str, Any] = {
    "text2img": AutoPipelineForText2Image,
    "img2img": AutoPipelineForImage2Image,
    "inpaint": AutoPipelineForInpainting,
}
"""What a pipeline may be for, and who makes one of another."""


def check_kind(kind: Any) -> None:
    """Refuse what no pipeline is for.

    Raises:
        PipelineError: there is no such kind.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise PipelineError(f"kind={kind!r}: one of {', '.join(KINDS)} is expected.")


def as_kind(pipe: Any, kind: str, **parts: Any) -> Any:
    """A pipeline for something else, of the same parts where no others are given; a baked one's has its defaults.

    Raises:
        PipelineError: there is no such kind, or no pipeline of it for these parts.
    """
    check_kind(kind)
    try:
        made = KINDS[kind].from_pipe(pipe, **parts)
    except (ValueError, AttributeError, TypeError) as error:
        raise PipelineError(f"there is no {kind} pipeline for a {type(pipe).__name__}: {error}") from error
    record = pipe_record_of(pipe)
    return accelerate(made) if record is not None and record.baked and "unet" not in parts else made
