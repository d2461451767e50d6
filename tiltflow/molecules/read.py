"""Input files: every line becomes a molecule or a reject with its reason; nothing is dropped or mended.

A conformer ensemble is that of one molecule. Two fragments are two molecules, and an undefined stereo centre or double bond
is several: a sampler that moves torsions would pick one of them, by chance, and never say so
(:mod:`tiltflow.molecules.stereo` has what counts as undefined).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rdkit import Chem, rdBase

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.audit import label
from tiltflow.molecules.molecule import Molecule
from tiltflow.molecules.stereo import groups, isomers, notes, only_isomer, undefined_stereo, where

METALS = frozenset(
    z for a, b in ((3, 4), (11, 13), (19, 31), (37, 50), (55, 84), (87, 118)) for z in range(a, b + 1)
) - {32}  # germanium stands with silicon
"""Atomic numbers."""


class Reject(NamedTuple):
    """Something that was refused: ``line`` of a .smi (record of an .sdf, 1 of a SMILES), name, input and reason."""

    line: int
    name: str
    input: str
    reason: str


class Read(NamedTuple):
    """What a source holds: molecules, the ``lines`` they stand in, and rejects."""

    molecules: list[Molecule]
    lines: list[int]
    rejects: list[Reject]


class _Entry(NamedTuple):
    """A line: what was parsed of it and why not, and the same as it was written, before RDKit judged its stereo."""

    line: int
    name: str
    input: str
    mol: Chem.Mol | None
    problem: str
    raw: Chem.Mol | None = None


def read_molecules(source: str, elements: frozenset[int] | None, max_atoms: int, enumerate_stereo: int = 0) -> Read:
    """The molecules of a SMILES, a .smi file (``SMILES [name]`` per line, # comments) or an .sdf file.

    Stereochemistry of an .sdf is that of its 3-D coordinates, or of its wedges and 2-D coordinates. Its atoms keep their
    order. Bridgeheads need no mark where only one isomer can be built, as in adamantane.

    Args:
        source: a SMILES, or a path that ends in .smi or .sdf.
        elements: atomic numbers that are supported; None: all.
        max_atoms: most atoms, with hydrogens.
        enumerate_stereo: make a molecule of each isomer where stereo is undefined, of at most so many; 0: refuse.

    Raises:
        TiltflowError: the file is missing, not text, of another kind, or empty.
    """
    suffix = Path(source).suffix.lower()
    with rdBase.BlockLogs():
        if suffix in (".smi", ".sdf"):
            text = _text(source)
            entries = list(_smi(text) if suffix == ".smi" else _sdf(text))
        elif os.path.isfile(source):
            raise TiltflowError(f"{source} is no .smi and no .sdf file; convert it to one of these.")
        else:
            entries = [_from_smiles(1, source.strip())]
        if not entries:
            raise TiltflowError(f"{source} is empty; write `SMILES name` in each line (.smi), or one record each (.sdf).")
        read = Read([], [], [])
        for entry in entries:
            found = _molecules(entry, elements, max_atoms, enumerate_stereo)
            if isinstance(found, str):
                read.rejects.append(Reject(entry.line, entry.name, entry.input, found))
            else:
                read.molecules.extend(found)
                read.lines.extend([entry.line] * len(found))
    return read


def _molecules(entry: _Entry, elements: frozenset[int] | None, max_atoms: int, most: int) -> list[Molecule] | str:
    """The molecule of a line, or its isomers; or why there is none."""
    if entry.mol is None:
        return entry.problem
    try:
        if problem := _unfit(entry.mol, elements, max_atoms):
            return problem
        found = _isomers(entry.mol, most)
    except Exception as error:  # of RDKit, whatever it is: a line never ends a file
        return f"RDKit fails on it ({type(error).__name__}: {error})"
    if isinstance(found, str):
        return found
    names = [entry.name] if len(found) == 1 else [f"{entry.name} isomer {k}" for k in range(1, len(found) + 1)]
    return [_bare(mol, name, entry.raw) for mol, name in zip(found, names)]


def one_molecule(given: Any, max_atoms: int) -> Molecule:
    """The molecule of a SMILES or of an RDKit molecule, whose atoms keep their order; or the molecule itself.

    Raises:
        TiltflowError: it is refused; something else was given.
    """
    if isinstance(given, Molecule):
        return given
    if isinstance(given, str):
        with rdBase.BlockLogs():
            entry = _from_smiles(1, given.strip())
    elif isinstance(given, Chem.Mol):
        mol = Chem.Mol(given)
        said, problem = Chem.MolToSmiles(mol), _problems(mol)
        entry = _Entry(1, "molecule", said, None if Chem.SanitizeMol(mol, catchErrors=True) else mol, problem)
    else:
        raise TiltflowError(f"a molecule is a SMILES, an RDKit Mol or a Molecule, not a {type(given).__name__}.")
    with rdBase.BlockLogs():
        found = _molecules(entry, None, max_atoms, 0)
    if isinstance(found, str):
        raise TiltflowError(f"{entry.input}: {found}.")
    return found[0]


def _text(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise TiltflowError(f"no file {source}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TiltflowError(f"{source} cannot be read as text ({error}).") from error


def _smi(text: str) -> Iterator[_Entry]:
    for line, row in enumerate(text.splitlines(), 1):
        if row.strip() and not row.lstrip().startswith("#"):
            yield _from_smiles(line, row.strip())


def _from_smiles(line: int, row: str) -> _Entry:
    """Of ``SMILES [|extensions|] [name]``."""
    unchecked: Any = Chem.SmilesParserParams()
    unchecked.sanitize = unchecked.removeHs = False
    mol = Chem.MolFromSmiles(row, Chem.SmilesParserParams())
    raw = Chem.MolFromSmiles(row, unchecked)
    given, _, rest = row.partition(" ") if "\t" not in row else row.partition("\t")
    name = raw.GetProp("_Name") if raw is not None and raw.HasProp("_Name") else rest.strip()
    return _Entry(line, name or f"molecule-{line}", given, mol, f"invalid SMILES: {_problems(raw)}", raw)


def _sdf(text: str) -> Iterator[_Entry]:
    records = re.split(r"(?m)^\$\$\$\$.*\n?", text)
    for number, block in enumerate(records[:-1] if not records[-1].strip() else records, 1):
        title = block.partition("\n")[0].strip()
        mol = Chem.MolFromMolBlock(block, removeHs=False)
        raw = Chem.MolFromMolBlock(block, sanitize=False) if mol is None else mol
        given = f"record {number}" if mol is None else Chem.MolToSmiles(Chem.RemoveHs(mol))
        yield _Entry(number, title or f"molecule-{number}", given, mol, f"invalid record: {_problems(raw)}")


def _problems(raw: Chem.Mol | None) -> str:
    """Why RDKit would not sanitise it; None is what could not be parsed at all."""
    found = [] if raw is None else [p.Message() for p in Chem.DetectChemistryProblems(raw)]
    return "; ".join(found) if found else "it does not parse"


def _unfit(mol: Chem.Mol, elements: frozenset[int] | None, max_atoms: int) -> str | None:
    """Why no ensemble can be made of a molecule, whatever its stereo."""
    fragments = len(Chem.GetMolFrags(mol))
    if fragments != 1:
        return f"{fragments} fragments; give one connected molecule" if fragments else "no atoms"
    full = Chem.AddHs(mol)
    strange = {a.GetSymbol() for a in full.GetAtoms() if not _known(a.GetAtomicNum(), elements)}
    if strange:
        return f"unsupported element {', '.join(sorted(strange))}"
    metals = [label(a) for a in mol.GetAtoms() if a.GetAtomicNum() in METALS]
    if metals:
        return f"metal {', '.join(metals)}; neither RDKit nor these energies know the geometry about a metal"
    radicals = [label(a) for a in mol.GetAtoms() if a.GetNumRadicalElectrons()]
    if radicals:
        return f"radical at {', '.join(radicals)}; only closed shells are supported"
    if full.GetNumAtoms() > max_atoms:
        return f"too large: {full.GetNumAtoms()} atoms with hydrogens, of at most {max_atoms}"
    return None


def _isomers(mol: Chem.Mol, most: int) -> list[Chem.Mol] | str:
    """The molecule, all of its stereo defined; if it is not, its isomers, of at most ``most``; or what is undefined."""
    undefined, together = undefined_stereo(mol), groups(mol)
    if not undefined and not together:
        return [mol]
    if undefined and not together and (only := only_isomer(mol, undefined)) is not None:
        return [only]
    said = f"undefined stereo: {', '.join([*(where(mol, s) for s in undefined), *together])}"
    found = list(islice(isomers(mol, undefined), most + 1)) if most else []
    if found and len(found) <= most:
        return found
    if most:
        return f"{said}; {f'it has more than {most} isomers' if found else 'RDKit cannot mark its isomers'}"
    enough = 2 ** (len(undefined) + len(together))
    return f"{said}; write it with @, @@, / and \\, or make every isomer with --enumerate-stereo {enough}"


def _known(number: int, elements: frozenset[int] | None) -> bool:
    return number > 0 and (elements is None or number in elements)


def _bare(mol: Chem.Mol, name: str, raw: Chem.Mol | None) -> Molecule:
    """With explicit hydrogens, and without the coordinates and properties of the input."""
    said = notes(mol, mol if raw is None else raw)
    full = Chem.AddHs(mol)
    full.RemoveAllConformers()
    for key in full.GetPropNames():
        full.ClearProp(key)
    return Molecule(name, Chem.MolToSmiles(Chem.RemoveHs(mol)), full, said)
