"""Conformers grouped by shape: Butina's clusters of the best heavy-atom RMSD over symmetric atoms.

D. Butina, Unsupervised data base clustering based on Daylight's fingerprint and Tanimoto similarity (1999).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from rdkit import Chem
from rdkit.Chem import rdMolAlign
from rdkit.ML.Cluster import Butina
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.molecule import Molecule, with_positions

THRESHOLD = 1.0
"""Å."""
MOST_MATCHES = 1_000
"""Symmetric numberings that are tried; a molecule with more may be cut a little too finely."""


class Clusters(NamedTuple):
    """The largest population first.

    ``labels`` (n,) counts from 0; of each cluster: ``sizes``, ``populations`` (the sum of its weights; None if they cannot
    be told), the row of its conformer of lowest energy, ``lowest``, and ``errors``, the populations' standard errors.
    """

    labels: Tensor
    sizes: list[int]
    populations: list[float] | None
    lowest: list[int]
    errors: list[float] | None = None


def clusters(
    molecule: Molecule, positions: Tensor, energy: Tensor, weights: Tensor | None, threshold: float = THRESHOLD,
    group: Tensor | None = None,
) -> Clusters:  # fmt: skip
    """Clusters whose members are within ``threshold`` Å of their centre. The cost grows with n².

    Args:
        molecule: Whose conformers.
        positions: (n, N, 3), in Å.
        energy: (n,).
        weights: (n,), summing to 1; None: they cannot be told, and clusters are ordered by size.
        threshold: In Å.
        group: (n,), of independent groups of conformers; None: all are independent.

    Raises:
        TiltflowError: the threshold is not positive.
    """
    if not threshold > 0:
        raise TiltflowError(f"the RMSD threshold must be positive, in Å; got {threshold}.")
    n = len(positions)
    full = with_positions(molecule.mol, positions)
    heavy = Chem.RemoveAllHs(full)
    shape = heavy if heavy.GetNumAtoms() else full
    rmsd = rdMolAlign.GetAllConformerBestRMS(shape, numThreads=1, maxMatches=MOST_MATCHES) if n > 1 else ()
    found = Butina.ClusterData(rmsd, n, threshold, isDistData=True, reordering=True) if n else ()
    members = [torch.tensor(rows) for rows in found]
    members.sort(key=lambda rows: -len(rows) if weights is None else -float(weights[rows].sum()))
    labels = torch.zeros(n, dtype=torch.int64)
    for k, rows in enumerate(members):
        labels[rows] = k
    return Clusters(
        labels,
        [len(rows) for rows in members],
        None if weights is None else [float(weights[rows].sum()) for rows in members],
        [int(rows[energy[rows].argmin()]) for rows in members],
        None if weights is None else [population_error(labels == k, weights, group) for k in range(len(members))],
    )


def population_error(inside: Tensor, weights: Tensor, group: Tensor | None) -> float:
    r"""Standard error of p = Σ w over a mask (n,), by the delta method for a ratio of sums over G independent groups.

    sqrt(G/(G − 1) Σ_g W_g² (p_g − p)²), W_g the weight of a group; NaN for fewer than two of them.
    """
    index = torch.arange(len(weights)) if group is None else group
    count = int(index.max()) + 1
    if count < 2:
        return math.nan
    total, part = (torch.zeros(count, dtype=w.dtype).index_add_(0, index, w) for w in (weights, weights * inside))
    return float((part - total * part.sum()).square().sum().mul(count / (count - 1)).sqrt())
