"""What a loss is computed of, and the two points on a path of the teacher that consistency compares."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from ..config import DistillConfig
from ..draws import Draws
from ..student import Student
from ..teacher import Conditions


@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples, each with what was computed of it.

    Attributes:
        conditions: what the UNet is told.
        z_0: latents of pictures, or ends of the teacher's paths, (batch, channels, height, width), float32.
        path: the teacher's paths (batch, points, channels, height, width); None where the objective needs none.
        grid: the timesteps of those points, the noisiest first.
    """

    conditions: Conditions
    z_0: torch.Tensor
    path: torch.Tensor | None = None
    grid: torch.Tensor | None = None

    def at(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(z_t, t) of one point of each path."""
        assert self.path is not None
        assert self.grid is not None
        rows = torch.arange(len(points))
        return self.path[rows, points.to(self.path.device)], self.grid[points]


class Segment(NamedTuple):
    """z_t and the point z_s of the same path, a solver's step on, s < t."""

    z_t: torch.Tensor
    t: torch.Tensor
    z_s: torch.Tensor
    s: torch.Tensor


def segment(student: Student, batch: Batch, draws: Draws, config: DistillConfig) -> Segment:
    """Two neighbouring points: of a cached path, or noised latents and the teacher's guided DDIM step from there."""
    if config.points == "paths":
        assert batch.grid is not None
        points = draws.below(len(batch.grid) - 1)
        return Segment(*batch.at(points), *batch.at(points + 1))
    solver = student.teacher.solver
    t, s = solver.timesteps(draws.below(config.solver_steps))
    z_t = solver.noisy(batch.z_0, draws.normal(batch.z_0), t)
    guided = student.guided(z_t, t, batch.conditions)
    return Segment(z_t, t, solver.noisy(*solver.split(guided, z_t, t), s), s)
