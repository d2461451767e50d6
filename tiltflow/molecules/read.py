"""Input files: every line becomes a molecule or a reject with its reason; nothing is dropped or mended.

A conformer ensemble is that of one molecule. Two fragments are two molecules, and an undefined stereo centre or double bond
is several: a sampler that moves torsions would pick one of them, by chance, and never say so
(:mod:`tiltflow.molecules.stereo` has what counts as undefined).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rdkit import Chem, rdBase

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules import files
from tiltflow.molecules.audit import label
from tiltflow.molecules.molecule import Molecule, positions_of
from tiltflow.molecules.stereo import groups, inverts, isomers, notes, only_isomer, undefined_stereo, where

METALS = frozenset(z for a, b in ((3, 4), (11, 13), (19, 31), (37, 50), (55, 84), (87, 118)) for z in range(a, b + 1))
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
    fields: dict[str, str] = {}  # noqa: RUF012


def read_molecules(source: str, elements: frozenset[int] | None, max_atoms: int, enumerate_stereo: int = 0) -> Read:
    """The molecules of a SMILES, or of a file: .smi, .sdf, .mol, or a .csv or .tsv with a column SMILES; each also as .gz.

    A line of a .smi is ``SMILES [name]``, or a # comment. Stereochemistry of an .sdf or .mol is that of its 3-D coordinates,
    or of its wedges and 2-D coordinates; its atoms keep their order, 3-D coordinates are a start, and data fields stay with
    the molecule, as other columns of a table do. Bridgeheads need no mark where only one isomer can be built.

    Args:
        source: a SMILES, or a path that ends in one of these.
        elements: atomic numbers that are supported; None: all.
        max_atoms: most atoms, with hydrogens.
        enumerate_stereo: make a molecule of each isomer where stereo is undefined, of at most so many; 0: refuse.

    Raises:
        TiltflowError: the file is missing, damaged, of another kind, or empty.
    """
    with rdBase.BlockLogs():
        entries = list(_entries(source))
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
    return [_bare(mol, name, entry) for mol, name in zip(found, names)]


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


def _entries(source: str) -> Iterator[_Entry]:
    path, kind = Path(source), files.kind(source)
    if kind == "smiles":
        for line, row in enumerate(files.lines(files.text(path)), 1):
            if row.strip() and not row.lstrip().startswith("#"):
                yield _from_smiles(line, row.strip())
    elif kind == "table":
        for line, smiles, name, fields in files.rows(path):
            yield _from_smiles(line, smiles)._replace(name=_title(name) or f"molecule-{line}", fields=fields)
    elif kind is not None:
        yield from _sdf(files.text(path), "$$$$" if kind == "sdf" else None)
    elif os.path.isfile(source):
        raise TiltflowError(f"{source} is no file of molecules by its name: {', '.join(files.KINDS)}, also with .gz.")
    else:
        yield _from_smiles(1, source.strip())


def _from_smiles(line: int, row: str) -> _Entry:
    """Of ``SMILES [|extensions|] [name]``."""
    unchecked: Any = Chem.SmilesParserParams()
    unchecked.sanitize = unchecked.removeHs = False
    mol = Chem.MolFromSmiles(row, Chem.SmilesParserParams())
    raw = Chem.MolFromSmiles(row, unchecked)
    given, _, rest = row.partition(" ") if "\t" not in row else row.partition("\t")
    name = _title(raw.GetProp("_Name") if raw is not None and raw.HasProp("_Name") else rest)
    return _Entry(line, name or f"molecule-{line}", given, mol, f"invalid SMILES: {_problems(raw)}", raw)


def _sdf(text: str, end: str | None) -> Iterator[_Entry]:
    """Records up to lines that begin with ``end``; None: there is one."""
    records: list[list[str]] = [[]]
    for row in files.lines(text):
        if end is not None and row.startswith(end):
            records.append([])
        else:
            records[-1].append(row)
    supplier: Any = Chem.SDMolSupplier()
    for number, record in enumerate(records[:-1] if not "".join(records[-1]).strip() else records, 1):
        block = "\n".join(record)
        supplier.SetData(f"{block.rstrip()}\n\n$$$$\n", removeHs=False)
        mol = supplier[0]
        raw = Chem.MolFromMolBlock(block, sanitize=False) if mol is None else None
        for atom in mol.GetAtoms() if mol is not None else ():
            if inverts(atom):  # its pyramid in 3-D is a snapshot, and no mark
                atom.SetChiralTag(Chem.ChiralType.CHI_UNSPECIFIED)
        given = f"record {number}" if mol is None else Chem.MolToSmiles(Chem.RemoveHs(mol))
        fields = {} if mol is None else {key: mol.GetProp(key) for key in mol.GetPropNames()}
        said = _title(record[0]) if record else ""
        problem = f"invalid record: {_problems(raw)}"
        yield _Entry(number, said or f"molecule-{number}", given, mol, problem, None, fields)


def _title(text: str) -> str:
    """A name in one line."""
    return " ".join(text.split())


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


def _bare(mol: Chem.Mol, name: str, entry: _Entry) -> Molecule:
    """With explicit hydrogens; coordinates, if they are 3-D, and data fields of the input stand beside it."""
    said = notes(mol, mol if entry.raw is None else entry.raw)
    solid = mol.GetNumConformers() > 0 and mol.GetConformer().Is3D()
    full = Chem.AddHs(mol, addCoords=solid)
    start = positions_of(full)[0] if solid else None
    full.RemoveAllConformers()
    for key in full.GetPropNames():
        full.ClearProp(key)
    return Molecule(name, Chem.MolToSmiles(Chem.RemoveHs(mol)), full, said, entry.fields, start)
