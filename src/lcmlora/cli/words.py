"""The shell's words for what the library's messages call by Python's names."""

from __future__ import annotations

import re

_OPTIONS = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "negative_prompt": "negative",
    "mask_image": "mask",
    "styles": "style",
    **{
        name: name.replace("_", "-")
        for name in (
            *("base", "recipe", "lora", "weight_name", "weight", "fuse", "vae", "overwrite", "resume", "strict"),
            *("steps", "guidance", "strength", "seed", "size", "image", "batch_size", "batch_sizes", "rows", "out"),
            *("alpha", "rank"),
            *("learning_rate", "warmup", "schedule", "ema", "huber_c", "max_grad_norm", "solver_steps", "resolution"),
            *("gradient_accumulation", "log_every", "mixed_precision", "then", "then_steps", "then_learning_rate"),
            *("weight_decay", "cache_dir", "cache_limit", "checkpoint_every", "validate_every", "trackers", "workers"),
            *("views", "paths", "optimizer", "merged", "text_column", "image_column", "dtype", "objective", "points"),
            *("w", "loss", "cache", "kohya", "random_flip", "center_crop", "buckets", "gradient_checkpointing"),
        )
    },
}
"""A Python argument -> the option that says it in the shell."""
_LONGEST_FIRST = "|".join(sorted(_OPTIONS, key=len, reverse=True))
_VALUE = r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|[\w.+-]*[\w+-]"
_ARGUMENT = re.compile(rf"(?<![\w.\"'-])({_LONGEST_FIRST})=({_VALUE})?")
_PHRASES = (
    (r"accelerate\(guidance=None\)|guidance=None", "--no-guidance-limit"),
    (r"(?:lcmlora\.)?accelerate\(enforce_inference_steps=False\)|enforce_inference_steps=False", "--diffusers-steps"),
    (r"lcmlora\.Style\(source, weight(?:, '[^']*')?\)", "--style name=source:weight"),
    (r"styles=\{\}", "no --style"),
    (r"overwrite=True", "--overwrite"),
    (r"base=False", "--no-compare"),
)
_WRAPPED = re.compile(r"(?:lcmlora\.)?accelerate\((?:pipe, )?(--[^()]*)\)")


def in_shell_words(message: str) -> str:
    """A message of the library as the shell's user can follow it: `fuse=False` is `--no-fuse`."""
    for pattern, words in _PHRASES:
        message = re.sub(pattern, words, message)
    return _WRAPPED.sub(r"\1", _ARGUMENT.sub(_option, message))


def _option(found: re.Match[str]) -> str:
    name, value = _OPTIONS[found[1]], found[2]
    if value is None:
        return f"--{name}"
    if value in ("True", "False"):
        return f"--{'no-' * (value == 'False')}{name}"
    return f"--{name} {value}"
