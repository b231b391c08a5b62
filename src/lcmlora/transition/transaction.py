"""Changing models and pipes, all or nothing. Each change knows its way back, and may be done twice."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .. import compat, compiling
from ..errors import LoraFileError
from ..layers import ModuleIndex
from ..lora import adapters
from ..lora.merge import FileLora, check_finite, contributions, merge, parameter_of
from ..lora.originals import Originals
from ..warn import warn
from .records import (
    AS_FOUND,
    LOST,
    UNKNOWN,
    Content,
    ModuleRecord,
    PipeRecord,
    Shell,
    module_record_of,
    pipe_record_of,
    put,
    sampled,
    watched,
)
from .snapshot import Component


class Undo:
    """The steps back, newest first. Each may run twice: an interruption can come before it is struck off."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []

    def push(self, step: Callable[..., Any], *args: Any) -> None:
        """Register a step *before* doing what it undoes: an interruption in between must not lose it."""
        self._steps.append(functools.partial(step, *args))

    def roll_back(self) -> None:
        """Go back as far as possible: a step that raises does not keep the others from running, and one that Ctrl-C
        stops is gone again.
        """
        failed: BaseException | None = None
        while self._steps:
            step = self._steps[-1]
            try:
                step()
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt) and failed is None:
                    failed = error
                    continue
                failed = failed or error
            self._steps.pop()
        if failed:
            raise failed

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None:
            self.roll_back()


def record_for(component: Component, undo: Undo) -> ModuleRecord:
    """The component's record; a new one is put on it."""
    if (known := module_record_of(component.module)) is not None:
        return known
    record = ModuleRecord.of(component.index, component.adapters)
    undo.push(_take_off, record)
    put(component.module, record)
    return record


def _take_off(record: ModuleRecord) -> None:
    if not record.spoiled:  # nobody shall go on with the rest
        put(record.module, None)


def change(record: ModuleRecord, component: Component, content: Content, keep: Any, undo: Undo) -> None:
    """Bring a component to a content.

    Args:
        record: the component's.
        component: as it is now.
        content: what shall be in it.
        keep: where its originals wait, if it is merged.
        undo: receives the way back.
    """
    old, originals = record.content, record.originals
    undo.push(_go_back, record, component, old, originals)
    if content.merged and keep is None:  # all that can be found before the first change: no way back from it
        used = {name for here in _added(component, content).values() for name in here}
        check_finite({name: lora for name, lora in content.loras.items() if name in used})
    if old is AS_FOUND:  # whatever its Parameters have become since, they are as found
        record.parameters = watched(component.index)
    record.content = UNKNOWN
    stays_merged = old.merged and content.merged and originals.keep == keep
    if old.merged and not stays_merged:
        originals.put_all_back()
    if content.merged:
        component.adapters.unwrap()
        if not stays_merged:
            record.originals = Originals(keep, component.sources)
        merge(component.index.layers, content.loras, content.weights, record.originals)
    elif content.touched:
        if old.merged:
            record.adapters.restore()
        _put_adapters(record, component, old, content)
    else:
        record.adapters.restore()
    if not content.merged:
        record.originals = Originals(None)
    settle(record, component, content)


def _added(component: Component, content: Content) -> Mapping[str, Mapping[str, float]]:
    return contributions(component.index.layers, content.loras, content.weights)


def _put_adapters(record: ModuleRecord, component: Component, old: Content, content: Content) -> None:
    """Have the content's LoRAs as PEFT adapters."""
    if set(content.weights) & record.adapters.names - component.adapters.names:  # deleted meanwhile
        record.adapters.restore()
    index = ModuleIndex.of(component.module)
    before = {} if old.merged else {n: x for n, x in old.loras.items() if isinstance(x, FileLora) and _in(index, n, x)}
    wanted = {name: lora for name, lora in content.loras.items() if isinstance(lora, FileLora)}
    adapters.delete(index, {name for name, lora in before.items() if wanted.get(name) != lora})
    for name, lora in wanted.items():
        if before.get(name) != lora:
            adapters.inject(component.module, name, lora)
    adapters.activate(ModuleIndex.of(component.module), content.loras, content.weights)


