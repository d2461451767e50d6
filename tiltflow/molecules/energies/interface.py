r"""Energies of molecules behind one interface: E(x) and −∇E(x) of x (B, N, 3) in Å, each energy in a unit that it names.

    mmff94     MMFF94 force field, RDKit               kcal/mol
    ani1ccx    ANI-1ccx neural network, TorchANI       hartree
    aimnet2    AIMNet2 neural network, Auto3D's file   eV
    gfn2       GFN2-xTB tight binding, tblite          hartree
    any ASE calculator, or a class of one's own, by ``module:function``

Samplers take energies in kT. :class:`Reduced` is the one place where a unit becomes kT. Packages beyond RDKit are imported
when their energy is opened; those that exclude each other have environments of their own (docs/energies.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from rdkit.Chem import GetPeriodicTable
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.molecule import Molecule

Unit = Literal["kcal/mol", "eV", "hartree"]

BOLTZMANN = 1.380649e-23
"""k, in J/K (exact)."""
JOULES: dict[Unit, float] = {"kcal/mol": 4184 / 6.02214076e23, "eV": 1.602176634e-19, "hartree": 4.3597447222060e-18}
"""One molecule's worth of each unit, in J; CODATA 2022, the first two exact."""
BOHR = 0.529177210544
"""a₀ in Å, CODATA 2022."""


class UnsupportedMolecule(TiltflowError):
    """An energy does not take this molecule. ``reason`` says why, the message also which molecule."""

    def __init__(self, molecule: Molecule, reason: str) -> None:
        super().__init__(f"{molecule.name} ({molecule.smiles}): {reason}")
        self.reason = reason


@runtime_checkable
class MolecularEnergy(Protocol):
    """The energy of one molecule, in the order of its atoms."""

    @property
    def name(self) -> str:
        """As :func:`open_energy` takes it."""
        ...

    @property
    def unit(self) -> Unit:
        """Of the energy; forces are in this unit per Å."""
        ...

    @property
    def elements(self) -> frozenset[int] | None:
        """Atomic numbers that it takes (None: not known)."""
        ...

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E (B,) in ``unit`` and −∇E (B, N, 3) in ``unit``/Å, without a graph, of x (B, N, 3) in Å.

        A row that cannot be evaluated is NaN; a wrong shape raises TiltflowError.
        """
        ...


def kt_per(unit: Unit, kelvin: float) -> float:
    r"""One ``unit`` in kT at a temperature: JOULES[unit] / (k T).

    >>> round(1 / kt_per("kcal/mol", 298.15), 4), round(1 / kt_per("eV", 298.15), 5)
    (0.5925, 0.02569)

    Raises:
        TiltflowError: an unknown unit, a temperature that is not positive and finite.
    """
    if unit not in JOULES:
        raise TiltflowError(f"unknown unit of energy {unit!r}: use one of {', '.join(get_args(Unit))}.")
    if not 0 < kelvin < math.inf:
        raise TiltflowError(f"the temperature must be positive and finite, got {kelvin} K.")
    return JOULES[unit] / (BOLTZMANN * kelvin)


@dataclass(frozen=True)
class Reduced:
    """(E(x) − zero) / kT: a ForceProvider in kT and kT/Å.

    Args:
        energy: in its own unit.
        kelvin: temperature in K.
        zero: in the unit of ``energy``. Absolute energies are 10⁴ to 10⁶ kT, of which float32 keeps only steps of 10⁻³ to
            10⁻¹ kT: subtract the energy of some relaxed conformer where x is float32.

    Raises:
        TiltflowError: see :func:`kt_per`; ``zero`` is not finite.
    """

    energy: MolecularEnergy
    kelvin: float
    zero: float = 0.0

    def __post_init__(self) -> None:
        kt_per(self.energy.unit, self.kelvin)
        if not math.isfinite(self.zero):
            raise TiltflowError(f"zero must be finite, got {self.zero} {self.energy.unit}.")

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(E − zero)/kT (B,) and −∇E/kT (B, N, 3), float64."""
        scale = kt_per(self.energy.unit, self.kelvin)
        energy, forces = self.energy.energy_and_forces(x)
        return scale * (energy.double() - self.zero), scale * forces.double()


# For adapters


def environment(name: str) -> str:
    """What to do about a package that has an environment of its own."""
    return f"install it with `make energy-{name}` and use .venv-energy-{name}/bin/tiltflow"


def required(module: str, advice: str) -> Any:
    """An optional package. Raises TiltflowError with ``advice`` if it, or something it imports, is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise TiltflowError(f"{module} cannot be imported ({error}); {advice}.") from error


def check_molecule(energy: MolecularEnergy, molecule: Molecule, *, charged: bool, radicals: bool = False) -> None:
    """Raises UnsupportedMolecule for elements, a charge or unpaired electrons that the energy does not take."""
    symbol = GetPeriodicTable().GetElementSymbol
    found = set(molecule.atomic_numbers.tolist())
    if energy.elements is not None and found - energy.elements:
        foreign, taken = (", ".join(map(symbol, sorted(z))) for z in (found - energy.elements, energy.elements))
        raise UnsupportedMolecule(molecule, f"{energy.name} does not take {foreign}; it takes {taken}")
    if molecule.charge and not charged:
        raise UnsupportedMolecule(molecule, f"{energy.name} takes neutral molecules; the charge is {molecule.charge:+d}")
    unpaired = unpaired_electrons(molecule)
    if unpaired and not radicals:
        raise UnsupportedMolecule(molecule, f"{energy.name} takes no radicals; electrons left unpaired: {unpaired}")


def unpaired_electrons(molecule: Molecule) -> int:
    """By RDKit's reading of the SMILES."""
    return sum(a.GetNumRadicalElectrons() for a in molecule.mol.GetAtoms())


def check_positions(energy: MolecularEnergy, x: Tensor, atoms: int) -> None:
    """Raises TiltflowError unless x is (B, atoms, 3)."""
    if x.ndim != 3 or x.shape[1:] != (atoms, 3):
        raise TiltflowError(f"{energy.name}: x has shape {tuple(x.shape)}; this molecule takes (B, {atoms}, 3), in Å.")


def row_by_row(
    energy: MolecularEnergy, x: Tensor, atoms: int, one: Callable[[np.ndarray], tuple[float, np.ndarray] | None]
) -> tuple[Tensor, Tensor]:
    """E (B,) and forces (B, N, 3), float64, of an engine that takes one conformer (N, 3) at a time.

    ``one`` gives energy and forces, or None where it failed; such rows, and those of non-finite x, are NaN.
    """
    check_positions(energy, x, atoms)
    positions = x.detach().cpu().double().numpy()
    energies, forces = np.full(len(x), np.nan), np.full(positions.shape, np.nan)
    for i in np.flatnonzero(np.isfinite(positions).all((1, 2))):
        found = one(positions[i])
        if found is not None:
            energies[i], forces[i] = found
    return torch.from_numpy(energies), torch.from_numpy(forces)


def non_finite_as_nan(x: Tensor, energy: Tensor, forces: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a batched network, float64, with NaN for those of non-finite x: a neighbour list just drops such atoms."""
    bad = ~torch.isfinite(x.detach().cpu()).flatten(1).all(1)
    energy, forces = energy.detach().double(), forces.detach().double()
    return energy.masked_fill(bad, torch.nan), forces.masked_fill(bad[:, None, None], torch.nan)
