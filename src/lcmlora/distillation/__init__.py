"""Distil one's own LCM-LoRA: latent consistency distillation of a LoRA (arXiv 2310.04378 and 2311.05556).

`config` what can be set, `data` pictures and captions, `solver` the formulas, `loop` the training, `export` the file.
"""

from .config import DistillConfig
from .loop import distill

__all__ = ["DistillConfig", "distill"]
