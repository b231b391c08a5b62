"""PEFT's adapters in a model: what is there, putting ours in beside it, and the exact way back."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners import lora as peft_lora
from torch import nn

from .. import compat
from ..errors import LoraFileError
from ..layers import INSIDE, ModuleIndex, layer_shape
from .merge import Factors, FileLora, Lora, Weight


class TunerLora:
    """A LoRA that PEFT has in a model, as `merge` takes it.

    Args:
        wrappers: PEFT's layers around the model's, by name.
        adapter: its name.
        found: what it counted with in each layer when it was found; 0 where it was off.
        place: where it stood among the active ones. PEFT goes by that order, which matters to DoRA.
    """

    def __init__(self, wrappers: Mapping[str, Any], adapter: str, found: Mapping[str, float], place: int) -> None:
        self._wrappers = {name: tuner for name, tuner in wrappers.items() if adapter in getattr(tuner, "lora_A", ())}
        # by layer: PEFT empties its own when somebody deletes the adapter
        self._halves = {
            name: (unit_scale(tuner, adapter), tuner.lora_B[adapter], tuner.lora_A[adapter])
            for name, tuner in self._wrappers.items()
        }
        self.found = dict(found)
        self.place = place

    @property
    def layers(self) -> frozenset[str]:
        """The layers it touches."""
        return frozenset(self._halves)

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Factors]]:
        """See `lcmlora.lora.merge.Lora.opened`."""
        yield self._factors

    def _factors(self, layer: str) -> Factors:
        scale, *halves = self._halves[layer]
        up, down = (half.weight.detach().float().flatten(1) for half in halves)
        return Factors(scale, up, down)


def unit_scale(tuner: Any, adapter: str) -> float:
    """What PEFT multiplies an adapter's product with at weight 1 (peft, lora/layer.py, set_scale)."""
    alphas = getattr(tuner, "lora_alpha", None) or getattr(tuner, "alpha", None)  # LoRA's and LyCORIS' names
    if not alphas:
        return 1.0
    rank = tuner.r[adapter]
    stabilised = getattr(tuner, "use_rslora", {}).get(adapter, False)
    return float(alphas[adapter] / (rank**0.5 if stabilised else rank))


