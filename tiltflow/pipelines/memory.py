"""How many rows fit: one is run and measured, the rest is a division."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from tiltflow.core.errors import TiltflowError

SHARE = 0.8
"""Of the memory that is free, for rows."""


def fitting_rows(run: Callable[[], object], most: int, device: torch.device) -> int:
    """How many rows fit, 1 … ``most``, if ``run`` needs for one what it needs now. It is run twice: the first warms up.

    On CUDA by the peak of what the allocator reserves, fragments included, against what it does not hold or holds unused; on
    Linux CPUs by the peak of resident memory.

    Raises:
        TiltflowError: memory cannot be measured on this device.
    """
    run()
    needed = peak_bytes(run, device)
    return int(max(1, min(most, SHARE * free_bytes(device) // max(needed, 1))))


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """How far memory rose while ``run`` ran."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what is cached would hide what the run reserves
        torch.cuda.reset_peak_memory_stats(device)
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        run()
        peak = torch.cuda.max_memory_reserved(device) - reserved
        return max(peak, torch.cuda.max_memory_allocated(device) - allocated)
    reset = Path("/proc/self/clear_refs")
    if device.type != "cpu" or not reset.exists():
        raise TiltflowError(f"memory cannot be measured on {device}: give micro_batch as a number.")
    _release()  # what malloc has kept would hide what the run needs
    reset.write_text("5")  # the peak is forgotten
    before = _kilobytes("/proc/self/status", "VmRSS")
    run()
    return 1024 * max(0, _kilobytes("/proc/self/status", "VmHWM") - before)


def free_bytes(device: torch.device) -> int:
    """What is left, on CUDA with what the allocator has cached."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return 1024 * _kilobytes("/proc/meminfo", "MemAvailable")


def _release() -> None:
    """Give freed memory back to the system, where the C library can."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _kilobytes(file: str, name: str) -> int:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
