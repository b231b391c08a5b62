"""The student: the teacher's UNet with a LoRA, W + alpha / rank * B @ A, whose factors alone are trained.

The factors are float32 and stand beside the UNet, not in it: while they are attached, a layer computes either with
merged weights or with B @ (A @ x) added to its own output. Both are the same function. The former is faster: forward
it costs one product of small matrices a layer, backward the factors' gradients go through the small inner dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_input

from ..layers import layer_shape, lcm_layers
from .config import DistillConfig
from .draws import seed_of
from .teacher import Conditions, Teacher


class Merged(torch.autograd.Function):
    """A layer with W + scale * B @ A in the place of W. The merged weight is not kept for the way back, and has no
    gradient of its own: that would cost as much as the layer.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, layer: Any, scale: float
    ) -> torch.Tensor:
        """The layer's output for x."""
        ctx.save_for_backward(x, down, up)
        ctx.layer, ctx.scale = layer, scale
        return _layer(layer, x, _merged(layer, down, up, scale), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x, A and B."""
        (grad,), (x, down, up), layer = grads, ctx.saved_tensors, ctx.layer
        with torch.enable_grad():
            factors = [factor.detach().requires_grad_() for factor in (down, up)]
            change = _change(layer, x.detach(), *factors)
        of_down, of_up = torch.autograd.grad(change, factors, grad.to(change.dtype) * ctx.scale)
        if not ctx.needs_input_grad[0]:
            return None, of_down, of_up, None, None
        weight, grad = _merged(layer, down, up, ctx.scale), grad.to(layer.weight.dtype)
        if isinstance(layer, nn.Conv2d):
            where = (layer.stride, layer.padding, layer.dilation)
            of_x = conv2d_input(x.shape, weight, grad, *where)  # type: ignore[no-untyped-call]
        else:
            of_x = grad @ weight
        return of_x.to(x.dtype), of_down, of_up, None, None


def _layer(layer: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The layer's function with another weight."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)
    return F.linear(x, weight, bias)


def _change(layer: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """B @ (A @ x), in the factors' dtype."""
    inner = _layer(layer, x.to(down.dtype), down)
    return F.conv2d(inner, up) if isinstance(layer, nn.Conv2d) else F.linear(inner, up)


def _merged(layer: Any, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """W + scale * B @ A, rounded once."""
    weight: torch.Tensor = layer.weight
    merged = torch.addmm(weight.to(up.dtype).flatten(1), up.flatten(1), down.flatten(1), alpha=scale)
    return merged.view(weight.shape).to(weight.dtype)


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
        self.merged = config.merged == "on" or (config.merged == "auto" and plain and config.mixed_precision == "no")
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

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [*self.down, *self.up]

    # -- passes -------------------------------------------------------------------------------------------------------

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The LoRA in each layer of the UNet, while the context lasts. All passes stand in such a context."""
        if self.merged:
            with self._in_place():
                yield
            return
        pairs = zip(self.layers.values(), self.down, self.up, strict=True)
        hooks = [layer.register_forward_hook(self._hook(down, up)) for layer, down, up in pairs]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, down: nn.Parameter, up: nn.Parameter) -> Any:
        def add(layer: Any, args: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
            return (out + self.scale * _change(layer, args[0], down, up)).to(out.dtype) if self._adds else out

        return add

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The layers compute with merged weights: each object, not its class, gets another `forward`."""

        def forward(layer: Any, down: nn.Parameter, up: nn.Parameter) -> Any:
            own = layer.forward

            def merged(x: torch.Tensor) -> torch.Tensor:
                if not self._adds:
                    return own(x)  # type: ignore[no-any-return]
                return Merged.apply(x, down, up, layer, self.scale)  # type: ignore[no-any-return, no-untyped-call]

            return merged

        found = {layer: vars(layer).get("forward") for layer in self.layers.values()}
        try:
            for layer, down, up in zip(found, self.down, self.up, strict=True):
                layer.forward = forward(layer, down, up)
            yield
        finally:
            for layer, before in found.items():
                vars(layer).pop("forward", None)
                if before is not None:
                    layer.forward = before

    def __call__(self, z: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The student's prediction, float32, with gradients."""
        return self.teacher.predict(z, t, conditions.alone())

    @torch.no_grad()
    def target(self, z: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The same without gradients."""
        return self.teacher.predict(z, t, conditions.alone())

    def pass_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The UNet's output for arguments by name, in its own dtype."""
        sample, timestep = inputs["sample"], inputs["timestep"]
        rest = {name: value for name, value in inputs.items() if name not in ("sample", "timestep")}
        return self.teacher.predict(sample, timestep, rest).to(sample.dtype)

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
