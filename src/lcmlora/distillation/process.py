"""What surrounds a run in its process: Accelerate, and Ctrl-C."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import compat
from ..errors import LcmLoraError
from ..loading import default_device
from .config import DistillConfig

logger = logging.getLogger(__name__)
_RUNNING = threading.RLock()
_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_XPU", "MULTI_MLU", "MULTI_HPU")


@contextmanager
def undisturbed() -> Iterator[None]:
    """One run at a time in this process, and torch as it is where nobody has set anything for the thread.

    Accelerate's settings belong to the process; and while diffusers loads a LoRA, every module that any thread makes
    is on the meta device. Another thread's run waits.
    """
    if not _RUNNING.acquire(blocking=False):
        logger.info("another run is going on in this process: waiting for its end")
        _RUNNING.acquire()
    try:
        with ExitStack() as stack:
            for one in (torch.inference_mode(False), torch.enable_grad()):
                stack.enter_context(one)
            for kind in {"cpu", torch.device(default_device()).type}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            yield
    finally:
        _RUNNING.release()


@contextmanager
def accelerating(config: DistillConfig, output: Path) -> Iterator[Any]:
    """An `Accelerator` for one run; the next run in this process may have another, and somebody else's is left alone.

    Raises:
        LcmLoraError: Accelerate is not installed, or can't do what the settings ask for.
    """
    try:
        import accelerate
    except ImportError as error:
        raise LcmLoraError("distill needs Hugging Face Accelerate: pip install 'lcmlora[train]'") from error
    trackers = [name.strip() for name in config.trackers.split(",") if name.strip()]
    with compat.own_accelerate():
        try:
            accelerator = accelerate.Accelerator(
                mixed_precision=config.mixed_precision,
                gradient_accumulation_steps=config.gradient_accumulation,
                log_with=trackers or None,
                project_dir=str(output),
            )
        except (ValueError, ImportError, RuntimeError) as error:
            raise LcmLoraError(
                f"Accelerate refuses mixed_precision={config.mixed_precision!r} or trackers={config.trackers!r}: "
                f"{error}"
            ) from error
        if missing := sorted(set(trackers) - {str(getattr(name, "value", name)) for name in accelerator.log_with}):
            raise LcmLoraError(f"trackers={config.trackers!r}: {', '.join(missing)} is not installed.")
        if accelerator.distributed_type.value not in _KINDS:
            raise LcmLoraError(
                f"distill runs in one process or several with a whole UNet each, not under "
                f"{accelerator.distributed_type.value}: accelerate launch --multi_gpu."
            )
        try:
            yield accelerator
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()


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
