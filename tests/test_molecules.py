"""Reading, auditing, weighing and writing conformers; ETKDG conformers stand in for samples. Each bad twin is caught."""

import csv
import gzip
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("rdkit")

from rdkit import Chem
from rdkit.Chem import rdDepictor, rdDistGeom, rdMolTransforms

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.audit import audit
from tiltflow.molecules.energies import open_energy
from tiltflow.molecules.ensemble import Ensemble
from tiltflow.molecules.generate import generate, rescored
from tiltflow.molecules.molecule import molecule, packed, unpacked, with_positions
from tiltflow.molecules.read import Reject, read_molecules
from tiltflow.molecules.rmsd import distinct
from tiltflow.molecules.settings import ConformerSettings
from tiltflow.molecules.stereo import strain
from tiltflow.molecules.templates import low_templates, templates
from tiltflow.molecules.torsions import dihedrals, place, rotatable_torsions
from tiltflow.molecules.write import write_conformers, write_rejects

STEREO = {  # name: SMILES, atoms whose exchange inverts a centre or turns a double bond
    "peptide": "C[C@H](N)C(=O)N[C@@H](CO)C(=O)O",
    "diene": "C/C=C/C=C\\C",
    "ring": "C[C@H]1CC[C@@H](C)CC1",
    "oxime": "C/C(=N/O)[C@H](F)Cl",
    "sulfoxide": "CC[S@](C)=O",
    "cyclononene": "C1CCC/C=C\\CCC1",
    "terpene": "CC1(C)[C@@H]2CC[C@@]1(C)C(=O)C2",
    "tropane": "CN1[C@@H]2CC[C@H]1CC2",
}


def embedded(smiles, n, seed=0xF00D):
    m = molecule(smiles)
    copy = Chem.Mol(m.mol)
    rdDistGeom.EmbedMultipleConfs(copy, n, randomSeed=seed)
    return m, torch.tensor([c.GetPositions().tolist() for c in copy.GetConformers()])


def ensemble(smiles="CCO", n=4, log_weights=None, **changes):
    m, x = embedded(smiles, n)
    log_weights = torch.zeros(n) if log_weights is None else log_weights
    facts = {"unit": "kcal/mol", "temperature": 300.0, "sampling_temperature": 1000.0, "provenance": {"seed": "3"}}
    return Ensemble(m, x, torch.arange(float(len(x))) - 0.1, log_weights=log_weights, **(facts | changes))


# Reading


def test_every_line_is_a_molecule_or_a_reject(tmp_path):
    path = tmp_path / "in.smi"
    lines = ["# three good ones", "CCO ethanol", "", "C1CC\tbroken one", "C[C@H](F)Cl", "C(C)(C)(C)(C)C  five", "CC(F)Cl"]
    path.write_text("\n".join([*lines, "C=C two words", ""]))
    read = read_molecules(str(path), None, 50)
    assert [(m.name, m.smiles) for m in read.molecules] == [
        ("ethanol", "CCO"),
        ("molecule-5", "C[C@H](F)Cl"),
        ("two words", "C=C"),
    ]
    assert read.lines == [2, 5, 8]
    assert [(r.line, r.name, r.input) for r in read.rejects] == [
        (4, "broken one", "C1CC"),
        (6, "five", "C(C)(C)(C)(C)C"),
        (7, "molecule-7", "CC(F)Cl"),
    ]
    assert read.rejects[1].reason.startswith("invalid SMILES: Explicit valence for atom # 0 C, 5")
    assert read.molecules[0].mol.GetNumAtoms() == 9 and not read.molecules[0].mol.GetNumConformers()


