"""``tiltflow conformers`` as users run it, over a stand-in for the sampler: embedded conformers with made-up weights."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from multiprocessing import active_children

import pytest
import torch

pytest.importorskip("rdkit")

from commands import tiltflow
from rdkit import Chem
from rdkit.Chem import rdDistGeom

import tiltflow as tiltflow_package
from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.energies import UnsupportedMolecule
from tiltflow.molecules.ensemble import Ensemble
from tiltflow.molecules.run import _keep
from tiltflow.molecules.settings import ConformerSettings
from tiltflow.molecules.workers import apart


@pytest.fixture
def calls(monkeypatch):
    """The molecules that were generated. Boron is unsupported, iodine gives useless weights, bromine faulty conformers."""
    seen = []

    def generate(molecule, settings, seed, progress, device):
        seen.append((molecule.name, settings, seed))
        if "B1" in molecule.smiles or "B(" in molecule.smiles:
            raise UnsupportedMolecule(molecule, "no parameters for B")
        if molecule.name == "interrupt":
            raise KeyboardInterrupt
        if molecule.name == "defect":
            raise ZeroDivisionError("by zero")
        if molecule.name == "diverged":
            raise TiltflowError(f"{molecule.name} ({molecule.smiles}): it diverged.")
        mol = Chem.Mol(molecule.mol)
        rdDistGeom.EmbedMultipleConfs(mol, settings.n, randomSeed=seed + 1)
        x = torch.tensor([c.GetPositions().tolist() for c in mol.GetConformers()], dtype=torch.float64)
        energy, log_w = torch.arange(float(len(x))), torch.linspace(0, 1, len(x))
        if "I" in molecule.smiles:
            log_w[0] = 80.0
        if molecule.name == "collapsed":
            x[:] = torch.nan
        if "Br" in molecule.smiles:
            x[1, 0] += 5.0
            energy[2] = torch.inf
        progress(settings.n, settings.n, "drawn")
        hot = settings.sampling_temperature or 900.0
        return Ensemble(molecule, x, energy, "kcal/mol", log_w, settings.temperature, hot, {"engine": "stand-in"})

    def here(work, jobs, workers, seconds, done):  # in this process, where the stand-in is
        for i, job in enumerate(jobs):
            work(*job)
            done(i, None)

    monkeypatch.setattr("tiltflow.molecules.run.generate", generate)
    monkeypatch.setattr("tiltflow.molecules.run.apart", here)
    monkeypatch.setattr("tiltflow.molecules.run._keep_alone", _keep)
    return seen


def rows_of(path):
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def test_one_smiles(calls, tmp_path):
    out = tmp_path / "run"
    args = ["C[C@H](O)CC", "-n", 12, "--temperature", "350 K", "--sampling-temperature", "700K", "--seed", 4, "--out", out]
    done = tiltflow("conformers", *args, "--json")
    assert done.returncode == 0, done.stderr
    assert "molecule-1" in done.stderr and "drawn" in done.stderr
    document = json.loads(done.stdout)
    wanted = ConformerSettings(energy="mmff94", temperature=350.0, sampling_temperature=700.0, n=12)
    assert calls[0][1:] == (wanted, 4)
    assert document["seed"] == 4 and document["verdict"] == "pass"
    lines = {r["name"]: r["status"] for r in document["rows"] if r["kind"] == "verdict"}
    assert lines == {"path weights ESS": "pass", "conformers left out": "pass"}
    (row,) = [r for r in document["rows"] if r["kind"] == "conformers"]
    assert row["conformers"] == 12 and row["rejected"] == 0 and 0.5 < row["ess"] <= 1 and row["reliable"]
    assert (row["energy_min"], row["energy_max"], row["energy_unit"]) == (0.0, 11.0, "kcal/mol") and row["seconds"] >= 0
    assert json.loads((out / "metrics.json").read_text()) == document
    assert json.loads((out / "config.json").read_text())["settings"]["temperature"] == 350.0
    first = next(iter(Chem.SDMolSupplier(str(out / "conformers.sdf"))))
    assert {"engine", "energy_model", "tiltflow_version", "seed", "sampling_temperature"} <= set(first.GetPropNames())
    assert Chem.MolToSmiles(first) == row["smiles"] == "CC[C@H](C)O" and rows_of(out / "rejects.csv") == []


def test_a_file_with_everything_that_goes_wrong(calls, tmp_path):
    source, out = tmp_path / "in.smi", tmp_path / "run"
    source.write_text("CCO good\nCC(F)Cl flat\nB(C)(C)C boron\nCCI iodide\nCCBr bromide\nCCN collapsed\n")
    done = tiltflow("conformers", source, "-n", 30, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    kept = {r["name"]: r for r in document["rows"] if r["kind"] == "conformers"}
    assert {name: (r["conformers"], r["rejected"], r["reliable"]) for name, r in kept.items()} == {
        "good": (30, 0, True),
        "iodide": (30, 0, False),
        "bromide": (28, 2, True),
        "collapsed": (0, 30, False),
    }
    assert document["verdict"] == "cannot tell"
    lines = {r["name"]: r for r in document["rows"] if r["kind"] == "verdict"}
    assert lines["path weights ESS"]["status"] == "cannot tell" and lines["conformers left out"]["status"] == "warn"
    assert "told of 2: iodide, collapsed" in lines["path weights ESS"]["explanation"]
    summary = document["rows"][0]
    assert (summary["kind"], summary["molecules"], summary["refused"], summary["unreliable"]) == ("summary", 4, 2, 2)
    refused = [(r["line"], r["name"], r["reason"]) for r in document["rows"] if r["kind"] == "refused"]
    assert refused[0][:2] == (2, "flat") and refused[1] == (3, "boron", "no parameters for B")
    rejects = [(r["line"], r["name"], r["reason"]) for r in rows_of(out / "rejects.csv")]
    assert rejects[0][0] == "2" and rejects[1] == ("3", "boron", "no parameters for B")
    assert "conformer 2 left out: C1-C2 is broken" in rejects[2][2]
    assert rejects[3] == ("5", "bromide", "conformer 3 left out: energy is not finite") and len(rejects) == 4 + 30
    weights = {name: [r["weight"] for r in rows_of(out / "conformers.csv") if r["name"] == name] for name in kept}
    assert set(weights["iodide"]) == {"cannot tell"}
    assert sum(map(float, weights["bromide"])) == pytest.approx(1) == sum(map(float, weights["good"]))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "cannot tell" in page and "boron" in page and "$3Dmol.createViewer" in page
    assert not re.search(r"""<(script|link|img)[^>]*(src|href)=["']?(https?:)?//""", page)