class Adapters:
    """What PEFT has in a model at one moment: wrappers, adapters, their scales. `restore` goes back to it.

    Args:
        index: the model, just walked over.
    """

    def __init__(self, index: ModuleIndex) -> None:
        self._module = index.module
        self._wrappers: dict[str, Any] = dict(index.wrappers)
        self._outermost = _outermost(index.wrappers)
        self._layers = frozenset(index.layers)
        self._marks = {key: index.module.__dict__[key] for key in compat.PEFT_MARKS if key in index.module.__dict__}
        self._configs = dict(self._marks.get("peft_config") or {})
        self._names = {name: compat.adapters_in(wrapper) for name, wrapper in self._wrappers.items()}
        self._states = {name: compat.adapter_state(wrapper) for name, wrapper in self._wrappers.items()}
        self._gradients = index.gradients
        active = [name for wrapper in self._wrappers.values() for name in wrapper.active_adapters]
        order = {name: place for place, name in enumerate(dict.fromkeys(active))}
        self.loras = {
            name: TunerLora(self._wrappers, name, self._weights_of(name), order.get(name, len(order)))
            for name in sorted(self.names)
        }

    @property
    def names(self) -> set[str]:
        """Every adapter, active or not."""
        return set(self._configs) | {name for names in self._names.values() for name in names}

    @property
    def active(self) -> list[str]:
        """The adapters that count somewhere."""
        return [name for name, lora in self.loras.items() if any(lora.found.values())]

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """The least and the greatest weight in a layer of each adapter that counts."""
        return {name: (min(w), max(w)) for name in self.active if (w := self.loras[name].found.values())}

    @property
    def merged(self) -> frozenset[str]:
        """The layers into whose weight PEFT has merged an adapter."""
        return frozenset(name for name, wrapper in self._wrappers.items() if getattr(wrapper, "merged", False))

    @property
    def why_not_mergeable(self) -> str | None:
        """Which adapter is more than up @ down on a layer that can be merged; None where none is."""
        for name, wrapper in self._wrappers.items():
            kind = type(wrapper).__name__
            if name not in self._layers or type(wrapper) not in (peft_lora.Linear, peft_lora.Conv2d):
                return f"the adapter on {name or 'the whole model'} ({kind}) is no plain LoRA of a Linear or Conv2d"
            if wrapper.lora_variant:
                return f"the adapter on {name} is no plain LoRA (DoRA or the like)"
            if any(wrapper.lora_bias.values()):
                return f"the adapter on {name} has a bias (lora_bias=True)"
            if getattr(compat.wrapped(wrapper), "groups", 1) != 1:
                return f"{name} is a grouped convolution"
        return None

    def only_as_found(self, name: str) -> str | None:
        """A wrapper in which this adapter has no weight that could be set; None where it has one everywhere."""
        found = (at for at, names in self._names.items() if name in names and not hasattr(self._wrappers[at], "r"))
        return next(found, None)

    def _weights_of(self, adapter: str) -> dict[str, float]:
        """What an adapter counts with wherever it is; 0 where it is off, 1 where PEFT knows no weights."""
        weights = {}
        for layer, wrapper in self._wrappers.items():
            if adapter in compat.adapters_in(wrapper):
                on = adapter in wrapper.active_adapters and not wrapper.disable_adapters
                known = adapter in getattr(wrapper, "r", ())
                weight = wrapper.scaling[adapter] / unit_scale(wrapper, adapter) if known else 1.0
                weights[layer] = weight if on else 0.0
        return weights

    def unwrap(self) -> None:
        """Take PEFT's wrappers out, leaving what they wrapped. `restore` puts them back.

        For the meantime the model is a plain one: its forward pass costs nothing extra, and PEFT can't un-merge what
        it did not merge.
        """
        _put(self._module, {name: compat.wrapped(wrapper) for name, wrapper in self._outermost.items()})
        for key in compat.PEFT_MARKS:
            self._module.__dict__.pop(key, None)

    def restore(self, here: ModuleIndex | None = None) -> None:
        """Bring PEFT's wrappers, adapters and scales back to that moment. Doing it twice does no harm.

        Args:
            here: the model as it is now; None walks over it.
        """
        now = _outermost((here or ModuleIndex.of(self._module)).wrappers)
        _put(self._module, {name: compat.wrapped(w) for name, w in now.items() if name not in self._outermost})
        _put(self._module, self._outermost)
        for name, wrapper in self._wrappers.items():
            compat.set_adapter_state(wrapper, self._states[name])
        for parameter, gradient in self._gradients:
            _require(parameter, gradient)
        for key in compat.PEFT_MARKS:
            self._module.__dict__.pop(key, None)
        self._module.__dict__.update(self._marks)
        if "peft_config" in self._marks:
            self._marks["peft_config"].clear()
            self._marks["peft_config"].update(self._configs)


def _outermost(wrappers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: wrapper for name, wrapper in wrappers.items() if not name.endswith(INSIDE)}


