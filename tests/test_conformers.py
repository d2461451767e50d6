"""The front door of conformers: the same as a run, saved and loaded exactly; its verdict; misuse in Python and as typed."""

import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("rdkit")

from commands import tiltflow
from rdkit import Chem

import tiltflow as tf
from tiltflow.cli.list import _rows
from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.energies import open_energy
from tiltflow.molecules.ensemble import read_ensemble
from tiltflow.molecules.judge import judge_conformers
from tiltflow.molecules.molecule import molecule
from tiltflow.molecules.settings import ENERGIES, CartesianSettings, ConformerSettings, TorsionalSettings

SMALL = TorsionalSettings(rounds=2, gradient_steps=2, batch=16)
AS_TYPED = ["--rounds", 2, "--gradient-steps", 2, "--batch", 16]
BENZYL = "OCc1ccccc1"


def test_it_gives_what_a_run_gives(tmp_path):
    torch.set_default_dtype(torch.float32)
    typed = ["-n", 12, "--temperature", "350K", "--seed", 3, *AS_TYPED, "--out", tmp_path / "run"]
    done = tiltflow("conformers", BENZYL, *typed)
    assert done.returncode == 0, done.stderr
    (ran,) = tf.load(tmp_path / "run")
    made = tf.conformers(BENZYL, n=12, temperature=350, seed=3, sampler=SMALL)
    assert torch.equal(made.positions, ran.positions) and torch.equal(made.log_weights, ran.log_weights)
    assert made.provenance == ran.provenance and made.provenance["energy_model"] == "mmff94"
    other = tf.conformers(BENZYL, n=12, temperature=350, seed=4, sampler=SMALL)
    assert not torch.equal(made.positions, other.positions)
    records = list(Chem.SDMolSupplier(str(made.to_sdf(tmp_path / "a.sdf")), removeHs=False))
    written = list(Chem.SDMolSupplier(str(tmp_path / "run" / "conformers.sdf"), removeHs=False))
    assert [r.GetPropsAsDict() for r in records[:2]] == [
        r.GetPropsAsDict() | {"conformer": k} for k, r in enumerate(written[:2], 1)
    ]


@pytest.mark.parametrize("smiles", ["C[C@H](F)/C=C/Cl", "C/C(F)=N/O", "CC[S@](C)=O"])
def test_what_is_saved_is_what_is_loaded(smiles, tmp_path):
    """Stereo too: an ensemble of another isomer, or without its marks, would lose all conformers to the audit."""
    made = tf.conformers(smiles, n=6, sampler=SMALL)
    (again,) = tf.load(made.save(tmp_path / "saved"))
    assert len(again) == len(made) > 0 and again.row() == made.row() and again.provenance == made.provenance
    assert torch.equal(again.positions, made.positions) and again.verdict() == made.verdict()
    flat = molecule(Chem.MolToSmiles(Chem.RemoveHs(made.molecule.mol), isomericSmiles=False))
    assert Chem.MolToSmiles(again.molecule.mol) == Chem.MolToSmiles(made.molecule.mol) != Chem.MolToSmiles(flat.mol)
    assert read_ensemble(tmp_path / "saved" / "molecule-00000.safetensors").discarded == made.discarded
    with pytest.raises(TiltflowError, match="already holds a run"):
        made.save(tmp_path / "saved")
    with pytest.raises(TiltflowError, match="no folder"):
        made.to_sdf(tmp_path / "none" / "a.sdf")


def test_molecules_in_any_form():
    mol = Chem.MolFromMolBlock(Chem.MolToMolBlock(Chem.MolFromSmiles("OC")))
    one, two, three = (tf.conformers(m, n=3, sampler=SMALL) for m in ("OC", mol, molecule("OC")))
    assert torch.equal(one.positions, two.positions) and torch.equal(one.positions, three.positions)
    assert one.molecule.mol.GetAtomWithIdx(0).GetSymbol() == "O"


def row(**changes):
    return {"name": "a", "conformers": 100, "rejected": 0, "ess": 0.5, **changes}


