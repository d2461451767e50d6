"""RMSD against RDKit's own, references against the files they were written from, the benchmark against planted methods."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from commands import tiltflow
from rdkit import Chem
from rdkit.Chem import rdForceFieldHelpers, rdMolAlign

import tiltflow.bench.conformers as bench
from tiltflow.bench.conformers import Generated, bench_conformers, bench_molecule, evenly, interval, relax
from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.geom import Listed, Reference, list_molecules, read_reference
from tiltflow.molecules.molecule import molecule, with_positions
from tiltflow.molecules.rmsd import coverage, heavy_atoms, rmsd_matrix, symmetries
from tiltflow.molecules.split import unseen
from tiltflow.molecules.torsions import dihedrals, rotatable_torsions

DATA = Path(__file__).parent.parent / "benchmarks" / "data" / "geom_drugs"
ALANINE = "C[C@H](N)C(=O)OC"
SYMMETRIC = {  # the number of symmetries RDKit knows of
    "Cc1ccccc1": 2,
    "CC(C)(C)c1ccc(C(F)(F)F)cc1": 72,
    "CC(=O)[O-]": 2,
    "CCC(=O)O": 2,
    "O=[N+]([O-])c1ccccc1": 4,
    "CC(N)=[NH2+]": 2,
    "COP(=O)([O-])[O-]": 6,
    "CS(=O)(=O)O": 6,
    "CC(N)=O": 1,
    "OC[C@H](O)CO": 2,
    "C1CCCCC1": 12,
}


def rotations(n, generator):
    """Random elements of SO(3), (n, 3, 3)."""
    q, r = torch.linalg.qr(torch.randn(n, 3, 3, generator=generator, dtype=torch.float64))
    q = q * torch.diagonal(r, dim1=1, dim2=2).sign()[:, None]
    return q * torch.linalg.det(q)[:, None, None]


def conformers(mol, n, seed=0):
    return bench.rdkit(mol, n, seed).positions


def heavy_mol(mol, x):
    return Chem.RemoveAllHs(with_positions(mol.mol, x))


# RMSD and coverage


@pytest.mark.parametrize("smiles", SYMMETRIC)
def test_rmsd_is_rdkits(smiles, generator):
    """Every pair; without its symmetries, or with the distance to a mirror image, it is not."""
    mol = molecule(smiles)
    x, y = conformers(mol, 3), conformers(mol, 4, seed=7)
    x = x + 0.6 * torch.randn(x.shape, generator=generator)
    y = y @ rotations(4, generator) + 0.6 * torch.randn(y.shape, generator=generator)
    orders = symmetries(mol)
    assert len(orders) == SYMMETRIC[smiles] and (orders == torch.arange(orders.shape[1])).all(1).any()
    y = y.clone()  # a symmetry's worth of renumbering
    heavy = heavy_atoms(mol)
    y[:, heavy] = y[:, heavy[orders[-1]]]
    found, p, q = rmsd_matrix(mol, x, y), heavy_mol(mol, x), heavy_mol(mol, y)
    expected = [[rdMolAlign.GetBestRMS(Chem.Mol(q), p, j, i) for j in range(4)] for i in range(3)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)
    mirrored = rmsd_matrix(mol, x, y * torch.tensor([1.0, 1.0, -1.0]))
    assert (mirrored - found).abs().max() > 0.01
    if len(orders) > 1:
        alone = [(k, k) for k in range(len(heavy))]
        plain = [[rdMolAlign.AlignMol(Chem.Mol(q), p, j, i, atomMap=alone) for j in range(4)] for i in range(3)]
        assert (torch.tensor(plain) - found).max() > 0.01


def test_rmsd_of_two_atoms_and_of_none(generator):
    """Two atoms at distances d and d': |d − d'|/2, the double root of the quartic; a moved copy: 0."""
    mol = molecule("CO")
    x, y = (torch.randn(5, 6, 3, generator=generator) for _ in range(2))
    d, e = ((v[:, 1] - v[:, 0]).norm(dim=1) for v in (x, y))
    torch.testing.assert_close(rmsd_matrix(mol, x, y), (d[:, None] - e).abs() / 2, rtol=0, atol=1e-5)
    hexane = molecule("CCCCCC")
    x = conformers(hexane, 3)
    moved = x @ rotations(3, generator) + 5
    assert rmsd_matrix(hexane, x, moved).diagonal().max() < 1e-6
    with pytest.raises(TiltflowError, match="no atom other than hydrogen"):
        rmsd_matrix(molecule("[H][H]"), torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))
    with pytest.raises(TiltflowError, match=r"b has shape \(3, 20, 2\)"):
        rmsd_matrix(hexane, x, x[..., :2])
    with pytest.raises(TiltflowError, match="1 of 3 conformers a of 'molecule' are not finite"):
        rmsd_matrix(hexane, x.index_fill(0, torch.tensor([1]), torch.nan), x)
    with pytest.raises(TiltflowError, match=r"more than 10,000 symmetries"):
        symmetries(molecule("C" + "(C(C(F)(F)F)(C(F)(F)F)C(F)(F)F)" * 2))


def test_coverage_by_hand():
    """Rows are references; transposed, recall and precision change places."""
    matrix = torch.tensor([[0.4, 2.0, 3.0], [0.9, 1.5, 2.5]])
    found = coverage(matrix, torch.tensor([0.5, 1.0, 2.5]))
    assert found.recall.tolist() == [0.5, 1.0, 1.0] and found.precision.tolist() == pytest.approx([1 / 3, 1 / 3, 1])
    assert found.recall_amr == pytest.approx(0.65) and found.precision_amr == pytest.approx((0.4 + 1.5 + 2.5) / 3)
    assert coverage(matrix.T, torch.tensor([0.5])).recall.tolist() == pytest.approx([1 / 3])
    with pytest.raises(TiltflowError, match="finite RMSDs"):
        coverage(torch.full((2, 2), torch.nan), torch.tensor([1.0]))


# References


def write_folder(folder, smiles, positions, order, name="alanine"):
    """A folder of one molecule whose files have the atoms in another order."""
    symbols = [a.GetSymbol() for a in molecule(smiles).mol.GetAtoms()]
    lines = []
    for x in positions.tolist():
        lines += [str(len(order)), "0", *("\t".join([symbols[i], *(f"{v:.6f}" for v in x[i])]) for i in order)]
    (folder / "molecules.csv").write_text(f"name,rotatable_bonds,smiles\n{name},9,{smiles}\n", encoding="utf-8")
    (folder / f"{name}.xyz.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return lines


@pytest.fixture
def folder(tmp_path, generator):
    """Four conformers, and the mirror image of the last one."""
    target = tmp_path / "data"
    target.mkdir()
    mol = molecule(ALANINE)
    x = conformers(mol, 4)
    order = torch.randperm(x.shape[1], generator=generator).tolist()
    lines = write_folder(target, ALANINE, torch.cat([x, x[-1:] * torch.tensor([1.0, 1.0, -1.0])]), order)
    return target, x, order, lines


def test_references_are_brought_into_the_molecules_order(folder):
    """Distances between bonded atoms are those of bonds; in the file's order they are not. The mirror image is left out."""
    path, x, order, _ = folder
    (listed,) = list_molecules(path)
    found = read_reference(path, listed)
    assert found.rotatable_bonds == 9 and found.other_stereo == 1 and found.molecule.smiles == molecule(ALANINE).smiles
    assert found.positions.shape == x.shape and rmsd_matrix(found.molecule, x, found.positions).diagonal().max() < 1e-5
    bonds = torch.tensor([[b.GetBeginAtomIdx(), b.GetEndAtomIdx()] for b in found.molecule.mol.GetBonds()])
    for positions, good in ((found.positions, True), (x[:, order], False)):
        lengths = (positions[:, bonds[:, 0]] - positions[:, bonds[:, 1]]).norm(dim=-1)
        assert bool(((lengths > 0.9) & (lengths < 1.7)).all()) == good