@pytest.mark.parametrize(
    ("smiles", "reason"),
    [
        ("CC)", "invalid SMILES: it does not parse"),
        ("[Na+].[Cl-]", "2 fragments"),
        ("C[CH2]", "radical at C2"),
        ("C*", "unsupported element *"),
        ("CBr", "unsupported element Br"),
        ("C" * 40, "too large: 122 atoms with hydrogens, of at most 100"),
        ("CC(F)Cl", "undefined stereo: centre C2"),
        ("CC=CC", "undefined stereo: bond C2-C3"),
        ("CC(=NO)CC", "undefined stereo: bond C2-N3"),
        ("COP(=S)([O-])OCC", "undefined stereo: centre P3"),  # a phosphorothioate: two isomers in a flask
        ("CS(=O)CC", "undefined stereo: centre S2"),
        ("CN1CC1C", "undefined stereo: centre C4; "),  # its carbon, not its nitrogen
        ("C[Mg]Cl", "metal Mg2"),
        ("CC1CCC(C)CC1", "centre C2, centre C5"),
        ("C1CC2CCCC2C1", "centre C3, centre C7"),  # bridgeheads, but two isomers can be built
        ("C[C@@H](N)C(=O)O |&1:1|", "undefined stereo: racemic group 1 of C2"),
        ("C[C@H](F)[C@@H](O)Cl |o1:1,&2:3|", "relative group 1 of C2, racemic group 2 of C4; write it"),
        ("", "no atoms"),
    ],
)
def test_refusals(smiles, reason):
    read = read_molecules(smiles, frozenset({1, 6, 7, 8, 9, 12, 15, 16, 17}), 100)
    assert not read.molecules and len(read.rejects) == 1
    assert reason in read.rejects[0].reason


NOT_UNDEFINED = [
    "CC(=N)C", "CC(=N)N", "NC(=N)NC", "C1C2CC3CC1CC(C2)C3", "C1CC2CCC1C2", "C12C3C4C1C5C2C3C45", "C1=CCCCC1",
    "[H]/N=C(\\C)N", "[NH3+]CC(=O)[O-]", "c1ccccc1S(F)(F)(F)(F)F", "CP(F)(F)(F)Cl", "C[C@H]1CN1",
    "[H][N@]1[N@@]([H])C1([H])[H]", "CN1CC1(C)C", "CN1C[C@@H]1C", "CC(C)N1CN1C", "CN=[N+]=[N-]", "CCN=C=O",
    "COP(=O)([O-])OCC", "COP(=O)(O)OCC", "CCOP(=O)(O)OP(=O)(O)OC", "CS(=O)O", "CP(=O)(O)CC", "CC(=[OH+])C",
    "CN1C2CCC1CC2", "CCCC(=O)OC[C@H](COP(=O)([O-])OCC[N+](C)(C)C)OC(=O)CCC",
    "Nc1ncnc2c1ncn2[C@@H]1O[C@H](COP(=O)(O)OP(=O)(O)O)[C@@H](O)[C@H]1O",
]  # fmt: skip


@pytest.mark.parametrize("smiles", NOT_UNDEFINED)
def test_what_looks_undefined_but_is_not(smiles):
    read = read_molecules(smiles, None, 100)
    assert len(read.molecules) == 1, read.rejects


def test_absolute_groups_are_as_marked():
    for said in ("C[C@@H](N)C(=O)O |a:1|", "C[C@@H](N)C(=O)O |a:1| alanine"):
        (one,) = read_molecules(said, None, 100).molecules
        assert one.smiles == "C[C@@H](N)C(=O)O"


@pytest.mark.parametrize(
    ("smiles", "isomers"),
    [
        ("CC(F)Cl", {"C[C@@H](F)Cl", "C[C@H](F)Cl"}),
        ("CC=CC", {"C/C=C/C", "C/C=C\\C"}),
        ("C[C@H](F)[C@@H](O)Cl |&1:1,3|", {"C[C@H](F)[C@@H](O)Cl", "C[C@@H](F)[C@H](O)Cl"}),
        ("CC(O)C(F)C(O)C", 4),  # two of the eight marks are no isomers of their own, and two pairs are one
        ("C1CC2CC1C=C2C", 2),  # four combinations of marks, of which two can be built
        ("C[C@H](F)N1CC1C", 2),
    ],
)
def test_every_isomer_once(smiles, isomers):
    read = read_molecules(f"{smiles}", None, 100, enumerate_stereo=4)
    found = [m.smiles for m in read.molecules]
    assert {*found} == isomers if isinstance(isomers, set) else len({*found}) == isomers, found
    assert len({*found}) == len(found) == len({m.name for m in read.molecules}) and read.lines == [1] * len(found)
    assert [a.GetAtomicNum() for a in read.molecules[-1].mol.GetAtoms()] == read.molecules[0].atomic_numbers.tolist()
    (refused,) = read_molecules(smiles, None, 100, enumerate_stereo=1).rejects
    assert "more than 1 isomers" in refused.reason


