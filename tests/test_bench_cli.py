"""`tiltflow bench`: misuse is found before torch is imported and before anything is written; only results are replaced."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from tiltflow.bench.result import require_result, write_result
from tiltflow.cli.bench import bench
from tiltflow.core.errors import TiltflowError

DOCUMENT = {"command": "tiltflow bench tilt", "version": "0", "seed": 0, "device": "cpu", "rows": [], "verdict": None}


def refused(args):
    """What the command says, in one line."""
    done = CliRunner().invoke(bench, [str(arg) for arg in args])
    assert done.exit_code in (1, 2) and (done.exit_code == 2 or isinstance(done.exception, TiltflowError)), done
    return str(done.exception) if isinstance(done.exception, TiltflowError) else done.output


@pytest.mark.parametrize("rounds", ["0", "-3", "1.5", "nan", "99999999999999999999"])
@pytest.mark.parametrize("what", [["tilt"], ["digits"], ["control"], ["sampling", "--problem", "gmm9"]])
def test_rounds_are_counts(what, rounds):
    assert "--rounds must be a whole number of at least 1" in refused([*what, "--rounds", rounds])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tilt", "--seed", "99999999999999999999"], "--seed must be"),
        (["tilt", "--seed", "-1"], "--seed must be"),
        (["sampling", "--problem", "gmm9", "--minutes", "nan"], "--minutes must be a finite number above 0"),
        (["sampling", "--problem", "gmm9", "--minutes", "inf"], "--minutes must be"),
        (["sampling", "--problem", "gmm9", "--minutes", "0"], "--minutes must be"),
        (["sampling", "--problem", "gmm9", "--minutes", "1", "--rounds", "1"], "not both"),
        (["sampling", "--problem", "gmm9", "--methods", "automatic", "--rounds", "1"], "end by themselves"),
        (["conformers", "--molecules", "0"], "--molecules must be"),
        (["digits", "--methods", "socm"], "unknown method 'socm' here"),
        (["control", "--device", "cuda"], "CPU only"),
        (["verdict", "--base", "nope"], "no base 'nope' here"),
        (["verdict", "--seeds", "0"], "--seeds must be"),
    ],
)
def test_misuse(args, message):
    assert message in refused(args)


@pytest.mark.parametrize("what", [["tilt"], ["verdict"], ["control"], ["sampling", "--problem", "gmm9"], ["conformers"]])
def test_what_is_no_result_is_never_replaced(what, tmp_path):
    mine, metrics = tmp_path / "reward.py", tmp_path / "metrics.json"
    mine.write_text("def reward(x): ...\n")
    metrics.write_text(json.dumps(DOCUMENT))  # of a run: it has no commit
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for path, message in [
        (mine, "not the result of a benchmark"),
        (metrics, "not the result of a benchmark"),
        (tmp_path, "not the result of a benchmark"),
        (mine / "x.json", "is a file"),
        (tmp_path / ("n" * 256), "name too long"),
    ]:
        assert message in refused([*what, "--out", path])
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_result_may_be_made_again(tmp_path):
    path = tmp_path / "new" / "tilt-0.json"
    require_result(None)
    require_result(path)
    assert not path.parent.exists()
    write_result(path, DOCUMENT, 1.5)
    require_result(path)
    assert json.loads(path.read_text()) == DOCUMENT | {"commit": json.loads(path.read_text())["commit"], "duration": 1.5}


def test_no_torch_before_a_benchmark_runs():
    code = "import sys, tiltflow.cli.bench; print([m for m in ('torch', 'numpy', 'rdkit') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