def test_open_stereo_is_the_first_blocks(folder):
    path, x, order, _ = folder
    write_folder(path, "CC(N)C(=O)OC", x[:1] * torch.tensor([1.0, 1.0, -1.0]), order)
    (listed,) = list_molecules(path)
    assert read_reference(path, listed).molecule.smiles == molecule(ALANINE.replace("@", "@@")).smiles
    with pytest.raises(TiltflowError, match=r"alanine\.xyz\.gz: no block has the stereo of C\[C@H\]"):
        read_reference(path, listed._replace(smiles=ALANINE))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda lines: lines[:-1], r"alanine\.xyz\.gz, block 5 \(line 73\): 16 atoms are announced, 15 are there"),
        (lambda lines: [*lines[:40], "C 1 2 x", *lines[41:]], r"block 3 \(line 37\).*could not convert"),
        (lambda lines: [*lines[:40], "Q 1 2 3", *lines[41:]], r"block 3 \(line 37\).*'Q'"),
        (lambda lines: [*lines[:20], lines[20].replace(lines[20].split()[0], "F"), *lines[21:]], "block 2: its elements"),
        (lambda lines: [*lines[:40], lines[40].split()[0] + " nan 0 0", *lines[41:]], "block 3: a coordinate is not finite"),
        (lambda lines: [*lines[:40], lines[40].split()[0] + " 50 0 0", *lines[41:]], "block 3: its bonds are not those"),
        (lambda lines: [*lines[:2], lines[2].split()[0] + " 50 0 0", *lines[3:]], "block 1: its atoms and bonds are not"),
        (lambda lines: [], "holds no XYZ block"),
    ],
)
def test_damaged_references_are_named(folder, damage, message):
    path, _, _, lines = folder
    (path / "alanine.xyz.gz").write_bytes(gzip.compress("\n".join(damage(lines)).encode()))
    with pytest.raises(TiltflowError, match=message):
        read_reference(path, *list_molecules(path))