def test_one_line_never_ends_a_file(calls, tmp_path):
    """Whatever an energy raises is a line of rejects.csv; isotopes are molecules; alone, it ends the run."""
    source, out = tmp_path / "in.smi", tmp_path / "run"
    source.write_text("CCO defect\n[2H]C([2H])([2H])CO deuterated\nCCN diverged\n[3H]C\n[2H]O[2H] heavy\n")
    done = tiltflow("conformers", source, "-n", 3, "--out", out)
    assert done.returncode == 0, done.stderr
    assert [(r["line"], r["name"], r["reason"]) for r in rows_of(out / "rejects.csv")] == [
        ("1", "defect", "ZeroDivisionError: by zero"),
        ("3", "diverged", "it diverged"),
    ]
    assert {r["name"] for r in rows_of(out / "conformers.csv")} == {"deuterated", "molecule-4", "heavy"}
    source.write_text("CCO defect\n")
    done = tiltflow("conformers", source, "--out", tmp_path / "alone")
    assert done.returncode != 0 and "ZeroDivisionError: by zero" in done.stderr


def test_what_hangs_or_dies_costs_its_own_piece():
    found, started = {}, time.monotonic()
    jobs = [(0.01,), (60.0,), (0.02,), (0.01,)]
    apart(time.sleep, jobs, 2, 0.5, found.__setitem__)
    assert time.monotonic() - started < 30 and not active_children()
    assert set(found) == {0, 1, 2, 3} and [i for i in found if found[i]] == [1] and "more than 0.5 s" in found[1]
    apart(os._exit, [(3,), (4,)], 1, 9.0, found.__setitem__)
    assert [found[i] for i in (0, 1)] == [f"its process died (exit code {k}); is there enough memory?" for k in (3, 4)]
    with pytest.raises(ValueError, match="non-negative"):
        apart(time.sleep, [(-1,)], 1, 9.0, found.__setitem__)


HANGING = """
import os, time
from tiltflow.molecules.energies.mmff import MMFF94

def energy(molecule):
    if molecule.name == "hangs":
        time.sleep(600)
    if molecule.name == "dies":
        os._exit(9)
    return MMFF94(molecule)
"""


