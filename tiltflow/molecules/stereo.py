"""Which stereo of a molecule is undefined, by chemistry: what could be kept apart in a flask, not what a graph could mark.

RDKit lists atoms and bonds whose neighbours differ. Of these are no isomers, since they turn into each other by themselves:

    three-coordinate nitrogen that can invert (amines, aziridines, diaziridines); a marked one of a three-ring is kept
    centres that differ only by which of several oxygens (or sulphurs) bears the charge, the proton or the double bond:
        phosphates, phosphonates, sulphinates
    C=N–H, C=O–H⁺: the proton moves; and double bonds with a linear end, as of azides and isocyanates
    five-coordinate centres; octahedral ones of which five neighbours are alike, as SF₅

They are conformers instead. Atoms of several rings, as bridgeheads, need no mark if just one isomer can be built in space,
as of adamantane or cubane.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice, product
from typing import Any

from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from tiltflow.molecules.audit import label

EMBEDDINGS, SECONDS, STRAIN = 16, 20, 40.0
"""Of a molecule with open bridgeheads, of each kind, and their time; kcal/mol above the best isomer that are impossible."""
MOST_TRIED = 4096
"""Combinations of marks that are tried to enumerate isomers."""
CHALCOGENS = (8, 16, 34, 52)
HINDERED = 3
"""Least substituents beside the bond of a biaryl that make its two senses isomers."""
MARKS = (Chem.ChiralType.CHI_TETRAHEDRAL_CW, Chem.ChiralType.CHI_TETRAHEDRAL_CCW)
SIDES = (Chem.BondStereo.STEREOCIS, Chem.BondStereo.STEREOTRANS)
_GROUPS = {Chem.StereoGroupType.STEREO_OR: "relative", Chem.StereoGroupType.STEREO_AND: "racemic"}
_BIARYL = Chem.MolFromSmarts("[c,C;R;X3]-!@[c,C,n;R;X3]")
_ALLENE = Chem.MolFromSmarts("[#6;!H2]=C=[#6;!H2]")


def undefined_stereo(mol: Chem.Mol) -> list[Chem.StereoInfo]:
    """Centres and double bonds without a mark that could be kept apart; ``mol`` may lack hydrogens."""
    full = Chem.AddHs(mol)
    open_ones = [s for s in Chem.FindPotentialStereo(full) if s.specified != Chem.StereoSpecified.Specified]
    if not open_ones:
        return []
    kept = {(s.type, s.centeredOn) for s in Chem.FindPotentialStereo(_levelled(full))}
    return [s for s in open_ones if (s.type, s.centeredOn) in kept and _lasts(full, s)]


def _levelled(full: Chem.Mol) -> Chem.Mol:
    """A copy in which all terminal oxygens of a phosphorus or sulphur are alike, and so on."""
    copy = Chem.RWMol(full)
    gone = []
    for atom in copy.GetAtoms():
        if atom.GetAtomicNum() not in (15, 16, 33, 34, 52) or atom.GetDegree() < 3:
            continue
        for end in atom.GetNeighbors():
            others = [a for a in end.GetNeighbors() if a.GetIdx() != atom.GetIdx()]
            if end.GetAtomicNum() in CHALCOGENS and all(a.GetAtomicNum() == 1 for a in others):
                bond = copy.GetBondBetweenAtoms(atom.GetIdx(), end.GetIdx())
                atom.SetFormalCharge(atom.GetFormalCharge() + (1 if bond.GetBondType() == Chem.BondType.DOUBLE else 0))
                bond.SetBondType(Chem.BondType.SINGLE)
                end.SetFormalCharge(-1)
                end.SetNoImplicit(True)
                gone += [a.GetIdx() for a in others]
    for i in gone:  # kept in the graph, so that atoms keep their numbers
        for near in list(copy.GetAtomWithIdx(i).GetNeighbors()):
            copy.RemoveBond(i, near.GetIdx())
    Chem.SanitizeMol(copy, catchErrors=True)
    return copy.GetMol()


def _lasts(full: Chem.Mol, s: Chem.StereoInfo) -> bool:
    """Whether the isomers do not turn into each other by themselves."""
    if str(s.type).startswith("Bond"):
        bond = full.GetBondWithIdx(s.centeredOn)
        ends = bond.GetBeginAtom(), bond.GetEndAtom()
        return not any(_linear(end) or _protonated(end, other) for end, other in (ends, ends[::-1]))
    atom = full.GetAtomWithIdx(s.centeredOn)
    if inverts(atom):
        return False
    if s.type == Chem.StereoType.Atom_Octahedral:
        ranks = list(Chem.CanonicalRankAtoms(full, breakTies=False))
        near = [ranks[a.GetIdx()] for a in atom.GetNeighbors()]
        return max(near.count(rank) for rank in near) < 5
    return s.type != Chem.StereoType.Atom_TrigonalBipyramidal


def _linear(atom: Chem.Atom) -> bool:
    return sum(b.GetBondType() == Chem.BondType.DOUBLE for b in atom.GetBonds()) > 1 or any(
        b.GetBondType() == Chem.BondType.TRIPLE for b in atom.GetBonds()
    )


def _protonated(end: Chem.Atom, other: Chem.Atom) -> bool:
    """The end of C=N–H, or of C=O–H⁺."""
    near = [a for a in end.GetNeighbors() if a.GetIdx() != other.GetIdx()]
    return end.GetAtomicNum() in (7, 8) and all(a.GetAtomicNum() == 1 for a in near)


def inverts(atom: Chem.Atom) -> bool:
    """A three-coordinate nitrogen, but for the head of a bridge."""
    if atom.GetAtomicNum() != 7 or atom.GetFormalCharge() or atom.GetTotalDegree() != 3 or atom.GetIsAromatic():
        return False
    return atom.GetOwningMol().GetRingInfo().NumAtomRings(atom.GetIdx()) < 2


def where(mol: Chem.Mol, s: Chem.StereoInfo) -> str:
    """ "centre C2" or "bond C2-C3"."""
    if str(s.type).startswith("Bond"):
        bond = mol.GetBondWithIdx(s.centeredOn)
        return f"bond {label(bond.GetBeginAtom())}-{label(bond.GetEndAtom())}"
    return f"centre {label(mol.GetAtomWithIdx(s.centeredOn))}"


def groups(mol: Chem.Mol) -> dict[str, tuple[int, ...]]:
    """Atoms of groups whose marks are only relative or racemic, by what they are called; absolute ones are as marked."""
    found = [g for g in mol.GetStereoGroups() if g.GetGroupType() in _GROUPS]
    atoms = [tuple(a.GetIdx() for a in g.GetAtoms()) for g in found]
    return {
        f"{_GROUPS[g.GetGroupType()]} group {k} of {', '.join(label(mol.GetAtomWithIdx(i)) for i in centres)}": centres
        for k, (g, centres) in enumerate(zip(found, atoms), 1)
    }


def only_isomer(mol: Chem.Mol, undefined: list[Chem.StereoInfo]) -> Chem.Mol | None:
    """The isomer, if just one can be built in space, as of norbornane or cubane, whose bridgeheads nobody marks."""
    if not all(_caged(mol, s) for s in undefined):
        return None
    found = list(islice(isomers(mol, undefined), 2))
    return found[0] if len(found) == 1 else None


def isomers(mol: Chem.Mol, undefined: list[Chem.StereoInfo]) -> Iterator[Chem.Mol]:
    """The isomers of open marks, and of groups, each once; of atoms of several rings as they can be built in space.

    None where a centre has more than four neighbours, for which there are no marks.
    """
    if any(not str(s.type).startswith("Bond") and s.type != Chem.StereoType.Atom_Tetrahedral for s in undefined):
        return
    together, seen = list(groups(mol).values()), set()
    plain = Chem.RWMol(mol)
    plain.SetStereoGroups([])
    cage = [s for s in undefined if _caged(mol, s)]
    free = [s for s in undefined if not _caged(mol, s)]
    choices = [SIDES if str(s.type).startswith("Bond") else MARKS for s in free]
    sides: list[Iterable[Any]] = [*choices, _built(mol, cage), *((False, True) for _ in together)]
    for chosen in islice(product(*sides), MOST_TRIED):
        marks, caged, turned = chosen[: len(free)], chosen[len(free)], chosen[len(free) + 1 :]
        copy = Chem.Mol(plain)
        for i in (i for centres, turn in zip(together, turned) if turn for i in centres):
            copy.GetAtomWithIdx(i).InvertChirality()
        isomer = _settled(copy, [*marks, *caged], [*free, *cage])
        if (smiles := Chem.MolToSmiles(isomer)) not in seen:
            seen.add(smiles)
            yield isomer


def _caged(mol: Chem.Mol, s: Chem.StereoInfo) -> bool:
    rings = mol.GetRingInfo()
    return s.type == Chem.StereoType.Atom_Tetrahedral and rings.NumAtomRings(s.centeredOn) > 1


def _built(mol: Chem.Mol, cage: list[Chem.StereoInfo]) -> list[tuple[Any, ...]]:
    """The marks of these atoms that embeddings come to which leave them open, without those that MMFF94 finds strained."""
    if not cage:
        return [()]
    lowest = _energies(mol, [s.centeredOn for s in cage])
    return [marks for marks, energy in lowest.items() if energy < min(lowest.values()) + STRAIN]


def _energies(mol: Chem.Mol, cage: list[int]) -> dict[tuple[Any, ...], float]:
    """Marks of atoms that embeddings come to which leave them open, and their lowest MMFF94 energy; 0 if it has none."""
    lowest: dict[tuple[Any, ...], float] = {}
    for random in (False, True):
        full = Chem.AddHs(mol)
        parameters: Any = rdDistGeom.EmbedParameters() if random else rdDistGeom.ETKDGv3()
        parameters.randomSeed, parameters.timeout, parameters.useRandomCoords = 0, SECONDS, random
        parameters.enableSequentialRandomSeeds = True
        numbers = list(rdDistGeom.EmbedMultipleConfs(full, EMBEDDINGS, parameters))
        for number, energy in zip(numbers, _relaxed(full) or [0.0] * len(numbers)):
            Chem.AssignStereochemistryFrom3D(full, number, replaceExistingTags=True)
            marks = tuple(full.GetAtomWithIdx(i).GetChiralTag() for i in cage)
            lowest[marks] = min(energy, lowest.get(marks, energy))
    return lowest


def _relaxed(full: Chem.Mol) -> list[float]:
    """MMFF94 energies of the conformers, which it relaxes; none if there are none, or no parameters."""
    if not full.GetNumConformers() or not rdForceFieldHelpers.MMFFHasAllMoleculeParams(full):
        return []
    return [energy for _, energy in rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(full, maxIters=100)]


def strain(mol: Chem.Mol) -> str | None:
    """A warning if bridgeheads are marked as they can hardly be: against the isomers that embeddings come to without marks.

    Args:
        mol: with hydrogens and a few conformers, which are relaxed.
    """
    rings = mol.GetRingInfo()
    cage = [a.GetIdx() for a in mol.GetAtoms() if a.GetChiralTag() in MARKS and rings.NumAtomRings(a.GetIdx()) > 1]
    own = _relaxed(mol) if len(cage) > 1 else []
    if not own:
        return None
    free = Chem.Mol(mol)
    for i in cage:
        free.GetAtomWithIdx(i).SetChiralTag(Chem.ChiralType.CHI_UNSPECIFIED)
    more = min(own) - min(_energies(free, cage).values(), default=min(own))
    where = ", ".join(label(mol.GetAtomWithIdx(i)) for i in cage)
    return f"{more:.0f} kcal/mol of strain: can the isomer marked at {where} exist?" if more > STRAIN else None


def _settled(mol: Chem.Mol, marks: list[Any], undefined: list[Chem.StereoInfo]) -> Chem.Mol:
    """With these marks, read anew from its SMILES, so that all other marks are as RDKit reads them; in the same order."""
    copy = Chem.Mol(mol)
    for mark, s in zip(marks, undefined):
        if str(s.type).startswith("Bond"):
            bond = copy.GetBondWithIdx(s.centeredOn)
            ends = bond.GetBeginAtom(), bond.GetEndAtom()
            near = [
                next(a.GetIdx() for a in end.GetNeighbors() if a.GetIdx() != other.GetIdx())
                for end, other in (ends, ends[::-1])
            ]
            bond.SetStereoAtoms(*near)
            bond.SetStereo(mark)
        else:
            copy.GetAtomWithIdx(s.centeredOn).SetChiralTag(mark)
    as_written: Any = Chem.SmilesParserParams()
    as_written.removeHs = False
    again = Chem.MolFromSmiles(Chem.MolToSmiles(copy), as_written)
    order = list(copy.GetPropsAsDict(True, True)["_smilesAtomOutputOrder"])
    found = Chem.RenumberAtoms(again, [order.index(i) for i in range(len(order))])
    Chem.SanitizeMol(found)  # it has lost its rings
    return found


def notes(mol: Chem.Mol, raw: Chem.Mol) -> tuple[str, ...]:
    """What a user should hear of the stereo of a molecule; ``raw`` is the same as it was written, before RDKit judged it."""
    found = []
    heavy = ([a for a in m.GetAtoms() if a.GetAtomicNum() != 1] for m in (raw, mol))
    for written, now in zip(*heavy, strict=True):
        if written.GetChiralTag() == Chem.ChiralType.CHI_UNSPECIFIED:
            continue
        if now.GetChiralTag() == Chem.ChiralType.CHI_UNSPECIFIED:
            why = "this nitrogen inverts" if inverts(now) else "it is no stereocentre"
            found.append(f"the mark at {label(now)} is dropped: {why}")
        elif inverts(now):
            found.append(f"{label(now)} is kept as marked, though this nitrogen inverts")
    axes = [*_hindered(mol), *_allenes(mol)]
    return (*found, *(f"axial chirality at {axis}: both senses may be among the conformers" for axis in axes))


def _hindered(mol: Chem.Mol) -> list[str]:
    """Biaryls that turn slowly and whose two senses differ."""
    ranks = list(Chem.CanonicalRankAtoms(mol, breakTies=False))
    found = []
    for i, j in mol.GetSubstructMatches(_BIARYL):
        beside = [
            [a for a in mol.GetAtomWithIdx(p).GetNeighbors() if a.GetIdx() != q] for p, q in ((i, j), (j, i))
        ]
        crowded = sum(_crowded(a, mol.GetAtomWithIdx(p)) for p, side in zip((i, j), beside) for a in side)
        if crowded >= HINDERED and all(len({ranks[a.GetIdx()] for a in side}) == 2 for side in beside):
            found.append(f"{label(mol.GetAtomWithIdx(i))}-{label(mol.GetAtomWithIdx(j))}")
    return found


def _crowded(beside: Chem.Atom, axis: Chem.Atom) -> bool:
    """Whether an atom beside the axis bears a substituent, or is in a ring that does."""
    return beside.GetTotalDegree() == 3 and beside.GetTotalNumHs() == 0 and axis.GetIdx() != beside.GetIdx()


def _allenes(mol: Chem.Mol) -> list[str]:
    ranks = list(Chem.CanonicalRankAtoms(mol, breakTies=False))
    found = []
    for i, c, j in mol.GetSubstructMatches(_ALLENE):
        sides = [[ranks[a.GetIdx()] for a in mol.GetAtomWithIdx(p).GetNeighbors() if a.GetIdx() != c] for p in (i, j)]
        if all(len(side) == 1 or len({*side}) == 2 for side in sides):
            found.append(f"{label(mol.GetAtomWithIdx(i))}={label(mol.GetAtomWithIdx(c))}={label(mol.GetAtomWithIdx(j))}")
    return found
