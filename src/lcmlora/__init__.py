"""LCM-LoRA on any fine-tune: four steps instead of fifty, and the way back.

import lcmlora
pipe = lcmlora.accelerate(pipe)  # 4 steps, guidance 1
lcmlora.restore(pipe)            # bit for bit what it was
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Base": "registry",
    "BaseModelError": "errors",
    "CallError": "errors",
    "DataError": "errors",
    "DistillConfig": "distillation",
    "LcmLoraError": "errors",
    "LcmLoraWarning": "errors",
    "LoraFileError": "errors",
    "LoraInfo": "lorafile",
    "LoraMismatchError": "errors",
    "PipelineError": "errors",
    "Sheet": "sheets",
    "Status": "state",
    "Style": "plan",
    "accelerate": "acceleration",
    "accelerated": "acceleration",
    "bake": "baking",
    "bases": "registry",
    "compare": "sheets",
    "detect_base": "registry",
    "distill": "distillation",
    "inspect_lora": "lorafile",
    "is_accelerated": "state",
    "load_pocket": "pocket",
    "register": "registry",
    "restore": "acceleration",
    "set_styles": "restyling",
    "status": "state",
    "sweep_guidance": "sheets",
    "sweep_steps": "sheets",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .acceleration import accelerate as accelerate
    from .acceleration import accelerated as accelerated
    from .acceleration import restore as restore
    from .baking import bake as bake
    from .distillation import DistillConfig as DistillConfig
    from .distillation import distill as distill
    from .errors import BaseModelError as BaseModelError
    from .errors import CallError as CallError
    from .errors import DataError as DataError
    from .errors import LcmLoraError as LcmLoraError
    from .errors import LcmLoraWarning as LcmLoraWarning
    from .errors import LoraFileError as LoraFileError
    from .errors import LoraMismatchError as LoraMismatchError
    from .errors import PipelineError as PipelineError
    from .lorafile import LoraInfo as LoraInfo
    from .lorafile import inspect_lora as inspect_lora
    from .plan import Style as Style
    from .pocket import load_pocket as load_pocket
    from .registry import Base as Base
    from .registry import bases as bases
    from .registry import detect_base as detect_base
    from .registry import register as register
    from .restyling import set_styles as set_styles
    from .sheets import Sheet as Sheet
    from .sheets import compare as compare
    from .sheets import sweep_guidance as sweep_guidance
    from .sheets import sweep_steps as sweep_steps
    from .state import Status as Status
    from .state import is_accelerated as is_accelerated
    from .state import status as status


def __getattr__(name: str) -> Any:
    """Import a public name's module only when the name is used: `import lcmlora` itself loads neither torch nor
    diffusers.
    """
    if name not in _HOME:
        raise AttributeError(f"module 'lcmlora' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
