"""Conformers as records of an SD file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rdkit import Chem
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.molecule import Molecule, with_positions
from tiltflow.train.store import replacing

Part = tuple[Molecule, Tensor, Sequence[Mapping[str, str]]]


def write_sdf(path: Path, parts: Iterable[Part]) -> None:
    """Write molecules with positions (n, N, 3) and n rows of properties each, in one step.

    Raises:
        TiltflowError: there is no such folder.
    """
    if not path.parent.is_dir():
        raise TiltflowError(f"no folder {str(path.parent)!r} for {path.name}; create it first.")
    with replacing(path) as part, Chem.SDWriter(str(part)) as writer:
        for molecule, positions, rows in parts:
            mol = with_positions(molecule.mol, positions)
            mol.SetProp("_Name", molecule.name)
            for i, row in enumerate(rows):
                for key, value in row.items():
                    if key != "name":
                        mol.SetProp(_key(key), _value(value))
                writer.write(mol, confId=i)


def _key(text: str) -> str:
    return " ".join(re.sub("[<>]", " ", text).split())


def _value(text: str) -> str:
    """A field ends with an empty line and a record with $$$$, so a value must hold neither."""
    return "\n".join(line for line in text.replace("$$$$", "").splitlines() if line.strip())
