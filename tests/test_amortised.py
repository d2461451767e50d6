"""One torsional sampler for many molecules: exact weights for unseen ones, learning that carries over, exact resume."""

import json
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("rdkit")

from commands import tiltflow

from tiltflow import load
from tiltflow.core.errors import TiltflowError
from tiltflow.core.weights import evidence
from tiltflow.molecules.amortised import load_amortised, prepare, save_amortised, train_amortised
from tiltflow.molecules.generate import generate
from tiltflow.molecules.molecule import molecule
from tiltflow.molecules.settings import AmortisedSettings, ConformerSettings, TorsionalSettings

SAMPLER = TorsionalSettings(
    rounds=13, batch=64, gradient_steps=25, minibatch=128, buffer_rounds=10, steps=15, draw_steps=30, hidden=32, layers=2,
    learning_rate=5e-3,
)  # fmt: skip
SETTINGS = AmortisedSettings(templates=1, visited=4, sampler=SAMPLER)
TRAINED, UNSEEN = ["CCCC", "CCCCC", "CCC(C)C", "CC(C)C(C)C"], "CCCC(C)C"


@pytest.fixture(scope="module")
def prepared():
    return prepare([molecule(s) for s in [*TRAINED, "C"]], SETTINGS, 0)


@pytest.fixture(scope="module")
def model(prepared):
    torch.set_default_dtype(torch.float64)  # as in the tests
    return train_amortised(prepared, replace(SETTINGS, sampler=replace(SAMPLER, rounds=2)), 0)


def evidence_of(model, one, n=1500):
    sampler = model.of(one.molecule, one.energy, one.torsions, one.templates, SETTINGS.temperature, 50)
    (drawn,) = sampler.draw([n], torch.Generator().manual_seed(1))
    line = torch.linspace(-math.pi, math.pi, 73, dtype=torch.float64)[:-1]
    energy = sampler.energies[0].energy(torch.cartesian_prod(line, line))
    exact = float(torch.logsumexp(-energy, 0)) + 2 * math.log(2 * math.pi / 72)
    return evidence(drawn.log_weights), exact


def test_an_unseen_molecule_has_exact_weights(prepared, model):
    """log Z of 2-methylpentane is that of quadrature though the network has hardly learned; it could tell half a kT."""
    assert [one.molecule.smiles for one in prepared] == model.smiles == [molecule(s).smiles for s in TRAINED]
    (unseen,) = prepare([molecule(UNSEEN)], SETTINGS, 0)
    found, exact = evidence_of(model, unseen)
    assert abs(found.log_z - exact) < 4 * found.log_z_error < 0.5


@pytest.mark.slow
def test_learning_carries_over(prepared, model):
    """The ESS on a molecule that was not trained on doubles by training on others, and log Z stays exact."""
    (unseen,) = prepare([molecule(UNSEEN)], SETTINGS, 0)
    before, exact = evidence_of(model, unseen)
    after, _ = evidence_of(train_amortised(prepared, SETTINGS, 0), unseen)
    assert abs(after.log_z - exact) < 4 * after.log_z_error and after.log_z_error < before.log_z_error
    assert after.ess > 2 * before.ess


def test_files_and_generate(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_amortised(path, model)
    loaded = load_amortised(path)
    assert loaded.settings == model.settings and loaded.smiles == model.smiles
    settings = ConformerSettings(n=50, templates=1, temperature=500.0, model=str(path))
    made = generate(molecule(UNSEEN), settings, seed=3)
    assert len(made) == 50 and 0 < made.ess <= 1
    assert int(made.provenance["energy_evaluations"]) == 50  # nothing was trained
    torch.save({}, tmp_path / "other.pt")
    for wrong in (tmp_path / "none.safetensors", tmp_path / "other.pt"):
        with pytest.raises(TiltflowError, match="not a conformer model"):
            load_amortised(wrong)


def test_resuming_is_exact(prepared, tmp_path):
    short = replace(SETTINGS, sampler=replace(SAMPLER, rounds=12, gradient_steps=2, minibatch=64))

    class Stopped(Exception):
        pass

    def stop(row):
        if row["iteration"] == 10:
            raise Stopped

    prepared = prepared[:2]
    whole = train_amortised(prepared, short, 0)
    with pytest.raises(Stopped):
        train_amortised(prepared, short, 0, tmp_path / "c.safetensors", callback=stop)
    resumed = train_amortised(prepared, short, 5, tmp_path / "c.safetensors", resume=True)
    for a, b in zip(whole.control.module.parameters(), resumed.control.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_misuse():
    with pytest.raises(TiltflowError, match="none of 1 molecules has a rotatable bond"):
        prepare([molecule("C")], SETTINGS, 0)
    with pytest.raises(TiltflowError, match="needs a number of rounds"):
        replace(SETTINGS, sampler=TorsionalSettings())


def test_the_command_trains_and_the_other_draws(tmp_path):
    smi = tmp_path / "alkanes.smi"
    smi.write_text("CCCC butane\nnonsense bad\nCCC(C)C\nCCCCC\n")
    run = tmp_path / "run"
    args = ["train-conformers", smi, "--out", run, "--molecules", 2, "--rounds", 2, "--seed", 1, "--json"]
    done = tiltflow(*args)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    row = rows[0]
    assert [r["iteration"] for r in rows[1:]] == [0, 1] and (run / "report.html").is_file()
    assert row["molecules"] == 2 and row["energy_calls"] == 2 * row["templates"] and 0 < row["ess"] <= 1
    assert len(load_amortised(run / "model.safetensors").smiles) == 2
    assert tiltflow(*args).returncode == 2  # the folder is taken
    assert tiltflow(*args, "--resume").returncode == 0
    more = tiltflow(*["3" if a == 2 and args[i - 1] == "--rounds" else a for i, a in enumerate(args)], "--resume")
    assert [r["iteration"] for r in json.loads(more.stdout)["rows"][1:]] == [0, 1, 2], more.stderr
    assert load(run).smiles == load_amortised(run / "model.safetensors").smiles
    drawn = tiltflow(
        "conformers", "CCCCC", "--model", run / "model.safetensors", "-n", 20, "--out", tmp_path / "drawn", "--json"
    )
    assert drawn.returncode == 0, drawn.stderr
    (row,) = [r for r in json.loads(drawn.stdout)["rows"] if r["kind"] == "conformers"]
    assert row["conformers"] + row["rejected"] == 20 and row["conformers"] > 10
    written = (tmp_path / "drawn" / "conformers.sdf").read_text()
    assert "sampling_temperature>  (1) \n700 K" in written  # the model's, not the ensemble's 300 K
    for more in (["--conjugated"], ["--sampling-temperature", "900K"]):
        odd = tiltflow("conformers", "CCCCC", "--model", run / "model.safetensors", *more, "--out", tmp_path / "no")
        assert odd.returncode == 2 and "a model brings its own" in odd.stderr and not (tmp_path / "no").exists()
    wrong = tiltflow("conformers", "CCCCC", "--model", smi, "--out", tmp_path / "no")
    assert wrong.returncode == 2 and "not a conformer model" in wrong.stderr and not (tmp_path / "no").exists()
    none = tiltflow("train-conformers", smi, "--out", tmp_path / "no", "--max-atoms", 3)
    assert none.returncode == 2 and "not one molecule" in none.stderr
