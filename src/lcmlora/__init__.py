"""LCM-LoRA on any fine-tune: four steps instead of fifty, and the way back.

import lcmlora
pipe = lcmlora.accelerate(pipe)  # 4 steps, guidance 1
lcmlora.restore(pipe)            # bit for bit what it was
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .quiet import IMPORTING, hushed

__version__ = "0.1.0"

_HOME = {
    "Base": "base",
    "BaseModelError": "errors",
    "Benchmark": "benchmarking",
    "CallError": "errors",
    "DataError": "errors",
    "DistillConfig": "distillation",
    "Generated": "generating",
    "LcmLoraError": "errors",
    "LcmLoraWarning": "errors",
    "LoraFileError": "errors",
    "LoraInfo": "lora.files",
    "LoraMismatchError": "errors",
    "LoraSource": "recipe",
    "PipelineError": "errors",
    "Recipe": "recipe",
    "ResizedLora": "distillation.resize",
    "Sheet": "sheets",
    "Status": "state",
    "Style": "transition.target",
    "accelerate": "acceleration",
    "accelerated": "acceleration",
    "again": "generating",
    "bake": "baking",
    "bases": "base",
    "benchmark": "benchmarking",
    "compare": "sheets",
    "detect_base": "base",
    "distill": "distillation",
    "generate": "generating",
    "inspect_lora": "lora.files",
    "is_accelerated": "state",
    "load": "loading",
    "load_baked": "baking",
    "load_pocket": "pocket",
    "recipes": "recipe",
    "register": "recipe",
    "resize_lora": "distillation.resize",
    "restore": "acceleration",
    "set_styles": "acceleration",
    "status": "state",
    "styled": "acceleration",
    "sweep": "sheets",
    "sweep_guidance": "sheets",
    "sweep_steps": "sheets",
    "sweep_weights": "sheets",
    "unregister": "recipe",
}

__all__ = sorted(_HOME)
_MODULES = ("pocket", "testing")  # `lcmlora.pocket.STYLE` works without an import of its own

if TYPE_CHECKING:
    from . import pocket as pocket
    from . import testing as testing
    from .acceleration import accelerate as accelerate
    from .acceleration import accelerated as accelerated
    from .acceleration import restore as restore
    from .acceleration import set_styles as set_styles
    from .acceleration import styled as styled
    from .baking import bake as bake
    from .baking import load_baked as load_baked
    from .base import Base as Base
    from .base import bases as bases
    from .base import detect_base as detect_base
    from .benchmarking import Benchmark as Benchmark
    from .benchmarking import benchmark as benchmark
    from .distillation import DistillConfig as DistillConfig
    from .distillation import distill as distill
    from .distillation.resize import ResizedLora as ResizedLora
    from .distillation.resize import resize_lora as resize_lora
    from .errors import BaseModelError as BaseModelError
    from .errors import CallError as CallError
    from .errors import DataError as DataError
    from .errors import LcmLoraError as LcmLoraError
    from .errors import LcmLoraWarning as LcmLoraWarning
    from .errors import LoraFileError as LoraFileError
    from .errors import LoraMismatchError as LoraMismatchError
    from .errors import PipelineError as PipelineError
    from .generating import Generated as Generated
    from .generating import again as again
    from .generating import generate as generate
    from .loading import load as load
    from .lora.files import LoraInfo as LoraInfo
    from .lora.files import inspect_lora as inspect_lora
    from .pocket import load_pocket as load_pocket
    from .recipe import LoraSource as LoraSource
    from .recipe import Recipe as Recipe
    from .recipe import recipes as recipes
    from .recipe import register as register
    from .recipe import unregister as unregister
    from .sheets import Sheet as Sheet
    from .sheets import compare as compare
    from .sheets import sweep as sweep
    from .sheets import sweep_guidance as sweep_guidance
    from .sheets import sweep_steps as sweep_steps
    from .sheets import sweep_weights as sweep_weights
    from .state import Status as Status
    from .state import is_accelerated as is_accelerated
    from .state import status as status
    from .transition.target import Style as Style


if not TYPE_CHECKING:  # a type checker would take it as a promise that any name exists

    def __getattr__(name: str) -> Any:
        """Import a public name's module only when the name is used: `import lcmlora` itself loads neither torch nor
        diffusers.
        """
        if name in _MODULES:
            return import_module(f".{name}", __name__)
        if name not in _HOME:
            raise AttributeError(f"module 'lcmlora' has no attribute {name!r}")
        with hushed(*IMPORTING):
            value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return [*__all__, *_MODULES, "__version__"]
