"""Features of the time that networks share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def time_features(t: Tensor, frequencies: int) -> Tensor:
    """[t, sin πkt, cos πkt for k = 1 … frequencies], (B, 1 + 2 frequencies), of t (B,)."""
    t = t[:, None]
    angle = t * torch.linspace(math.pi, frequencies * math.pi, frequencies, dtype=t.dtype, device=t.device)
    return torch.cat([t, angle.sin(), angle.cos()], 1)
