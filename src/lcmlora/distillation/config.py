"""What a distillation can be told. Nothing here needs torch, so that a command line can list it at once."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import DataError, brief
from .presets import PRESETS


def _set(default: Any, help: str, *, free: bool = False) -> Any:
    """A field with its help. `free`: a run may go on with another value, as it changes nothing that is learned."""
    return dataclasses.field(default=default, metadata={"help": help, "free": free})


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Settings of `distill`. The defaults are those of the LCM-LoRA report where it gives them.

    `DistillConfig.preset("paths")` has those of another objective. Each field's help is in its metadata too.

    Args:
    """

    objective: Literal["lcm", "paths", "schedule"] = _set(
        "lcm",
        "what is learned: 'lcm' (latent consistency), 'paths' (regression onto the teacher's own paths, computed "
        "once), or 'schedule' (consistency towards the timesteps that few steps visit, as TDD and PCM).",
    )
    then: Literal["none", "lcm", "paths", "schedule"] = _set("none", "the objective of a second stage.")
    then_steps: int = _set(0, "how many of the steps, the last ones, are the second stage's.")
    then_learning_rate: float = _set(0.0, "peak rate of the second stage; 0 is learning_rate.")
    rank: int = _set(64, "the LoRA's rank.")
    alpha: float | None = _set(None, "the LoRA's alpha, which counts with alpha / rank. None is rank.")
    steps: int = _set(1000, "optimizer steps, all stages together.")
    batch_size: int = _set(12, "examples a step and process.")
    gradient_accumulation: int = _set(1, "passes whose gradients are averaged into one optimizer step.")
    learning_rate: float = _set(1e-4, "peak rate of AdamW.")
    warmup: int = _set(0, "steps over which the rate rises from 0, in each stage.")
    schedule: Literal["constant", "cosine"] = _set(
        "constant", "the rate after that: 'constant', or 'cosine' down to a hundredth by the stage's end."
    )
    optimizer: Literal["adamw", "adamw8bit"] = _set("adamw", "'adamw8bit' keeps its state in 8 bits (bitsandbytes).")
    weight_decay: float = _set(1e-2, "AdamW's.")
    max_grad_norm: float = _set(1.0, "the gradient's norm is clipped to this.")
    w: float = _set(
        7.5,
        "guidance distilled in, as in the LCM paper's equation 14: eps = (1 + w) eps_cond - w eps_uncond, so "
        "w = guidance_scale - 1. The LCM-LoRA report fixes 7.5.",
    )
    solver_steps: int = _set(50, "timesteps of the DDIM solver; it has to divide the teacher's 1000.")
    points: Literal["noised", "paths"] = _set(
        "noised",
        "where 'lcm' and 'schedule' have z_t and its next point from: 'noised' latents and a step of the teacher, or "
        "two neighbours on the teacher's cached 'paths'.",
    )
    paths: int = _set(1, "how many of the teacher's paths are drawn for each prompt, each from a noise of its own.")
    huber_c: float = _set(1e-3, "the pseudo-Huber loss's c, in units of latents; below it errors count squared.")
    loss: Literal["element", "sample"] = _set(
        "element", "whether that loss is taken of each latent 'element', or of each 'sample' (their mean square)."
    )
    ema: float = _set(0.0, "decay of the average of the LoRA's weights that is saved; 0 saves the last weights.")
    resolution: int | None = _set(None, "side of the training pictures in pixels. None is the UNet's own.")
    random_flip: bool = _set(
        False, "mirror every second picture (not for pictures with words, or captions with sides)."
    )
    center_crop: bool = _set(False, "crop the middle of each picture, not a random place.")
    buckets: bool = _set(False, "keep the pictures' shapes: batches of one of some sizes each, instead of squares.")
    views: int = _set(1, "how many drawn crops and mirrorings of each picture are cached.")
    cache: bool = _set(
        True,
        "compute latents and text embeddings once and keep them on disk; off, every step encodes its pictures and "
        "prompts anew. The teacher's paths are always kept.",
    )
    cache_dir: str = _set("", "folder of the cache; runs may share it. Empty: 'cache' in the output.", free=True)
    cache_limit: float = _set(50.0, "GB that the cache may take on disk.", free=True)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = _set(
        "auto",
        "of the frozen teacher; the LoRA's own weights are float32 always. 'auto' is a pipeline's own, and float32 "
        "for one that is loaded.",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = _set("no", "'no', 'fp16' or 'bf16', as Accelerate's.")
    merged: Literal["auto", "on", "off"] = _set(
        "auto",
        "compute the student's layers with merged weights, W + BA, or with the LoRA beside each. 'auto' merges on a "
        "CPU in float32, where that is faster.",
    )
    gradient_checkpointing: bool = _set(
        False, "recompute activations in the backward pass: a third slower, much less memory."
    )
    compile: bool = _set(False, "compile the UNet's repeated blocks (torch.compile): slow to start, then faster.")
    kohya: bool = _set(False, "also write a copy in kohya's layout, for ComfyUI and A1111.", free=True)
    checkpoint_every: int = _set(
        500, "steps between checkpoints; 0 writes none. A run resumes from the one in its output folder.", free=True
    )
    validate_every: int = _set(500, "steps between validation sheets, and one at the end; 0 makes none.", free=True)
    log_every: int = _set(10, "steps between lines of log.jsonl.", free=True)
    trackers: str = _set(
        "", "names of Accelerate's trackers, such as 'tensorboard,wandb', beside log.jsonl.", free=True
    )
    workers: int = _set(0, "processes that load pictures; 0 loads them in the training process.", free=True)
    seed: int = _set(0, "of everything random; with the same seed a resumed run equals an uninterrupted one.")

    def __post_init__(self) -> None:
        """Refuse settings that no run could use.

        Raises:
            DataError: naming the setting.
        """
        for name, kind in get_type_hints(type(self)).items():
            _check_kind(name, getattr(self, name), kind)
        for name in (
            "rank",
            "steps",
            "batch_size",
            "gradient_accumulation",
            "log_every",
            "solver_steps",
            "paths",
            "views",
        ):
            if getattr(self, name) < 1:
                raise DataError(f"{name}={getattr(self, name)!r}: at least 1 is expected.")
        for name in ("learning_rate", "max_grad_norm", "huber_c", "cache_limit", "alpha"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise DataError(f"{name}={getattr(self, name)!r}: a number above 0 is expected.")
        for name in ("w", "weight_decay", "warmup", "then_learning_rate", "checkpoint_every", "validate_every",
                     "workers", "seed"):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise DataError(f"{name}={getattr(self, name)!r}: 0 or more is expected.")
        if not 0 <= self.ema < 1:
            raise DataError(f"ema={self.ema!r}: 0 (off) or a decay below 1, such as 0.995, is expected.")
        if self.resolution is not None and self.resolution < 8:
            raise DataError(f"resolution={self.resolution!r}: a side in pixels is expected.")
        if (self.then == "none") != (self.then_steps == 0) or not 0 <= self.then_steps < self.steps:
            raise DataError(
                f"then={self.then!r} and then_steps={self.then_steps}: a second stage needs both, and fewer steps "
                f"than the {self.steps} of the whole run."
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DistillConfig:
        """Settings with a name, and changes to them. With other `steps` a second stage has the same share of them.

        Args:
            name: "lcm", "paths", "schedule", "paths-schedule" or "paths-lcm".
            changes: settings that differ from it.

        Raises:
            DataError: there is no such preset or setting.
        """
        if name not in PRESETS:
            raise DataError(f"preset {name!r} is not known; there are {', '.join(map(repr, PRESETS))}.")
        if odd := sorted(changes.keys() - {field.name for field in dataclasses.fields(cls)}):
            raise DataError(f"{', '.join(odd)}: DistillConfig has no such setting.")
        settings = {**PRESETS[name], **changes}
        if "then_steps" in PRESETS[name] and "then_steps" not in changes and isinstance(settings["steps"], int):
            settings["then_steps"] = max(1, PRESETS[name]["then_steps"] * settings["steps"] // PRESETS[name]["steps"])
        return cls(**settings)

    @property
    def lora_alpha(self) -> float:
        """The alpha in force."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def stages(self) -> tuple[tuple[str, int, int, float], ...]:
        """(objective, first step, step after the last, peak rate) of each stage."""
        first = self.steps - self.then_steps
        one = (self.objective, 0, first, self.learning_rate)
        rate = self.then_learning_rate or self.learning_rate
        return (one,) if self.then == "none" else (one, (self.then, first, self.steps, rate))

    @property
    def recipe(self) -> str:
        """How the result is to be driven, a name in `lcmlora.recipes()`: by what was learned last."""
        return "lcm" if self.stages[-1][0] == "lcm" else "tcd"


def _check_kind(name: str, value: Any, kind: Any) -> None:
    """Refuse a value of another type than its field's."""
    allowed = get_args(kind)
    if get_origin(kind) is Literal:
        if value not in allowed:
            words = f"{', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}"
            raise DataError(f"{name}={value!r}: {words} is expected.")
        return
    if value is None and type(None) in allowed:
        return
    wanted = next((one for one in allowed if one is not type(None)), kind)
    takes = (int, float) if wanted is float else (wanted,)
    if not isinstance(value, takes) or (isinstance(value, bool) and wanted is not bool):
        words = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}[wanted]
        raise DataError(f"{name}={brief(value)}: {words} is expected.")


def _documented() -> str:
    lines = [f"        {field.name}: {field.metadata['help']}" for field in dataclasses.fields(DistillConfig)]
    return f"{(DistillConfig.__doc__ or '').rstrip()}\n" + "\n".join(lines) + "\n"


DistillConfig.__doc__ = _documented()
