"""Private names of torch, diffusers, transformers and PEFT. They stand here and nowhere else in the package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

import diffusers
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

PEFT_MARKS = ("peft_config", "_hf_peft_config_loaded", "_weight_conversions", "lora_scale", "_safe_fusing")
"""What PEFT, diffusers and transformers set on a model that has adapters, or had one fused."""
FUSED = "_merged_adapters"
"""Where a pipeline notes which adapters `fuse_lora` merged."""
PROMPT_ENCODERS = ("encode_prompt", "_encode_prompt")
"""A pipeline's methods that make embeddings of a prompt."""
COMPILED = "_compiled_call_impl"
"""Where `torch.nn.Module.compile` puts its result, which is called past the module's hooks."""
_BARS = "_progress_bar_config"  # what set_progress_bar_config was called with last
_MODULE_STATE = frozenset(nn.Module().__dict__)


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's children by name, as torch keeps them (`named_children` is a generator, ten times slower)."""
    return module._modules


def path_to(module: nn.Module, name: str) -> list[nn.Module]:
    """A module and those down to one of its parts, which is the last; empty where there is no such part.

    A call asks for it: `get_submodule` takes ten times as long.
    """
    path: list[nn.Module] = [module]
    for part in name.split("."):
        child = path[-1]._modules.get(part)
        child = wrapped(path[-1])._modules.get(part) if child is None else child
        if child is None:
            return []
        path.append(child)
    return path