@pytest.mark.parametrize(
    ("smiles", "note"),
    [
        ("[H][N@]1[N@@]([H])C1([H])[H]", "the mark at N1 is dropped: this nitrogen inverts; the mark at N2"),
        ("C[N@](CC)CCC", "the mark at N2 is dropped: this nitrogen inverts"),
        ("C[C@H](C)F", "the mark at C2 is dropped: it is no stereocentre"),
        ("C[N@]1C[C@@H]1C", "N2 is kept as marked"),
        ("CC=C=CC", "axial chirality at C2=C3=C4"),
        ("Cc1cccc(O)c1-c1c(C)cccc1N", "axial chirality at C8-C9"),
        ("Cc1ccccc1-c1ccccc1", ""),
        ("Cc1cccc(C)c1-c1c(C)cccc1N", ""),  # one side is symmetric
        ("C[C@H](N)C(=O)O", ""),
    ],
)
def test_notes(smiles, note):
    (one,) = read_molecules(smiles, None, 100).molecules
    assert note in "; ".join(one.notes) and bool(note) == bool(one.notes)
    assert unpacked(packed(one)).notes == one.notes


def test_an_impossible_isomer_is_warned_of():
    """A hydrogen that points into the cage of bicyclo[3.3.1]nonane; its possible epimer is not."""
    for smiles, said in (("C[C@@H]1C[C@@H]2CCC[C@@H](C1)C2", True), ("C[C@@H]1C[C@@H]2CCC[C@H](C1)C2", False)):
        m, x = embedded(smiles, 2)
        found = strain(with_positions(m.mol, x))
        assert (found is not None and "kcal/mol of strain: can the isomer marked at C4, C8 exist?" in found) == said


def test_isotopes_turn_about_the_same_bonds():
    for light, heavy in (("CCCO", "[2H]C([2H])([2H])CCO[2H]"), ("CCCO", "[13CH3]CC[18OH]"), ("C", "[3H]C")):
        one, two = (rotatable_torsions(read_molecules(s, None, 50).molecules[0]) for s in (light, heavy))
        mol = read_molecules(heavy, None, 50).molecules[0].mol
        assert len(one.atoms) == len(two.atoms)
        for a, b in two.atoms[:, 1:3].tolist():
            assert 1 not in (mol.GetAtomWithIdx(a).GetAtomicNum(), mol.GetAtomWithIdx(b).GetAtomicNum())


