"""PEFT's adapters in a model: what is there, putting ours in beside it, and the exact way back."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn

from .errors import LoraFileError, PipelineError
from .merge import FileLora, Halves
from .unets import base_layer, layer_shape

_ATTRIBUTES = ("peft_config", "_hf_peft_config_loaded")


def tuner_layers(module: nn.Module) -> dict[str, Any]:
    """The layers that PEFT has wrapped, by name."""
    return {name: inner for name, inner in module.named_modules() if base_layer(inner) is not inner}


class TunerLora:
    """A LoRA that PEFT has in a model, as `merge` takes it."""

    def __init__(self, tuners: Mapping[str, Any], adapter: str) -> None:
        self._tuners = {name: tuner for name, tuner in tuners.items() if adapter in tuner.lora_A}
        self._adapter = adapter

    @property
    def layers(self) -> frozenset[str]:
        """The layers it touches."""
        return frozenset(self._tuners)

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """See `lcmlora.merge.Lora.opened`."""
        yield self._halves

    def _halves(self, layer: str) -> Halves:
        tuner, adapter = self._tuners[layer], self._adapter
        up, down = (part[adapter].weight.detach().float().flatten(1) for part in (tuner.lora_B, tuner.lora_A))
        return unit_scale(tuner, adapter), up, down


def unit_scale(tuner: Any, adapter: str) -> float:
    """What PEFT multiplies an adapter's product with at weight 1 (peft, lora/layer.py, set_scale)."""
    rank = tuner.r[adapter]
    stabilised = getattr(tuner, "use_rslora", {}).get(adapter, False)
    return float(tuner.lora_alpha[adapter] / (rank**0.5 if stabilised else rank))


class Adapters:
    """What PEFT has in a module at one moment: layers, active adapters, scales. `restore` goes back to it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._tuners = tuner_layers(module)
        self._attributes = {key: module.__dict__[key] for key in _ATTRIBUTES if key in module.__dict__}
        self._configs = dict(self._attributes.get("peft_config") or {})
        self._active = {name: list(tuner.active_adapters) for name, tuner in self._tuners.items()}
        self._scales = {name: dict(tuner.scaling) for name, tuner in self._tuners.items()}
        self._disabled = {name: tuner.disable_adapters for name, tuner in self._tuners.items()}
        self._grad = [(parameter, parameter.requires_grad) for parameter in module.parameters()]

    @property
    def names(self) -> set[str]:
        """Every adapter, active or not."""
        return set(self._configs) | {adapter for scales in self._scales.values() for adapter in scales}

    @property
    def merged(self) -> bool:
        """Whether PEFT has merged an adapter into some layer's weight."""
        return any(tuner.merged for tuner in self._tuners.values())

    @property
    def plain(self) -> bool:
        """Whether every active adapter is a plain LoRA, of which up @ down tells all (no DoRA, no LoHa)."""
        return not any(
            getattr(tuner, "lora_variant", None) or not hasattr(tuner, "lora_A") for tuner in self._tuners.values()
        )

    @property
    def weights(self) -> dict[str, float]:
        """Each active adapter and the weight it is set to (the same in every layer, as `set_adapters` leaves it)."""
        return {
            adapter: tuner.scaling[adapter] / unit_scale(tuner, adapter)
            for name, tuner in self._tuners.items()
            for adapter in self._active[name]
            if adapter in tuner.scaling and not self._disabled[name]
        }

    @property
    def loras(self) -> dict[str, TunerLora]:
        """Every adapter as `merge` takes it."""
        return {name: TunerLora(self._tuners, name) for name in self.names}

    def park(self) -> None:
        """Take the PEFT layers out, leaving the layers they wrapped. `restore` puts them back.

        For the meantime the model is a plain one: its forward pass costs nothing extra, and PEFT can't un-merge what
        it did not merge.
        """
        _replace(self._module, {name: base_layer(tuner) for name, tuner in self._tuners.items()})
        for key in _ATTRIBUTES:
            self._module.__dict__.pop(key, None)

    def restore(self) -> None:
        """Bring PEFT's layers, adapters and scales back to that moment."""
        here = tuner_layers(self._module)
        _replace(self._module, {name: base_layer(tuner) for name, tuner in here.items() if name not in self._tuners})
        _replace(self._module, self._tuners)
        for name, tuner in self._tuners.items():
            tuner.set_adapter(self._active[name])
            for adapter in set(tuner.scaling) - set(self._scales[name]):
                tuner.delete_adapter(adapter)
            tuner.enable_adapters(not self._disabled[name])
            tuner.scaling.clear()
            tuner.scaling.update(self._scales[name])
        for parameter, grad in self._grad:
            parameter.requires_grad_(grad)
        for key in _ATTRIBUTES:
            self._module.__dict__.pop(key, None)
        self._module.__dict__.update(self._attributes)
        if "peft_config" in self._attributes:
            self._attributes["peft_config"].clear()
            self._attributes["peft_config"].update(self._configs)


