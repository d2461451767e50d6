r"""Reference conformers in the format of ``benchmarks/data/geom_drugs``: GEOM's, found by CREST.

A folder holds ``molecules.csv`` (name, rotatable_bonds, smiles) and for each line ``NAME.xyz.gz``: concatenated XYZ blocks
in Å whose order of atoms is the file's own. Two atoms are bonded if they are nearer than 1.3 times the sum of their
covalent radii (RDKit's). The first block's graph of elements and bonds is matched to the SMILES' (bond orders follow from
the hydrogens), and every other block must have the same graph in the same order.

Stereo is read off the coordinates. What the SMILES leaves open is settled by the first block that agrees with it, for a
:class:`Molecule` is one stereoisomer; blocks of another stereoisomer are dropped and counted: no method that keeps the
stereo of its SMILES could reach them.
"""

from __future__ import annotations

import csv
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rdkit import Chem
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.files import content
from tiltflow.molecules.molecule import Molecule, molecule, with_positions

BOND = 1.3
_TABLE = Chem.GetPeriodicTable()
_NUMBERS = {_TABLE.GetElementSymbol(z): z for z in range(1, 119)}


class Reference(NamedTuple):
    """A molecule and its reference conformers.

    ``rotatable_bonds``: the file's own count. ``positions``: (R, N, 3), float64, Å, in the molecule's order of atoms.
    ``other_stereo``: blocks that were dropped for being another stereoisomer.
    """

    molecule: Molecule
    rotatable_bonds: int
    positions: Tensor
    other_stereo: int


class Listed(NamedTuple):
    """A line of ``molecules.csv``."""

    name: str
    rotatable_bonds: int
    smiles: str


def list_molecules(folder: Path) -> list[Listed]:
    """The lines of ``molecules.csv``. Raises TiltflowError if it is missing, empty or a line is no such line."""
    path = folder / "molecules.csv"
    try:
        lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TiltflowError(f"{path}: unreadable ({error}). The folder must hold molecules.csv and NAME.xyz.gz.") from error
    found: list[Listed] = []
    for number, line in enumerate(lines, 2):
        try:
            found.append(Listed(line["name"], int(line["rotatable_bonds"]), line["smiles"]))
        except (KeyError, TypeError, ValueError) as error:
            raise TiltflowError(f"{path}, line {number}: name,rotatable_bonds,smiles are needed, got {line}.") from error
    if not found:
        raise TiltflowError(f"{path} lists no molecule.")
    return found


def read_reference(folder: Path, listed: Listed) -> Reference:
    """The conformers of one molecule. Raises TiltflowError, naming file and block, for what is not as described above."""
    path = folder / f"{listed.name}.xyz.gz"
    mol = Chem.MolFromSmiles(listed.smiles)
    if mol is None:
        raise TiltflowError(f"{folder / 'molecules.csv'}: {listed.smiles!r} of {listed.name} is not a SMILES.")
    numbers, positions = read_xyz(path)
    found = molecule(listed.smiles, listed.name)
    ordered = in_order(found, numbers, positions, path)
    isomers = [_isomer(found, x) for x in ordered]
    isomer = {smiles: Chem.MolFromSmiles(smiles) for smiles in isomers}
    agrees = [smiles for smiles, other in isomer.items() if other.HasSubstructMatch(mol, useChirality=True)]
    if not agrees:
        raise TiltflowError(f"{path}: no block has the stereo of {listed.smiles}; the first is {isomers[0]}.")
    kept = torch.tensor([smiles == agrees[0] for smiles in isomers])
    complete = molecule(agrees[0], listed.name)
    if complete.smiles != found.smiles:
        found, ordered = complete, in_order(complete, numbers, positions, path)
    return Reference(found, listed.rotatable_bonds, ordered[kept], int((~kept).sum()))


