"""Devices by name."""

from __future__ import annotations

import torch

from tiltflow.core.errors import TiltflowError


def check_device(device: str) -> str:
    """The device, if torch has it here. Raises TiltflowError otherwise."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TiltflowError(f"device {device!r} is not usable here ({str(error).splitlines()[0]}).") from error
    return device
