"""Energies of molecules, by name."""

from __future__ import annotations

from collections.abc import Callable

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.energies.interface import MolecularEnergy
from tiltflow.molecules.molecule import Molecule
from tiltflow.molecules.settings import ENERGIES
from tiltflow.run.names import import_function


def open_energy(name: str, molecule: Molecule) -> MolecularEnergy:
    """The energy of a molecule by name.

    Args:
        name: Of :data:`~tiltflow.molecules.settings.ENERGIES`; or ``module:function`` (``file.py:function``), which is given
            the molecule and returns an ASE calculator or a :class:`MolecularEnergy`.

    Raises:
        UnsupportedMolecule: the energy does not take this molecule.
        TiltflowError: an unknown name, a missing package, a function that returns something else.
    """
    from tiltflow.molecules.energies import aimnet2, ani, ase, mmff, xtb

    known: dict[str, Callable[[Molecule], MolecularEnergy]] = {
        e.name: e for e in (mmff.MMFF94, ani.ANI1ccx, aimnet2.AIMNet2, xtb.GFN2)
    }
    if name in known:
        return known[name](molecule)
    if ":" not in name:
        raise TiltflowError(f"unknown energy {name!r}: use one of {', '.join(ENERGIES)}, or module:function.")
    made = import_function(name)(molecule)
    if isinstance(made, MolecularEnergy):
        return made
    if hasattr(made, "get_property") and hasattr(made, "calculate"):
        return ase.ASEEnergy(made, molecule, name)
    raise TiltflowError(
        f"{name!r} returned a {type(made).__name__}; it must return an ASE calculator or a MolecularEnergy (name, unit, "
        "elements, energy_and_forces)."
    )