def test_damaged_folders_are_named(folder):
    path = folder[0]
    (path / "alanine.xyz.gz").write_bytes(b"plain text")
    with pytest.raises(TiltflowError, match=r"alanine\.xyz\.gz: not a readable gzipped"):
        read_reference(path, *list_molecules(path))
    with pytest.raises(TiltflowError, match="'C1' of ring is not a SMILES"):
        read_reference(path, Listed("ring", 1, "C1"))
    (path / "molecules.csv").write_text("name,rotatable_bonds,smiles\na,many,C\n")
    with pytest.raises(TiltflowError, match=r"molecules\.csv, line 2"):
        list_molecules(path)
    with pytest.raises(TiltflowError, match=r"must hold molecules\.csv"):
        list_molecules(path / "nowhere")


def test_the_shipped_references():
    """One whose SMILES leaves stereo open, one with conformers of another double-bond isomer."""
    listed = {line.name: line for line in list_molecules(DATA)}
    assert len(listed) == 40
    opened, other = (read_reference(DATA, listed[name]) for name in ("rot8_46ceda5c8b", "rot8_39c3318a02"))
    assert "[C@H]" in opened.molecule.smiles and opened.other_stereo == 0 and len(opened.positions) == 46
    assert other.other_stereo == 5 and len(other.positions) == 71


def test_molecules_trained_on_are_found():
    """Written otherwise, or with other stereo; a neighbour of the same formula is another molecule."""
    mine = [molecule(ALANINE, "alanine"), molecule("Clc1ccncc1", "pyridine")]
    unseen(mine, ["CCC(N)C(=O)O", "CNCC(=O)OC", "c1ccnc(Cl)c1", "[Hg]"])
    with pytest.raises(TiltflowError, match="1 of 2 molecules to be evaluated are in the training list: alanine"):
        unseen(mine, ["C", "O(C)C(=O)[C@@H](C)N"])
    with pytest.raises(TiltflowError, match="training list: pyridine"):
        unseen(mine, ["c1cc(ccn1)Cl"])


# The benchmark


@pytest.mark.parametrize("method", ["rdkit", "rdkit_random_torsions"])
def test_baselines_give_what_is_asked_for(method):
    """n different conformers by seed, of the molecule's stereo; random torsions are uniform and leave the bonds alone."""
    mol = molecule("CC[C@H](F)C(=O)NCCO")
    made = bench.METHODS[method](mol, 40, 0)
    again, other = (bench.METHODS[method](mol, 40, seed).positions for seed in (0, 1))
    assert (rmsd_matrix(mol, made.positions, torch.cat([made.positions, other])) < 1e-6).sum() == 40
    assert made.positions.shape == (40, mol.mol.GetNumAtoms(), 3) and made.energy_calls == 0 and made.seconds > 0
    assert torch.equal(made.positions, again) and not torch.allclose(made.positions, other)
    for x in made.positions[:5]:
        copy = with_positions(mol.mol, x[None])
        Chem.AssignStereochemistryFrom3D(copy)
        assert Chem.MolToSmiles(Chem.RemoveHs(copy)) == mol.smiles
    if method != "rdkit":
        angles = dihedrals(made.positions, rotatable_torsions(mol).atoms)
        assert ((angles.abs() < torch.pi / 2).sum(0) > 8).all() and ((angles.abs() > torch.pi / 2).sum(0) > 8).all()
        plain = bench.rdkit(mol, 40, 0).positions
        for b in mol.mol.GetBonds():
            i, j = b.GetBeginAtomIdx(), b.GetEndAtomIdx()
            lengths = [(p[:, i] - p[:, j]).norm(dim=1) for p in (plain, made.positions)]
            torch.testing.assert_close(*lengths, rtol=0, atol=1e-6)


