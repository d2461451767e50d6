"""What a job will cost: plans beside jobs whose cost is known, and beside the run itself."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from commands import tiltflow

from tiltflow.cli.options import RUN
from tiltflow.cli.plan import plan_group
from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import as_json, settings
from tiltflow.run import job as flow
from tiltflow.run import plan as planning
from tiltflow.run.job import Outcome, run
from tiltflow.run.memory import forget_peak, peak
from tiltflow.train.settings import Training
from tiltflow.train.store import save_state

MODELS = str(Path(__file__).with_name("models.py"))
TILT = ["finetune", "--base", f"{MODELS}:process", "--reward", f"{MODELS}:right", "--batch", 8, "--steps", 5]
TILT += ["--samples", 200, "--reference-samples", 200]
ENERGIES = str(Path(__file__).with_name("energies_by_name.py"))
SAMPLER = ["train-sampler", f"{ENERGIES}:problem", "--batch", 16, "--steps", 5, "--draw-steps", 5, "--hidden", 8]
SAMPLER += ["--samples", 100, "--compared", 40]
MIB = 2**20


class Watch:
    """A clock that only work moves."""

    now = 0.0

    def spend(self, seconds):
        self.now += seconds


WATCH = Watch()


ALONE = planning._alone
"""A trial in a process of its own, which takes seconds to start."""


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(flow, "page_of", lambda *outcome: None)
    monkeypatch.setattr(flow, "write_page", lambda folder, page: None)
    monkeypatch.setattr(planning, "_alone", planning.measure)
    monkeypatch.chdir(tmp_path)


@settings
class Known:
    """A job of known cost: a start, rounds that fill a buffer, samples to judge, and a file of them."""

    name: ClassVar[str] = "known"
    writes: ClassVar[tuple[str, ...]] = ()
    seed: int = 0
    device: str = "cpu"
    samples: int = 1_000
    good: bool = True
    training: Training = Training(rounds=60, buffer_rounds=10, tolerance=0.01)

    def config(self):
        return as_json(self)

    def check(self):
        if not self.good:
            raise TiltflowError("this is no good.")

    def trial(self, training, share):
        share = max(share, 0.02)
        return replace(self, samples=round(share * self.samples), training=replace(self.training, **training)), share

    def train(self, work):
        WATCH.spend(10.0)
        for i in range(self.training.rounds):
            seconds = 3.0 if i else 5.0
            WATCH.spend(seconds)
            rows = torch.zeros(min(i + 1, self.training.buffer_rounds), 25_000)
            row = {"iteration": i, "elbo": 0.0, "seconds": seconds, "processor_seconds": seconds}
            work.round(row, "training", self.training.rounds)
            if (i + 1) % self.training.checkpoint_every == 0 or i + 1 == self.training.rounds:
                WATCH.spend(0.5)
                save_state(work.checkpoint.path, {"weights": [torch.zeros(250)], "buffer": rows})

    def judge(self, model, work):
        WATCH.spend(1 + 0.04 * self.samples)
        work.tell("judging", 1, 1, "")
        summary = {"energy_evaluations": 7 * self.training.rounds}
        return Outcome("known", summary, None, tensors={"x": torch.ones(self.samples, 1_000)}, history=work.rounds)


def test_a_plan_is_what_comes(monkeypatch):
    """To the second, but for checkpoints: the last one is written among what follows."""
    monkeypatch.setattr(time, "perf_counter", lambda: WATCH.now)
    monkeypatch.setattr(time, "process_time", lambda: WATCH.now)
    job = Known()
    planned = planning.plan(job)
    document = run(job, Path("run"))
    whole, summary = planned.estimate(), document["rows"][0]
    assert summary["seconds"] == 10 + 5 + 59 * 3 + 3 * 0.5 + 1 + 40
    assert whole["seconds"] == pytest.approx(summary["seconds"], abs=0.6)
    assert whole["energies"] == summary["energy_evaluations"] == 420
    assert planned.disk == pytest.approx(sum(p.stat().st_size for p in Path("run").iterdir()), rel=0.01)
    assert planned.disk == pytest.approx(1e5 * 10 + 4e6, rel=0.01)
    assert set(planned.peaks()) == {"a round", "judging", "report"} and min(planned.peaks().values()) > 50 * MIB
    assert (planned.fewest, planned.most) == (50, 60)
    assert [row["ends"] for row in planned.rows() if row["kind"] == "plan"][:2] == ["earliest end", "at most"]


def test_a_peak_is_forgotten():
    here = torch.device("cpu")
    forget_peak(here)
    before = torch.ones(50 * MIB)
    high = peak(here)
    del before
    forget_peak(here)
    assert high - peak(here) > 150 * MIB
    assert peak(torch.device("meta")) is None


def test_parts_grow_and_several_processes_share_the_rounds_and_pay_for_gradients():
    def once(seconds):
        return planning.Spent(seconds, seconds)

    trial = planning.Trial(
        share=0.1, spent={"start": once(2.0), "report": once(1.0), "judging": planning.Spent(9.0, 4.0)},
        peaks={"training": 110, "judging": 300}, files={}, rounds=[once(9.0), once(8.0)],
        checkpoint=0.0, kept=10, weights=3 * 10**9, energies=None, bound=True, busy=1.0,
    )  # fmt: skip
    judged = {"judging": planning.Spent(5.0, 3.0)}  # in both together half at work
    less = trial._replace(share=0.05, peaks={"training": 100, "judging": 200}, spent=trial.spent | judged)
    plan = planning.Plan(Training(rounds=10, gradient_steps=5, buffer_rounds=5), torch.device("cpu"), less, trial)
    one, eight, many = (plan.estimate(processes=n) for n in (1, 8, 64))
    assert one["seconds"] == pytest.approx(80 + 3 + 44)  # judging: 4 + .9 · 1 / .05 of work
    assert eight["train_seconds"] == pytest.approx(10 * (1 + 5 * 2 * 7 / 8 * 3e9 / 300e9))
    assert many["train_seconds"] == pytest.approx(10 * (8 / 64 + 5 * 2 * 63 / 64 * 3e9 / 50e9))
    assert one["seconds"] - one["train_seconds"] == eight["seconds"] - eight["train_seconds"]
    assert plan.fewest == plan.most == 10 and one["energies"] is None
    assert plan.peaks() == {"a round": 110 + 2 * 3 * 10, "judging": pytest.approx(300 + 18 * 100)}
    minutes = replace(plan, training=Training(rounds=10, minutes=1.0))
    assert minutes.estimate()["train_seconds"] == 60


def test_misuse_is_found_and_nothing_is_left():
    with pytest.raises(TiltflowError, match="no good"):
        planning.plan(Known(good=False))
    done = tiltflow("plan", *TILT, "--reward", f"{MODELS}:constant")
    assert done.returncode == 2 and "constant" in done.stderr
    done = tiltflow("plan", *TILT, "--out", "run")
    assert done.returncode == 2 and "--out" in done.stderr
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(("command", "rounds"), [(TILT, (50, 200)), (SAMPLER, (200,))])
def test_the_command_line_plans(command, rounds):
    done = tiltflow("plan", *command, "--rounds", 200, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    whole = [row for row in rows if row["kind"] == "plan"]
    assert tuple(row["rounds"] for row in whole) == (*rounds, 200, 200)
    assert [row["processes"] for row in whole[-2:]] == [8, 64] and not list(Path.cwd().iterdir())
    assert whole[0]["peak_mb"] > 100 and whole[0]["disk_mb"] > 0
    assert whole[0]["energies"] == (200 * 16 if command is SAMPLER else None)


def test_a_plan_in_words():
    told = tiltflow("plan", *TILT).stdout
    assert "a round" in told and "earliest end" in told and "all-reduced" in told and "processors were at work" in told


def test_a_plan_takes_the_options_of_the_command():
    from tiltflow.cli import COMMANDS, cli

    for name, planned in plan_group.commands.items():
        command = cli.get_command(None, name)
        assert name in COMMANDS
        assert [p.name for p in planned.params] == [p.name for p in command.params if p.name not in RUN]
    assert set(plan_group.commands) == {"finetune", "train-sampler", "finetune-pipeline", "train-conformers"}


REWARD = "def brightness(x, texts):\n    return x.flatten(1).mean(1)\n"


@pytest.mark.slow
def test_pipelines_and_conformers_are_planned_in_processes_of_their_own(monkeypatch):
    """By the commands as users run them."""
    monkeypatch.setattr(planning, "_alone", ALONE)
    pytest.importorskip("rdkit")
    tiny = pytest.importorskip("tiny_pipelines")
    tiny.build("stable_diffusion").save_pretrained("pipe")
    Path("mine.py").write_text(REWARD)
    Path("prompts.txt").write_text("a\nb\n")
    Path("two.smi").write_text("CCCO a\nCCCN b\nCCCCO c\n")
    quick = ["--batch", 4, "--steps", 5, "--rank", 2, "--samples", 24, "--rounds", 100]
    pipeline = ["finetune-pipeline", "pipe", "--reward", "mine.py:brightness", "--prompts", "prompts.txt", *quick]
    few = ["--molecules", 3, "--visited", 2, "--batch", 8, "--hidden", 8, "--gradient-steps", 2, "--rounds", 100]
    before = sorted(Path.cwd().rglob("*"))
    for command in (pipeline, ["train-conformers", "two.smi", *few]):
        done = tiltflow("plan", *command, "--json")
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout)["rows"]
        assert rows[0]["rounds"] == 100 and rows[0]["seconds"] > rows[0]["train_seconds"] > 0
        assert rows[0]["peak_mb"] > 100 and rows[0]["disk_mb"] > 0
        assert (rows[0]["energies"] is None) == (command is pipeline)
    assert sorted(Path.cwd().rglob("*")) == before
