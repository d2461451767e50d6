"""A small network of (x, t) for vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """(x (B, dim), t (B,)) → (B, out): residual SiLU layers on x and Fourier features of t; starts at exactly zero."""

    def __init__(self, dim: int, out: int, hidden: int = 64, layers: int = 3, frequencies: int = 4) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.first = nn.Linear(dim + 1 + 2 * frequencies, hidden)
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.last = nn.Linear(hidden, out)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Output (B, out)."""
        angle = t[:, None] * math.pi * torch.arange(1, self.frequencies + 1, dtype=t.dtype, device=t.device)
        h = self.first(torch.cat([x, t[:, None], angle.sin(), angle.cos()], 1))
        for layer in self.hidden:
            h = h + layer(nn.functional.silu(h))
        return self.last(nn.functional.silu(h))