def test_sdf_gives_stereo_by_coordinates_and_keeps_the_order(tmp_path):
    m, x = embedded(STEREO["oxime"], 1)
    mirrored = x * torch.tensor([-1.0, 1.0, 1.0])
    flat = Chem.MolFromSmiles("F[C@H](Cl)Br")
    rdDepictor.Compute2DCoords(flat)
    blocks = [Chem.MolToMolBlock(with_positions(m.mol, y), includeStereo=False) for y in (x, mirrored)]
    blocks = [*blocks, Chem.MolToMolBlock(flat), "\n\n\n  1  0  0\nnonsense\nM  END\n"]
    path = tmp_path / "in.sdf"
    path.write_text("$$$$\n".join(["first" + blocks[0], *blocks[1:]]) + "$$$$\n")
    read = read_molecules(str(path), None, 100)
    opposite = m.smiles.replace("@@", "@") if "@@" in m.smiles else m.smiles.replace("@", "@@")
    assert [r.smiles for r in read.molecules] == [m.smiles, opposite, "F[C@H](Cl)Br"]
    assert read.molecules[0].name == "first" and read.molecules[1].name == "molecule-2"
    assert [a.GetAtomicNum() for a in read.molecules[0].mol.GetAtoms()] == m.atomic_numbers.tolist()
    assert [r.line for r in read.rejects] == [4] and "invalid record" in read.rejects[0].reason
    assert audit(read.molecules[0], x) == [None] and audit(read.molecules[1], x) != [None]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.smi", "# nothing\n", "is empty"),
        ("a.sdf", "", "is empty"),
        ("a.smi", None, "no file"),
        ("a.xyz", "1\n", "no file of molecules by its name"),
        ("a.smi.gz", "CCO\n", "cannot be read"),
        ("a.csv", "name,formula\na,C2H6O\n", "no column SMILES; its first line names name, formula"),
    ],
)
def test_files_that_are_none(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(TiltflowError, match=message):
        read_molecules(str(tmp_path / name), None, 100)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_kind_of_file_says_the_same(end, tmp_path):
    """Compressed or not, in Latin-1 or with a mark, with a form feed in a name: the same lines, names, stereo and fields."""
    table = ["Id,Canonical_SMILES,pIC50", '"café, black",C[C@H](N)C(=O)O,7.1', "b,CCO,", ",C1CC,", "d\x0cd,C/C=C/C,-3"]
    semicolons = [line.replace(",", ";").replace("é;", "é,") for line in table]
    smi = ["C[C@H](N)C(=O)O café, black", "CCO b", "C1CC", "C/C=C/C d\x0cd"]
    for name, lines, encoding in (
        ("a.csv", table, "latin-1"), ("a.csv.gz", semicolons, "utf-8-sig"),
        ("a.smi", smi, "latin-1"), ("A.SMI.GZ", smi, "utf-16"),
    ):  # fmt: skip
        data = (end.join(lines) + end).encode(encoding)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
        read = read_molecules(str(tmp_path / name), None, 50)
        assert [m.smiles for m in read.molecules] == ["C[C@H](N)C(=O)O", "CCO", "C/C=C/C"], name
        assert [m.name for m in read.molecules] == ["café, black", "b", "d d"]
        first = 2 if "csv" in name else 1
        assert read.lines == [first, first + 1, first + 3] and [r.line for r in read.rejects] == [first + 2]
        fields = [{"pIC50": "7.1"}, {}, {"pIC50": "-3"}] if first == 2 else [{}] * 3
        assert [dict(m.fields) for m in read.molecules] == fields


def test_a_bomb_is_refused_at_once(tmp_path):
    path = tmp_path / "bomb.smi.gz"
    path.write_bytes(gzip.compress(b"CCO ethanol\n" * (4 << 20), 9))  # 48 MiB in 140 KiB
    with pytest.raises(TiltflowError, match=r"unpacks to more than 1\d MiB from"):
        read_molecules(str(path), None, 50)


def test_coordinates_are_a_start_and_fields_go_through(tmp_path):
    """Through .sdf.gz and .mol to conformers.sdf; names of ours are kept apart, and no field ends a record."""
    m, x = embedded("C[C@H](O)CC", 1)
    mol = with_positions(m.mol, x)
    writer = Chem.SDWriter(str(tmp_path / "a.sdf"))
    for key, value in (("assay", "7.1"), ("energy", "old"), ("note", "one\ntwo")):
        mol.SetProp(key, value)
    writer.write(mol)
    writer.close()
    (tmp_path / "b.sdf.gz").write_bytes(gzip.compress((tmp_path / "a.sdf").read_bytes().replace(b"\n", b"\r\n")))
    Chem.MolToMolFile(mol, str(tmp_path / "c.mol"))
    for name, fields in (("a.sdf", 3), ("b.sdf.gz", 3), ("c.mol", 0)):
        (one,) = read_molecules(str(tmp_path / name), None, 50).molecules
        assert one.smiles == m.smiles and len(one.fields) == fields
        torch.testing.assert_close(one.start, x[0], rtol=0, atol=1e-4)
        heavy = Chem.RemoveHs(mol)
        Chem.MolToMolFile(heavy, str(tmp_path / "d.mol"))
        (two,) = read_molecules(str(tmp_path / "d.mol"), None, 50).molecules
        assert two.start.shape == x[0].shape and audit(two, two.start[None]) == [None]
    (one,) = read_molecules(str(tmp_path / "b.sdf.gz"), None, 50).molecules
    assert unpacked(packed(one)).fields == one.fields
    fields = {**one.fields, "note": "one\n\ntwo\n$$$$", "a<b>": "c"}
    e = replace(ensemble("C[C@H](O)CC"), molecule=replace(one, fields=fields))
    write_conformers(tmp_path, [(e, e.clusters())])
    records = list(Chem.SDMolSupplier(str(tmp_path / "conformers.sdf")))
    found = records[0].GetPropsAsDict()
    assert len(records) == 4 and found["assay"] == 7.1 and found["input energy"] == "old" and found["a b"] == "c"
    assert found["note"] == "one\ntwo" and float(found["energy"]) == float(e.energy[0])
    assert [float(r.GetProp("relative_energy")) for r in records] == pytest.approx((e.energy - e.energy.min()).tolist())


def test_a_start_is_a_template_of_its_own():
    """The rarer geometry that was given, an amide's cis side, is among the templates; embeddings come to the other."""
    m = molecule("CNC(C)=O")
    atoms = torch.tensor([[0, 1, 2, 4]])
    found, *_ = templates(m, rotatable_torsions(m), 4, seed=0)
    copy = Chem.Mol(m.mol)
    rdDistGeom.EmbedMolecule(copy, randomSeed=1)
    rdMolTransforms.SetDihedralDeg(copy.GetConformer(), 0, 1, 2, 4, 180.0)
    start = torch.from_numpy(copy.GetConformer().GetPositions())
    more, *_ = templates(replace(m, start=start), rotatable_torsions(m), 4, seed=0)
    assert len(dihedrals(found, atoms)) == 1 and (dihedrals(more, atoms).abs() > 2.5).any() and len(more) == 2


def low(smiles, most=12):
    m = molecule(smiles)
    torsions = rotatable_torsions(m)
    return m, torsions, low_templates(m, torsions, most, 0, 300.0)


@pytest.mark.parametrize(
    ("smiles", "turns", "states"),
    [
        ("CC1CCCCC1", 0, 4),  # both chairs, each with its labelled copy
        ("C[C@H](O)CN(C)CC", 4, 2),  # a nitrogen that inverts
        ("C[C@H](O)CN(C)C", 3, 1),  # two of whose arms are alike: turning is inverting
        ("CNC=O", 0, 2),  # cis and trans
        ("NCCN", 3, 1),
        ("NO", 1, 1),
        ("OO", 1, 1),
        ("CCC#CCC", 1, 1),
        ("OCC#CC#CCO", 3, 1),
        ("C(#Cc1ccccc1)c1ccccc1", 1, 1),
        ("CC#CC", 0, 1),
        ("CCC#N", 0, 1),
        ("CC#CO", 0, 1),
        ("COP(=O)(O)OCC", 4, 2),  # which oxygen bears the proton
    ],
)
def test_every_label_turns_or_is_enumerated(smiles, turns, states):
    _, torsions, found = low(smiles)
    assert (len(torsions.atoms), len(found.positions), found.unsampled) == (turns, states, ())


def test_an_alkyne_turns_about_its_line():
    """The far end moves, the near end and the line stay, and the dihedral is what was asked for."""
    m, torsions, found = low("CCC#CCC")
    x = place(found.positions[0], torsions, torch.tensor([[0.0], [2.0]], dtype=torch.float64))
    torch.testing.assert_close(dihedrals(x, torsions.atoms)[:, 0], torch.tensor([0.0, 2.0], dtype=torch.float64))
    assert audit(m, x) == [None, None] and 2 < int((x[0] - x[1]).norm(dim=1).gt(1e-3).sum()) < m.mol.GetNumAtoms() - 5


NOTHING = Chem.MolFromSmarts("[#118]")


@pytest.mark.parametrize(
    ("smiles", "off", "named"),
    [
        ("CCO", {"torsions.HYDROXYL": NOTHING}, None),
        ("NCCO", {"torsions.AMINO": NOTHING}, "bond N1-C2"),
        ("CCC#CCC", {"torsions.alkynes": lambda mol: []}, "bond C2-C5"),
        ("CCCC", {"torsions.RotatableBondSmarts": NOTHING}, None),
        ("CC1CCCCC1", {"templates.ROUNDS": 1, "templates.COUNT": 1}, "ring bond"),
        ("CC1CCCCC1", {"most": 2}, "ring bond"),
        ("C[C@H](O)CN(C)CC", {"most": 1}, "nitrogen N5"),
        ("CNC=O", {"most": 1}, "bond N2-C3"),
        ("COP(=O)(O)OCC", {"most": 1}, "centre P3"),
    ],
)
def test_a_label_that_is_switched_off_cannot_be_told(smiles, off, named, monkeypatch):
    most = off.get("most", 12)
    for name in off.keys() - {"most"}:
        monkeypatch.setattr(f"tiltflow.molecules.{name}", off[name])
    *_, found = low(smiles, most)
    if named is None:  # a bond that does not turn is a label, and its states are enumerated
        assert len(found.positions) == 3 and not found.unsampled
    else:
        assert any(name.startswith(named) for name in found.unsampled), found.unsampled


def test_what_is_not_sampled_is_said(tmp_path):
    made = generate(molecule("CC1CCCCC1"), ConformerSettings(n=2, coordinates="torsions"), 0)
    assert not made.reliable and "ring bond" in made.unsampled and "ring bond" in made.row()["unsampled"]
    verdict = made.verdict()
    assert verdict.status == "cannot tell" and any("ring bond" in line.explanation for line in verdict.lines)
    record = next(iter(Chem.SDMolSupplier(str(made.to_sdf(tmp_path / "a.sdf")))))
    assert record.GetProp("weight") == "cannot tell" and record.GetProp("unsampled") == made.unsampled
    whole = generate(molecule("CC1CCCCC1"), ConformerSettings(n=9, coordinates="torsions"), 0)
    assert whole.reliable and 1.2 < float(whole.energy.max() - whole.energy.min()) < 1.6  # the axial chair


def test_one_record_of_each_geometry():
    """Water, five times asked for; methylcyclohexane: two chairs, the labelled copies of each one record."""
    for smiles, n, geometries in (("O", 5, 1), ("c1ccccc1", 9, 1), ("CC1CCCCC1", 100, 2)):
        made = generate(molecule(smiles), ConformerSettings(n=n, coordinates="torsions"), 0)
        assert len(made) == geometries and float(made.weights.sum()) == pytest.approx(1)
    x = made.positions[[0, 0, 1]]
    assert sorted(map(len, distinct(made.molecule, x, made.energy[[0, 0, 1]]))) == [1, 2]


# The audit


def test_a_thousand_conformers_without_a_false_alarm_and_every_planted_flip():
    """What passes is the input again when read from its coordinates; a mirror image is caught wherever there is a centre."""
    checked = 0
    for smiles in STEREO.values():
        m, x = embedded(smiles, 130)
        faults = audit(m, x)
        rereads = [Chem.MolToSmiles(Chem.RemoveHs(from_coordinates(m, y))) for y in x]
        for fault, reread in zip(faults, rereads):  # an embedding may put two atoms on top of each other, and does
            assert (fault is None and reread == m.smiles) or "Å" in fault, (fault, reread)
        checked += len(x)
        assert sum(f is None for f in faults) > 0.9 * len(x)
        mirror = audit(m, x * torch.tensor([1.0, -1.0, 1.0]))
        chiral = any(a.GetChiralTag() != Chem.ChiralType.CHI_UNSPECIFIED for a in m.mol.GetAtoms())
        assert all(f is not None and "is inverted" in f for f in mirror) if chiral else mirror == faults
    assert checked > 1000


def from_coordinates(m, x):
    """A molecule whose stereo is only that of the coordinates: through a mol block without it."""
    return Chem.MolFromMolBlock(Chem.MolToMolBlock(with_positions(m.mol, x[None]), includeStereo=False), removeHs=False)


@pytest.mark.parametrize(
    ("smiles", "other", "named"),
    [
        ("C/C=C/F", "C/C=C\\F", "double bond C2=C3 is"),
        ("C1CCC/C=C\\CCC1", "C1CCC/C=C/CCC1", "double bond C5=C6 is"),
        ("C/C(F)=N/O", "C/C(F)=N\\O", "double bond C2=N4 is"),
        ("C[C@H](F)[C@H](O)Cl", "C[C@H](F)[C@@H](O)Cl", "centre C4 is inverted"),
        ("C[C@H]1CC[C@@H](O)CC1", "C[C@H]1CC[C@H](O)CC1", "centre C5 is inverted"),
    ],
)
def test_one_planted_flip_is_caught_and_named(smiles, other, named):
    """The coordinates of one isomer given to the other, which has the same atoms and bonds."""
    for one, two in ((smiles, other), (other, smiles)):
        m, x = embedded(one, 3)
        assert audit(m, x) == [None] * 3
        assert all(fault is not None and fault.startswith(named) and ";" not in fault for fault in audit(molecule(two), x))


def test_bonds_that_break_form_or_collapse():
    m, x = embedded("CCO", 5)
    x[1, 0] += 3.0
    x[2, 3] = x[2, 7] + 0.3
    x[3, 2] = x[3, 1] + 0.6 * (x[3, 2] - x[3, 1])
    x[4, 0, 0] = torch.nan
    faults = audit(m, x)
    assert faults[0] is None and "C1-C2 is broken" in faults[1] and "is no bond" in faults[2]
    assert "C2-O3 is too short (0.8" in faults[3] and faults[4] == "coordinates are not finite"
    with pytest.raises(TiltflowError, match=r"must be \(n, 9, 3\)"):
        audit(m, x[:, :4])


# Weights


def test_weights_are_path_weights_and_nothing_else():
    log_w = torch.tensor([0.0, 1.0, 2.0, -math.inf])
    e = ensemble(log_weights=log_w)
    torch.testing.assert_close(e.weights, log_w.exp() / log_w.exp().sum())
    w = log_w.exp()
    assert e.ess == pytest.approx(float(w.sum() ** 2 / (4 * w.square().sum()))) and e.reliable
    boltzmann = log_w - e.energy / 0.596  # the known-bad twin weighs twice
    assert (e.weights - torch.softmax(boltzmann, 0)).abs().max() > 0.1
    plain = ensemble()
    assert plain.weights.tolist() == [0.25] * 4 and plain.ess == 1.0
    kept = e.keep(torch.tensor([True, True, False, False]))
    assert float(kept.weights.sum()) == pytest.approx(1) and kept.discarded == 2
    masked = torch.tensor([0.0, 1.0, -math.inf, -math.inf])
    assert kept.ess == pytest.approx(ensemble(log_weights=masked).ess)  # leaving samples out does not improve the ESS
    assert plain.keep(torch.tensor([False] * 4)).reliable is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_weights": torch.tensor([0.0, torch.nan, 0.0, 0.0])}, "NaN"),
        ({"log_weights": torch.full((4,), -math.inf)}, "all −∞"),
        ({"log_weights": torch.zeros(3)}, r"must be \(4,\)"),
        ({"temperature": 0.0}, "must be positive"),
    ],
)
def test_ensembles_that_are_none(changes, message):
    with pytest.raises(TiltflowError, match=message):
        ensemble(**changes)


