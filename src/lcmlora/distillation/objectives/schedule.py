"""Consistency towards the timesteps that few steps visit: TDD (arXiv 2409.01347), PCM (2405.18407), TCD (2402.19159).

TDD's targets are near, which makes 4 and 8 steps exact, and leaves what one and two steps do untrained; TCD's are
anywhere below. Half of the examples have either here: see docs/distillation.md.

f(z_t, t -> r) = alpha_r z_0 + sigma_r eps, with the prediction's own z_0 and eps: a DDIM step to r, the identity at
r = t. Student and target both go to the same r. For TCDScheduler.
"""

from __future__ import annotations

import torch

from ..config import DistillConfig
from ..draws import Draws
from ..solver import pseudo_huber, visited
from ..student import Student
from .batch import Batch, segment

REACH = 260
"""How far below a point its target timestep lies in half of the examples (TDD: within 260 of 1000)."""


class Schedule:
    """d(f(z_t, t -> r), f(z_s, s -> r)), s the next point below t, r <= s a timestep that a schedule visits."""

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        self._visited = [*visited(), 0]

    def __call__(self, student: Student, batch: Batch, draws: Draws) -> torch.Tensor:
        """See `Objective`."""
        z_t, t, z_s, s = segment(student, batch, draws, self.config)
        least = [0 if far else here - REACH for far, here in zip(draws.below(2).tolist(), s.tolist(), strict=True)]
        reached = [
            [r for r in self._visited if low <= r <= here] or [0] for low, here in zip(least, s.tolist(), strict=True)
        ]
        chosen = draws.below([len(targets) for targets in reached]).tolist()
        r = torch.tensor([targets[i] for targets, i in zip(reached, chosen, strict=True)])
        solver = student.teacher.solver
        f_t = solver.noisy(*solver.split(student(z_t, t, batch.conditions), z_t, t), r)
        f_s = solver.noisy(*solver.split(student.target(z_s, s, batch.conditions), z_s, s), r)
        return pseudo_huber(f_t, f_s, self.config.huber_c, self.config.loss)