@pytest.mark.slow
def test_a_run_outlives_molecules_that_hang_or_die(tmp_path):
    (tmp_path / "mine.py").write_text(HANGING)
    (tmp_path / "in.smi").write_text("CCO good\nCCC hangs\nCCN dies\nCO last\n")
    sampler = ["--rounds", 1, "--gradient-steps", 1, "--batch", 8, "--energy", f"{tmp_path / 'mine.py'}:energy"]
    done = tiltflow("conformers", tmp_path / "in.smi", "-n", 3, *sampler, "--time-limit", 20, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    reasons = {r["name"]: r["reason"] for r in rows_of(tmp_path / "run" / "rejects.csv")}
    assert set(reasons) == {"hangs", "dies"} and "exit code 9" in reasons["dies"] and "20 s" in reasons["hangs"]
    assert {r["name"] for r in rows_of(tmp_path / "run" / "conformers.csv")} == {"good", "last"}


def test_what_ran_out_of_time_is_tried_again(calls, tmp_path, monkeypatch):
    source, out = tmp_path / "in.smi", tmp_path / "run"
    source.write_text("CCO slow\nCCC quick\n")
    common = ("conformers", source, "-n", 3, "--out", out)
    with monkeypatch.context() as patch:

        def late(work, jobs, workers, seconds, done):
            work(*jobs[1])
            done(0, f"late after {seconds:g}")

        patch.setattr("tiltflow.molecules.run.apart", late)
        assert tiltflow(*common, "--time-limit", 7).returncode == 0
    assert [(r["name"], r["reason"]) for r in rows_of(out / "rejects.csv")] == [("slow", "late after 7")]
    assert tiltflow(*common, "--time-limit", 70, "--resume").returncode == 0
    assert [c[0] for c in calls] == ["quick", "slow"] and rows_of(out / "rejects.csv") == []
    alone = tiltflow("conformers", "CCO", "--time-limit", 1e-9, "--out", tmp_path / "alone")
    assert alone.returncode == 2 and "CCO: it took more than 1e-09 s" in alone.stderr


def test_resume_generates_only_what_is_missing(calls, tmp_path):
    source, out = tmp_path / "in.smi", tmp_path / "run"
    source.write_text("CCO good\nCC interrupt\nCCC last\n")
    stopped = tiltflow("conformers", source, "-n", 3, "--out", out)
    assert stopped.returncode == 130 and len(calls) == 2 and not (out / "conformers.sdf").exists()
    again = tiltflow("conformers", source, "-n", 3, "--out", out, "--resume")
    assert again.returncode == 130 and [c[0] for c in calls] == ["good", "interrupt", "interrupt"]
    other = tiltflow("conformers", source, "-n", 4, "--out", out, "--resume")
    assert other.returncode == 2 and "cannot resume" in other.stderr
    source.write_text("CCO good\nCC second\nCCC last\n")
    changed = tiltflow("conformers", source, "-n", 3, "--out", out, "--resume")
    assert changed.returncode == 2 and "input_sha256" in changed.stderr
    done = tiltflow("conformers", source, "-n", 3, "--out", out, "--overwrite")
    assert done.returncode == 0 and [c[2] for c in calls[-3:]] == [0, 1, 2], done.stderr
    count, text = len(calls), (out / "conformers.csv").read_text()
    assert tiltflow("conformers", source, "-n", 3, "--out", out, "--resume").returncode == 0 and len(calls) == count
    assert (out / "conformers.csv").read_text() == text


def test_more_rounds_make_finished_molecules_anew(calls, tmp_path):
    out = tmp_path / "run"
    for rounds, resume, made in ((5, [], 1), (5, ["--resume"], 1), (9, ["--resume"], 2)):
        done = tiltflow("conformers", "CCO", "-n", 3, "--rounds", rounds, "--out", out, *resume)
        assert done.returncode == 0 and len(calls) == made, done.stderr
    assert [settings.sampler.rounds for _, settings, _ in calls] == [5, 9]
    assert tiltflow("conformers", "CCO", "-n", 3, "--rounds", 5, "--out", out, "--resume").returncode == 2


def test_a_run_is_read_back_where_it_was_moved_to(calls, tmp_path):
    source, out, there = tmp_path / "in.smi", tmp_path / "run", tmp_path / "there"
    source.write_text("CCBr bromide\nB(C)(C)C boron\nC/C=C/Cl double\n")
    assert tiltflow("conformers", source, "-n", 5, "--out", out).returncode == 0
    out.rename(there)
    source.unlink()
    bromide, double = tiltflow_package.load(there)
    assert (bromide.molecule.name, len(bromide), bromide.discarded) == ("bromide", 3, 2)
    assert (len(double), Chem.MolToSmiles(Chem.RemoveHs(double.molecule.mol))) == (5, double.molecule.smiles)
    numbers = [[float(r["energy"]) for r in rows_of(there / "conformers.csv") if r["name"] == "double"]]
    assert numbers == [double.energy.tolist()]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["CC(F)Cl"], "undefined stereo: centre C2"),
        (["B(C)(C)C"], "mmff94 does not take B"),
        (["missing.smi"], "no file"),
        (["CCO", "--temperature", "27C"], "write Kelvin"),
        (["CCO", "--sampling-temperature", "0K"], "above 0 K"),
        (["CCO", "--device", "meta"], "not usable"),
        (["CCO", "-n", 0], "-n"),
        (["CCCCCCC", "--max-atoms", 10], "too large"),
        (["CCO", "--cover", "--rescore", "gfn2"], "cover has a recipe of its own: leave out rescore"),
    ],
)
def test_misuse(args, message, calls, tmp_path):
    done = tiltflow("conformers", *args, "--out", tmp_path / "run")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_the_command_line_starts_without_rdkit():
    code = "import sys, tiltflow.cli; print([m for m in ('rdkit', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
