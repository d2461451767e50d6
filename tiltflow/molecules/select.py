"""Which n of many conformers to keep so that they cover the others."""

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError

TWINS = 1e-3
"""Conformers closer than this, in the unit of the RMSD, are the same."""


def cover(rmsd: Tensor, n: int, radius: float) -> Tensor:
    """Rows (n,) of m ≥ n conformers, the most useful first: each covers the most targets that none before it covers.

    Greedy maximum coverage, within 1 − 1/e of the best choice (Nemhauser, Wolsey & Fisher 1978). Once no conformer covers
    any more, the radius is halved and what is chosen covers less.

    Args:
        rmsd: (m, targets), of conformers from what is to be covered. radius: in its unit; a conformer covers the targets at
            most this far.

    Raises:
        TiltflowError: fewer than n conformers, a radius that is not positive.
    """
    if not 1 <= n <= len(rmsd) or not radius > 0:
        raise TiltflowError(f"cannot choose {n} of {len(rmsd)} conformers within {radius} Å: 1 ≤ n ≤ m, radius > 0.")
    chosen: list[int] = []
    free = torch.ones(len(rmsd), dtype=torch.bool)
    near = rmsd <= radius
    gain = near.sum(1)
    left = torch.ones(rmsd.shape[1], dtype=torch.bool)
    while len(chosen) < n:
        best = int(torch.where(free, gain, -1).argmax())
        if int(gain[best]) == 0 and radius < TWINS:
            return torch.cat([torch.tensor(chosen), free.nonzero()[: n - len(chosen), 0]])
        if int(gain[best]) == 0:  # all covered that can be
            radius /= 2
            near = rmsd <= radius
            left = ~near[chosen].any(0)
            gain = near[:, left].sum(1)
            continue
        chosen.append(best)
        free[best] = False
        newly = near[best] & left
        left &= ~newly
        gain = gain - near[:, newly].sum(1)
    return torch.tensor(chosen)
