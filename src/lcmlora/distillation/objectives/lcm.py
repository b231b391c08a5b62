"""Latent consistency distillation: Luo et al. 2023, arXiv 2310.04378, algorithm 1, and 2311.05556 for a LoRA.

f(z_t, t) = c_skip(t) z_t + c_out(t) z_0 is drawn to its own value at the next point of the teacher's path.
"""

from __future__ import annotations

import torch

from ..config import DistillConfig
from ..draws import Draws
from ..solver import pseudo_huber
from ..student import Student
from .batch import Batch, segment


class Lcm:
    """d(f(z_{t_n+k}, c, t_n+k), f(z^_{t_n}, c, t_n)), z^ by one guided step of the teacher."""

    def __init__(self, config: DistillConfig) -> None:
        self.config = config

    def __call__(self, student: Student, batch: Batch, draws: Draws) -> torch.Tensor:
        """See `Objective`."""
        z_t, t, z_s, s = segment(student, batch, draws, self.config)
        solver = student.teacher.solver
        f_t = solver.consistency(student(z_t, t, batch.conditions), z_t, t)
        f_s = solver.consistency(student.target(z_s, s, batch.conditions), z_s, s)
        return pseudo_huber(f_t, f_s, self.config.huber_c, self.config.loss)
