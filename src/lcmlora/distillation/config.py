"""What a distillation can be told."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..errors import DataError


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Settings of `distill`. The defaults are those of the LCM-LoRA report where it gives them.

    Args:
        rank: the LoRA's rank.
        alpha: the LoRA's alpha, which counts with alpha / rank. None is `rank`.
        steps: optimizer steps.
        batch_size: pictures a step and process.
        gradient_accumulation: passes whose gradients are averaged into one optimizer step.
        learning_rate: peak rate of AdamW.
        warmup: steps over which the rate rises from 0.
        schedule: the rate after that: "constant", or "cosine" down to a hundredth.
        weight_decay: AdamW's.
        max_grad_norm: the gradient's norm is clipped to this.
        w: guidance distilled in, as in the LCM paper's equation 14: eps = (1 + w) eps_cond - w eps_uncond, so
            w = guidance_scale - 1. The LCM-LoRA report fixes 7.5.
        solver_steps: timesteps of the DDIM solver; `skip` schedule steps lie between two of them (50 and 20 of 1000).
        huber_c: the pseudo-Huber loss's c, in units of latents; below it errors count squared.
        ema: decay of the average of the LoRA's weights that is saved; 0 saves the last weights.
        resolution: side of the training pictures in pixels. None is the UNet's own.
        random_flip: mirror every second picture (not for pictures with words, or captions with sides).
        mixed_precision: "no", "fp16" or "bf16", as Accelerate's. The LoRA's own weights are float32 always.
        gradient_checkpointing: recompute activations in the backward pass: a third slower, much less memory.
        checkpoint_every: steps between checkpoints; 0 writes none. A run resumes from the newest in its output folder.
        log_every: steps between lines of `log.jsonl`.
        workers: processes that load pictures; 0 loads them in the training process.
        seed: of everything random; with the same seed a resumed run equals an uninterrupted one.
    """

    rank: int = 64
    alpha: float | None = None
    steps: int = 1000
    batch_size: int = 12
    gradient_accumulation: int = 1
    learning_rate: float = 1e-4
    warmup: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    w: float = 7.5
    solver_steps: int = 50
    huber_c: float = 1e-3
    ema: float = 0.0
    resolution: int | None = None
    random_flip: bool = False
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 500
    log_every: int = 10
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that no run could use.

        Raises:
            DataError: naming the setting.
        """
        for name in ("rank", "steps", "batch_size", "gradient_accumulation", "log_every", "solver_steps"):
            if getattr(self, name) < 1:
                raise DataError(f"{name}={getattr(self, name)!r}: at least 1 is expected.")
        for name in ("learning_rate", "max_grad_norm", "huber_c"):
            if not getattr(self, name) > 0:
                raise DataError(f"{name}={getattr(self, name)!r}: a number above 0 is expected.")
        if not 0 <= self.ema < 1:
            raise DataError(f"ema={self.ema!r}: 0 (off) or a decay below 1, such as 0.995, is expected.")
        if self.schedule not in ("constant", "cosine"):
            raise DataError(f"schedule={self.schedule!r}: 'constant' or 'cosine' is expected.")

    @property
    def lora_alpha(self) -> float:
        """The alpha in force."""
        return float(self.rank if self.alpha is None else self.alpha)