def read_xyz(path: Path) -> tuple[Tensor, Tensor]:
    """Atomic numbers (N,) and positions (R, N, 3), float64, in Å, of a gzipped file of XYZ blocks of one molecule.

    Raises:
        TiltflowError: no such file, no gzip, no such block, another order of elements than in the first block.
    """
    try:
        lines = content(path).decode("utf-8").splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TiltflowError(f"{path}: not a readable gzipped XYZ file ({error}).") from error
    numbers: list[int] = []
    blocks: list[list[list[float]]] = []
    start = 0
    while start < len(lines):
        where = f"{path}, block {len(blocks) + 1}"
        try:
            end = start + 2 + int(lines[start])
            atoms = [_atom(line) for line in lines[start + 2 : end]]
        except (ValueError, KeyError) as error:
            raise TiltflowError(
                f"{where} (line {start + 1}): a number of atoms, a comment and lines 'element x y z' are needed ({error})."
            ) from error
        if end > len(lines) or not atoms:
            raise TiltflowError(f"{where} (line {start + 1}): {lines[start]} atoms are announced, {len(atoms)} are there.")
        elements = [z for z, _ in atoms]
        if blocks and elements != numbers:
            raise TiltflowError(f"{where}: its elements are not those of the first block, in this order.")
        numbers = elements
        blocks.append([x for _, x in atoms])
        start = end
    if not blocks:
        raise TiltflowError(f"{path} holds no XYZ block.")
    positions = torch.tensor(blocks, dtype=torch.float64)
    bad = (~torch.isfinite(positions).flatten(1).all(1)).nonzero()
    if len(bad):
        raise TiltflowError(f"{path}, block {int(bad[0]) + 1}: a coordinate is not finite.")
    return torch.tensor(numbers), positions


def _atom(line: str) -> tuple[int, list[float]]:
    symbol, x, y, z = line.split()
    return _NUMBERS[symbol], [float(x), float(y), float(z)]


def in_order(molecule: Molecule, numbers: Tensor, positions: Tensor, path: Path) -> Tensor:
    """positions (R, N, 3) in the molecule's order of atoms. Raises TiltflowError naming the block whose graph is another."""
    bonded = _bonded(numbers, positions)
    wanted = torch.zeros(2 * (molecule.mol.GetNumAtoms(),), dtype=torch.bool)
    for bond in molecule.mol.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        wanted[i, j] = wanted[j, i] = True
    order = _graph(numbers, bonded[0]).GetSubstructMatch(_graph(molecule.atomic_numbers, wanted))
    same_size = len(numbers) == len(wanted) and int(bonded[0].sum()) == int(wanted.sum())
    if not order or not same_size:
        raise TiltflowError(f"{path}, block 1: its atoms and bonds are not those of {molecule.smiles}.")
    index = torch.tensor(order)
    other = (bonded[:, index][:, :, index] != wanted).flatten(1).any(1).nonzero()
    if len(other):
        raise TiltflowError(f"{path}, block {int(other[0]) + 1}: its bonds are not those of {molecule.smiles}.")
    return positions[:, index]


def _bonded(numbers: Tensor, positions: Tensor) -> Tensor:
    """(R, N, N), bool."""
    radii = torch.tensor([_TABLE.GetRcovalent(int(z)) for z in numbers], dtype=torch.float64)
    apart = ~torch.eye(len(numbers), dtype=torch.bool)
    near = [torch.cdist(part, part) < BOND * (radii[:, None] + radii) for part in positions.split(256)]
    return torch.cat(near) & apart


def _graph(numbers: Tensor, bonded: Tensor) -> Chem.Mol:
    """Elements and which of them are bonded, nothing else."""
    graph = Chem.RWMol()
    for z in numbers.tolist():
        atom = Chem.Atom(z)
        atom.SetNoImplicit(True)
        graph.AddAtom(atom)
    for i, j in bonded.triu().nonzero().tolist():
        graph.AddBond(i, j, Chem.BondType.SINGLE)
    return graph.GetMol()


def _isomer(molecule: Molecule, x: Tensor) -> str:
    """The isomeric SMILES of the coordinates (N, 3)."""
    mol: Any = with_positions(molecule.mol, x[None])
    Chem.AssignStereochemistryFrom3D(mol)
    return Chem.MolToSmiles(Chem.RemoveHs(mol))
