"""Whether a model and a pipe still are what lcmlora left: before the way back, and before each call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .. import compat
from ..errors import PipelineError
from ..layers import INSIDE
from ..lora.adapters import unit_scale
from ..lora.merge import FileLora, Lora, Weight, parameter_of
from ..warn import warn
from .records import AS_FOUND, LOST, UNKNOWN, ModuleRecord, PipeRecord, baked_of, module_record_of, parameters_of
from .snapshot import Component, not_in_memory

_PROBES = 6


@dataclasses.dataclass(frozen=True)
class Findings:
    """What somebody else did to a model since lcmlora changed it.

    Attributes:
        why_not: why there is no way back at present, and what to call first; None where there is one.
        moved: layers that have another Parameter with the same values.
        undone: layers whose weights were changed, and whose originals are kept.
        inexact: layers that were changed and can't be brought back.
    """

    why_not: str | None = None
    moved: tuple[str, ...] = ()
    undone: tuple[str, ...] = ()
    inexact: tuple[str, ...] = ()


def examine(component: Component) -> Findings:
    """Compare a changed model with what its record says."""
    record = component.record
    assert record is not None
    if record.spoiled:
        return Findings(LOST)
    if record.content is AS_FOUND:  # nothing was changed, but somebody may have fused a LoRA of their own
        return Findings(inexact=tuple(sorted(component.adapters.merged)))
    if not_in_memory(component):
        return Findings(
            f"the weights of this pipe's {component.name} were off-loaded since (they are on the meta device or on "
            "disk): call pipe.remove_all_hooks(), or switch the off-loading off, first."
        )
    unreadable = record.originals.unreadable()
    gone = [name for name, parameter in record.parameters.items() if id(parameter) in unreadable]
    here = parameters_of(component.index)
    moved, lost, real = [], [], {}
    for name, old in record.parameters.items():
        now = here.get(name)
        if now is None or type(now) is not type(old) or now.shape != old.shape:
            lost.append(name)
            continue
        real[name] = now
        if now is not old:
            moved.append(name)
    changed: set[str] = set()
    if not gone and record.content is not UNKNOWN:
        changed = record.changed(real) | (component.adapters.merged & real.keys())
    ours = _touched(record)
    if not gone and not ours & changed.union(lost):  # what lcmlora did not change is the user's own to change
        return Findings(moved=tuple(name for name in moved if name not in changed))
    replaced = changed.intersection(moved)
    undone = {n for n in changed - replaced if record.originals.holds(record.parameters[n])}
    return Findings(
        _without_originals(gone, next(iter(unreadable.values()), "")),
        moved=tuple(name for name in moved if name not in replaced),
        undone=tuple(sorted(undone)),
        inexact=tuple(sorted((changed - undone) | (ours & set(lost)) | set(gone))),
    )


def _without_originals(layers: list[str], why: str) -> str | None:
    if not layers:
        return None
    return (
        f"{why}, and the originals of {_some(layers)} were there alone. Load the pipe anew with from_pretrained; "
        "lcmlora.restore(pipe, force=True) gives back what is left."
    )


def _touched(record: ModuleRecord) -> set[str]:
    """The layers whose weights lcmlora changed, or put adapters around."""
    kept = {name for name, parameter in record.parameters.items() if record.originals.holds(parameter)}
    return kept or kept.union(*(lora.layers for lora in record.content.loras.values()))


def require_way_back(component: Component, purpose: str, force: bool = False) -> tuple[Findings, str | None]:
    """Refuse where a model can't be brought back exactly.

    Args:
        component: a changed model as it is now.
        purpose: what is to be done, in words.
        force: go on where the way back is not exact.

    Returns:
        What was found and, with `force`, what can't be given back, in words.

    Raises:
        PipelineError: there is no way back, or not an exact one.
    """
    found, record = examine(component), component.record
    assert record is not None
    if found.why_not and not (force and not record.spoiled):
        raise PipelineError(f"lcmlora can't {purpose}: {found.why_not}")
    left = found.why_not or _in_words(component, found)
    if left and not force:
        first = (
            "Call pipe.unfuse_lora() first. If the weights still differ then, " if component.adapters.merged else ""
        )
        raise PipelineError(
            f"lcmlora can't {purpose} exactly: {left} {first}lcmlora.restore(pipe, force=True) gives back what it can."
        )
    return found, left


def drifted(component: Component) -> bool:
    """Whether other LoRAs count in a changed model than those that were left there, or others do so beside them."""
    record = component.record
    assert record is not None
    content = record.content
    if content.merged:
        found = examine(component)
        return bool(component.adapters.active or found.why_not or found.moved or found.undone or found.inexact)
    left = _counting(record.adapters.loras, dict.fromkeys(record.adapters.loras))
    if content.touched:
        left = _counting(content.loras, content.weights)
    now = _counting(component.adapters.loras, dict.fromkeys(component.adapters.loras))
    return left.keys() != now.keys() or any(abs(now[place] - weight) > 1e-6 for place, weight in left.items())


def _counting(loras: Mapping[str, Lora], weights: Mapping[str, Weight]) -> dict[tuple[str, str], float]:
    """What each LoRA counts with in each layer where it does."""
    counting = {}
    for name, weight in weights.items():
        for layer in loras[name].found.keys() | loras[name].layers:
            if value := loras[name].found.get(layer, 0.0) if weight is None else weight:
                counting[name, layer.partition(INSIDE)[0]] = value
    return counting


def check_as_left(component: Component, purpose: str) -> None:
    """Refuse a changed model that is not as lcmlora left it.

    Raises:
        PipelineError: with what to call.
    """
    if component.record is not None and component.record.content.touched and drifted(component):
        raise PipelineError(
            f"lcmlora can't {purpose}: the LoRAs in the {component.name} are not those that lcmlora left there "
            "(set_adapters, load_lora_weights, load_state_dict, off-loading, ...). lcmlora.set_styles(pipe, styles) "
            "says what shall be in it."
        )


def check_way_back(component: Component, purpose: str, force: bool = False) -> str | None:
    """The same just before the change: warns where somebody's change is undone, and takes note of new Parameters."""
    found, left = require_way_back(component, purpose, force)
    record, here = component.record, parameters_of(component.index)
    assert record is not None
    for name in found.moved:
        record.originals.rebind(record.parameters[name], here[name])
        record.parameters[name] = here[name]
    if ours := [name for name in found.moved if record.originals.holds(here[name])]:
        warn(
            f"{_some(ours)} of the {component.name} have other Parameter objects than accelerate found: their "
            "values come back, the objects don't."
        )
    if found.undone:
        warn(
            f"the weights of {_some(found.undone)} of the {component.name} were changed while the pipe was "
            "accelerated (fuse_lora, load_state_dict, ...): that change is undone now."
        )
    record.originals.leave_out(record.parameters[name] for name in found.inexact)
    return left


