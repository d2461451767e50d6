"""Samples of a control on a chain, with their energies and path weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltflow.core.brownian import NoiseChain
from tiltflow.core.control import DriftControl
from tiltflow.core.simulate import sample
from tiltflow.energies import Evaluator


class Drawn(NamedTuple):
    """Samples (n, *event), their energies (n,), and unnormalised log path weights (n,) or None: mean e^{log_weights} ≈ Z.

    ``groups`` (n,) of rows that are related, on the CPU; None: all are independent.
    """

    x: Tensor
    energy: Tensor
    log_weights: Tensor | None
    groups: Tensor | None = None


@torch.no_grad()
def draw(
    chain: NoiseChain,
    control: DriftControl,
    energy: Evaluator,
    n: int,
    generator: torch.Generator,
    batch: int = 2_000,
    condition: Callable[[int], dict[str, Any]] = lambda rows: {},
) -> Drawn:
    """n samples of a control on a chain; ``condition`` gives it so many rows."""
    geometry = chain.geometry
    x, energies, log_w = [], [], []
    for start in range(0, n, batch):
        rows = min(batch, n - start)
        part = sample(chain, control, chain.source(rows, generator), generator, **condition(rows))
        x.append(geometry.wrap(part.x))
        energies.append(energy.value(x[-1]))
        log_w.append(part.log_ratio - energies[-1])
    points = torch.cat(x)
    weights = torch.cat(log_w) - geometry.log_normal(points, chain.end_variance) if chain.initial is None else None
    return Drawn(points, torch.cat(energies), weights)
