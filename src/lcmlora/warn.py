"""One way to warn: the warning names the line of the user's own code that led to it."""

from __future__ import annotations

import inspect
import warnings

from .errors import LcmLoraWarning

_BETWEEN = frozenset({"lcmlora", "torch", "diffusers", "diffusers_modules", "contextlib"})
"""Top-level modules whose frames may stand between the user's code and a warning of ours. `diffusers_modules` holds
the community pipelines that diffusers loads."""


def warn(message: str) -> None:
    """Warn with `LcmLoraWarning`, at the innermost line that is neither this package's nor the frameworks'."""
    frame = inspect.currentframe()
    depth = 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, LcmLoraWarning, stacklevel=depth)
