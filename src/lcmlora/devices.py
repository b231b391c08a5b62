"""What is measured of a device: when its work is done, how much memory it took at most, and its name."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from .compat import execution_device

_PROCESS = Path("/proc/self")


def device_of(pipe: Any) -> torch.device:
    """Where a pipe computes: off-loaded models run there too, wherever they wait."""
    return torch.device(execution_device(pipe) or "cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was told: only then a clock says what it took."""
    if device.type != "cpu" and torch.accelerator.is_available():
        torch.accelerator.synchronize(device)


class PeakMemory:
    """The most memory in use since it was made: of the device, or of this process where that is the processor.

    It begins a new peak: torch's own statistic of the device, and the system's of the process, start from here.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if hasattr(self._module, "reset_peak_memory_stats"):
            self._module.reset_peak_memory_stats(device)
        elif device.type == "cpu":
            with contextlib.suppress(OSError):  # Linux: 5 resets the peak (proc_pid_clear_refs(5))
                (_PROCESS / "clear_refs").write_text("5")

    @property
    def _module(self) -> Any:
        return None if self._device.type == "cpu" else torch.get_device_module(self._device)

    def bytes(self) -> int | None:
        """The peak in bytes; None where the system has no such figure."""
        if hasattr(self._module, "max_memory_allocated"):
            return int(self._module.max_memory_allocated(self._device))
        if self._device.type != "cpu":
            return None
        with contextlib.suppress(OSError):
            if found := re.search(r"VmHWM:\s*(\d+) kB", (_PROCESS / "status").read_text()):
                return int(found[1]) * 1024
        return None


def hardware(device: torch.device) -> str:
    """The device in one line, with what its speed hangs on: "Intel(R) Xeon(R) ..., 2 threads, torch 2.13.0"."""
    if hasattr(module := torch.get_device_module(device), "get_device_name"):
        name = module.get_device_name(device)
    else:
        name = _processor() if device.type == "cpu" else device.type
    threads = f", {torch.get_num_threads()} threads of {os.cpu_count()}" if device.type == "cpu" else ""
    return f"{name}{threads}, torch {torch.__version__}"


def _processor() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()):
            return found[1].strip()
    return platform.processor() or platform.machine()
