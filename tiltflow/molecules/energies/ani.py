"""ANI-1ccx through TorchANI, hartree (J. S. Smith et al., Nature Communications 10, 2903, 2019).

An ensemble of eight networks fitted to coupled-cluster energies of neutral closed-shell molecules of H, C, N and O. It knows
nothing of atoms that are much closer than a bond: what it says there is finite, and need not be high.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tiltflow.molecules.energies.interface import (
    Unit,
    check_molecule,
    check_positions,
    environment,
    non_finite_as_nan,
    required,
)
from tiltflow.molecules.molecule import Molecule


@cache
def _network(torchani: Any) -> torch.nn.Module:
    """The same for every molecule; reading it takes seconds."""
    return torchani.models.ANI1ccx(periodic_table_index=True).float().requires_grad_(False)


class ANI1ccx:
    """The ensemble's mean energy, in float32 but for the atoms' own energies; conformers in one batch.

    Raises:
        UnsupportedMolecule: elements beyond H, C, N, O; a charge; a radical.
        TiltflowError: TorchANI is missing.
    """

    name = "ani1ccx"
    unit: Unit = "hartree"
    elements = frozenset({1, 6, 7, 8})

    def __init__(self, molecule: Molecule) -> None:
        check_molecule(self, molecule, charged=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pkg_resources, that it is going away
            self._network = _network(required("torchani", environment("ani")))
        self._numbers = molecule.atomic_numbers

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_positions(self, x, len(self._numbers))
        with torch.enable_grad():
            y = x.detach().cpu().float().requires_grad_(True)
            energy = self._network((self._numbers.expand(len(y), -1), y)).energies
            (gradient,) = torch.autograd.grad(energy.sum(), y)
        return non_finite_as_nan(x, energy, -gradient)
