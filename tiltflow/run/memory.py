"""Peak memory: of CUDA what the allocator took, blocks that it caches included; on Linux CPUs what is resident."""

from __future__ import annotations

from pathlib import Path

import torch

RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def forget_peak(device: torch.device) -> None:
    """From here on :func:`peak` counts anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif RESET.exists():
        RESET.write_text("5")


def peak(device: torch.device) -> int | None:
    """Bytes since :func:`forget_peak`; None where they cannot be measured."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if device.type != "cpu" or not RESET.exists():
        return None
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
