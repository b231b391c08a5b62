"""What was done to a model and to each pipe around it, kept on the model and on the pipe."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .. import compat
from ..errors import PipelineError
from ..layers import ModuleIndex
from ..lora.adapters import Adapters
from ..lora.merge import Lora, Weight
from ..lora.originals import Originals

if TYPE_CHECKING:
    from ..base import Base
    from ..lora.merge import FileLora
    from ..lora.sources import LoraFile
    from ..prompts import PromptCache
    from ..recipe import Recipe
    from .target import PipeSettings, Target

RECORD = "_lcmlora"  # the attribute that holds our record, on each changed model and on each accelerated pipe
_SAMPLES = 8
_FEW = 8
LOST = (
    "an accelerate(keep=None) was stopped in the middle: some of the UNet's weights are merged and some are not, and "
    "with keep=None no originals were kept. Load the pipe anew with from_pretrained."
)
lock = threading.RLock()
"""Held for the length of a transition: accelerate, set_styles and restore take turns."""


@dataclasses.dataclass(frozen=True)
class Content:
    """What is in a model.

    Attributes:
        loras: every LoRA that may count, by name.
        weights: those that count, and how strongly; None is as found.
        merged: whether they are merged into the weights, or stay PEFT adapters.
        touched: whether anything differs from what was found.
    """

    loras: Mapping[str, Lora] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, Weight] = dataclasses.field(default_factory=dict)
    merged: bool = False
    touched: bool = True


AS_FOUND = Content(touched=False)
UNKNOWN = Content()
"""In the middle of a change."""


class Gate:
    """Calls of a model may run side by side; who changes it waits for them, and they for it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._callers: list[int] = []
        self._owner: tuple[int, int] | None = None  # thread, depth

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Use the model as it is."""
        me = threading.get_ident()
        with self._condition:
            self._condition.wait_for(lambda: self._owner is None or self._owner[0] == me)
            self._callers.append(me)
        try:
            yield
        finally:
            with self._condition:
                self._callers.remove(me)
                self._condition.notify_all()

    def is_called_here(self) -> bool:
        """Whether this thread is in a call of the model."""
        return threading.get_ident() in self._callers

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Have the model alone.

        Raises:
            PipelineError: this thread is in a call itself, and others are too: they would wait for each other.
        """
        me = threading.get_ident()
        with self._condition:
            if me in self._callers and any(caller != me for caller in self._callers):
                raise PipelineError(
                    "the pipe can't be changed from inside a call while another thread draws with the same UNet: "
                    "change it between calls, or use lcmlora.styled(pipe, styles)."
                )
            self._condition.wait_for(lambda: self._is_free_for(me))
            depth = self._owner[1] if self._owner else 0
            self._owner = (me, depth + 1)
        try:
            yield
        finally:
            with self._condition:
                self._owner = (me, depth) if depth else None
                self._condition.notify_all()

    def _is_free_for(self, me: int) -> bool:
        others = any(caller != me for caller in self._callers)
        return not others and (self._owner is None or self._owner[0] == me)

    def __deepcopy__(self, memo: dict[int, Any]) -> Gate:
        return Gate()


