"""Whatever comes in, a command answers with a sentence: no traceback, no hang, no file elsewhere, no code of the input's.

``make test`` tries a few inputs of each kind, always the same ones; ``make fuzz`` tries 10,000 (``TILTFLOW_FUZZ``).
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from commands import tiltflow

import tiltflow as tf
from tiltflow.core.errors import TiltflowError
from tiltflow.pipelines.prompts import read_prompts
from tiltflow.run.folder import RunFolder
from tiltflow.train.store import load_state, save_state

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

COUNT = int(os.environ.get("TILTFLOW_FUZZ", "10"))
SETTINGS = hypothesis.settings(
    max_examples=COUNT, derandomize=True, deadline=10_000, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
fuzzed = lambda **kinds: lambda test: SETTINGS(hypothesis.given(**kinds)(test))  # noqa: E731

TEXT = st.text(st.characters(exclude_characters="\0"), max_size=20)
NUMBERS = st.sampled_from(["-1", "0", "1e400", "nan", "99999999999999999999", "-0", "1_0", "٣", "0x1", "", " "])
WORDS = st.one_of(TEXT, NUMBERS, st.sampled_from(["--", "-", "::", ":", "a:b", "../x", "x.py:y", "--seed", "-n", "--json"]))
COMMANDS = ["finetune", "train-sampler", "sample", "compare", "export", "conformers", "list", "bench", "plan", ""]
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)), max_leaves=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small run folder: a model that was saved from Python."""
    torch.set_default_dtype(torch.float32)
    from tiltflow.energies import ENERGY_PROBLEMS
    from tiltflow.sampling.settings import SamplerSettings

    problem = ENERGY_PROBLEMS["gaussian2d"]()
    settings = SamplerSettings.of("adjoint_sampling", problem.settings, rounds=1, batch=8, steps=4, draw_steps=4, hidden=4)
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    return tf.train_sampler(problem, settings=settings, seed=0).save(folder)


def answered(done):
    """Success or misuse, and no traceback."""
    assert done.returncode in (0, 2, 3) and "Traceback" not in done.stderr and "defect" not in done.stderr, done.stderr
    return done


@fuzzed(command=st.sampled_from(COMMANDS), words=st.lists(WORDS, max_size=5))
def test_command_lines(tmp_path_factory, command, words):
    here = tmp_path_factory.mktemp("words")
    before = set(here.parent.iterdir())
    answered(tiltflow(command, *words, cwd=here))
    assert set(here.parent.iterdir()) == before
    shutil.rmtree(here)


FIELDS = ["problem", "method", "shape", "scale", "settings", "seed", "job", "format", "device"]
FILES = ["config.json", "manifest.json", "metrics.json", "weights.safetensors"]


@fuzzed(field=st.sampled_from(FIELDS), value=JSON)
def test_configs(saved, tmp_path_factory, field, value):
    here = tmp_path_factory.mktemp("config")
    shutil.copytree(saved, here / "run")
    config = json.loads((here / "run" / "config.json").read_text())
    (here / "run" / "config.json").write_text(json.dumps(config | {"problem": "gaussian2d"} | {field: value}))
    (here / "run" / "manifest.json").unlink()
    answered(tiltflow("sample", here / "run", "-n", 2))
    shutil.rmtree(here)


@fuzzed(name=st.sampled_from(FILES), content=st.binary(max_size=60))
def test_files_of_a_run_folder(saved, tmp_path_factory, name, content):
    here = tmp_path_factory.mktemp("files")
    shutil.copytree(saved, here / "run")
    (here / "run" / name).write_bytes(content)
    answered(tiltflow("sample", here / "run", "-n", 2))
    answered(tiltflow("compare", here / "run"))
    (here / "mine").write_text("mine")
    try:
        with RunFolder(here / "run", {"seed": 1}, overwrite=True):
            pass
    except TiltflowError:
        pass
    assert (here / "mine").read_text() == "mine"
    shutil.rmtree(here)


STATE = {"iteration": 3, "weights": [torch.ones(3)], "history": [{"loss": 0.5}]}


@fuzzed(place=st.integers(0, 2_000), change=st.binary(min_size=1, max_size=8), cut=st.booleans())
def test_checkpoints(tmp_path_factory, place, change, cut):
    """Any change of the bytes is found."""
    path = tmp_path_factory.mktemp("checkpoint") / "c.safetensors"
    save_state(path, STATE)
    content = bytearray(whole := path.read_bytes())
    place %= len(content)
    content[place : place + len(change)] = change
    content = content[: -place or None] if cut else content
    path.write_bytes(content)
    if bytes(content) == whole:
        return
    try:
        found = load_state(path)
    except TiltflowError:
        found = None
    shutil.rmtree(path.parent)
    assert found is None


@fuzzed(suffix=st.sampled_from([".txt", ".jsonl", ".csv"]), content=st.one_of(st.binary(max_size=80), TEXT.map(str.encode)))
def test_prompts(tmp_path_factory, suffix, content):
    path: Path = tmp_path_factory.mktemp("prompts") / f"p{suffix}"
    path.write_bytes((b"prompt\n" if suffix == ".csv" else b"") + content)
    try:
        found = read_prompts(path)
    except TiltflowError as error:
        assert len(str(error).split("\n")) <= 2
    else:
        assert found and all(prompt.strip() for prompt in found)
        assert suffix != ".txt" or len(found) <= content.count(b"\n") + 1
    shutil.rmtree(path.parent)
