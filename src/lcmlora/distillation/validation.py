"""Watching a run: what the student draws in few steps, beside what the teacher draws from the same noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, TCDScheduler

from ..sheets.axes import in_steps
from ..sheets.sheet import Cell, Line, Sheet
from ..writing import whole
from .batches import Batches
from .config import DistillConfig
from .student import Student

FOLDER = "validation"
STEPS = (1, 2, 4, 8)
PROMPTS = 8
"""How many of the data's texts are drawn where nobody names others."""


@dataclasses.dataclass(frozen=True)
class Validation:
    """A sheet and its numbers.

    Attributes:
        sheet: the picture's file.
        rel: for each number of steps, the distance of the student's latents to the teacher's, relative to theirs.
    """

    sheet: Path
    rel: dict[int, float]

    @property
    def score(self) -> float:
        """What the best checkpoint has least of: the mean over 2, 4 and 8 steps. One step is another matter."""
        few = [distance for steps, distance in self.rel.items() if steps > 1]
        return sum(few) / len(few)


def forget(output: Path, step: int) -> None:
    """Delete the sheets of later steps: they will come again, or are another run's."""
    for sheet in (output / FOLDER).glob("step-*.png"):
        number = sheet.stem.removeprefix("step-")
        if number.isdigit() and int(number) > step:
            sheet.unlink()


class Validator:
    """Draws some prompts from fixed noises.

    Args:
        batches: whose cache keeps the teacher's own paths, computed once.
        prompts: what to draw.
        config: the run's settings.
        output: the run's folder.
    """

    def __init__(self, batches: Batches, prompts: Sequence[str], config: DistillConfig, output: Path) -> None:
        self.batches, self.config, self.folder = batches, config, output / FOLDER
        self.prompts = [(prompt, -1 - i) for i, prompt in enumerate(prompts)]  # no number of a training path
        self.seconds = batches.embed(prompts) + batches.draw(self.prompts)
        self.reference = torch.stack([batches.path(*prompt)[-1] for prompt in self.prompts])
        self._pictures: list[Any] | None = None

    @torch.no_grad()
    def __call__(self, student: Student, step: int) -> Validation:
        """Draw the sheet of a step.

        Raises:
            LcmLoraError: it can't be written.
        """
        teacher = self.batches.teacher
        if self._pictures is None:
            self._pictures = teacher.decode(self.reference)
        columns, rel = [], {}
        for steps in STEPS:
            z_0 = self.sample(student, steps).cpu()
            rel[steps] = float((z_0 - self.reference).norm() / self.reference.norm())
            columns.append(teacher.decode(z_0))
        names = [*map(in_steps, STEPS), "teacher"]
        cells = [tuple(Cell(image, {}) for image in line) for line in zip(*columns, self._pictures, strict=True)]
        sheet = Sheet(tuple(cells), tuple(names), tuple(Line(prompt) for prompt, _ in self.prompts))
        file = self.folder / f"step-{step:06d}.png"
        with whole(file) as partial:
            sheet.image.save(partial, format="PNG")
        return Validation(file, rel)

    def sample(self, student: Student, steps: int) -> torch.Tensor:
        """Latents that the student draws, by the scheduler its file will be driven by (TCDScheduler without noise)."""
        teacher, lcm = student.teacher, self.config.recipe == "lcm"
        kind: Any = LCMScheduler if lcm else TCDScheduler
        scheduler = kind(trained_betas=teacher.solver.betas, prediction_type=teacher.solver.prediction_type)
        scheduler.set_timesteps(steps, device=teacher.device)
        extra = {"generator": torch.Generator().manual_seed(0)} if lcm else {"eta": 0.0}
        z = torch.stack([self.batches.noise(*prompt) for prompt in self.prompts]).to(teacher.device)
        conditions = self.batches.cached([prompt for prompt, _ in self.prompts])
        for t in scheduler.timesteps:
            prediction = student.target(z, t.expand(len(z)), conditions)
            z, z_0 = scheduler.step(prediction, t, z, **extra, return_dict=False)
        return z_0.float()  # type: ignore[no-any-return]
