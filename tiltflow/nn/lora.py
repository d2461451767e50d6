r"""Low-rank adaptation: train W + (1/√r)·BA instead of W, with B = 0 at the start (Hu et al. 2022, arXiv:2106.09685).

Few directions to learn means little noise from few paths: on a small budget this is what keeps the KL down.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiltflow.core.errors import TiltflowError


class LowRank(nn.Module):
    """W ↦ W + BA/√r, with A (r, in) random and B (out, r) zero."""

    def __init__(self, out_features: int, in_features: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        a = torch.randn(rank, in_features, generator=generator, device=generator.device)
        self.a = nn.Parameter(a / math.sqrt(in_features))
        self.b = nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight."""
        return weight + self.b @ self.a / math.sqrt(len(self.a))


def add_low_rank(module: nn.Module, rank: int, generator: torch.Generator) -> nn.Module:
    """Freeze ``module`` and put a trainable low-rank update on every linear layer in it, in place.

    Raises:
        TiltflowError: rank below 1, or no linear layer to adapt.
    """
    if rank < 1:
        raise TiltflowError(f"the rank of a low-rank update must be at least 1, got {rank}.")
    layers = [m for m in module.modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise TiltflowError(f"{type(module).__name__} has no nn.Linear to adapt; train all weights (rank None).")
    updates = []
    for layer in layers:
        width = min(rank, layer.in_features, layer.out_features)
        updates.append(LowRank(layer.out_features, layer.in_features, width, generator).to(layer.weight))
        parametrize.register_parametrization(layer, "weight", updates[-1])
    module.requires_grad_(False)
    for update in updates:
        update.requires_grad_(True)
    return module


def merge_low_rank(module: nn.Module) -> nn.Module:
    """Fold every low-rank update into its weight, in place: an ordinary network again."""
    for layer in module.modules():
        if parametrize.is_parametrized(layer, "weight"):
            assert isinstance(layer, nn.Module)
            parametrize.remove_parametrizations(layer, "weight")
    return module
