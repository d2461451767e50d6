"""Commands of the second job as users run them: documents, exit codes, run folders, misuse."""

import json
from pathlib import Path

import pytest
import torch
from commands import apart, tiltflow
from safetensors.torch import load_file

ENERGIES = str(Path(__file__).with_name("energies_by_name.py"))
TINY = ["--rounds", 3, "--batch", 32, "--gradient-steps", 2, "--steps", 10, "--hidden", 16, "--layers", 2, "--samples", 100,
        "--evidence", 0]  # fmt: skip
OWN = ["--shape", "2", "--scale", 2, "--finest", 0.1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    done = apart("train-sampler", f"{ENERGIES}:bowl", *OWN, *TINY, "--out", out, "--json")
    assert done.returncode in (0, 3), done.stderr
    assert "training" in done.stderr and "ESS" in done.stderr
    return out, json.loads(done.stdout), done.returncode


def test_train_sampler_leaves_one_document_and_a_folder(run):
    out, document, code = run
    assert set(document) == {"command", "version", "seed", "device", "rows", "verdict"}
    assert document["verdict"] in ("cannot tell", "fail") and (code == 3) == (document["verdict"] == "fail")  # no reference
    assert json.loads((out / "metrics.json").read_text()) == document
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "weights.safetensors", "samples.safetensors", "report.html", "checkpoint.safetensors"} <= names


def test_sample_draws_from_a_sampler(run, tmp_path):
    out, _, _ = run
    target = tmp_path / "drawn.safetensors"
    done = tiltflow("sample", out, "--trust", "-n", 50, "--out", target, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["shape"] == [50, 2]
    drawn = load_file(target)
    torch.testing.assert_close(drawn["energy"], 0.5 * drawn["x"].square().sum(1).float())
    assert drawn["log_weights"].shape == (50,)
    refused = tiltflow("sample", out, "--trust", "--noise", "ode", "--out", tmp_path / "other")
    assert refused.returncode == 2 and "leave out noise" in refused.stderr and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([f"{ENERGIES}:bowl", *OWN], "--overwrite"),
        ([f"{ENERGIES}:bowl", *OWN, "--seed", 5, "--resume"], "cannot resume"),
        ([f"{ENERGIES}:detached", *OWN, "--overwrite"], "detached"),
    ],
)
def test_misuse_exits_2_and_overwrites_nothing(args, message, run):
    out, _, _ = run
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    done = tiltflow("train-sampler", *args, *TINY, "--out", out)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_check_energy(run):
    done = tiltflow("check-energy", f"{ENERGIES}:bowl", *OWN, "--samples", 64, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["rows"][0]["where"] == "base" and document["verdict"] in ("pass", "warn")
    assert tiltflow("check-energy", f"{ENERGIES}:detached", *OWN).returncode == 3
    other = tiltflow("check-energy", f"{ENERGIES}:bowl", *OWN, "--space", "circle")
    assert other.returncode == 2 and "vectors, particles, torus" in other.stderr


@pytest.mark.slow
def test_bench_sampling(tmp_path):
    out = tmp_path / "result.json"
    what = ["--problem", "gaussian2d", "--methods", "pis", "--rounds", 1]
    done = tiltflow("bench", "sampling", *what, "--json", "--out", out)
    assert done.returncode == 0, done.stderr
    document, written = json.loads(done.stdout), json.loads(out.read_text(encoding="utf-8"))
    assert written["rows"] == document["rows"] and written["duration"] > 0
    row = document["rows"][0]
    assert row["mode_tv"] is None and row["gradient_steps"] == 1 and row["w2"] > row["w2_floor"] > 0
    assert row["energy_calls"] > 0 and row["energy_evaluations"] > 0 and row["network_evaluations"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--problem", "nope"], "unknown problem 'nope'"),
        (["--problem", "gmm9", "--methods", "nope"], "unknown method 'nope'"),
        (["--problem", "gmm9", "--device", "meta"], "CPU only"),
        ([], "--problem"),
    ],
)
def test_bench_misuse(args, message):
    done = tiltflow("bench", "sampling", *args)
    assert done.returncode == 2 and message in done.stderr
