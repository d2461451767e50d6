"""What comes from elsewhere: run folders, code, files, signals. Each row of the table of what once went wrong is a test."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import tiltflow
from models import process, right
from safetensors.torch import load_file
from test_fit_and_run import SmallRun, Stopped, same

import tiltflow as tf
from tiltflow.cli.boundary import judged
from tiltflow.cli.common import command_line
from tiltflow.core.errors import TiltflowError, TiltflowWarning
from tiltflow.pipelines.prompts import read_prompts
from tiltflow.run import job as flow
from tiltflow.run.names import sources
from tiltflow.train import store
from tiltflow.train.checkpoint import Checkpoint
from tiltflow.train.store import load_state, read_tensors, save_state, write_tensors, write_text

MODELS = str(Path(__file__).with_name("models.py"))
BASE = ["--base", f"{MODELS}:process"]
FEW = ["--rounds", 4, "--checkpoint-every", 2, "--batch", 8, "--steps", 6, "--samples", 100, "--reference-samples", 200]


@pytest.fixture(scope="module", autouse=True)
def _without_pages():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "page_of", lambda *args: None)
        patch.setattr(flow, "write_page", lambda folder, page: None)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, _without_pages):
    """A finished run whose config names a reward file beside it."""
    here = tmp_path_factory.mktemp("trust")
    (here / "mine.py").write_text("def r(x):\n    return x[:, 0]\n")
    done = tiltflow("finetune", *BASE, "--reward", "mine.py:r", *FEW, "--out", "run", cwd=here)
    assert done.returncode in (0, 3), done.stderr
    return here


@pytest.fixture
def here(made, tmp_path):
    """A copy of it; its names are those of the original."""
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path


def edited(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    manifest = json.loads((folder / "manifest.json").read_text())  # as one who is evil would
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))


# --- a run folder is data (rows 1, 9, 10, 15, 21)


@pytest.mark.parametrize("field", ["base", "reward", "conditions"])
def test_a_run_folder_runs_no_code(field, here):
    (here / "run" / "payload.py").write_text(f"open({str(here / 'RAN')!r}, 'w').close()\n")
    edited(here / "run", **{"base": "digits", "reward": "thickness", field: f"{here / 'run' / 'payload.py'}:velocity"})
    for args in (("sample", "run", "-n", 4), ("compare", "run"), ("export", "run", "--out", "e")):
        tiltflow(*args, cwd=here)
    done = tiltflow("sample", here / "run", "-n", 4, cwd=here)
    assert done.returncode == 2 and "--trust" in done.stderr and "payload.py" in done.stderr
    done = tiltflow("finetune", "--base", here / "run", "--reward", f"{MODELS}:right", *FEW, "--out", here / "next")
    assert done.returncode == 2 and not (here / "next").exists()
    with pytest.raises(TiltflowError, match="is not imported"):
        tf.load(here / "run")
    assert not (here / "RAN").exists()
    tiltflow("sample", here / "run", "-n", 4, "--trust", cwd=here)  # the known-bad twin: the user vouches for it
    assert (here / "RAN").exists()


def test_code_is_imported_if_the_user_names_it(here, made):
    named = [*BASE, "--reward", made / "mine.py:r"]
    done = tiltflow("sample", here / "run", "-n", 4, *named, "--out", here / "x")
    assert done.returncode == 0 and load_file(here / "x")["samples"].shape == (4, 2), done.stderr
    assert tiltflow("sample", here / "run", "-n", 4, "--problem", "dw4", "--out", here / "y").returncode == 2
    torch.set_default_dtype(torch.float32)
    model = tf.load(here / "run", base=process(), reward=right)
    assert torch.equal(model.sample(3), tf.load(here / "run", trust=True).sample(3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a run folder"), ("{", "cannot be read"), ("[" * 100_000 + "]" * 100_000, "cannot be read"),
        ("[1]", "holds no JSON object"), ('{"a": ' * 100_000, "cannot be read"), ("\0", "cannot be read"),
        ({"more": 1}, "unknown field 'more'"), ({"base": ...}, "lacks base"), ({"strength": ...}, "lacks strength"),
        ({"settings": {}}, "lacks settings.rounds"), ({"settings": 3}, "settings must be"), ({"format": 1}, "format 2"),
        ({"job": "magic"}, "leaves no model"), ({"base": ["a"]}, "base must be"), ({"strength": "2"}, "strength must be"),
        ({"method": [[]]}, "method must be"), ({"seed": 1e400}, "seed must be"),
    ],
)  # fmt: skip
def test_a_config_that_is_wrong_is_one_sentence(text, message, here):
    config = here / "run" / "config.json"
    if text is None:
        config.unlink()
    elif isinstance(text, str):
        config.write_text(text)
    else:
        edited(here / "run", **text)
    done = tiltflow("sample", here / "run", "-n", 4, "--trust")
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (here / "run" / "drawn.safetensors").exists()


def test_nothing_foreign_is_replaced(here):
    mine = here / "mine.py"
    mine.write_text("mine")
    for args in (
        ("compare", here / "run", "--out", mine), ("sample", here / "run", "--trust", "--out", mine),
        ("export", here / "run", "--out", mine), ("bench", "control", "--rounds", 1, "--out", mine),
        ("pretrain", "--steps", 1, "--out", mine), ("pretrain", "--steps", 1, "--out", mine, "--overwrite"),
        ("finetune", *BASE, "--reward", f"{MODELS}:right", *FEW, "--overwrite", "--out", mine),
        ("demo", "memoryless", "--rounds", 1, "--overwrite", "--out", mine),
    ):  # fmt: skip
        done = tiltflow(*args)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, (args, done.stderr)
    assert mine.read_text() == "mine"


# --- identity and durability (rows 3, 4, 5, 6)


def test_the_checkpoint_of_another_run_is_refused(here, made, tmp_path):
    other = tiltflow("finetune", *BASE, "--reward", "mine.py:r", *FEW, "--strength", 5, "--out", tmp_path / "5", cwd=made)
    assert other.returncode in (0, 3)
    for name in ("checkpoint.safetensors", "checkpoint.older.safetensors"):
        shutil.copy(here / "run" / name, tmp_path / "5" / name)
    done = tiltflow(
        "finetune", *BASE, "--reward", "mine.py:r", *FEW, "--strength", 5, "--resume", "--allow-changed", "--out",
        tmp_path / "5", cwd=made,
    )  # fmt: skip
    assert done.returncode == 2 and "other values of: the settings" in done.stderr


def test_changed_code_is_refused_unless_told(tmp_path):
    (tmp_path / "mine.py").write_text("from helper import sign\ndef r(x):\n    return sign * x[:, 0]\n")
    (tmp_path / "helper.py").write_text("sign = 1\n")
    assert {Path(file).name for file in sources({"reward": f"{tmp_path}/mine.py:r"})} == {"mine.py", "helper.py"}
    kept = Checkpoint(tmp_path / "c", {"the settings": "a", **sources({"reward": f"{tmp_path}/mine.py:r"})})
    small = SmallRun()
    with pytest.raises(Stopped):
        small.fit(kept, stop_at=4)
    (tmp_path / "helper.py").write_text("sign = -1\n")
    changed = Checkpoint(tmp_path / "c", {"the settings": "a", **sources({"reward": f"{tmp_path}/mine.py:r"})})
    with pytest.raises(TiltflowError, match=r"other values of: .*helper.py\. Resume .* --allow-changed"):
        SmallRun().fit(changed, resume=True)
    SmallRun().fit(Checkpoint(changed.path, changed.identity, frozenset({"the settings"})), resume=True)
    with pytest.raises(Stopped):
        SmallRun().fit(kept, stop_at=4)
    with pytest.raises(TiltflowError, match="the weights that training starts from"):
        SmallRun(seed=1).fit(kept, resume=True)


def flipped(path, place=-100):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    whole, path = SmallRun().fit(), tmp_path / "checkpoint.safetensors"
    for damage in (flipped, Path.unlink):  # other kinds: test_damaged_and_foreign_files_are_named
        with pytest.raises(Stopped):
            SmallRun().fit(path, stop_at=8)
        assert [load_state(p)["iteration"] for p in (path, Checkpoint(path).older)] == [6, 3]
        damage(path)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert same(whole, SmallRun(seed=9).fit(path, resume=True))
        assert path.is_file() and (damage is Path.unlink or "The checkpoint before it is taken" in str(said[0].message))
    flipped(path)
    flipped(Checkpoint(path).older)
    with pytest.raises(TiltflowError, match="There is no other checkpoint"):
        SmallRun().fit(path, resume=True)


def test_a_state_that_is_no_checkpoint_is_named(tmp_path):
    save_state(tmp_path / "c", {"t": torch.ones(2)})
    with pytest.raises(TiltflowError, match="is no checkpoint of this training"):
        SmallRun().fit(tmp_path / "c", resume=True)


def test_damaged_weights_are_not_sampled(here, made):
    weights = here / "run" / "weights.safetensors"
    saved = read_tensors(weights)[0]
    for damage in (flipped, lambda p: write_tensors(p, {k: v * torch.nan for k, v in saved.items()})):
        shutil.copy(made / "run" / "manifest.json", here / "run")
        damage(weights)
        done = tiltflow("sample", here / "run", "--trust", "-n", 4)
        assert done.returncode == 2 and "is not what the run wrote" in done.stderr
        (here / "run" / "manifest.json").unlink()
        done = tiltflow("sample", here / "run", "--trust", "-n", 4)
        assert done.returncode == 2 and ("checksum" in done.stderr or "not finite" in done.stderr)


def test_global_generators_survive(tmp_path):
    """A method that draws where it should not: from the generators of PyTorch, NumPy and Python."""

    class Noisy(SmallRun):
        def fit(self, *args, **kw):
            cost = self.method.cost

            def reward(x):
                noise = torch.rand(()) + np.random.rand() + random.random()
                return cost.reward(x) + 0.01 * noise * x[:, 0]

            object.__setattr__(self.method, "cost", type(cost)(reward))
            return super().fit(*args, **kw)

    def seed(n):
        for one in (torch.manual_seed, np.random.seed, random.seed):
            one(n)

    seed(0)
    whole = Noisy().fit()
    for wanted in (True, False):  # and the known-bad twin: a checkpoint without them
        seed(0)
        with pytest.raises(Stopped):
            Noisy().fit(tmp_path / "c", stop_at=8)
        seed(1)
        if not wanted:
            saved = load_state(tmp_path / "c")
            seed(7)
            from tiltflow.train.checkpoint import global_generators

            save_state(tmp_path / "c", saved | {"globals": global_generators()})
        assert same(whole, Noisy().fit(tmp_path / "c", resume=True)) is wanted


def test_a_reward_that_keeps_something_is_told_of():
    from tiltflow.verdict.check_reward import quick_check

    calls = []

    def reward(x):
        calls.append(0)
        return x[:, 0] * (1 + 1e-6 * len(calls))

    with pytest.warns(TiltflowWarning, match="if it keeps something between calls"):
        quick_check(reward, torch.randn(16, 2), torch.Generator(), True)


@pytest.mark.parametrize("step", ["save_file", "fsync", "replace"])
def test_a_full_disk_loses_nothing(step, tmp_path, monkeypatch):
    path = tmp_path / "c"
    with pytest.raises(Stopped):
        SmallRun().fit(path, stop_at=8)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(TiltflowError, match=r"c cannot be written: No space left"):
        patch.setattr(store if step == "save_file" else os, step, full)
        SmallRun().fit(path, resume=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before  # and no rubbish


# --- interruption (row 8)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_round_and_saves_it(number, tmp_path):
    whole = SmallRun().fit()
    started = signal.getsignal(number)

    def press(row):
        if row["iteration"] == 0:
            os.kill(os.getpid(), number)

    with pytest.warns(TiltflowWarning, match="finished and saved first"), pytest.raises(KeyboardInterrupt) as ended:
        SmallRun().fit(tmp_path / "c", callback=press)
    assert ended.value.args == (number,) and signal.getsignal(number) is started
    assert load_state(tmp_path / "c")["iteration"] == 1 and load_state(Checkpoint(tmp_path / "c").older)["iteration"] == 0
    assert same(whole, SmallRun().fit(tmp_path / "c", resume=True))


def test_a_second_interrupt_leaves_at_once(tmp_path):
    def press(row):
        if row["iteration"] == 4:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the round went on")

    with pytest.warns(TiltflowWarning), pytest.raises(KeyboardInterrupt):
        SmallRun().fit(tmp_path / "c", callback=press)
    assert load_state(tmp_path / "c")["iteration"] == 3


@pytest.mark.slow
def test_an_interrupted_command_says_what_is_saved_and_how_to_go_on(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ndef r(x):\n    time.sleep(.02)\n    return x[:, 0]\n")
    more = [*FEW, "--rounds", 1_000, "--checkpoint-every", 1_000, "--out", "run"]
    command = [sys.executable, "-m", "tiltflow", "finetune", *BASE, "--reward", "slow.py:r", *more, "--overwrite"]
    child = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoint.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    said = child.communicate()[1].splitlines()[-1]
    saved = load_state(tmp_path / "run" / "checkpoint.safetensors")["iteration"]
    assert child.returncode == 143 and said.startswith(f"interrupted; all is saved up to round {saved}. To go on: tiltflow")
    assert said.endswith("--out run --resume") and "--overwrite" not in said


# --- code and files of others (rows 2, 12 – 14, 16 – 18, 22)


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("sys.exit(0)", 2, "r() in "), ("os._exit(7)", 2, "ended the process with exit code 7 (in round "),
        ("1 / 0", 2, "raised ZeroDivisionError: division by zero (in round "),
        ("raise KeyError('a')", 2, "line 7, raised KeyError"),
        ("raise OSError('no')", 2, "raised OSError"), ("raise MemoryError", 2, "raised MemoryError"),
        ("return x[:, 0] * float('nan')", 2, "NaN or infinite for 4 of 4 samples"), ("return x", 2, "shape (4, 2)"),
        ("raise KeyboardInterrupt", 130, "interrupted; all is saved up to round "),
    ],
)  # fmt: skip
def test_what_a_reward_does_in_training_is_named(body, code, message, tmp_path):
    """After the checks, in a round; and never with exit code 0."""
    text = "import os, sys\nrounds = []\ndef r(x):\n    if len(x) == 4:\n        rounds.append(0)\n"
    text += f"    if len(rounds) > 1:\n        {body}\n    return x[:, 0]\n"
    (tmp_path / "mine.py").write_text(text)
    done = tiltflow("finetune", *BASE, "--reward", "mine.py:r", *FEW, "--batch", 4, "--out", "run", cwd=tmp_path)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "run" / "checkpoint.safetensors").exists() and os._exit.__module__ != "tiltflow.cli.boundary"


def test_what_code_does_when_it_is_imported_is_named(tmp_path):
    for text, message in (("import sys\nsys.exit(0)", "line 2, ended the process"), ("def r(x:", "SyntaxError"), ("\0", "")):
        (tmp_path / "mine.py").write_text(text)
        done = tiltflow("finetune", *BASE, "--reward", "mine.py:r", *FEW, "--out", "run", cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr and not (tmp_path / "run").exists()


def test_shapes_of_a_base_that_do_not_fit_are_the_users():
    args = ["--base", f"{MODELS}:velocity", "--predicts", "velocity", "--reward", f"{MODELS}:right", "--shape", 3]
    done = tiltflow("check-reward", *args)
    assert done.returncode == 2 and "models.py, line" in done.stderr and "raised RuntimeError: mat1" in done.stderr
    assert "Traceback" in tiltflow("check-reward", *args, "--debug").stderr


def test_a_reward_and_a_judge_get_copies(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def r(x):\n    x.clamp_(-.3, .3)\n    return x[:, 0]\ndef pure(x):\n    return x.clamp(-.3, .3)[:, 0]\n"
        "def judge(x):\n    x.data.mul_(0)\n    return x[:, 0]\n"
    )
    drawn = []
    for reward, judges in (("r", ["--judge", "mine.py:judge"]), ("pure", [])):
        done = tiltflow("finetune", *BASE, "--reward", f"mine.py:{reward}", *judges, *FEW, "--out", reward, cwd=tmp_path)
        assert done.returncode in (0, 3), done.stderr  # a judge that is constant is no defect
        drawn.append(load_file(tmp_path / reward / "samples.safetensors")["samples"])
    assert torch.equal(*drawn) and float(drawn[0].std()) > 0.4


@pytest.mark.parametrize("out", ["file/run", "n" * 300, "/proc/none/run", "/sys/run"])
@pytest.mark.parametrize("command", ["finetune", "sample", "compare"])
def test_places_that_cannot_be_written_are_one_sentence(command, out, made, tmp_path):
    (tmp_path / "file").write_text("mine")
    args = {
        "finetune": ["finetune", *BASE, "--reward", f"{MODELS}:right", *FEW],
        "sample": ["sample", made / "run", "--trust", "-n", 4], "compare": ["compare", made / "run"],
    }[command]  # fmt: skip
    done = tiltflow(*args, "--out", out, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.strip() and "Traceback" not in done.stderr, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_defects_and_the_disk_have_their_codes():
    def raised(error):
        try:
            raise error
        except BaseException as found:
            found.__traceback__ = None
            return judged(found)

    told = "RuntimeError: a. This is a defect of tiltflow: please report it, with what --debug shows."
    assert raised(RuntimeError("a\nb")) == (1, told)
    assert raised(OSError(28, "No space left on device", "/x")) == (2, "'/x': No space left on device.")
    assert raised(MemoryError())[0] == 2 and raised(SystemExit(3)) == (3, None)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.txt", b"a\x0cb\nc\xc2\x85d\xe2\x80\xa8e\rf\r\n", ["a\x0cb", "c\x85d\u2028e\rf"]),
        ("a.jsonl", '{"prompt": "a\u2028b"}\n'.encode(), ["a\u2028b"]), ("a.csv", b'prompt\r\n"a\rb"\r\n', ["a\rb"]),
        ("b.jsonl", b'{"prompt": "a"}\n{"prompt": " "}\n', "line 2: no text"),
        ("c.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("d.jsonl", b'{"prompt": "\\ud800"}\n', "prompt 1 holds half"), ("e.txt", b"\xff", "not UTF-8"),
        ("b.csv", b"prompt\na\n" + b"x" * 200_000, "line 3: field larger"),
        ("c.csv", b'prompt\nx\n"open\n', "line 3: unexpected end"),
    ],
)  # fmt: skip
def test_a_prompt_ends_with_its_line(name, content, found, tmp_path):
    (tmp_path / name).write_bytes(content)
    if isinstance(found, list):
        assert read_prompts(tmp_path / name) == found
        return
    with pytest.raises(TiltflowError, match=found):
        read_prompts(tmp_path / name)


def test_no_cell_is_a_formula(tmp_path):
    from tiltflow.molecules.read import Reject
    from tiltflow.molecules.write import write_rejects

    names = ["=HYPERLINK(1)", "+1+1", "-2", "@x", "-a", "C=C", "\t=1"]
    write_rejects(tmp_path, [Reject(i, name, "C", "no") for i, name in enumerate(names)])
    cells = [line.split(",")[1] for line in (tmp_path / "rejects.csv").read_text().splitlines()[1:]]
    assert cells == ["'=HYPERLINK(1)", "'+1+1", "-2", "'@x", "'-a", "C=C", "'\t=1"]


def test_secrets_are_masked(monkeypatch):
    words = ["finetune", "--token", "abc", "--api-key=abc", "--ray", "ray://me:abc@host:1", "--base", "hf_abcdefghijkl"]
    monkeypatch.setattr(sys, "argv", ["tiltflow", *words])
    assert "abc" not in command_line() and "host:1" in command_line() and "--base" in command_line()


def test_a_write_is_whole_or_not_at_all(tmp_path):
    write_text(tmp_path / "a", "old")
    (tmp_path / "a").chmod(0o644)
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "\ud800")
    assert (tmp_path / "a").read_text() == "old"
    write_tensors(tmp_path / "t", {"a": torch.ones(2)})
    assert (tmp_path / "t").stat().st_mode & 0o077 == (tmp_path / "a").stat().st_mode & 0o077
    assert {p.name for p in tmp_path.iterdir()} == {"a", "t"}