def _in(index: ModuleIndex, name: str, lora: FileLora) -> bool:
    """Whether a LoRA is still the adapter that it was made, in every layer."""
    return all(name in compat.adapters_in(index.wrappers[x]) for x in lora.layers if x in index.wrappers) and (
        lora.layers <= index.wrappers.keys()
    )


def settle(record: ModuleRecord, component: Component, content: Content) -> None:
    """The component holds this content now."""
    refresh_joint_projections(component)
    record.samples = sampled(record.parameters)
    record.content = content


def refresh_joint_projections(component: Component) -> None:
    """Copy q, k and v anew into what `fuse_qkv_projections` made of them."""
    for attention in component.index.joint_projections:
        parts: Any = attention
        for joint, halves in (("to_qkv", ("to_q", "to_k", "to_v")), ("to_kv", ("to_k", "to_v"))):
            if (target := getattr(parts, joint, None)) is not None:
                weights: list[torch.Tensor] = [parameter_of(compat.wrapped(getattr(parts, half))) for half in halves]
                torch.no_grad()(target.weight.copy_)(torch.cat(weights))


def _go_back(record: ModuleRecord, component: Component, old: Content, originals: Originals) -> None:
    """Undo `change`: the weights first, then PEFT's wrappers as they were around them."""
    if record.originals.lost and record.content is not old:
        record.spoiled = True
        put(record.module, record)
        component.adapters.restore()
        warn(LOST)
        return
    if record.originals is not originals:
        record.originals.put_all_back()
        record.originals = originals
    try:
        if old.merged:
            merge(component.index.layers, old.loras, old.weights, originals)
        else:
            originals.put_all_back()
    except LoraFileError:  # the files of what was there are gone: the originals are not
        originals.put_all_back()
        raise
    component.adapters.restore()
    settle(record, component, old)


def give_back(component: Component) -> None:
    """Bring a model back to what was found, and take the record off. It can be called again after an interruption."""
    record = component.record
    assert record is not None
    record.content = UNKNOWN
    record.originals.put_all_back()
    for module in record.compiled:
        compat.forget_compilation(module)
    record.adapters.restore(component.index)
    refresh_joint_projections(component)
    record.originals.forget()
    put(record.module, None)


def compile_as(record: ModuleRecord, how: compiling.Compile, undo: Undo) -> None:
    """Compile the module as asked, and give up what lcmlora compiled otherwise."""
    regions = compiling.regions(record.module, how)
    mine = record.compiled
    new = [module for module in regions if not compat.is_compiled(module)]  # the user's own stay as they are
    gone = [module for module in mine if module not in regions]
    undo.push(setattr, record, "compiled", mine)
    for module in gone:
        undo.push(module.compile)
        compat.forget_compilation(module)
    for module in new:
        undo.push(compat.forget_compilation, module)
        module.compile()
    record.compiled = [module for module in mine if module not in gone] + new


def dress(pipe: Any, record: PipeRecord, undo: Undo) -> None:
    """Give a pipe its scheduler, VAE, class and record."""
    undo.push(put, pipe, pipe_record_of(pipe))
    undo.push(_be, pipe, Shell.of(pipe))
    _be(pipe, record.made)
    put(pipe, record)


def _be(pipe: Any, shell: Shell) -> None:
    if pipe.scheduler is not shell.scheduler:
        pipe.scheduler = shell.scheduler
    if getattr(pipe, "vae", None) is not shell.vae:
        pipe.vae = shell.vae
    if type(pipe) is not shell.cls:
        pipe.__class__ = shell.cls
    if getattr(pipe, compat.FUSED, None) != shell.fused:  # somebody fused LoRAs of which nothing is left
        setattr(pipe, compat.FUSED, shell.fused)


def dress_again(pipe: Any, made: Shell, here: Shell) -> None:
    """Have a pipe's very scheduler and VAE again, after it was something else for a while."""
    if (record := pipe_record_of(pipe)) is not None:
        record.made = made
        _be(pipe, here)


def undress(pipe: Any, record: PipeRecord) -> None:
    """Give a pipe back what it was apart from its models. Doing it twice does no harm."""
    own = record.made.vae is record.found.vae  # then the VAE is none of ours
    _be(pipe, dataclasses.replace(record.found, vae=getattr(pipe, "vae", None)) if own else record.found)
    put(pipe, None)