def test_relaxation_lowers_mmff_and_refuses_what_it_does_not_know():
    mol = molecule(ALANINE)
    x = bench.rdkit_random_torsions(mol, 4, 0).positions

    def energies(positions):
        mobile = with_positions(mol.mol, positions)
        return [e for _, e in rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(mobile, maxIters=0)]

    assert all(after < before for before, after in zip(energies(x), energies(relax(mol, x))))
    with pytest.raises(TiltflowError, match="MMFF94 has no parameters for 'molecule'"):
        relax(molecule("CB(O)O"), torch.zeros(1, 9, 3))
    with pytest.raises(TiltflowError, match=r"\(1, 9, 2\)"):
        with_positions(mol.mol, torch.zeros(1, 9, 2))


def reference(n=4):
    mol = molecule("CCCCO", "butanol")
    return Reference(mol, 8, conformers(mol, n, seed=11), 0)


def test_planted_methods_score_what_they_must(monkeypatch):
    """The references themselves: all covered, AMR 0. All alike: the share near that one. A failure: 0, and named."""
    it = reference()

    def planted(which):
        return lambda mol, n, seed: Generated(it.positions[[k % 4 if which is None else which for k in range(n)]], 7, 1.0)

    def failing(mol, n, seed):
        raise TiltflowError("cannot")

    def few(mol, n, seed):
        return Generated(it.positions, 0, 0.0)

    methods = {"all": planted(None), "one": planted(2), "failing": failing, "few": few}
    monkeypatch.setattr(bench, "METHODS", methods)
    rows = {name: bench_molecule(it, name, 0) for name in methods}
    perfect = rows["all"][0]
    assert perfect["generated"] == 256 and perfect["references"] == 4 and perfect["relaxed"] is False
    assert perfect["recall_coverage"] == perfect["precision_coverage"] == [1.0] * 5
    assert perfect["recall_amr"] < 1e-6 and perfect["precision_amr"] < 1e-6
    assert perfect["recall_by_share"] == [[1.0] * 5] * 4
    distances = rmsd_matrix(it.molecule, it.positions, it.positions)[:, 2]
    one = rows["one"][0]
    assert one["recall_amr"] == pytest.approx(float(distances.mean())) and one["precision_coverage"] == [1.0] * 5
    assert one["recall_coverage"] == pytest.approx([float((distances <= t).double().mean()) for t in bench.THRESHOLDS])
    assert one["recall_coverage"][0] < 1
    relaxed = rows["all"][1]
    assert relaxed["relaxed"] and 0 < relaxed["recall_amr"] < 0.5 and relaxed["seconds"] > perfect["seconds"] == 1.0
    for name, error in (("failing", "cannot"), ("few", "few gave 4 conformers of 'butanol' instead of 256.")):
        assert [r["error"] for r in rows[name]] == [error] * 2 and rows[name][0]["recall_coverage"] == [0.0] * 5
    elsewhere = [r | {"molecule": "rigid", "rotatable_bonds": 3} for r in rows["all"]]
    summary = bench.summarise(rows["all"] + rows["failing"] + elsewhere)
    key = {(r["method"], r["subset"]): r for r in summary if r["threshold"] == 1.0 and not r["relaxed"]}
    assert set(key) == {(m, s) for m in ("all", "failing") for s in bench.SUBSETS}
    assert key["all", "all"]["molecules"] == 2 and key["all", "≥ 7 rotatable bonds"]["molecules"] == 1
    failed = key["failing", "all"]
    assert failed["recall_coverage"] == failed["precision_coverage"] == 0 and failed["recall_amr"] is None
    assert failed["failed"] == ["butanol"] and key["all", "all"]["failed"] == [] and key["all", "all"]["energy_calls"] == 14


def test_interval_and_spacing(generator):
    """The bootstrap of many values is the normal one; of equal values it has no width."""
    values = torch.randn(400, generator=generator)
    low, high = interval(values.tolist())
    width = 2 * 1.96 * float(values.std()) / 20
    assert high - low == pytest.approx(width, rel=0.05) and low < float(values.mean()) < high
    assert interval([0.5, 0.5]) == (0.5, 0.5)
    assert evenly(4, 512).tolist() == [0, 1, 2, 3] and evenly(529, 512)[[0, -1]].tolist() == [0, 528]
    assert len(set(evenly(529, 512).tolist())) == 512


