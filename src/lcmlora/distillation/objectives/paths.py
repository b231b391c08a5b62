"""Direct regression onto the teacher's own paths, which were computed once: neither teacher nor target pass.

After CMT (2025: every point of a teacher's path is regressed to its end), with a choice of targets: the student's
f(z_t, t -> s) = alpha_s z_0 + sigma_s eps is drawn to the path's own z_s, for the steps that samplers of few steps
make. For TCDScheduler. Row F of the table in docs/distillation.md.
"""

from __future__ import annotations

import torch

from ..config import DistillConfig
from ..draws import Draws
from ..solver import MOST_STEPS, few_steps, pseudo_huber, visited
from ..student import Student
from .batch import Batch


class Paths:
    """d(f(z_t, t -> s), z_s) for two points of one path.

    t: for half of the examples any point, for the others a step of a schedule of n ~ U{1 .. 8} steps.
    s: any visited timestep at or below the point after t, or the path's end.
    """

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        self._schedules = [few_steps(n) for n in range(1, MOST_STEPS + 1)]
        self._targets = frozenset([*visited(), 0])

    def __call__(self, student: Student, batch: Batch, draws: Draws) -> torch.Tensor:
        """See `Objective`."""
        i, j = self.choose(batch, draws)
        (z_t, t), (z_s, s) = batch.at(i), batch.at(j)
        solver = student.teacher.solver
        f_t = solver.noisy(*solver.split(student(z_t, t, batch.conditions), z_t, t), s)
        return pseudo_huber(f_t, z_s, self.config.huber_c, self.config.loss)

    def choose(self, batch: Batch, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """Which points of each path are t and s."""
        assert batch.grid is not None
        grid = batch.grid.tolist()
        place = {t: point for point, t in enumerate(grid)}
        anywhere, half = draws.below(len(grid) - 1).tolist(), draws.below(2).tolist()
        schedules = [self._schedules[n] for n in draws.below(MOST_STEPS).tolist()]
        steps = draws.below([len(schedule) for schedule in schedules]).tolist()
        points = [
            point if uniform else place[schedule[step]]
            for point, uniform, schedule, step in zip(anywhere, half, schedules, steps, strict=True)
        ]
        ends = [[j for j in range(point + 1, len(grid)) if grid[j] in self._targets] for point in points]
        chosen = draws.below([len(targets) for targets in ends]).tolist()
        return torch.tensor(points), torch.tensor([targets[c] for targets, c in zip(ends, chosen, strict=True)])
