"""AdamW, and the learning rate over a stage of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import LcmLoraError
from .config import DistillConfig


def make(parameters: Sequence[nn.Parameter], config: DistillConfig) -> torch.optim.Optimizer:
    """The optimizer.

    Raises:
        LcmLoraError: the 8-bit one is not installed.
    """
    kind: Any = torch.optim.AdamW
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            raise LcmLoraError("optimizer='adamw8bit' needs bitsandbytes: pip install bitsandbytes") from error
        kind = bitsandbytes.optim.AdamW8bit
    elif all(parameter.device.type == "cpu" for parameter in parameters):
        settings["fused"] = True  # a quarter of the time: a LoRA has hundreds of small tensors
    optimizer: torch.optim.Optimizer = kind(list(parameters), **settings)
    return optimizer


def rate(step: int, stage: tuple[str, int, int, float], config: DistillConfig) -> float:
    """The learning rate at a step of a stage: (objective, first step, step after the last, peak rate)."""
    _, first, last, peak = stage
    step, steps = step - first, last - first
    if step < config.warmup:
        return peak * (step + 1) / config.warmup
    if config.schedule == "constant":
        return peak
    done = (step - config.warmup) / max(1, steps - config.warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
