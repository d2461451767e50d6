"""Energies of molecules, by name; see :mod:`tiltflow.molecules.energies.interface`."""

from tiltflow.molecules.energies.interface import MolecularEnergy, Reduced, UnsupportedMolecule, kt_per
from tiltflow.molecules.energies.open import open_energy
from tiltflow.molecules.settings import parse_temperature

__all__ = ["MolecularEnergy", "Reduced", "UnsupportedMolecule", "kt_per", "open_energy", "parse_temperature"]
