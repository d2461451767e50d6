"""No molecule of an evaluation was trained on: checked by code, on SMILES without stereo."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Iterable
from pathlib import Path

from rdkit import Chem

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.files import content
from tiltflow.molecules.molecule import Molecule


def read_training_smiles(path: Path) -> list[str]:
    """The column SMILES of a gzipped, tab-separated table. Raises TiltflowError if it is no such table."""
    try:
        lines = content(path).decode("utf-8").split("\n")
        return [line["SMILES"] for line in csv.DictReader(lines, delimiter="\t")]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise TiltflowError(f"{path}: not a readable gzipped table ({error}).") from error
    except KeyError as error:
        raise TiltflowError(f"{path}: has no column SMILES.") from error


def unseen(molecules: Iterable[Molecule], training_smiles: Iterable[str]) -> None:
    """Raise TiltflowError, with their names, if molecules are in the training list.

    Two molecules are the same if their canonical SMILES without stereo are. Tautomers are different molecules.
    """
    evaluated = {_flat(m.smiles): m.name for m in molecules}
    possible = {_letters(smiles) for smiles in evaluated}
    seen = {evaluated.get(_flat(smiles)) for smiles in training_smiles if _letters(smiles) in possible} - {None}
    if seen:
        names = ", ".join(sorted(str(name) for name in seen))
        raise TiltflowError(
            f"{len(seen)} of {len(evaluated)} molecules to be evaluated are in the training list: {names}. "
            "Take them out of one of the two."
        )


def _letters(smiles: str) -> str:
    """The same for any two SMILES of one molecule; quick, so that few need parsing."""
    return "".join(sorted(c for c in smiles.upper() if c.isalpha() and c != "H"))


def _flat(smiles: str) -> str:
    mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        raise TiltflowError(f"{smiles!r} is not a SMILES.")
    Chem.RemoveStereochemistry(mol)
    return Chem.MolToSmiles(mol)