def test_populations_are_sums_of_weights():
    log_w = torch.linspace(0, 2, 40)
    e = ensemble("CCCCCC", 40, log_weights=log_w)
    found = e.clusters(0.3)
    assert sum(found.sizes) == 40 and sum(found.populations) == pytest.approx(1) and len(found.sizes) > 2
    assert found.populations == sorted(found.populations, reverse=True)
    for k, (size, population, lowest) in enumerate(zip(found.sizes, found.populations, found.lowest)):
        mine = found.labels == k
        assert int(mine.sum()) == size and float(e.weights[mine].sum()) == pytest.approx(population)
        assert float(e.energy[lowest]) == float(e.energy[mine].min())
    assert abs(found.populations[0] - found.sizes[0] / 40) > 1e-3  # counting members is the bad twin
    assert len(e.clusters(100.0).sizes) == 1
    with pytest.raises(TiltflowError, match="threshold"):
        e.clusters(0.0)


def test_clusters_know_symmetric_atoms():
    """Two methyl groups exchanged are the same shape."""
    m, x = embedded("CC(C)CO", 1)
    exchanged = x.clone()
    exchanged[:, [0, 2]] = x[:, [2, 0]]
    e = Ensemble(m, torch.cat([x, exchanged]), torch.zeros(2), "kT", torch.zeros(2), 300.0, 300.0, {})
    assert e.clusters(0.01).sizes == [2]