class _Unpicklable:
    """A record is about objects of this process."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        first = "" if getattr(self, "baked", None) else "lcmlora.restore(pipe) first, or "
        raise PipelineError(
            f"an accelerated pipe can't be pickled (torch.save, multiprocessing): {first}"
            "lcmlora.bake(pipe, folder) and load the folder there."
        )


@dataclasses.dataclass(eq=False)
class ModuleRecord(_Unpicklable):
    """What was done to one model, through whichever pipes.

    Attributes:
        module: the model.
        adapters: what PEFT had in it before.
        parameters: the weight of each layer as an object, at the first change, and every other Parameter.
        originals: the weights that merging changed.
        content: what is in it now.
        samples: a few values of each weight, as the last change left them.
        pipes: those that rely on it; the last one restored gives the weights back.
        applied: what the UNet was made to be. None on a text encoder.
        compiled: the modules that lcmlora compiled.
        gate: calls and changes wait for each other there.
        spoiled: whether a change was stopped in the middle with no way back.
    """

    module: nn.Module
    adapters: Adapters
    parameters: dict[str, nn.Parameter]
    originals: Originals
    content: Content = AS_FOUND
    samples: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    pipes: weakref.WeakSet[Any] = dataclasses.field(default_factory=weakref.WeakSet)
    applied: Applied | None = None
    compiled: list[nn.Module] = dataclasses.field(default_factory=list)
    gate: Gate = dataclasses.field(default_factory=Gate)
    spoiled: bool = False

    @staticmethod
    def of(index: ModuleIndex, adapters: Adapters) -> ModuleRecord:
        """The record of a model that was not changed yet."""
        parameters = watched(index)
        record = ModuleRecord(index.module, adapters, parameters, Originals(None))
        record.samples = sampled(parameters)
        return record

    def is_for_none_but(self, pipe: Any) -> bool:
        """Whether this record still stands on its model, and no other pipe relies on it."""
        return module_record_of(self.module) is self and not any(other is not pipe for other in self.pipes)

    def changed(self, parameters: Mapping[str, nn.Parameter]) -> set[str]:
        """Those whose sampled values are not what was left there. A cast of the whole model is no change."""
        now = views({name: parameters[name] for name in self.samples.keys() & parameters.keys()})
        if not now:
            return set()
        left = {name: self.samples[name].to(view.device, view.dtype) for name, view in now.items()}
        if len({(view.device, view.dtype) for view in now.values()}) == 1 and torch.equal(
            torch.cat(list(now.values())), torch.cat(list(left.values()))
        ):
            return set()
        return {name for name, view in now.items() if not torch.equal(view, left[name])}

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleRecord:
        fields = [field.name for field in dataclasses.fields(self) if field.name != "pipes"]
        twin = object.__new__(ModuleRecord)
        memo[id(self)] = twin
        twin.__dict__.update({name: deepcopy(getattr(self, name), memo) for name in fields}, pipes=weakref.WeakSet())
        return twin


@dataclasses.dataclass(frozen=True)
class Applied:
    """What a UNet was made to be, resolved.

    Attributes:
        target: as the caller said it.
        base: the base, None for a UNet of no known structure.
        recipe: how its few-step LoRA is driven.
        lcm: that LoRA.
        weight: what it counts with.
        files: the styles' files as they were found, by name.
    """

    target: Target
    base: Base | None
    recipe: Recipe
    lcm: FileLora
    weight: float
    files: Mapping[str, LoraFile]

    def __deepcopy__(self, memo: dict[int, Any]) -> Applied:
        return self


@dataclasses.dataclass(frozen=True)
class Shell:
    """What a pipe is apart from its models."""

    cls: type
    scheduler: Any
    vae: Any
    fused: Any

    @staticmethod
    def of(pipe: Any) -> Shell:
        """What it is now."""
        return Shell(type(pipe), pipe.scheduler, getattr(pipe, "vae", None), getattr(pipe, compat.FUSED, None))


@dataclasses.dataclass(eq=False)
class PipeRecord(_Unpicklable):
    """What was done to one pipe.

    Attributes:
        owner: the pipe, held weakly. A copy of the pipe has the same record, and another owner.
        settings: what the caller asked of it.
        modules: the models that it relies on, by the pipeline's names.
        found: what it was before.
        made: what it was made.
        running: held by the thread that calls the pipe.
        told: what a call has warned of already.
        baked: what `bake` wrote of the folder that its models were loaded from; None where lcmlora merged them.
        gate: calls and changes of the UNet wait for each other there.
        cache: what the text encoders made of the last prompts; None where nothing is remembered.
    """

    owner: weakref.ref[Any]
    settings: PipeSettings
    modules: dict[str, ModuleRecord]
    found: Shell
    made: Shell
    running: Any = dataclasses.field(default_factory=threading.RLock)
    told: set[str] = dataclasses.field(default_factory=set)
    cache: PromptCache | None = None
    baked: Mapping[str, Any] | None = None
    gate: Gate = dataclasses.field(default_factory=Gate)

    def __post_init__(self) -> None:
        if self.modules:
            self.gate = self.unet.gate
        elif self.baked is not None and (noted := _noted(self.owner())) is not None:
            self.gate = noted.gate

    @property
    def unet(self) -> ModuleRecord:
        """The record of the UNet that was accelerated."""
        return self.modules["unet"]

    def __deepcopy__(self, memo: dict[int, Any]) -> PipeRecord:
        pipe: Any = self.owner()
        if (noted := _noted(pipe)) is not None:
            note_baked(deepcopy(compat.uncompiled(pipe.unet), memo), noted.written)  # the copied pipe's
        names = ("settings", "modules", "found", "made", "baked")
        return PipeRecord(self.owner, **{name: deepcopy(getattr(self, name), memo) for name in names})


def module_record_of(module: Any) -> ModuleRecord | None:
    """What was done to this model; None for nothing."""
    record = getattr(compat.uncompiled(module), "__dict__", {}).get(RECORD)
    return record if isinstance(record, ModuleRecord) else None


def pipe_record_of(pipe: Any) -> PipeRecord | None:
    """What was done to this very pipe; None for nothing. A copy of an accelerated pipe gets a record of its own."""
    record = getattr(pipe, "__dict__", {}).get(RECORD)
    if not isinstance(record, PipeRecord):
        return None
    return record if record.owner() is pipe else _adopt(pipe, record)


def _adopt(pipe: Any, record: PipeRecord) -> PipeRecord:
    """The record of a copied pipe: it relies on the same models, and has a scheduler for itself."""
    made = record.made
    if pipe.scheduler is made.scheduler:
        pipe.scheduler = deepcopy(made.scheduler)
    made = dataclasses.replace(made, scheduler=pipe.scheduler)
    mine = PipeRecord(weakref.ref(pipe), record.settings, dict(record.modules), record.found, made, baked=record.baked)
    for module in mine.modules.values():
        module.pipes.add(pipe)
    pipe.__dict__[RECORD] = mine
    return mine


class _Baked(NamedTuple):
    """What `bake` wrote of a UNet's folder, and where its calls and changes wait."""

    written: Mapping[str, Any]
    gate: Gate


