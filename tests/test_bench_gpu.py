"""The script that a GPU is asked with: what fails is a row, and the next question is asked."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["gpu"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_a_question_that_fails_is_a_row_and_the_next_is_asked(script, capsys):
    def fails():
        raise RuntimeError("out of memory")

    asked = script.Questions(torch.device("cpu"), 60)
    assert asked.ask("a", "one", fails) == {} and asked.ask("a", "two", lambda: {"x": 1}) == {"x": 1}
    asked.seconds = 0
    asked.ask("a", "three", fails)
    assert [row["status"] for row in asked.rows] == ["fail", "ok", "skipped"]
    assert asked.rows[0]["error"] == "RuntimeError: out of memory" and asked.rows[1]["peak_mb"] > 10
    assert [json.loads(line)["question"] for line in capsys.readouterr().out.splitlines()] == ["one", "two", "three"]


@pytest.mark.slow
def test_the_script_runs_here(tmp_path):
    pytest.importorskip("peft")
    small = ["--device", "cpu", "--dtype", "float32", "--sizes", "tiny,tinyflow", "--jobs", "dw4,conformers", "--small"]
    command = [sys.executable, "benchmarks/gpu.py", *small, "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "gpu.json").read_text())
    rows = {(row["subject"], row["question"]): row for row in document["rows"]}
    assert document["card"] == "none" and document["device"] == "cpu" and document["duration"] > 0
    assert {row["status"] for row in document["rows"]} == {"ok"}, document["rows"]
    assert ("conformers", "training on cpu, 16 times the batch") in rows
    for size in ("tiny", "tinyflow"):
        assert rows[size, "phases of a round"]["finite"] and rows[size, "beside float32"]["x1_apart"] == 0
        assert rows[size, "resumed"]["resumed_loss"] == rows[size, "resumed"]["straight_loss"]
        saved = rows[size, "adapter saved and loaded"]
        assert saved["loaded_apart"] < 1e-6 < 1e-4 < saved["base_apart"]