# Files


def test_sdf_comes_back_as_it_was(tmp_path):
    log_w = torch.linspace(0, 1, 5)
    many = [ensemble(smiles, 5, log_weights=log_w) for smiles in (*STEREO.values(), "[H]/N=C(\\C)N", "C[N+](=O)[O-]")]
    write_conformers(tmp_path, [(e, e.clusters()) for e in many])
    records = list(Chem.SDMolSupplier(str(tmp_path / "conformers.sdf")))
    rows = list(csv.DictReader((tmp_path / "conformers.csv").open()))
    assert len(records) == len(rows) == 5 * len(many)
    for i, e in enumerate(many):
        mine, lines = records[5 * i : 5 * i + 5], rows[5 * i : 5 * i + 5]
        assert {Chem.MolToSmiles(r) for r in mine} == {e.molecule.smiles} == {line["smiles"] for line in lines}
        assert [float(r.GetProp("energy")) for r in mine] == e.energy.tolist() == [float(line["energy"]) for line in lines]
        weights = [float(r.GetProp("weight")) for r in mine]
        assert weights == e.weights.tolist() and sum(weights) == pytest.approx(1)
        props = mine[0].GetPropsAsDict()
        assert props["energy_unit"] == "kcal/mol" and props["temperature"] == "300 K" and props["seed"] == 3
    assert not list(tmp_path.glob("*.part"))


