"""What the tests of distillation share: small settings, and a student outside of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig

from lcmlora.distillation import DistillConfig
from lcmlora.distillation.student import Student
from lcmlora.distillation.teacher import Teacher, borrowed
from lcmlora.layers import TARGET_MODULES

CONFIG: dict[str, Any] = {
    "rank": 4,
    "steps": 4,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "checkpoint_every": 2,
    "log_every": 2,
    "validate_every": 0,
}
PROMPTS = ["a fox", "a cat", "a red dog", "an owl"]


@contextmanager
def students(pipe: Any, **settings: Any) -> Iterator[Student]:
    """A student of a pipe, with factors that make a difference."""
    config = DistillConfig(**{**CONFIG, **settings})
    with borrowed(pipe):
        student = Student(Teacher(pipe, config, torch.device("cpu")), config)
        for i, up in enumerate(student.up):
            up.data.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
        with student.attached():
            yield student


def peft_unet(unet: Any, student: Student) -> Any:
    """The same LoRA as an adapter of PEFT's, in a UNet of its own."""
    other = type(unet).from_config(unet.config)
    other.load_state_dict(unet.state_dict())
    other.requires_grad_(False)
    other.add_adapter(
        LoraConfig(r=student.rank, lora_alpha=student.alpha, target_modules=list(TARGET_MODULES)), adapter_name="x"
    )
    for name, down, up in zip(student.layers, student.down, student.up, strict=True):
        wrapper = other.get_submodule(name)
        wrapper.lora_A["x"].weight.data.copy_(down.data)
        wrapper.lora_B["x"].weight.data.copy_(up.data)
    return other
