r"""Conformers with their weights.

A sampler that follows q instead of p* ∝ e^{−E/kT} corrects itself by path weights w ∝ dP*/dQ, and the weight of a sample is
its normalised path weight, w_i / Σ w. It is never multiplied by e^{−E/kT}: the energy is in the samples already.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.core.weights import ess, normalised
from tiltflow.molecules.molecule import Molecule

RELIABLE = 0.05
"""Least ESS fraction at which weights are stated."""


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Samples of one molecule. Rows that are not finite may be in it: :func:`tiltflow.molecules.audit.audit` names them.

    Args:
        positions: (n, N, 3), Å, float64, atoms in the order of ``molecule.mol``.
        energy: (n,), in ``unit``, e.g. "kcal/mol".
        log_weights: log path weights (n,), up to a constant, at ``temperature``; None: conformers that were chosen, not
            drawn, and have no weights (:mod:`tiltflow.molecules.covering`).
        temperature: in K, of the target. sampling_temperature: in K, at which the sampler was trained.
        provenance: what made it: energy, seed, versions; written beside every conformer.
        discarded: samples with a fault that were left out; they count as samples without weight in the ESS.

    Raises:
        TiltflowError: shapes that do not fit, temperatures that are not positive, log weights that are NaN, +∞ or all −∞.
    """

    molecule: Molecule
    positions: Tensor
    energy: Tensor
    unit: str
    log_weights: Tensor | None
    temperature: float
    sampling_temperature: float
    provenance: dict[str, str]
    discarded: int = 0

    def __post_init__(self) -> None:
        n, atoms = len(self.positions), self.molecule.mol.GetNumAtoms()
        log_w = self.log_weights
        if self.positions.shape != (n, atoms, 3) or self.positions.dtype != torch.float64 or self.energy.shape != (n,):
            raise TiltflowError(
                f"{self.molecule.name}: positions are {tuple(self.positions.shape)} {self.positions.dtype} and energies "
                f"{tuple(self.energy.shape)}; they must be (n, {atoms}, 3) torch.float64, in Å, and (n,)."
            )
        if log_w is not None and log_w.shape != (n,):
            raise TiltflowError(f"{self.molecule.name}: log weights are {tuple(log_w.shape)}; they must be ({n},), or None.")
        if log_w is not None and n > 0 and not torch.isfinite(log_w.max()):  # of NaN and numbers, the maximum is NaN
            raise TiltflowError(f"{self.molecule.name}: log weights are NaN, +∞, or all −∞. Has the sampler diverged?")
        if not (self.temperature > 0 and self.sampling_temperature > 0):
            raise TiltflowError(
                f"{self.molecule.name}: temperatures must be positive, in K; got {self.temperature} and "
                f"{self.sampling_temperature}."
            )

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def weights(self) -> Tensor:
        """Normalised path weights at ``temperature``, (n,), float64: they sum to 1. TiltflowError: there are none."""
        if self.log_weights is None:
            raise TiltflowError(f"{self.molecule.name}: conformers that were chosen to cover have no weights.")
        return normalised(self.log_weights)

    @property
    def ess(self) -> float:
        """Effective sample size as a fraction of all samples drawn, (Σw)²/(N Σw²), N = n + discarded; 0 without weights."""
        if self.log_weights is None or not len(self):
            return 0.0
        return len(self) / (len(self) + self.discarded) * ess(self.log_weights)

    @property
    def reliable(self) -> bool:
        """The weights mean something: ESS ≥ 0.05. Below that, "cannot tell" stands in place of every weight."""
        return self.ess >= RELIABLE

    def keep(self, rows: Tensor) -> Self:
        """The samples of a mask (n,); their weights sum to 1 again. Raises TiltflowError if none of them has a weight."""
        return replace(
            self,
            positions=self.positions[rows],
            energy=self.energy[rows],
            log_weights=None if self.log_weights is None else self.log_weights[rows],
            discarded=self.discarded + int((~rows).sum()),
        )