def _put(module: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    """Put modules at the names given, whatever stands there."""
    for name, part in parts.items():
        parent, _, child = name.rpartition(".")
        with suppress(AttributeError):  # somebody took away what it was in
            compat.children_of(module.get_submodule(parent))[child] = part


@torch.inference_mode(False)  # its tensors have to work outside too
def inject(module: Any, name: str, lora: FileLora) -> None:
    """Load a LoRA as a PEFT adapter called `name`, without gradients and in the weights' dtype.

    PEFT itself is called, not diffusers' or transformers' loader: those log, guess and touch other state (transformers
    switches the model to evaluation mode).

    Raises:
        LoraFileError: its file is gone, changed or damaged, or its values are too large for the model's dtype.
    """
    state = _state(module, lora)
    with warnings.catch_warnings():  # that adapters stand beside each other is what is wanted
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated without")  # needed to merge alone
        inject_adapter_in_model(_lora_config(lora), module, adapter_name=name)
    report = set_peft_model_state_dict(module, state, adapter_name=name)
    plain = {layer for layer, pair in lora.pairs.items() if not pair.magnitude}
    ends = (f".lora_A.{name}.weight", f".lora_B.{name}.weight", f".lora_magnitude_vector.{name}.weight")
    missing = [
        key
        for key in report.missing_keys
        if key.endswith(ends) and not ("lora_magnitude_vector" in key and key.partition(".lora_")[0] in plain)
    ]
    if report.unexpected_keys or missing:
        raise RuntimeError(f"PEFT took only a part of {lora.label}: {report.unexpected_keys[:3]} were not expected.")
    compat.mark_as_adapted(module)
    wrappers: dict[str, Any] = dict(ModuleIndex.of(module).wrappers)
    for layer, tuner in wrappers.items():
        if name in getattr(tuner, "lora_A", ()):
            if layer in plain and name in tuner.lora_magnitude_vector:  # PEFT's use_dora goes for all layers
                del tuner.lora_magnitude_vector[name], tuner.lora_variant[name]
            weight: Any = compat.wrapped(tuner).weight
            for parts in (tuner.lora_A, tuner.lora_B, tuner.lora_magnitude_vector):
                if name in parts:
                    parts[name].to(weight.device, _adapter_dtype(weight)).requires_grad_(False)


def _state(module: nn.Module, lora: FileLora) -> dict[str, torch.Tensor]:
    """What PEFT calls the state of an adapter, from a file."""
    state: dict[str, torch.Tensor] = {}
    with lora.opened_whole() as read:
        for layer, pair in sorted(lora.pairs.items()):
            (_, up, down), magnitude = read(layer)
            inner: Any = compat.wrapped(module.get_submodule(layer))
            out, *rest = layer_shape(inner)
            ones = (1,) * (len(rest) - 1)
            if not pair.alpha:  # PEFT divides by it to tell an adapter's weight; `_lora_config` has another one
                up = torch.zeros_like(up)
            state[f"{layer}.lora_A.weight"] = down.view(len(down), *rest)
            state[f"{layer}.lora_B.weight"] = up.view(out, len(down), *ones)
            if magnitude is not None:
                state[f"{layer}.lora_magnitude_vector"] = magnitude.view(1, out, *ones) if ones else magnitude
            dtype = _adapter_dtype(inner.weight)
            values = (up, down) if magnitude is None else (up, down, magnitude)
            if not all(torch.isfinite(value.to(dtype)).all() for value in values):
                raise LoraFileError(f"{lora.label}: values for {layer} are too large for {dtype}.")
    return state


def _lora_config(lora: FileLora) -> LoraConfig:
    """PEFT's configuration of a LoRA: the commonest rank and alpha, and the others as patterns."""
    ranks = {layer: pair.rank for layer, pair in lora.pairs.items()}
    alphas = {layer: pair.alpha or float(pair.rank) for layer, pair in lora.pairs.items()}
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(ranks),
        rank_pattern={layer: r for layer, r in ranks.items() if r != rank},
        alpha_pattern={layer: a for layer, a in alphas.items() if a != alpha},
        init_lora_weights=False,
        inference_mode=True,
        use_dora=any(pair.magnitude for pair in lora.pairs.values()),
    )


def _adapter_dtype(weight: torch.Tensor) -> torch.dtype:
    """The weight's own, unless that is a quantised one."""
    return weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else torch.float32


def activate(index: ModuleIndex, loras: Mapping[str, Lora], weights: Mapping[str, Weight]) -> None:
    """Make these adapters, and no others, active at these weights.

    Args:
        index: the model, walked over after the last adapter went in.
        loras: every adapter that may be named.
        weights: those wanted. None leaves each layer's weight as it was found.

    Raises:
        RuntimeError: PEFT did not do so.
    """
    for layer, wrapper in index.wrappers.items():
        tuner: Any = wrapper
        there = compat.adapters_in(wrapper)
        where = layer.partition(INSIDE)[0]
        at = {
            name: loras[name].found.get(where, 0.0) if w is None else w for name, w in weights.items() if name in there
        }
        on = (name for name, weight in at.items() if weight)
        here = sorted(on, key=lambda name: (getattr(loras[name], "place", len(at)), name))  # PEFT adds in this order
        plain = hasattr(tuner, "r")
        tuner.enable_adapters(plain or bool(here))
        if plain or here:
            tuner.set_adapter(here)
        for name in here if plain else ():
            tuner.scaling[name] = at[name] * unit_scale(tuner, name)
        if plain and (set(tuner.active_adapters) != set(here) or tuner.disable_adapters):
            raise RuntimeError(f"PEFT did not activate {here}; active: {tuner.active_adapters}")
    for parameter, gradient in index.gradients:  # set_adapter turns gradients on
        _require(parameter, gradient)


def _require(parameter: nn.Parameter, gradient: bool) -> None:
    if parameter.requires_grad != gradient:
        mode = torch.inference_mode if parameter.is_inference() else torch.enable_grad
        mode()(parameter.requires_grad_)(gradient)


def delete(index: ModuleIndex, names: set[str]) -> None:
    """Take adapters out for good."""
    for wrapper in index.wrappers.values():
        tuner: Any = wrapper
        for name in names & set(getattr(tuner, "lora_A", ())):
            tuner.delete_adapter(name)
    for name in names:
        getattr(index.module, "peft_config", {}).pop(name, None)