def _in_words(component: Component, found: Findings) -> str | None:
    if not found.inexact:
        return None
    also = f" ({len(found.undone)} others can be given back)" if found.undone else ""
    return (
        f"the weights of {_some(found.inexact)} of the {component.name} were changed or replaced since accelerate "
        f"(fuse_lora, load_state_dict, quantising, ...), and their originals were not kept{also}."
    )


def _some(names: Iterable[str]) -> str:
    all_names = list(names)
    return f"{len(all_names)} layer{'s' * (len(all_names) > 1)} (such as {all_names[0]})"


def warn_of_lost_adapters(component: Component) -> None:
    """Tell what the way back does to adapters that somebody loaded or deleted in the meantime."""
    record = component.record
    assert record is not None
    if record.content is UNKNOWN:  # a way back was interrupted: what is there is ours
        return
    found, now, loras = record.adapters.names, component.adapters.names, record.content.loras
    absorbed = {n for n in loras if n not in found and not isinstance(loras[n], FileLora)}
    if late := absorbed | component.late.keys():
        warn(
            f"restore removes {sorted(late)}, loaded while the pipe was accelerated. set_styles, or loading before "
            "accelerate, keeps LoRAs."
        )
    if not record.content.merged and (deleted := found - now):
        warn(f"restore brings back {sorted(deleted)}, deleted while the pipe was accelerated.")