def test_conformers_that_were_chosen_have_no_weights():
    """Neither to read, nor to weight for another energy, nor populations; left-out ones are counted all the same."""
    e = replace(ensemble(n=6), log_weights=None)
    assert not e.reliable and e.ess == 0.0 and e.clusters(0.01).populations is None
    assert [row["weight"] for row in e.records(e.clusters())] == ["none"] * 6
    assert e.keep(torch.tensor([True] * 4 + [False] * 2)).discarded == 2
    with pytest.raises(TiltflowError, match="have no weights"):
        _ = e.weights
    energy = open_energy("mmff94", e.molecule)
    with pytest.raises(TiltflowError, match="cannot be weighted for mmff94"):
        rescored(e, energy, energy)


def test_unreliable_weights_are_not_written(tmp_path):
    log_w = torch.zeros(40)
    log_w[0] = 50.0
    e = ensemble("CCO", 40, log_weights=log_w)
    found = e.clusters()
    assert not e.reliable and found.populations is None
    write_conformers(tmp_path, [(e, found)])
    assert {row["weight"] for row in csv.DictReader((tmp_path / "conformers.csv").open())} == {"cannot tell"}
    assert {r.GetProp("weight") for r in Chem.SDMolSupplier(str(tmp_path / "conformers.sdf"))} == {"cannot tell"}


def test_no_cell_is_a_formula(tmp_path):
    names = ('=HYPERLINK("http://a.b","c")', "+1+1", "@x", "-2.5", "plain = 3")
    write_rejects(tmp_path, [Reject(1, name, "C", "=1") for name in names])
    rows = list(csv.DictReader((tmp_path / "rejects.csv").open(newline="")))
    assert [r["name"] for r in rows] == ["'" + names[0], "'+1+1", "'@x", "-2.5", "plain = 3"] and rows[0]["reason"] == "'=1"


def test_rejects_are_written_with_awkward_text(tmp_path):
    reject = Reject(3, 'a "name", with comma', "C1", "no\nreason")
    write_rejects(tmp_path, [reject])
    (row,) = csv.DictReader((tmp_path / "rejects.csv").open(newline=""))
    assert row == {"line": "3", "name": reject.name, "input": "C1", "reason": reject.reason}