@pytest.mark.parametrize(
    ("rows", "ess", "left_out"),
    [
        ([row()], "pass", "pass"),
        ([row(ess=0.3)], "pass", "pass"),
        ([row(ess=0.05)], "warn", "pass"),
        ([row(ess=0.0499)], "cannot tell", "pass"),
        ([row(ess=0.0, conformers=0, rejected=100)], "cannot tell", "warn"),
        ([row(conformers=99, rejected=1)], "pass", "pass"),
        ([row(conformers=98, rejected=2)], "pass", "warn"),
        ([row(), row(name="b", ess=0.01), row(ess=0.2)], "cannot tell", "pass"),
        ([row(), row(ess=None, rejected=50)], "pass", "pass"),
    ],
)
def test_verdicts(rows, ess, left_out):
    verdict = judge_conformers(rows)
    assert {line.name: line.status for line in verdict.lines} == {"path weights ESS": ess, "conformers left out": left_out}
    assert verdict.status == max((ess, left_out), key=("pass", "warn", "cannot tell").index)


@pytest.mark.slow
def test_conformers_without_weights_are_not_judged(monkeypatch):
    assert judge_conformers([row(ess=None)]) is None and judge_conformers([]) is None
    monkeypatch.setattr("tiltflow.molecules.covering.EXTRA", 8)
    made = tf.conformers("CCO", n=2, cover=True)
    assert made.log_weights is None and len(made) == 2
    with pytest.raises(TiltflowError, match="no weights to judge"):
        made.verdict()


HUGE = 10**20
MISUSE = [  # as typed; in Python; what is said
    (["CCO", "-n", 0], {"n": 0}, "n must be a whole number of at least 1, got 0"),
    (["CCO", "--temperature", "-5K"], {"temperature": "-5K"}, "above 0 K"),
    (["CCO", "--temperature", "0"], {"temperature": 0.0}, "temperature must be a finite number above 0"),
    (["CCO", "--temperature", "nan"], {"temperature": math.nan}, "temperature must be a finite number above 0"),
    (["CCO", "--temperature", "inf"], {"temperature": math.inf}, "temperature must be a finite number above 0"),
    (["CCO", "--temperature", "27C"], {"temperature": "27C"}, "write Kelvin"),
    (["CCO", "--sampling-temperature", "nan"], {"sampling_temperature": math.nan}, "must be a finite number above 0"),
    (["CCO", "--max-atoms", 0], {"max_atoms": 0}, "must be a whole number of at least 1, got 0"),
    (["CCO", "--max-atoms", 5], {"max_atoms": 5}, "too large: 9 atoms"),
    (["CCO", "--seed", HUGE], {"seed": HUGE}, "seed must be a whole number from 0 to 1e+09"),
    (["CCO", "--seed", -1], {"seed": -1}, "seed must be a whole number from 0"),
    (["CCO", "--templates", 0], {"templates": 0}, "templates must be"),
    (["CCO", "--energy", "mmf"], {"energy": "mmf"}, "unknown energy 'mmf': use one of mmff94"),
    (["CCO", "--rescore", "gfn"], {"rescore": "gfn"}, "unknown energy 'gfn'"),
    (["CCO", "--energy", "no_such:energy"], {"energy": "no_such:energy"}, "cannot import 'no_such'"),
    (["CCO", "--model", "none.safetensors"], {"model": "none.safetensors"}, "not a conformer model"),
    (["CCO", "--model", "m", "--conjugated"], {"model": "m", "conjugated": True}, "a model brings its own"),
    (["CCO", "--cover", "--energy", "gfn2"], {"cover": True, "energy": "gfn2"}, "a recipe of its own: leave out energy"),
    (["CC(F)Cl"], {"molecule": "CC(F)Cl"}, "undefined stereo"),
    (["C1CC"], {"molecule": "C1CC"}, "invalid SMILES"),
    (["B(C)(C)C"], {"molecule": "B(C)(C)C"}, "mmff94 does not take B"),
]