_baked: weakref.WeakKeyDictionary[Any, _Baked] = weakref.WeakKeyDictionary()
"""The UNets of baked pipes, so that pipes which share one know it, with the folder gone too."""


def note_baked(unet: Any, written: Mapping[str, Any]) -> None:
    """Note of a UNet what `bake` wrote of the folder that it was loaded from."""
    _baked[compat.uncompiled(unet)] = _Baked(written, Gate())


def baked_of(pipe: Any) -> Mapping[str, Any] | None:
    """What `bake` wrote of the folder from which `load_baked` loaded the pipe's UNet, with it or another pipe."""
    noted = _noted(pipe)
    return noted.written if noted is not None else None


def _noted(pipe: Any) -> _Baked | None:
    unet = compat.uncompiled(getattr(pipe, "unet", None))
    return _baked.get(unet) if isinstance(unet, nn.Module) else None


class StandIn:
    """What is noted on a scheduler of ours.

    Args:
        found: the scheduler that it took the place of.
        unet: the UNet that it was made for, held weakly.
    """

    def __init__(self, found: Any, unet: Any = None) -> None:
        self.found = found
        self.unet = weakref.ref(unet) if unet is not None else lambda: None

    def __reduce__(self) -> Any:
        return StandIn, (self.found,)


def stands_for(scheduler: Any) -> Any:
    """The scheduler that one of ours took the place of; every other one stands for itself."""
    note = getattr(scheduler, "__dict__", {}).get(RECORD)
    return note.found if isinstance(note, StandIn) else scheduler


def copied_from(scheduler: Any, index: ModuleIndex) -> bool:
    """Whether a UNet holds what was merged into another one, the one that this scheduler of ours was made for."""
    note = getattr(scheduler, "__dict__", {}).get(RECORD)
    record = module_record_of(note.unet()) if isinstance(note, StandIn) else None
    if record is None or record.module is index.module or not record.content.merged:
        return False
    merged = {n: p for n, p in parameters_of(index).items() if record.originals.holds(record.parameters.get(n))}
    return bool(views(merged)) and not record.changed(merged)


def put(thing: Any, record: Any) -> None:
    """Put a record on a model or a pipe, or on our scheduler the one it stands for; None takes it off."""
    if record is None:
        thing.__dict__.pop(RECORD, None)
    else:
        thing.__dict__[RECORD] = record


def parameters_of(index: ModuleIndex) -> dict[str, nn.Parameter]:
    """A model's weights by their layers' names, and its other Parameters by their own."""
    weights = {name: getattr(layer, "weight", None) for name, layer in index.layers.items()}
    return {**{n: p for n, p in weights.items() if isinstance(p, nn.Parameter)}, **index.vectors}


def watched(index: ModuleIndex) -> dict[str, nn.Parameter]:
    """Those that a record remembers: every weight, and a few of the others, which lcmlora never changes."""
    every = parameters_of(index)
    return {name: p for name, p in every.items() if name not in index.vectors} | {
        name: every[name] for name in list(index.vectors)[::_FEW]
    }


def sampled(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """A few values of each weight, by logical place: they stay the same in another memory layout."""
    return {name: view.clone() for name, view in views(parameters).items()}


def views(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The places that `sampled` looks at, on a diagonal, without copying. Weights of unknown kinds have none."""
    found = {}
    for name, parameter in parameters.items():
        if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.numel():
            continue
        if parameter.ndim == 1:
            found[name] = parameter.data[:_SAMPLES]
            continue
        if parameter.ndim == 0:
            found[name] = parameter.data.view(1)
            continue
        (rows, columns, *inner), (down, right, *strides) = parameter.shape, parameter.stride()
        count = min(_SAMPLES, rows, columns)
        step = down * (rows // count) + right * (columns // count)
        middle = sum(stride * (size // 2) for size, stride in zip(inner, strides, strict=True))
        found[name] = parameter.data.as_strided((count,), (step,), parameter.storage_offset() + middle)
    return found