def why_not_fast(pipe: Any, record: PipeRecord) -> str | None:
    """What keeps the LCM-LoRA from working in a call, in words; None where nothing does. Cheap: a few layers."""
    if record.baked is not None and baked_of(pipe) is None:
        return "pipe.unet is not the one that was baked, and nothing says that the LCM-LoRA is in it"
    for name, module in record.modules.items():
        if name != "unet" and not module.content.touched:
            continue
        if compat.uncompiled(getattr(pipe, name, None)) is not module.module:
            return f"pipe.{name} is not the one that was accelerated: lcmlora.accelerate(pipe) accelerates the new one"
        if module_record_of(module.module) is not module:
            return f"the {name} was restored through another pipe: lcmlora.accelerate(pipe) accelerates it again"
    if not isinstance(pipe.scheduler, type(record.made.scheduler)):
        return (
            f"pipe.scheduler is {type(pipe.scheduler).__name__}, not {type(record.made.scheduler).__name__}: "
            "lcmlora.accelerate(pipe) puts it back"
        )
    applied, driven = record.unet.applied if record.modules else None, record.settings.policy.recipe.name
    if applied is not None and applied.recipe.name != driven:
        return (
            f"the UNet was given recipe {applied.recipe.name!r} through another pipe, and this one is driven for "
            f"{driven!r}: lcmlora.accelerate(pipe) follows"
        )
    return why_lora_is_off(record.unet) if record.modules else None


def why_lora_is_off(unet: ModuleRecord) -> str | None:
    """What keeps the LCM-LoRA from working in a UNet, in words; None where nothing does."""
    applied, content = unet.applied, unet.content
    if why := unet.originals.why_cut():  # the UNet may be mapped from it, and must not be looked at then
        return f"{why}: load the pipe anew with from_pretrained"
    if content is UNKNOWN:
        return "a change of its LoRAs was stopped in the middle: lcmlora.accelerate(pipe) finishes it"
    if applied is None or not applied.weight:
        return None
    layers = list(applied.lcm.pairs)
    paths = {layer: compat.path_to(unet.module, layer) for layer in layers[:: max(1, len(layers) // _PROBES)]}
    if not all(paths.values()):
        return "layers of the UNet were replaced since accelerate"
    if any(compat.is_on_disk(part) for path in paths.values() for part in path):
        return None  # the memory says nothing
    if not content.merged:
        return _why_adapter_is_off(applied.target.adapter_name, applied.weight, paths)
    if unet.changed({layer: parameter_of(compat.wrapped(path[-1])) for layer, path in paths.items()}):
        return "weights were changed since accelerate (load_state_dict, fuse_lora, ...), so the LCM-LoRA may be gone"
    return None


def _why_adapter_is_off(name: str, weight: float, paths: dict[str, list[nn.Module]]) -> str | None:
    for *_, attention, module in paths.values():
        tuner: Any = module
        if name not in getattr(tuner, "scaling", ()) or name not in tuner.active_adapters or tuner.disable_adapters:
            return (
                "the LCM-LoRA is not active (another adapter was loaded or set, or it was deleted): "
                "lcmlora.accelerate(pipe) puts it back"
            )
        if abs(tuner.scaling[name] - weight * unit_scale(tuner, name)) > 1e-6 * abs(weight):
            return f"the LCM-LoRA does not count with {weight:g} any more: lcmlora.accelerate(pipe) sets it again"
        if compat.uses_fused_projections(attention):
            return "fuse_qkv_projections() goes past PEFT adapters: lcmlora.accelerate(pipe, fuse=True) merges them"
    return None
