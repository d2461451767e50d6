"""Training that was stopped, killed or diverged; what is on disk; what is never overwritten."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tiltflow.core.chain import memoryless_chain, uniform_grid
from tiltflow.core.control import FineTuned, tilted
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.nn.mlp import MLP
from tiltflow.problems.tilt import mixture2d
from tiltflow.run.folder import LOCK, RunFolder
from tiltflow.train import store
from tiltflow.train.buffer import Buffer
from tiltflow.train.fit import fit
from tiltflow.train.loss import QuantileMask
from tiltflow.train.method import State
from tiltflow.train.settings import Training
from tiltflow.train.store import load_state, load_weights, save_state, save_weights

SETTINGS = Training(
    rounds=12, learning_rate=1e-2, gradient_steps=2, minibatch=50, buffer_rounds=3, ema=0.99, checkpoint_every=3
)


class Stopped(Exception):
    pass


class SmallRun:
    """A small run with everything that a checkpoint has to hold."""

    def __init__(self, seed=0, net=None):
        problem = mixture2d()
        chain = memoryless_chain(problem.process(), uniform_grid(5), torch.full((5,), 0.1))
        torch.manual_seed(seed)
        self.mask, self.saved = QuantileMask(0.8, decay=0.5), None
        self.method = AdjointMatching(chain, RewardCost(problem.reward), batch=16, mask=self.mask)
        control = FineTuned(tilted(problem.process(), (net or (lambda: MLP(4, 2, 8, 2)))()))
        self.state = State(control, torch.Generator().manual_seed(seed))

    def fit(self, checkpoint=None, resume=False, stop_at=None, settings=SETTINGS, callback=None):
        def stop(row):
            if callback is not None:
                callback(row)
            if row["iteration"] == stop_at:
                raise Stopped

        history = fit(self.method, self.state, settings, checkpoint, resume, stop)
        self.saved = None if checkpoint is None else load_state(getattr(checkpoint, "path", checkpoint))
        return self, history

    @property
    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.state.control.module.parameters()])


def without_seconds(history):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in history]


def same(one, other):
    """Bit for bit: result, history, and every tensor and number of the state."""
    (a, history), (b, other_history) = one, other
    return (
        torch.equal(a.weights, b.weights)
        and without_seconds(history) == without_seconds(other_history)
        and torch.equal(a.mask.threshold, b.mask.threshold)
        and (None in (a.saved, b.saved) or equal(a.saved["buffer"], b.saved["buffer"]))
        and torch.equal(a.state.generator.get_state(), b.state.generator.get_state())
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.set_default_dtype(torch.float64)
    path = tmp_path_factory.mktemp("whole") / "deep" / "checkpoint.safetensors"
    return SmallRun().fit(path), load_state(path)


@pytest.mark.parametrize("stop_at", [6, 8])  # the last checkpoint is after the rounds 0 … 5
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one(stop_at, uninterrupted, tmp_path):
    whole, final = uninterrupted
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stopped):
        SmallRun().fit(path, stop_at=stop_at)
    assert load_state(path)["iteration"] == 6 and len(load_state(path)["buffer"]["x"]) == 160  # of 240: the next drops 80
    resumed = SmallRun(seed=99).fit(path, resume=True)  # another start, other random numbers: all comes from the file
    assert same(whole, resumed)
    again = load_state(path)
    for name in ("weights", "average"):
        assert all(torch.equal(a, b) for a, b in zip(final[name], again[name], strict=True))
    last = torch.cat([a.flatten() for a in again["weights"]])
    assert not torch.equal(last, resumed[0].weights)  # the average is the result
    with pytest.raises(Stopped):  # the known-bad twin of the comparison
        SmallRun(seed=1).fit(path, stop_at=6)
    assert not same(whole, SmallRun().fit(path, resume=True))


def test_resuming_twice_and_resuming_a_finished_run_change_nothing(uninterrupted, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    for stop_at, resume in ((4, False), (7, True), (10, True)):
        with pytest.raises(Stopped):
            SmallRun().fit(path, resume, stop_at)
    assert same(uninterrupted[0], SmallRun(seed=5).fit(path, resume=True))
    before = path.read_bytes()
    assert same(uninterrupted[0], SmallRun(seed=6).fit(path, resume=True))
    assert path.read_bytes() == before


def forget_generator(saved):
    saved["generator"] = torch.Generator().manual_seed(0).get_state()


def forget_buffer(saved):
    saved["buffer"] = {}


def forget_mask(saved):
    saved["auxiliary"]["mask"] = QuantileMask().state_dict()


def forget_average(saved):
    saved["average"] = [w.clone() for w in saved["weights"]]


def forget_optimiser(saved):
    saved["optimiser"]["state"] = {}


@pytest.mark.parametrize("forget", [forget_generator, forget_buffer, forget_mask, forget_average, forget_optimiser])
def test_whatever_is_not_restored_shows(forget, uninterrupted, tmp_path):
    """Known-bad twins: a checkpoint that lacks one part does not resume to the same result."""
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stopped):
        SmallRun().fit(path, stop_at=6)
    saved = load_state(path)
    forget(saved)
    save_state(path, saved)
    assert not same(uninterrupted[0], SmallRun().fit(path, resume=True))


class Normalised(torch.nn.Module):
    """A network whose running statistics change in training."""

    def __init__(self):
        super().__init__()
        self.norm, self.net = torch.nn.BatchNorm1d(4), MLP(4, 2, 8, 2)

    def forward(self, x, t):
        return self.net(self.norm(x), t) + 0.01 * self.norm.running_var[:2]


def test_running_statistics_survive(tmp_path):
    whole = SmallRun(net=Normalised).fit()
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stopped):
        SmallRun(net=Normalised).fit(path, stop_at=6)
    resumed = SmallRun(net=Normalised).fit(path, resume=True)
    assert same(whole, resumed)
    for a, b in zip(whole[0].state.control.module.buffers(), resumed[0].state.control.module.buffers(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(Stopped):
        SmallRun(net=Normalised).fit(path, stop_at=6)
    saved = load_state(path)
    saved["running"] = list(Normalised().buffers())  # the known-bad twin: they start afresh
    save_state(path, saved)
    assert not same(whole, SmallRun(net=Normalised).fit(path, resume=True))


CONFIG = {"seed": 0, "strength": 1.0, "clip": float("inf"), "base": None}
CHILD = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from dataclasses import replace
from test_fit_and_run import CONFIG, SETTINGS, RunFolder, SmallRun
torch.set_default_dtype(torch.float64)
torch.set_num_threads(int(sys.argv[3]))
slow = replace(SETTINGS, checkpoint_every=1)
def tell(row):
    print(row["iteration"], flush=True)
    if row["iteration"] == 7:
        sys.stdin.read()  # until killed
with RunFolder(Path(sys.argv[1]), CONFIG) as run:
    SmallRun().fit(run.checkpoint, settings=slow, callback=tell)
"""


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_killed_run_resumes_bit_for_bit_and_its_folder_is_its_own(uninterrupted, tmp_path):
    run = tmp_path / "run"
    tests = str(Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": str(Path(tests).parent)}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(run), tests, str(torch.get_num_threads())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        seen = [int(child.stdout.readline()) for _ in range(8)]
        assert seen[-1] == 7
        before = contents(run)
        for kw in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(TiltflowError, match="in use by another run"), RunFolder(run, CONFIG, **kw):
                pass
        assert contents(run) == before
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdin.close()
        child.stdout.close()
    with RunFolder(run, CONFIG, resume=True) as folder:  # the lock died with its owner
        assert load_state(folder.checkpoint)["iteration"] == 7
        assert same(uninterrupted[0], SmallRun(seed=3).fit(folder.checkpoint, resume=True))


class Diverging(AdjointMatching):
    """A method whose loss turns NaN once the fixture says so."""

    nan = False

    def loss(self, control, material, generator):
        return super().loss(control, material, generator) * (float("nan") if Diverging.nan else 1.0)


def test_divergence_stops_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    training, path = SmallRun(), tmp_path / "checkpoint.safetensors"
    m = training.method
    training.method = Diverging(m.chain, m.cost, m.batch, mask=m.mask)

    def spoil(row):
        monkeypatch.setattr(Diverging, "nan", row["iteration"] >= 7)

    with pytest.raises(TiltflowError, match=r"loss nan .* in round 8: training diverged"):
        training.fit(path, callback=spoil)
    saved = load_state(path)
    assert saved["iteration"] == 6 and all(bool(torch.isfinite(w).all()) for w in saved["weights"])
    assert bool(torch.isfinite(training.weights).all())  # the step that would have spoilt them was not taken


def test_resume_misuse(tmp_path):
    with pytest.raises(TiltflowError, match=r"nothing to resume: no checkpoint at .*missing"):
        SmallRun().fit(tmp_path / "missing", resume=True)
    with pytest.raises(TiltflowError, match="nothing to resume"):
        SmallRun().fit(None, resume=True)
    path = tmp_path / "checkpoint.safetensors"
    SmallRun().fit(path, settings=Training(rounds=1))
    with pytest.raises(TiltflowError, match="another network"):
        SmallRun(net=lambda: MLP(4, 2, 9, 2)).fit(path, resume=True)


# --- store


STATE = {
    "numbers": [1, -2.5, True, None, "text ü", float("inf")],
    "by index": {0: {"step": torch.tensor(3.0)}, 7: {}},
    "tuple": (1, (2, 3)),
    "tensor": {"tensor": 1, "pairs": [], "list": {}},  # names that the encoding itself uses
    "empty": {},
    "tensors": [
        torch.arange(6, dtype=torch.uint8),
        torch.randn(2, 3).to(torch.bfloat16),
        torch.randn(3, 4, dtype=torch.float64).T,
        torch.tensor([True, False]),
        torch.tensor(7),
        torch.zeros(0, 5),
        torch.nn.Parameter(torch.ones(2)),
    ],
}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_state_round_trip(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(path, STATE)
    loaded = load_state(path)
    assert equal(STATE, loaded) and list(loaded["by index"]) == [0, 7]
    assert not equal(STATE, {**loaded, "by index": {"0": loaded["by index"][0], "7": {}}})  # the comparison can fail
    save_state(path, {"only": 1})  # no tensors at all
    assert load_state(path) == {"only": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]  # nothing half-written is left


def test_shared_and_overlapping_tensors_are_saved_apart(tmp_path):
    x = torch.arange(4.0)
    save_state(tmp_path / "s", {"a": x, "b": x, "view": x[1:3]})
    loaded = load_state(tmp_path / "s")
    assert torch.equal(loaded["a"], loaded["b"]) and torch.equal(loaded["view"], x[1:3])


def test_what_is_on_the_host_is_written_without_a_copy(monkeypatch, tmp_path):
    given, written = [torch.ones(3), torch.zeros(2, 2)], []
    monkeypatch.setattr(store, "save_file", lambda tensors, *to: written.append(tensors) or save_file(tensors, *to))
    save_state(tmp_path / "s", {"given": given})
    assert [written[0][name].data_ptr() for name in ("t0", "t1")] == [v.data_ptr() for v in given]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "s"
    save_state(path, {"a": 1})
    with pytest.raises(TypeError):
        save_state(path, {"a": object()})
    assert load_state(path) == {"a": 1}


def test_damaged_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "s"
    save_state(path, STATE)
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[:200], whole[:-1], whole + b"x", b"\xff" * 64, b"PK\x03\x04 a pickle, perhaps"):
        path.write_bytes(damaged)
        with pytest.raises(TiltflowError, match="damaged"):
            load_state(path)
    for text in ("{", '{"tensor": "t9"}', '{"pairs": 3}', '{"x": 3}', '{"pairs": [[1]]}', "3", "[" * 100_000, "\xff"):
        save_file({store.STATE: torch.tensor(list(text.encode("latin-1")), dtype=torch.uint8)}, path)
        with pytest.raises(TiltflowError, match="damaged"):
            load_state(path)
    save_state(path, STATE)
    for place in (-1, -60):  # a bit of a tensor, a bit of the structure
        flipped = bytearray(path.read_bytes())
        flipped[place] ^= 4
        (tmp_path / "flipped").write_bytes(flipped)
        with pytest.raises(TiltflowError, match="damaged"):
            load_state(tmp_path / "flipped")
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(TiltflowError, match="not a state that tiltflow wrote"):
        load_state(path)
    with pytest.raises(TiltflowError, match="no file"):
        load_state(tmp_path / "none")
    with pytest.raises(TiltflowError, match="no file"):
        load_state(tmp_path)


def test_weights_round_trip_and_misfit(tmp_path):
    path, net, other = tmp_path / "w.safetensors", MLP(4, 2, 8, 2), MLP(4, 2, 8, 2)
    save_weights(path, net, {"made": "by a test"})
    load_weights(path, other)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    with pytest.raises(TiltflowError, match="does not fit MLP"):
        load_weights(path, MLP(4, 2, 9, 2))
    with pytest.raises(TiltflowError, match="no weights file"):
        load_weights(tmp_path / "none", net)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(TiltflowError, match="damaged"):
        load_weights(path, net)
    with torch.no_grad():
        next(net.parameters()).fill_(float("nan"))
    save_weights(path, net)
    with pytest.raises(TiltflowError, match="is not finite"):
        load_weights(path, net)


FORBIDDEN = re.compile(
    r"torch\.(load|save)\b|\b(pickle|dill|joblib|shelve|marshal)\b|allow_pickle=True|(?<![.\w])(eval|exec)\("
)


def test_nothing_is_unpickled():
    root = Path(__file__).parent.parent
    sources = [p for folder in ("tiltflow", "recipes", "benchmarks") for p in (root / folder).rglob("*.py")]
    assert len(sources) > 20
    code = {p: re.sub(r'"""(?s:.*?)"""|#.*', "", p.read_text(encoding="utf-8")) for p in sources}
    assert {p.name: hits.group() for p, text in code.items() if (hits := FORBIDDEN.search(text))} == {}
    assert FORBIDDEN.search("x = torch.load(path)") and FORBIDDEN.search("import pickle")


# --- run folders


LEFT = {"config.json", "metrics.json", "manifest.json", "checkpoint.safetensors", LOCK}


def start(path, config=None, **kw):
    with RunFolder(path, CONFIG if config is None else config, **kw) as run:
        (run.path / "metrics.json").write_text("[]")
        run.checkpoint.write_bytes(b"state")


def refused(path, message, config=None, **kw):
    before = contents(path) if path.is_dir() else None
    with pytest.raises(TiltflowError, match=message):
        start(path, config, **kw)
    assert before is None or contents(path) == before, "something was overwritten"


def test_a_run_is_not_overwritten_unless_asked(tmp_path):
    run = tmp_path / "a" / "run"
    start(run)
    assert json.loads((run / "config.json").read_text()) == {**CONFIG, "clip": None}
    refused(run, "already holds a run", {"seed": 1})
    refused(run, "already holds a run")
    start(run, {"seed": 1}, overwrite=True)
    assert {p.name for p in run.iterdir()} == LEFT
    assert json.loads((run / "config.json").read_text()) == {"seed": 1}


def test_only_a_run_is_overwritten(tmp_path):
    """A config.json alone does not make a run, and a run with somebody's notes in it is not thrown away."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "weights.safetensors").write_bytes(b"years of work")
    for kw in ({}, {"overwrite": True}):
        refused(model, r"not a run's \(config.json, weights.safetensors\)", **kw)
    refused(model, "not a run's", resume=True)
    run = tmp_path / "run"
    start(run)
    mine = {"my-notes.md": "mine", "analysis/table.csv": "mine", "samples.png": "mine", "adapter/README.md": "mine"}
    for name, text in mine.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(text)
    start(run, resume=True)
    start(run, CONFIG | {"seed": 2}, overwrite=True)
    assert all((run / name).read_text() == text for name, text in mine.items())
    refused(run, r"files of others that the run would write \(adapter/README.md\)", overwrite=True, writes=("adapter/*",))
    assert json.loads((run / "config.json").read_text())["seed"] == 2
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file")
    assert (tmp_path / "file").read_text() == "x"


def test_resume_needs_the_same_settings(tmp_path):
    run = tmp_path / "run"
    refused(run, "nothing to resume", resume=True)
    assert not run.exists()
    start(run)
    start(run, resume=True)  # an infinity in the config is the same infinity
    refused(run, r"strength: 1.0 then, 2.0 now", CONFIG | {"strength": 2.0}, resume=True)
    refused(run, r"extra: None then, 3 now", CONFIG | {"extra": 3}, resume=True)
    (run / "config.json").write_text("{")
    refused(run, "config.json cannot be read", resume=True)


@pytest.mark.parametrize("kw", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_killed_before_its_config_can_be_used(kw, tmp_path):
    """By any of the three; what was being written when it was killed goes."""
    (tmp_path / LOCK).touch()
    (tmp_path / f"{store.UNFINISHED}x").mkdir()
    (tmp_path / f"{store.UNFINISHED}x" / "config.json").write_text("{")
    start(tmp_path, **kw)
    assert {p.name for p in tmp_path.iterdir()} == LEFT


def test_a_run_killed_while_it_writes_is_resumed_and_overwritten(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Stopped), RunFolder(run, CONFIG, writes=("adapter/*",)) as opened:
        for name in ("checkpoint.safetensors", "checkpoint.older.safetensors", "adapter/weights"):
            (run / name).parent.mkdir(exist_ok=True)
            (run / name).write_text("written, and not in the manifest yet")
        (opened.path / "adapter" / f"{store.UNFINISHED}y").mkdir()
        raise Stopped
    (run / "log").mkdir()
    (run / "log" / "mine.txt").write_text("mine")
    start(run, resume=True, writes=("adapter/*",))
    shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "link").symlink_to(run)
    for place in (run, tmp_path / "copy", tmp_path / "link"):
        start(place, resume=True, writes=("adapter/*",))
        start(place, {"seed": 1}, overwrite=True)
        left = {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()}
        assert left == LEFT | {"log/mine.txt"}
        start(place, CONFIG, overwrite=True, writes=("adapter/*",))


def test_links_out_of_a_folder_are_not_followed(tmp_path):
    start(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.md").write_text("mine")
    (tmp_path / "run" / "log").symlink_to(tmp_path / "mine")
    (tmp_path / "run" / LOCK).unlink()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "mine" / "notes.md")
    with pytest.raises((TiltflowError, OSError)):
        start(tmp_path / "run", overwrite=True)
    (tmp_path / "run" / LOCK).unlink()
    with pytest.raises(TiltflowError, match="files of others that the run would write"):
        start(tmp_path / "run", overwrite=True)
    assert (tmp_path / "mine" / "notes.md").read_text() == "mine"


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    start(tmp_path / "run")
    (tmp_path / "mine").write_text("mine")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    for files in ({"../mine": {}}, {str(tmp_path / "mine"): {}}):
        (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest | {"files": files, "writes": ["../*", "/*"]}))
        with contextlib.suppress(TiltflowError):
            start(tmp_path / "run", overwrite=True)
        assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"name": "a web app"}))
    refused(tmp_path / "run", "not a run's", overwrite=True)


def test_an_unwritable_config_loses_nothing(tmp_path):
    start(tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(TypeError):
        start(tmp_path / "run", {"net": object()}, overwrite=True)
    assert contents(tmp_path / "run") == before


def test_run_files_are_valid_json(tmp_path):
    with RunFolder(tmp_path, CONFIG) as run:
        run.write_json("metrics.json", {"rows": [{"a": float("nan")}, (1.0, -float("inf"))]})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"rows": [{"a": None}, [1.0, None]]}


# --- buffer


def rows(*values):
    v = torch.tensor(values)
    return {"x": v[:, None].float(), "k": v}


def test_buffer_holds_the_newest_rounds():
    ring = Buffer(2)
    assert len(ring) == 0
    for first in (0, 3, 6):
        ring.add(rows(first, first + 1, first + 2))
    assert ring.items["k"].tolist() == [3, 4, 5, 6, 7, 8] and ring.items["x"][:, 0].tolist() == [3, 4, 5, 6, 7, 8]
    ring.add(rows(9))  # rounds as long as the last one
    assert ring.items["k"].tolist() == [8, 9]
    last = Buffer()
    last.add(rows(1, 2, 3))
    last.add(rows(4))
    assert last.items["k"].tolist() == [4]


@pytest.mark.parametrize("lengths", [(3, 3, 3, 3), (3, 1, 2, 4)])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_buffer_saves_what_the_next_round_leaves_of_it(rounds, lengths):
    """Restored after any round it goes on as it was, without the rows that were to be dropped."""
    whole, part, first = Buffer(rounds), Buffer(rounds), 0
    for n in lengths:
        part.load_state_dict(whole.state_dict())
        for ring in (whole, part):
            ring.add(rows(*range(first, first + n)))
        first += n
        assert part.items["k"].tolist() == whole.items["k"].tolist()
        assert len(part.state_dict().get("k", ())) == len(whole.state_dict().get("k", ())) <= (rounds - 1) * n


def test_buffer_batches(generator):
    ring = Buffer(10)
    ring.add(rows(*range(10)))
    assert [len(b["k"]) for [(b, _)] in ring.batches(None, 3, generator)] == [10, 10, 10]
    assert [[len(b["k"]) for b, _ in parts] for parts in ring.batches(99, 1, generator, 4)] == [[4, 4, 2]]
    batches = [b for [(b, _)] in ring.batches(4, 50, generator)]
    assert all(len(set(b["k"].tolist())) == 4 for b in batches)  # without replacement
    assert all(torch.equal(b["x"][:, 0], b["k"].float()) for b in batches)  # rows stay together
    assert {int(k) for b in batches for k in b["k"]} == set(range(10))


def test_buffer_misuse():
    ring = Buffer(5)
    ring.add(rows(1, 2))
    for material in ({"x": torch.ones(2)}, {"x": torch.ones(2), "k": torch.ones(3)}, {}):
        with pytest.raises(TiltflowError, match="rows of equal number"):
            ring.add(material)
    for capacity in (0, -1):
        with pytest.raises(TiltflowError, match="at least one round"):
            Buffer(capacity)
