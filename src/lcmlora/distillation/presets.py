"""Settings with names: what each differs from the defaults in, and where each value is from.

"Our table" is the comparison of objectives on the embedded model in docs/distillation.md: one small model and short
runs, so its rates and ranks are a start for others, no more. What is not set here is `DistillConfig`'s default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "lcm": {  # Luo et al. 2023, arXiv 2311.05556, LCM-LoRA: what the defaults are
        "objective": "lcm",
        "w": 7.5,  # the report
        "learning_rate": 1e-4,  # diffusers, examples/consistency_distillation/README_sdxl.md, LoRA
        "solver_steps": 50,  # the same, num_ddim_timesteps
        "huber_c": 1e-3,  # the same, huber_c
    },
    "paths": {  # our table, row F
        "objective": "paths",
        "w": 3.5,  # TDD (arXiv 2409.01347); PCM (arXiv 2405.18407) has 4 to 5: a fixed w can't be undone later
        "learning_rate": 1e-3,  # our table: 3e-3 is closer by 3 %, but nobody tried it on a large model
        "schedule": "cosine",  # our table
        "warmup": 50,  # our table
        "weight_decay": 0.0,  # our table
        "ema": 0.99,  # our table
    },
    "schedule": {
        "objective": "schedule",
        "points": "paths",  # our table, row D: no teacher pass in training
        "w": 3.5,  # TDD
        "learning_rate": 1e-3,  # our table; TDD trains whole UNets at 1e-6
        "schedule": "cosine",  # our table
        "warmup": 50,  # our table
        "weight_decay": 0.0,  # our table
        "ema": 0.99,  # our table
    },
    "paths-schedule": {  # near by `paths` first, then as sharp as the teacher by `schedule`: our table
        "objective": "paths",
        "then": "schedule",
        "points": "paths",
        "steps": 560,
        "then_steps": 160,
        "learning_rate": 3e-3,
        "then_learning_rate": 1e-3,
        "w": 3.5,  # TDD
        "schedule": "cosine",
        "warmup": 50,
        "weight_decay": 0.0,
        "ema": 0.99,
    },
    "paths-lcm": {  # near by `paths`, then crisp by `lcm` at the higher rate; too high for the model of our table
        "objective": "paths",
        "then": "lcm",
        "steps": 1000,
        "then_steps": 250,
        "learning_rate": 1e-3,
        "then_learning_rate": 3e-3,
        "w": 3.5,
        "schedule": "cosine",
        "warmup": 50,
        "weight_decay": 0.0,
        "ema": 0.99,
    },
}