def _replace(module: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    """Put modules at the names given, whatever stands there."""
    for name, part in parts.items():
        parent, _, child = name.rpartition(".")
        module.get_submodule(parent)._modules[child] = part


def inject(module: Any, name: str, lora: FileLora) -> None:
    """Load a LoRA as a PEFT adapter called `name`, without gradients and in the weights' dtype.

    PEFT itself is called, not diffusers' or transformers' loader: those log, guess and touch other state (transformers
    switches the model to evaluation mode).

    Raises:
        LoraFileError: its file is gone, changed or damaged, or its values are too large for the model's dtype.
        PipelineError: PEFT can't put it into layers of this kind.
    """
    state = _state(module, lora)
    with warnings.catch_warnings():  # that adapters stand beside each other is what is wanted
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated without")  # needed to merge alone
        try:
            inject_adapter_in_model(_lora_config(lora), module, adapter_name=name)
        except (ValueError, NotImplementedError) as error:  # such as DoRA on weights quantised by torchao
            raise PipelineError(f"PEFT can't put {lora.label} into this {type(module).__name__}: {error}") from error
    report = set_peft_model_state_dict(module, state, adapter_name=name)
    plain = {layer for layer, pair in lora.pairs.items() if not pair.magnitude}
    absent = {f"{layer}.lora_magnitude_vector.{name}.weight" for layer in plain}
    if report.unexpected_keys or any(f".{name}." in key and key not in absent for key in report.missing_keys):
        raise RuntimeError(f"PEFT took only a part of {lora.label}: {report.unexpected_keys[:3]} were not expected.")
    module._hf_peft_config_loaded = True  # diffusers and transformers ask for it
    for layer, tuner in tuner_layers(module).items():
        if name in tuner.lora_A:
            if layer in plain and name in tuner.lora_magnitude_vector:  # PEFT's use_dora goes for all layers
                del tuner.lora_magnitude_vector[name], tuner.lora_variant[name]
            weight: Any = base_layer(tuner).weight
            for parts in (tuner.lora_A, tuner.lora_B, tuner.lora_magnitude_vector):
                if name in parts:
                    parts[name].to(weight.device, _adapter_dtype(weight)).requires_grad_(False)


def _state(module: nn.Module, lora: FileLora) -> dict[str, torch.Tensor]:
    """What PEFT calls the state of an adapter, from a file."""
    state: dict[str, torch.Tensor] = {}
    with lora.opened_whole() as read:
        for layer, pair in sorted(lora.pairs.items()):
            _, up, down, magnitude = read(layer)
            inner: Any = base_layer(module.get_submodule(layer))
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


def activate(module: nn.Module, weights: Mapping[str, float]) -> None:
    """Make these adapters, and no others, active at these weights.

    Raises:
        RuntimeError: PEFT did not do so.
    """
    grads = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    for tuner in tuner_layers(module).values():
        here = sorted(name for name in weights if name in tuner.lora_A)  # PEFT adds in this order
        tuner.enable_adapters(True)
        tuner.set_adapter(here)
        for name in here:
            tuner.scaling[name] = weights[name] * unit_scale(tuner, name)
        if set(tuner.active_adapters) != set(here) or tuner.disable_adapters:
            raise RuntimeError(f"PEFT did not activate {here}; active: {tuner.active_adapters}")
    for parameter, grad in grads:  # set_adapter turns gradients on
        parameter.requires_grad_(grad)


def delete(module: nn.Module, names: set[str]) -> None:
    """Take adapters out for good."""
    for tuner in tuner_layers(module).values():
        for name in names & set(tuner.lora_A):
            tuner.delete_adapter(name)
    for name in names:
        getattr(module, "peft_config", {}).pop(name, None)
