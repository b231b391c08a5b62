"""Merging LoRAs into a UNet's weights, and the exact way back.

W' = W + sum_i w_i * alpha_i / r_i * B_i @ A_i, computed in float32 and rounded once to the weight's dtype. The way
back computes nothing: it copies the kept originals, so it is exact in every dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from .lorafile import Pair, load
from .unets import base_layer

_PEFT_ATTRIBUTES = ("peft_config", "_hf_peft_config_loaded")


@dataclasses.dataclass(frozen=True)
class Share:
    """What one LoRA file adds to the layers: its pairs by layer name, and the weight it counts with."""

    path: Path
    pairs: Mapping[str, Pair]
    weight: float


class Originals:
    """The weights that a merge changes, as they were, in host memory. `restore` puts them back and forgets them."""

    def __init__(self) -> None:
        self._kept: list[tuple[nn.Parameter, torch.Tensor]] = []

    def keep(self, parameter: nn.Parameter) -> None:
        """Copy a weight before it changes."""
        # A plain clone would be on the weight's own device: an accelerator's memory is the scarcer one.
        self._kept.append((parameter, parameter.detach().to("cpu", copy=True)))

    def restore(self) -> None:
        """Put the copies back into their parameters."""
        with torch.no_grad():
            for parameter, original in self._kept:
                parameter.copy_(original)
        self._kept.clear()

    def forget(self) -> None:
        """Drop the copies; there is no way back then."""
        self._kept.clear()

    @property
    def bytes(self) -> int:
        """Host memory held, in bytes."""
        return sum(original.nbytes for _, original in self._kept)


def merge(
    layers: Mapping[str, nn.Module], shares: Iterable[Share], tuners: Mapping[str, Any], originals: Originals | None
) -> None:
    """Add every share's product, and what the active adapters of `tuners` (PEFT layers by name) add, to the layers in
    place.

    The parameters stay the same objects. `originals` receives each weight before it changes; with None nothing is
    kept.

    Raises:
        LoraFileError: a LoRA holds NaN or infinity. What was merged by then is for the caller to restore.
    """
    shares = list(shares)
    with ExitStack() as stack, torch.no_grad():
        files = [stack.enter_context(safe_open(share.path, "pt")) for share in shares]
        for name, layer in layers.items():
            halves = [
                (share.weight * share.pairs[name].scale, *load(share.path, share.pairs[name], file))
                for share, file in zip(shares, files, strict=True)
                if name in share.pairs
            ]
            deltas = active_deltas(tuners[name]) if name in tuners else []
            if not halves and not deltas:
                continue
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            if originals is not None:
                originals.keep(weight)
            weight.copy_(_merged(weight, halves, deltas))


def _merged(
    weight: torch.Tensor, halves: list[tuple[float, torch.Tensor, torch.Tensor]], deltas: list[torch.Tensor]
) -> torch.Tensor:
    """weight + sum of scale * up @ down + deltas, float32, shape as the weight's."""
    total = weight.detach().float().flatten(1).clone()
    if halves:  # every LoRA in one product: (out, r1 + r2 + ...) @ (r1 + r2 + ..., in)
        up = torch.cat([scale * up for scale, up, _ in halves], dim=1).to(weight.device)
        down = torch.cat([down for _, _, down in halves], dim=0).to(weight.device)
        total.addmm_(up, down)
    for delta in deltas:
        total += delta.float().flatten(1).to(weight.device)
    return total.view_as(weight)


def tuner_layers(unet: nn.Module) -> dict[str, Any]:
    """The layers that PEFT has wrapped, by name."""
    return {name: module for name, module in unet.named_modules() if base_layer(module) is not module}


def active_deltas(tuner: Any) -> list[torch.Tensor]:
    """What each active adapter of a PEFT layer adds to its weight, at its present scale."""
    if tuner.disable_adapters:
        return []
    return [tuner.get_delta_weight(adapter) for adapter in tuner.active_adapters if adapter in tuner.lora_A]


