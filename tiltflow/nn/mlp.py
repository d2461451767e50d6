"""A small network of (x, t) for vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tiltflow.nn.features import time_features


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
        h = self.first(torch.cat([x, time_features(t, self.frequencies)], 1))
        for layer in self.hidden:
            h = h + layer(nn.functional.silu(h))
        return self.last(nn.functional.silu(h))


class EventMLP(nn.Module):
    """An :class:`MLP` on events of any shape; ``periodic`` gives it the sines and cosines of angles (B, d) instead."""

    def __init__(self, net: MLP, periodic: bool = False) -> None:
        super().__init__()
        self.net, self.periodic = net, periodic

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Output of the shape of x."""
        rows = torch.cat([x.sin(), x.cos()], -1) if self.periodic else x
        return self.net(rows.flatten(1), t).reshape(x.shape)


class SystemMLP(nn.Module):
    """An :class:`MLP` on angles (B, d) of several systems with the same d, each known by its number: ``system`` (B,)."""

    def __init__(self, systems: int, dim: int, hidden: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.systems = systems
        self.net = MLP(2 * dim + systems, dim, hidden, layers)

    def forward(self, x: Tensor, t: Tensor, system: Tensor) -> Tensor:
        """Output (B, d)."""
        number = nn.functional.one_hot(system, self.systems).to(x)
        return self.net(torch.cat([x.sin(), x.cos(), number], -1), t)