@pytest.mark.parametrize(("typed", "given", "said"), MISUSE)
def test_misuse_by_both_doors(typed, given, said, tmp_path):
    done = tiltflow("conformers", *typed, "--out", tmp_path / "run")
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
    with pytest.raises(TiltflowError) as error:
        tf.conformers(**{"molecule": "CCO", **given})
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["-n", 2001], "at most 2000 in a run"),
        (["--rounds", 0], "--rounds must be"),
        (["--sigma-min", 4], "sigma_min must be below sigma_max"),
        (["--learning-rate", "nan"], "--learning-rate must be"),
        (["--minimum-ess", 1], "--minimum-ess must be"),
        (["--device", "nowhere"], "device 'nowhere'"),
    ],
)
def test_misuse_as_typed(typed, said, tmp_path):
    done = tiltflow("conformers", "CCO", *typed, "--out", tmp_path / "run")
    assert done.returncode == 2 and said in done.stderr and not (tmp_path / "run").exists(), done.stderr


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--molecules", 0], "--molecules must be"),
        (["--rounds", 0], "--rounds must be"),
        (["--rounds", "none"], "needs a number of rounds"),
        (["--temperature", "-5K"], "above 0 K"),
        (["--visited", 0], "--visited must be"),
        (["--energy", "mmf"], "unknown energy"),
        (["--max-atoms", 0], "--max-atoms must be"),
        (["--seed", HUGE], "--seed must be"),
        (["--device", "meta"], "not usable"),
    ],
)
def test_misuse_of_training(typed, said, tmp_path):
    source = tmp_path / "in.smi"
    source.write_text("CCCC\n")
    done = tiltflow("train-conformers", source, *typed, "--out", tmp_path / "run")
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    missing = tiltflow("train-conformers", tmp_path / "none.smi", "--out", tmp_path / "run")
    assert missing.returncode == 2 and "no file" in missing.stderr and not (tmp_path / "run").exists()


def test_what_else_is_refused():
    with pytest.raises(TiltflowError, match="no setting 'temprature'"):
        tf.conformers("CCO", temprature=300)
    with pytest.raises(TiltflowError, match="not a list"):
        tf.conformers(["CCO"])
    for changes in ({"pretrain": -1}, {"max_cost_gradient": (30.0, math.nan)}, {"sigma_min": 2.0}, {"fine_rate": 0.0}):
        with pytest.raises(TiltflowError, match=next(iter(changes))):
            CartesianSettings(**changes)
    assert ConformerSettings(temperature="300 K") == ConformerSettings(temperature=300)


def test_the_table_of_energies_is_that_which_opens(monkeypatch):
    from tiltflow.molecules.energies import aimnet2, ani, mmff, xtb

    classes = (mmff.MMFF94, ani.ANI1ccx, aimnet2.AIMNet2, xtb.GFN2)
    assert {e.name: e.unit for e in classes} == {name: said.split(", ")[-1] for name, said in ENERGIES.items()}
    with pytest.raises(TiltflowError, match=", ".join(ENERGIES)):
        open_energy("other", molecule("C"))
    assert [r["name"] for r in _rows("energies")] == list(ENERGIES)


def test_without_rdkit(monkeypatch, tmp_path):
    """What needs it says which extra to install; importing tiltflow, or its names, needs none."""
    code = (
        "import sys; sys.modules['rdkit'] = None\n"
        "import tiltflow\nassert tiltflow.Ensemble and 'conformers' in dir(tiltflow)\n"
        "from tiltflow.molecules.job import ConformersJob\n"
        "for call in (lambda: tiltflow.conformers('CCO'), lambda: ConformersJob(input='CCO').check()):\n"
        "    try:\n        call()\n    except tiltflow.TiltflowError as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count('pip install "tiltflow[conformers,report]"') == 2, done.stdout
    monkeypatch.setitem(sys.modules, "rdkit", None)
    for command in ("conformers", "train-conformers"):
        typed = tiltflow(command, "CCO", "--out", tmp_path / "run")
        assert typed.returncode == 2 and "conformers need RDKit" in typed.stderr and not (tmp_path / "run").exists()
