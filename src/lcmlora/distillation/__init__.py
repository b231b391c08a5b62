"""Distil one's own few-step LoRA: only an adapter is trained, from any teacher (arXiv 2310.04378, 2311.05556).

`config`, `presets` what can be set; `data` pictures and captions; `teacher` the frozen pipeline; `cache`, `paths` what
is computed once; `solver` the formulas; `objectives` what is learned; `student` the LoRA; `loop` the training;
`validation` how far it is; `export` the file. `config` and `presets` need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import DistillConfig

if TYPE_CHECKING:
    from .loop import distill

__all__ = ["DistillConfig", "distill"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import the training, and torch with it, only when it is used."""
        if name != "distill":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module(".loop", __name__).distill