def test_command(folder, tmp_path, monkeypatch):
    """One molecule in a process of its own; kept until the run is complete; an interrupted run resumes."""
    path, out = folder[0], tmp_path / "result.json"
    common = ("bench", "conformers", "--data", path, "--methods", "rdkit", "--molecules", 1, "--out", out, "--json")
    done = tiltflow(*common)
    document = json.loads(done.stdout)
    assert done.returncode == 0 and json.loads(out.read_text())["rows"] == document["rows"]
    assert not (tmp_path / "result.json.parts").exists()
    kinds = [r["kind"] for r in document["rows"]]
    assert kinds.count("molecule") == 2 and kinds.count("summary") == 2 * 2 * 5 and kinds.count("share") == 2 * 2 * 5 * 4
    (row,) = [r for r in document["rows"] if r["kind"] == "molecule" and r["relaxed"]]
    assert row["references"] == 4 and row["references_of_other_stereo"] == 1 and row["recall_coverage"][-1] == 1.0

    def here(work, jobs, progress):
        threads = torch.get_num_threads()
        rows = [row for job in jobs for row in work(*job, 1)]
        torch.set_num_threads(threads)
        return rows

    def without_seconds(rows):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    parts = tmp_path / "parts"
    monkeypatch.setattr(bench, "run_apart", here)
    first = bench_conformers(path, ("rdkit",), 0, parts=parts)
    assert without_seconds(first) == without_seconds(document["rows"])  # by the seed
    monkeypatch.setattr(bench, "run_apart", lambda work, jobs, progress: pytest.fail("nothing is left to do"))
    assert bench_conformers(path, ("rdkit",), 0, parts=parts) == first
    (kept,) = parts.glob("*.json")
    kept.write_text("{")
    with pytest.raises(TiltflowError, match="is damaged"):
        bench_conformers(path, ("rdkit",), 0, parts=parts)
    (path.parent / bench.TRAINING).write_bytes(gzip.compress(f"SMILES\n{ALANINE}\n".encode()))
    with pytest.raises(TiltflowError, match="training list: alanine"):
        bench_conformers(path, ("rdkit",), 0)


def test_a_molecule_that_cannot_be_used_is_skipped_and_named(folder, monkeypatch):
    """Coordinates with other bonds than the SMILES, as of a zwitterion in vacuum, or no file; all of them: an error."""
    path = folder[0]
    table = path / "molecules.csv"
    table.write_text(table.read_text() + "zwitterion,1,[NH3+]CC(=O)[O-]\nnone,1,CCO\n")
    (path / "zwitterion.xyz.gz").write_bytes(gzip.compress(b"2\n0\nH 0 0 0\nH 0 0 0.7\n"))
    monkeypatch.setattr(bench, "run_apart", lambda work, jobs, progress: [row for job in jobs for row in work(*job, 1)])
    done = tiltflow("bench", "conformers", "--data", path, "--methods", "rdkit", "--json")
    assert done.returncode == 0 and "skipped: zwitterion: " in done.stderr and "skipped: none: " in done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {r["molecule"] for r in rows if r["kind"] == "molecule"} == {"alanine"}
    skipped = {r["molecule"]: r["reason"] for r in rows if r["kind"] == "skipped"}
    assert "block 1: its atoms and bonds are not those" in skipped["zwitterion"] and len(skipped) == 2
    (path / "alanine.xyz.gz").unlink()
    with pytest.raises(TiltflowError, match="none"):
        bench_conformers(path, ("rdkit",), 0)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--methods", "rdkit,magic"], "method 'magic'"),
        (["--methods", "rdkit,rdkit"], "once each"),
        (["--molecules", 99], "--molecules 99"),
        (["--seed", -1], "--seed must be a whole number of at least 0, got -1"),
        (["--seed", 10**12], "seed must be a whole number from 0 to 1e+09"),
        (["--device", "cuda"], "--device cuda"),
    ],
)
def test_misuse(args, message):
    done = tiltflow("bench", "conformers", *args)
    assert done.returncode == 2 and message in done.stderr


def test_missing_data_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "DATA", tmp_path / "none")
    done = tiltflow("bench", "conformers")
    assert done.returncode == 2 and "--data DIR" in done.stderr