def own_parameters(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """A module's own Parameters, without those of its children."""
    return module._parameters


def wrapped(module: nn.Module) -> nn.Module:
    """The module itself, or the one inside the PEFT modules around it."""
    return wrappers_of(module)[-1]


def wrappers_of(module: nn.Module) -> list[nn.Module]:
    """PEFT's modules around a module, the outermost first, and it. Adapters of two kinds stand around each other."""
    chain = [module]
    while True:
        children = chain[-1]._modules
        inner = children.get("base_layer") or children.get("original_module")
        if inner is None or not isinstance(chain[-1], BaseTunerLayer | AuxiliaryTrainingWrapper):
            return chain
        chain.append(inner)


def uncompiled(module: Any) -> Any:
    """The module inside a `torch.compile`d one."""
    return getattr(module, "_orig_mod", module)


def mark_as_adapted(module: nn.Module) -> None:
    """Tell diffusers and transformers that the model has PEFT adapters."""
    module._hf_peft_config_loaded = True  # type: ignore[assignment]


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return getattr(module, COMPILED, None) is not None


def forget_compilation(module: nn.Module) -> None:
    """Undo `module.compile()`."""
    module.__dict__.pop(COMPILED, None)


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """A model that computes eagerly and keeps its activations, whatever `compile` and gradient checkpointing made of
    it: compiled blocks are called past hooks, and activations are computed anew past `functional_call`.
    """
    names = ("gradient_checkpointing", "_gradient_checkpointing_func", COMPILED)
    before = [(one, {n: one.__dict__[n] for n in names if n in one.__dict__}) for one in model.modules()]
    try:
        for one, own in before:
            forget_compilation(one)
            one.__dict__.update({"gradient_checkpointing": False} if "gradient_checkpointing" in own else {})
        yield
    finally:
        for one, own in before:
            one.__dict__.update(own)


def repeated_blocks(unet: nn.Module) -> set[str]:
    """Names of the block classes that diffusers compiles one by one."""
    return set(getattr(unet, "_repeated_blocks", None) or ("BasicTransformerBlock",))


def is_on_disk(module: nn.Module) -> bool:
    """Whether diffusers' group off-loading keeps this module's weights in a file: its memory is uninitialised."""
    registry = module.__dict__.get("_diffusers_hook")
    hook = registry.get_hook("group_offloading") if registry is not None else None
    return bool(hook is not None and getattr(hook.group, "offload_to_disk_path", None))


def has_fused_projections(module: nn.Module) -> bool:
    """Whether `fuse_qkv_projections` has given an attention a joint projection (which un-fusing leaves in place)."""
    return "to_qkv" in module._modules or "to_kv" in module._modules


def uses_fused_projections(module: nn.Module) -> bool:
    """Whether the joint projection is in use now."""
    return has_fused_projections(module) and type(getattr(module, "processor", None)).__name__.startswith("Fused")


def name_or_path(thing: Any) -> str:
    """What a pipeline or model was loaded from; empty where nothing says."""
    config = getattr(thing, "config", None)
    found = config.get("_name_or_path") if isinstance(config, Mapping) else getattr(config, "_name_or_path", None)
    return str(found or "")


def set_name_or_path(pipe: Any, name: str) -> None:
    """Note what a pipeline was loaded from, where its loader does not."""
    pipe.register_to_config(_name_or_path=name)


def execution_device(pipe: Any) -> Any:
    """Where a pipeline computes, off-loaded or not."""
    return getattr(pipe, "_execution_device", None) or getattr(pipe, "device", None)


def shows_bars(pipe: Any) -> bool:
    """Whether a pipeline's own progress bars are on."""
    return not (progress_bar_config(pipe) or {}).get("disable")


@contextmanager
def without_bars(pipe: Any) -> Iterator[None]:
    """A pipeline without progress bars of its own, for the length of a block."""
    own = vars(pipe)
    before = own.get(_BARS)
    own[_BARS] = {**(before or {}), "disable": True}
    try:
        yield
    finally:
        own.pop(_BARS, None)
        if before is not None:
            own[_BARS] = before


class _Bars:
    """Stands where a library keeps whether it shows bars, and says no to the threads that hide them."""

    def __init__(self, shown: Any) -> None:
        self.shown = shown
        self.hidden: list[int] = []

    def __bool__(self) -> bool:
        return bool(self.shown) and get_ident() not in self.hidden


_BARS_LOCK = Lock()


@contextmanager
def bars_hidden() -> Iterator[None]:
    """No bars of diffusers and transformers while this thread loads or saves.

    Other threads keep theirs, and what the program says about bars meanwhile stays. The hub's bars are others: a
    download is seen.
    """
    homes, here = (diffusers.utils.logging, transformers.utils.logging), get_ident()
    with _BARS_LOCK:
        for home in homes:
            if not isinstance(home._tqdm_active, _Bars):
                home._tqdm_active = _Bars(home._tqdm_active)
        switches = [home._tqdm_active for home in homes]
        for switch in switches:
            switch.hidden.append(here)
    try:
        yield
    finally:
        with _BARS_LOCK:
            for home, switch in zip(homes, switches, strict=True):
                switch.hidden.remove(here)
                if home._tqdm_active is switch and not switch.hidden:
                    home._tqdm_active = switch.shown


def is_offloaded(pipe: Any) -> bool:
    """Whether accelerate's or diffusers' hooks bring weights of the pipe to the device when they are needed."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return any(_brings_weights(module.__dict__) for part in parts for module in part.modules())


def _brings_weights(own: Mapping[str, Any]) -> bool:
    hook, registry = own.get("_hf_hook"), own.get("_diffusers_hook")
    if registry is not None and registry.get_hook("group_offloading") is not None:
        return True
    return hook is not None and bool(getattr(hook, "offload", True))  # AlignDevicesHook may only move inputs


def adapter_state(wrapper: nn.Module) -> dict[str, Any]:
    """All that PEFT keeps in a wrapper by adapter name or for all adapters: values, and copies of containers."""
    state: dict[str, Any] = {}
    for key, value in wrapper.__dict__.items():
        if key in _MODULE_STATE:
            continue
        if isinstance(value, dict | list | set):
            state[key] = value.copy()
        elif isinstance(value, str | bool | None):
            state[key] = value
    for key, child in wrapper._modules.items():
        if isinstance(child, nn.ModuleDict):
            state[key] = dict(child._modules)
        elif isinstance(child, nn.ParameterDict):
            state[key] = dict(child.items())
    return state


def set_adapter_state(wrapper: nn.Module, state: Mapping[str, Any]) -> None:
    """Bring a wrapper back to what `adapter_state` gave; dicts stay the same objects.

    An interruption must leave a wrapper that can be read: an adapter counts as there once `r` names it, and as a LoRA
    once `lora_A` does, so these come last and go first.
    """
    last = ("r", "lora_A")
    containers: dict[str, Any] = {}
    for key in sorted(state, key=lambda key: last.index(key) if key in last else -1):
        value, container = state[key], wrapper._modules.get(key, wrapper.__dict__.get(key))
        if isinstance(container, nn.ModuleDict | nn.ParameterDict | dict | set):
            containers[key] = container._modules if isinstance(container, nn.ModuleDict) else container
            containers[key].update(value)
        else:  # a list of active adapters may be one object for many wrappers
            wrapper.__dict__[key] = value.copy() if isinstance(value, list) else value
    for key, container in reversed(containers.items()):
        for name in set(container) - set(state[key]):
            container.discard(name) if isinstance(container, set) else container.pop(name)


def adapters_in(wrapper: Any) -> set[str]:
    """The names of the adapters that a PEFT wrapper holds."""
    if hasattr(wrapper, "r"):
        return set(wrapper.r)
    held = (getattr(wrapper, names, ()) for names in wrapper.adapter_layer_names)
    return {name for names in held for name in names} | set(getattr(wrapper, "_adapters", ()))


def version_of(tensor: torch.Tensor) -> int:
    """How often torch has seen a tensor being written."""
    return 0 if tensor.is_inference() else tensor._version


def progress_bar_config(pipe: Any) -> dict[str, Any] | None:
    """What `set_progress_bar_config` was told; None where it was never called."""
    return getattr(pipe, _BARS, None)


@contextmanager
def own_accelerate() -> Iterator[None]:
    """A block whose `accelerate.Accelerator` has settings of its own, which are the process's otherwise: those of
    another one are back afterwards. Devices and process groups stay.
    """
    from accelerate.state import AcceleratorState, GradientState

    states = [kind._shared_state for kind in (AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    try:
        for state in states:
            state.clear()
        yield
    finally:
        for state, was in zip(states, before, strict=True):
            state.clear()
            state.update(was)
