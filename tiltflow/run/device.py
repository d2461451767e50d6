"""Devices by name."""

from __future__ import annotations

import torch

from tiltflow.core.errors import TiltflowError

AUTO = "auto"
"""The fastest device there is: CUDA, else MPS, else the CPU."""


def check_device(device: str) -> str:
    """The device that a name stands for, if torch has it here. Raises TiltflowError otherwise."""
    if device == AUTO:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
        torch.Generator(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TiltflowError(f"device {device!r} is not usable here ({str(error).splitlines()[0]}).") from error
    return device