def replace(unet: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules at the names given, whatever stands there."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        unet.get_submodule(parent)._modules[child] = module


def park(unet: nn.Module) -> None:
    """Take the PEFT layers out of a UNet, leaving the layers they wrapped. `Adapters.restore` puts them back.

    For the meantime the UNet is a plain one: its forward pass costs nothing extra, and PEFT can't un-merge what it did
    not merge.
    """
    replace(unet, {name: base_layer(tuner) for name, tuner in tuner_layers(unet).items()})
    unet.__dict__.pop("peft_config", None)
    unet.__dict__.pop("_hf_peft_config_loaded", None)


def inject(unet: Any, name: str, share: Share) -> None:
    """Load a LoRA into the UNet as a PEFT adapter called `name`, through diffusers, without gradients."""
    state: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    layers = {layer: unet.get_submodule(layer) for layer in share.pairs}
    with safe_open(share.path, "pt") as file:
        for layer, pair in share.pairs.items():
            up, down = load(share.path, pair, file)
            shape = base_layer(layers[layer]).weight.shape
            ones = (1,) * (len(shape) - 2)
            state[f"unet.{layer}.lora_A.weight"] = down.view(pair.rank, *shape[1:])
            state[f"unet.{layer}.lora_B.weight"] = up.view(*up.shape, *ones)
            alphas[f"unet.{layer}.alpha"] = pair.alpha
    unet.load_lora_adapter(state, prefix="unet", adapter_name=name, network_alphas=alphas)
    for module in tuner_layers(unet).values():
        if name in module.lora_A:
            module.lora_A[name].requires_grad_(False)
            module.lora_B[name].requires_grad_(False)


class Adapters:
    """What PEFT has in a module at one moment: its layers, what is active in them, at which scale. `restore` goes
    back.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._tuners = tuner_layers(module)
        self._attributes = {key: module.__dict__[key] for key in _PEFT_ATTRIBUTES if key in module.__dict__}
        self._configs = dict(self._attributes.get("peft_config", {}))
        self._active = {name: list(tuner.active_adapters) for name, tuner in self._tuners.items()}
        self._scales = {name: dict(tuner.scaling) for name, tuner in self._tuners.items()}
        self._disabled = {name: tuner.disable_adapters for name, tuner in self._tuners.items()}
        self._grad = [(parameter, parameter.requires_grad) for parameter in module.parameters()]

    @property
    def merged(self) -> bool:
        """Whether PEFT has merged an adapter into some layer's weight."""
        return any(tuner.merged for tuner in self._tuners.values())

    @property
    def weights(self) -> dict[str, float]:
        """Each active adapter and the weight it is set to (the same in every layer, as `set_adapters` leaves it)."""
        return {
            adapter: tuner.scaling[adapter] * tuner.r[adapter] / tuner.lora_alpha[adapter]
            for name, tuner in self._tuners.items()
            for adapter in self._active[name]
            if adapter in tuner.scaling and not self._disabled[name]
        }

    def restore(self) -> None:
        """Bring PEFT's layers, adapters and scales back to that moment."""
        here = tuner_layers(self._module)
        replace(self._module, {name: base_layer(tuner) for name, tuner in here.items() if name not in self._tuners})
        replace(self._module, self._tuners)
        for name, tuner in self._tuners.items():
            for adapter in set(tuner.lora_A) - set(self._scales[name]):
                tuner.delete_adapter(adapter)
            tuner.set_adapter(self._active[name])
            tuner.enable_adapters(not self._disabled[name])
            tuner.scaling.clear()
            tuner.scaling.update(self._scales[name])
        for parameter, grad in self._grad:
            parameter.requires_grad_(grad)
        for key in _PEFT_ATTRIBUTES:
            self._module.__dict__.pop(key, None)
        self._module.__dict__.update(self._attributes)
        if self._configs:
            configs = self._attributes["peft_config"]
            configs.clear()
            configs.update(self._configs)


def activate(unet: Any, adapters: Mapping[str, float]) -> None:
    """Make these adapters, and no others, active at these weights, and check that they are."""
    unet.set_adapters(list(adapters), list(adapters.values()))
    for tuner in tuner_layers(unet).values():
        wanted = set(adapters) & set(tuner.lora_A)
        if wanted - set(tuner.active_adapters):
            raise RuntimeError(f"PEFT did not activate {sorted(wanted)}; active: {tuner.active_adapters}")
