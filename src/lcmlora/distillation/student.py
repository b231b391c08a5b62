"""The student: the teacher's UNet with a LoRA, W + alpha / rank * B @ A, whose factors alone are trained.

The factors are float32 and stand beside the UNet, not in it: a pass either computes with merged weights, in the place
of the UNet's own (`torch.func.functional_call`), or adds B @ (A @ x) behind each layer. Both are the same function; a
merged pass costs one product of small matrices a layer, the other two more layers in every layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..layers import layer_shape, lcm_layers
from .config import DistillConfig
from .draws import seed_of
from .teacher import Conditions, Teacher


class Student:
    """A LoRA of every layer that an LCM-LoRA covers.

    Args:
        teacher: whose UNet it adapts.
        config: the run's settings.

    Attributes:
        layers: the adapted layers by name.
        down: A of each, (rank, in, ...).
        up: B of each, (out, rank) or (out, rank, 1, 1); 0 at first, so that the student begins as the teacher.
    """

    def __init__(self, teacher: Teacher, config: DistillConfig) -> None:
        self.teacher, self.rank, self.alpha = teacher, config.rank, config.lora_alpha
        self.layers = lcm_layers(teacher.unet)
        self.scale = self.alpha / self.rank
        plain = teacher.device.type == "cpu" and teacher.unet.dtype == torch.float32
        self.merged = config.merged == "on" or (
            config.merged == "auto" and plain and not config.gradient_checkpointing and config.mixed_precision == "no"
        )
        self.down, self.up = [], []
        generator = torch.Generator().manual_seed(seed_of(config.seed, "student"))
        for layer in self.layers.values():
            out, *rest = layer_shape(layer)
            down = torch.empty(self.rank, *rest, dtype=torch.float32)
            up = torch.zeros(out, self.rank, *[1] * (len(rest) - 1), dtype=torch.float32)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)  # as PEFT and torch's own layers do
            self.down.append(nn.Parameter(down.to(teacher.device)))
            self.up.append(nn.Parameter(up.to(teacher.device)))
        self._adds = True
        self._now: dict[str, torch.Tensor] | None = None  # the merged weights of this step, without gradients

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [*self.down, *self.up]

    # -- passes -------------------------------------------------------------------------------------------------------

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The LoRA behind each layer of the UNet, while the context lasts; nothing to do where passes are merged."""
        pairs = [] if self.merged else list(zip(self.layers.values(), self.down, self.up, strict=True))
        hooks = [layer.register_forward_hook(self._hook(down, up)) for layer, down, up in pairs]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, down: nn.Parameter, up: nn.Parameter) -> Any:
        def add(layer: Any, args: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
            if not self._adds:
                return out
            x = args[0].to(down.dtype)
            if isinstance(layer, nn.Conv2d):
                inner = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
                change = F.conv2d(inner, up)
            else:
                change = F.linear(F.linear(x, down), up)
            return (out + self.scale * change).to(out.dtype)

        return add

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """All passes stand in such a context. The factors stay as they are while it lasts: it merges them once."""
        try:
            yield
        finally:
            self._now = None

    def weights(self) -> dict[str, torch.Tensor]:
        """The merged weights by the UNet's own names, with gradients to the factors, rounded once."""
        merged = {}
        for (name, layer), down, up in zip(self.layers.items(), self.down, self.up, strict=True):
            weight: Any = layer.weight
            change = self.scale * (up.flatten(1) @ down.flatten(1))
            merged[f"{name}.weight"] = (weight.float() + change.view(weight.shape)).to(weight.dtype)
        return merged

    def __call__(self, z: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The student's prediction, float32, with gradients."""
        weights = self.weights() if self.merged else None
        if weights is not None:
            self._now = {name: weight.detach() for name, weight in weights.items()}
        return self.teacher.predict(z, t, conditions.alone(), weights)

    @torch.no_grad()
    def target(self, z: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The same without gradients."""
        if self.merged and self._now is None:
            self._now = self.weights()
        return self.teacher.predict(z, t, conditions.alone(), self._now)

    def pass_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The UNet's output for arguments by name, in its own dtype."""
        sample, timestep = inputs["sample"], inputs["timestep"]
        rest = {name: value for name, value in inputs.items() if name not in ("sample", "timestep")}
        weights = self.weights() if self.merged else None
        return self.teacher.predict(sample, timestep, rest, weights).to(sample.dtype)

    def guided(self, z: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The teacher's guided prediction: the same UNet without the LoRA."""
        self._adds = False
        try:
            return self.teacher.guided(z, t, conditions)
        finally:
            self._adds = True

    # -- as a file ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of the factors as PEFT spells them: `layer.lora_A.weight`, `layer.lora_B.weight`."""
        return {
            f"{name}.lora_{half}.weight": factor.detach().clone()
            for name, down, up in zip(self.layers, self.down, self.up, strict=True)
            for half, factor in (("A", down), ("B", up))
        }
