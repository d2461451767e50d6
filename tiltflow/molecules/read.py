"""Input files: every line becomes a molecule or a reject with its reason; nothing is dropped or mended.

A conformer ensemble is that of one molecule. Two fragments are two molecules, and an undefined stereo centre or double bond
is several: a sampler that moves torsions would pick one of them, by chance, and never say so.
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

MOST_BRIDGEHEADS = 4
"""Undefined bridgeheads of which all combinations are tried: at most 16 embeddings."""


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
    line: int
    name: str
    input: str
    mol: Chem.Mol | None
    problem: str


def read_molecules(source: str, elements: frozenset[int] | None, max_atoms: int) -> Read:
    """The molecules of a SMILES, a .smi file (``SMILES [name]`` per line, # comments) or an .sdf file.

    Stereochemistry of an .sdf is that of its 3-D coordinates, or of its wedges and 2-D coordinates. Its atoms keep their
    order. Bridgeheads need no mark where only one isomer can be built, as in adamantane.

    Args:
        source: a SMILES, or a path that ends in .smi or .sdf.
        elements: atomic numbers that are supported; None: all.
        max_atoms: most atoms, with hydrogens.

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
        for line, name, given, mol, problem in entries:
            checked = problem if mol is None else _checked(mol, elements, max_atoms)
            if isinstance(checked, str):
                read.rejects.append(Reject(line, name, given, checked))
            else:
                read.molecules.append(_bare(checked, name))
                read.lines.append(line)
    return read


def one_molecule(given: Any, max_atoms: int) -> Molecule:
    """The molecule of a SMILES or of an RDKit molecule, whose atoms keep their order; or the molecule itself.

    Raises:
        TiltflowError: it is refused; something else was given.
    """
    if isinstance(given, Molecule):
        return given
    if isinstance(given, str):
        with rdBase.BlockLogs():
            _, name, said, mol, problem = _from_smiles(1, given.strip())
    elif isinstance(given, Chem.Mol):
        mol = Chem.Mol(given)
        name, said, problem = "molecule", Chem.MolToSmiles(mol), _problems(mol)
        mol = None if Chem.SanitizeMol(mol, catchErrors=True) else mol
    else:
        raise TiltflowError(f"a molecule is a SMILES, an RDKit Mol or a Molecule, not a {type(given).__name__}.")
    checked = problem if mol is None else _checked(mol, None, max_atoms)
    if isinstance(checked, str):
        raise TiltflowError(f"{said}: {checked}.")
    return _bare(checked, name)


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
    unchecked.sanitize = False
    mol = Chem.MolFromSmiles(row, Chem.SmilesParserParams())
    raw = Chem.MolFromSmiles(row, unchecked) if mol is None else mol
    given, _, rest = row.partition(" ") if "\t" not in row else row.partition("\t")
    name = raw.GetProp("_Name") if raw is not None and raw.HasProp("_Name") else rest.strip()
    return _Entry(line, name or f"molecule-{line}", given, mol, f"invalid SMILES: {_problems(raw)}")


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


def _checked(mol: Chem.Mol, elements: frozenset[int] | None, max_atoms: int) -> Chem.Mol | str:
    """The molecule, all of its stereo defined, or why no ensemble can be made of it."""
    fragments = len(Chem.GetMolFrags(mol))
    if fragments != 1:
        return f"{fragments} fragments; give one connected molecule" if fragments else "no atoms"
    full = Chem.AddHs(mol)
    strange = {a.GetSymbol() for a in full.GetAtoms() if not _known(a.GetAtomicNum(), elements)}
    if strange:
        return f"unsupported element {', '.join(sorted(strange))}"
    radicals = [label(a) for a in mol.GetAtoms() if a.GetNumRadicalElectrons()]
    if radicals:
        return f"radical at {', '.join(radicals)}; only closed shells are supported"
    if full.GetNumAtoms() > max_atoms:
        return f"too large: {full.GetNumAtoms()} atoms with hydrogens, of at most {max_atoms}"
    if mol.GetStereoGroups():
        return "undefined stereo: groups of relative or racemic centres; write one isomer"
    undefined = [s for s in Chem.FindPotentialStereo(full) if s.specified != Chem.StereoSpecified.Specified]
    if not undefined:
        return mol
    rings = mol.GetRingInfo()
    cage = all(s.type == Chem.StereoType.Atom_Tetrahedral and rings.NumAtomRings(s.centeredOn) > 1 for s in undefined)
    only = _only_isomer(mol) if cage and len(undefined) <= MOST_BRIDGEHEADS else None
    return only or f"undefined stereo: {', '.join(_where(mol, s) for s in undefined)}; write it with @, @@, / and \\"


def _only_isomer(mol: Chem.Mol) -> Chem.Mol | None:
    """The isomer, if just one can be built in space, as of norbornane or adamantane, whose bridgeheads nobody marks."""
    from rdkit.Chem.EnumerateStereoisomers import EnumerateStereoisomers, StereoEnumerationOptions

    isomers = EnumerateStereoisomers(mol, StereoEnumerationOptions(unique=True, tryEmbedding=True))
    found = list(islice(isomers, 2))
    return found[0] if len(found) == 1 else None


def _known(number: int, elements: frozenset[int] | None) -> bool:
    return number > 0 and (elements is None or number in elements)


def _where(mol: Chem.Mol, stereo: Chem.StereoInfo) -> str:
    if str(stereo.type).startswith("Bond"):
        bond = mol.GetBondWithIdx(stereo.centeredOn)
        return f"bond {label(bond.GetBeginAtom())}-{label(bond.GetEndAtom())}"
    return f"centre {label(mol.GetAtomWithIdx(stereo.centeredOn))}"


def _bare(mol: Chem.Mol, name: str) -> Molecule:
    """With explicit hydrogens, and without the coordinates and properties of the input."""
    full = Chem.AddHs(mol)
    full.RemoveAllConformers()
    for key in full.GetPropNames():
        full.ClearProp(key)
    return Molecule(name, Chem.MolToSmiles(Chem.RemoveHs(mol)), full)
