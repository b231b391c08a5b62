"""What a distillation learns: each objective a small module, in the symbols of its paper."""

from __future__ import annotations

from typing import Protocol

import torch

from ..config import DistillConfig
from ..draws import Draws
from ..student import Student
from .batch import Batch
from .lcm import Lcm
from .paths import Paths
from .schedule import Schedule

__all__ = ["OBJECTIVES", "Batch", "Objective", "needs_paths"]


class Objective(Protocol):
    """A loss of a batch."""

    def __init__(self, config: DistillConfig) -> None: ...

    def __call__(self, student: Student, batch: Batch, draws: Draws) -> torch.Tensor:
        """The loss, with gradients to the student's factors.

        Args:
            student: its passes, and the teacher's.
            batch: what is learned from.
            draws: chance, for each example its own.
        """


OBJECTIVES: dict[str, type[Objective]] = {"lcm": Lcm, "paths": Paths, "schedule": Schedule}


def needs_paths(name: str, config: DistillConfig) -> bool:
    """Whether an objective learns from the teacher's cached paths, not from latents."""
    return name == "paths" or config.points == "paths"
