"""Other styles, or other weights of them, in a pipe that is accelerated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from . import adapters, merge, plan
from .errors import PipelineError
from .plan import LCM, Part, Style
from .records import Pipe, Undo, UnetRecord, change, lock, pipe_record_of, push_return, record_of, require_originals
from .sources import Given
from .unets import layers


def set_styles(pipe: Pipe, styles: Mapping[str, float | Given | Style]) -> Pipe:
    """Change the styles of an accelerated pipe: which there are, and how strongly they count. The LCM-LoRA stays.

    Merged weights are computed anew from the originals, so any number of changes leaves exactly what `accelerate` with
    these styles would have made, in the same memory (a compiled UNet needs no recompilation).

    Args:
        pipe: an accelerated pipe; its siblings that share the UNet change with it.
        styles: all the styles wanted. name -> a weight, for a style that is there (loaded before `accelerate`, or by
            lcmlora); name -> source or `Style`, for a new one. Styles that are not named are off.

    Returns:
        The same pipe.

    Raises:
        PipelineError: the pipe is not accelerated, its originals were not kept, or a name can't be used.
        LoraFileError, LoraMismatchError: as for `accelerate`. Nothing is changed then.
    """
    with lock:
        record = record_of(pipe)
        if record is None or pipe_record_of(pipe) is None:
            raise PipelineError("set_styles changes an accelerated pipe; lcmlora.accelerate(pipe, styles=...) first.")
        require_originals(record, "change styles")
        parts, weights = _restyled(pipe, record, styles)
        with Undo() as undo:
            for name, part in parts.items():
                old = record.parts.get(name)
                if old is not None and part.merged:
                    undo.push(merge.merge, layers(part.module), old.loras, record.weights, record.originals)
                elif old is not None:
                    undo.push(adapters.Adapters(part.module).restore)
                change(part, old.loras if old else {}, weights, record.originals, undo if old is None else Undo())
            before = record.parts
            for name in parts.keys() - before.keys():
                push_return(parts[name], record.originals, record.undo)
            undo.push(record.settle, before, record.weights)
            record.settle(parts, weights)
        for name, part in parts.items():
            if name in before and not part.merged:
                adapters.delete(part.module, set(before[name].loras) - set(part.loras))
    return pipe


def _restyled(
    pipe: Any, record: UnetRecord, styles: Mapping[str, float | Given | Style]
) -> tuple[dict[str, Part], dict[str, float]]:
    """The parts and weights that an accelerated pipe gets with these styles, all of it checked."""
    there = {name: lora for part in record.parts.values() for name, lora in part.loras.items() if name != LCM}
    weights = {LCM: record.weights[LCM]}
    files: dict[str, dict[str, merge.FileLora]] = {}
    for name, wanted in styles.items():
        if not hasattr(type(wanted), "__float__"):  # no number
            style = Style.of(wanted)  # type: ignore[arg-type]
            plan.check_style_name(name, set(there) | set(weights))
            for part_name, lora in plan.style_loras(pipe, name, style, record.request.hub).items():
                files.setdefault(part_name, {})[name] = lora
            weights[name] = style.weight
        elif name not in there:
            raise PipelineError(
                f"there is no style {name!r}; those that are there: {sorted(there)}. Give its source, or "
                "lcmlora.Style(source, weight)."
            )
        else:
            weights[name] = wanted  # type: ignore[assignment]
        plan.check_weight(f"style {name!r}", weights[name])
    parts = {}
    for part_name in {**record.parts, **files}:
        part = record.parts.get(part_name) or plan.part_for(pipe, part_name, record.fused, files.get(part_name))
        plan.check_mergeable(part, files.get(part_name))
        kept = {
            name: lora for name, lora in part.loras.items() if name in weights or not isinstance(lora, merge.FileLora)
        }
        parts[part_name] = dataclasses.replace(part, loras={**kept, **files.get(part_name, {})})
        for name, here in parts[part_name].loras.items():
            if part.merged and weights.get(name) and isinstance(here, merge.FileLora):
                here.check()  # before anything is changed: the way back from a failure reads files too
    return parts, weights
