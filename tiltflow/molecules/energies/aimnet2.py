"""AIMNet2, the TorchScript file that Auto3D ships, eV (D. Anstine, R. Zubatyuk, O. Isayev, Chem. Sci. 16, 10228, 2025).

An ensemble of four networks fitted to ωB97M-D3 energies of closed shells of any charge, fourteen elements. Auto3D itself,
which wants more packages, is not imported.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.energies.interface import Unit, check_molecule, check_positions, environment, non_finite_as_nan
from tiltflow.molecules.molecule import Molecule

FILE = "models/aimnet2_wb97m_ens_f.jpt"


@cache
def _network(file: Path) -> Any:
    """The same for every molecule; reading it takes a second."""
    return torch.jit.load(file, map_location="cpu")


class AIMNet2:
    """The ensemble's mean energy and forces, in float32, atoms summed in float64; conformers in one batch.

    Raises:
        UnsupportedMolecule: other elements; a radical.
        TiltflowError: Auto3D or its file is missing.
    """

    name = "aimnet2"
    unit: Unit = "eV"
    elements = frozenset({1, 5, 6, 7, 8, 9, 14, 15, 16, 17, 33, 34, 35, 53})

    def __init__(self, molecule: Molecule) -> None:
        check_molecule(self, molecule, charged=True)
        package = find_spec("Auto3D")
        if package is None or package.origin is None:
            raise TiltflowError(f"Auto3D is missing; {environment('aimnet2')}.")
        file = Path(package.origin).parent / FILE
        if not file.is_file():
            raise TiltflowError(f"{file} is missing, which Auto3D 2.3.1 has; {environment('aimnet2')}.")
        self._network = _network(file)
        self._numbers, self._charge = molecule.atomic_numbers, molecule.charge

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_positions(self, x, len(self._numbers))
        y = x.detach().cpu().float().clone()  # the network marks its input as requiring a gradient
        charge = torch.full((len(y),), float(self._charge), dtype=torch.float32)
        with torch.jit.optimized_execution(False):  # as fast, and no half second of compiling for each new shape
            found = self._network({"coord": y, "numbers": self._numbers.expand(len(y), -1), "charge": charge})
        return non_finite_as_nan(x, found["energy"], found["forces"])
