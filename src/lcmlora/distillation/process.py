"""What surrounds a run in its process: Accelerate, and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import compat
from ..errors import LcmLoraError
from .config import DistillConfig

_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_XPU", "MULTI_MLU", "MULTI_HPU")


@contextmanager
def accelerating(config: DistillConfig, output: Path) -> Iterator[Any]:
    """An `Accelerator` for one run; the next run in this process may have another.

    Raises:
        LcmLoraError: Accelerate is not installed, or can't do what the settings ask for.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise LcmLoraError("distill needs Hugging Face Accelerate: pip install 'lcmlora[train]'") from error
    others = compat.accelerate_in_use()
    trackers = [name.strip() for name in config.trackers.split(",") if name.strip()]
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation,
            log_with=trackers or None,
            project_dir=str(output),
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise LcmLoraError(
            f"Accelerate refuses mixed_precision={config.mixed_precision!r} or trackers={config.trackers!r}: {error}"
        ) from error
    try:
        if missing := sorted(set(trackers) - {str(getattr(name, "value", name)) for name in accelerator.log_with}):
            raise LcmLoraError(f"trackers={config.trackers!r}: {', '.join(missing)} is not installed.")
        if accelerator.distributed_type.value not in _KINDS:
            raise LcmLoraError(
                f"distill runs in one process or several with a whole UNet each, not under "
                f"{accelerator.distributed_type.value}: accelerate launch --multi_gpu."
            )
        yield accelerator
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        if not others:
            compat.forget_accelerate()


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that a run can finish its step. A second Ctrl-C interrupts at once.

    In another than the main thread Python knows no signals, and nothing happens here.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
