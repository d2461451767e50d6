"""Commands as users run them: JSON on stdout, exit codes, run folders, and every kind of misuse."""

import json
from pathlib import Path

import pytest
import torch
from commands import apart, tiltflow
from safetensors.torch import load_file

MODELS = str(Path(__file__).with_name("models.py"))
BASE = ["--base", f"{MODELS}:velocity", "--predicts", "velocity", "--shape", "2"]
SMALL = ["--rounds", "80", "--batch", "128", "--learning-rate", "1e-2", "--steps", "20", "--gradient-steps", "4"]
SMALL += ["--reference-samples", "4000", "--samples", "4000"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    reward = ["--reward", f"{MODELS}:right", "--judge", f"{MODELS}:judge", "--strength", "1"]
    done = apart("finetune", *BASE, *reward, *SMALL, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_finetune_reaches_the_tilt_and_leaves_a_run_folder(run):
    out, document = run
    assert set(document) == {"command", "version", "seed", "device", "rows", "verdict"}
    summary = document["rows"][0]
    assert summary["reward_reached"] == pytest.approx(0.25, abs=0.03)  # N(0, .25) tilted by e^x has mean .25
    assert summary["log_z"] == pytest.approx(0.125, abs=0.03)
    assert document["verdict"] in ("pass", "warn")
    assert json.loads((out / "metrics.json").read_text()) == document
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "weights.safetensors", "samples.safetensors", "report.html"} <= names
    report = (out / "report.html").read_text()
    assert "http://" not in report and "https://" not in report and document["verdict"] in report


@pytest.mark.parametrize("noise,steps", [("ode", 30), ("0.5", 60), ("0.7", 60), ("memoryless", 25)])
def test_sample_with_any_schedule(run, noise, steps, tmp_path):
    out, _ = run
    target = tmp_path / "drawn.safetensors"
    done = tiltflow("sample", out, "--trust", "-n", 4000, "--noise", noise, "--steps", steps, "--out", target, "--json")
    assert done.returncode == 0, done.stderr
    x = load_file(target)["samples"]
    assert x.shape == (4000, 2)
    assert float(x[:, 0].mean()) == pytest.approx(0.25, abs=0.05)
    assert float(x[:, 1].mean()) == pytest.approx(0.0, abs=0.05)
    assert x.std(0) == pytest.approx(torch.tensor([0.5, 0.5]), abs=0.05)
    again = tiltflow("sample", out, "--out", target)
    assert again.returncode == 2 and "exists" in again.stderr


def test_samples_have_their_path_weights(run, tmp_path):
    """Those of the run and new ones as drawn: what they say, weighted, is the tilt's. Exact ones need none."""
    out, _ = run
    assert tiltflow("sample", out, "--trust", "-n", 4000, "--out", tmp_path / "drawn").returncode == 0
    assert tiltflow("sample", out, "--trust", "-n", 400, "--exact", "--out", tmp_path / "exact").returncode == 0
    for file in (tmp_path / "drawn", out / "samples.safetensors"):
        drawn = load_file(file)
        assert float(torch.softmax(drawn["log_weights"], 0) @ drawn["samples"][:, 0]) == pytest.approx(0.25, abs=0.04)
    assert set(load_file(tmp_path / "exact")) == {"samples"}


def test_existing_run_is_refused_and_untouched(run):
    out, _ = run
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    done = tiltflow("finetune", *BASE, "--reward", f"{MODELS}:right", *SMALL, "--out", out)
    assert done.returncode == 2 and "--overwrite" in done.stderr
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize(
    "args,message",
    [
        (["--strength", "-1"], "--strength must be a finite number of at least 0"),
        (["--sigma", "1.0"], "not memoryless"),
        (["--reward", f"{MODELS}:detached"], "detached"),
        (["--reward", f"{MODELS}:infinite"], "NaN or infinite"),
        (["--reward", f"{MODELS}:wrong_length"], "output length"),
        (["--reward", f"{MODELS}:constant"], "constant"),
        (["--reward", f"{MODELS}:nothing"], "has no 'nothing'"),
        (["--reward", "beauty"], "unknown reward 'beauty'"),
        (["--base", f"{MODELS}:velocity", "--shape", "2"], "--predicts"),
        (["--base", f"{MODELS}:velocity", "--predicts", "velocity", "--shape", "3"], "shape"),
        (["--base", "no-such-file.safetensors"], "no-such-file"),
        (["--base", "nothing"], "unknown base"),
        (["--shape", "two"], "--shape must be a tuple of a whole number"),
        (["--device", "abacus"], "abacus"),
        (["--method", "magic"], "unknown method 'magic'; use one of adjoint_matching"),
        (["--method", "dds"], "'dds' samples from an energy"),
        (["--method", "reinforce", "--last-steps", "3"], "takes no last_steps"),
        (["--log", "paper"], "unknown log 'paper'"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_misuse_exits_2_and_writes_nothing(args, message, tmp_path):
    out = tmp_path / "run"
    options = [] if "--base" in args else BASE
    reward = [] if "--reward" in args else ["--reward", f"{MODELS}:right"]
    done = tiltflow("finetune", *options, *reward, *SMALL, "--out", out, *args)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not out.exists()


def test_zero_strength_leaves_the_weights_unchanged(tmp_path):
    from models import GaussianVelocity

    torch.set_default_dtype(torch.float32)
    done = tiltflow("finetune", *BASE, "--reward", f"{MODELS}:right", "--strength", 0, *SMALL, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    saved = load_file(tmp_path / "run" / "weights.safetensors")
    for name, value in GaussianVelocity().state_dict().items():
        assert torch.equal(saved[name].float(), value.float())


def test_chi_is_refused_other_schedules(tmp_path):
    out = tmp_path / "run"
    options = [*SMALL, "--chi", "0.5", "--rounds", 2]
    done = tiltflow("finetune", *BASE, "--reward", f"{MODELS}:right", *options, "--out", out)
    assert done.returncode in (0, 3), done.stderr
    refused = tiltflow("sample", out, "--trust", "--noise", "ode")
    assert refused.returncode == 2 and "chi" in refused.stderr
    assert tiltflow("sample", out, "--trust", "--noise", "memoryless").returncode == 0


def test_failing_verdict_exits_3(tmp_path):
    options = ["--strength", "3", *SMALL, "--rounds", "1", "--method", "adjoint_matching_plain"]
    done = tiltflow("finetune", *BASE, "--reward", f"{MODELS}:right", *options, "--out", tmp_path / "run", "--json")
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["verdict"] == "fail"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["method"] == "adjoint_matching_plain"


def test_check_reward_answers_which_strength():
    done = tiltflow("check-reward", *BASE, "--reward", f"{MODELS}:right", "--strength", 1, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    one = next(r for r in rows if r["kind"] == "strength" and r["strength"] == 1)
    assert one["mean_reward"] == pytest.approx(0.25, abs=0.06)
    assert tiltflow("check-reward", *BASE, "--reward", f"{MODELS}:constant").returncode == 3


def test_help_names_every_command():
    done = tiltflow("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("finetune", "sample", "pretrain", "check-reward", "demo", "bench"))


def test_unknown_problem_is_misuse():
    done = tiltflow("bench", "tilt", "--problem", "nope")
    assert done.returncode == 2 and "mixture2d" in done.stderr


@pytest.mark.parametrize("what", [["tilt"], ["digits"], ["control"]])
def test_bench_refuses_unknown_methods_and_other_devices(what):
    done = tiltflow("bench", *what, "--methods", "nope")
    assert done.returncode == 2 and "unknown method 'nope'" in done.stderr
    done = tiltflow("bench", *what, "--device", "meta")
    assert done.returncode == 2 and "CPU only" in done.stderr


@pytest.mark.slow
def test_bench_prints_and_writes_one_document(tmp_path):
    out = tmp_path / "deep" / "result.json"
    done = tiltflow("bench", "control", "--methods", "log_variance", "--rounds", "2", "--json", "--out", str(out))
    assert done.returncode == 0
    document, written = json.loads(done.stdout), json.loads(out.read_text(encoding="utf-8"))
    assert {"command", "version", "seed", "device", "rows", "verdict"} == set(document)
    assert len(document["rows"]) == 3 and written["rows"] == document["rows"] and written["duration"] > 0


TINY = ["--rounds", "2", "--batch", "8", "--steps", "10", "--reference-samples", "600", "--samples", "200"]


@pytest.mark.parametrize(
    "args",
    [
        pytest.param(["--reward", "thickness", "--label", "3", "--guidance", "1.5"], marks=pytest.mark.slow),
        ["--reward", "digit-3", "--strength", "0.5"],
        pytest.param(["--reward", "inpainting"], marks=pytest.mark.slow),
    ],
    ids=["thickness", "digit-3", "inpainting"],
)
def test_shipped_rewards_on_the_shipped_base(args, tmp_path):
    out = tmp_path / "run"
    done = tiltflow("finetune", "--base", "digits", *args, *TINY, "--out", out, "--json")
    assert done.returncode in (0, 3), done.stderr
    document = json.loads(done.stdout)
    assert document["verdict"] in ("fail", "cannot tell", "warn", "pass")
    assert any(name.endswith("_reference") and name != "reward_reference" for name in document["rows"][0])  # a judge
    if "inpainting" in args:
        assert any("unseen 8" in row.get("name", "") for row in document["rows"])
    drawn = tiltflow("sample", out, "-n", 8, "--noise", "ode", "--steps", 5, "--json")
    assert drawn.returncode == 0, drawn.stderr
    assert json.loads(drawn.stdout)["rows"][0]["shape"] == [8, 1, 28, 28]
