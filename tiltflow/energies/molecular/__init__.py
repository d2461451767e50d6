"""Energies of molecules, by name; see :mod:`tiltflow.energies.molecular.interface`."""

from tiltflow.energies.molecular.interface import (
    MolecularEnergy,
    Reduced,
    UnsupportedMolecule,
    kt_per,
    open_energy,
    parse_temperature,
)

__all__ = ["MolecularEnergy", "Reduced", "UnsupportedMolecule", "kt_per", "open_energy", "parse_temperature"]
