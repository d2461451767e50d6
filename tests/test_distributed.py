"""Several processes that train together, on gloo: they train what one would, and none waits for ever for another."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from models import process, right
from ranks import free_port, ranks

from tiltflow import TiltflowError
from tiltflow.core.errors import LostProcess
from tiltflow.energies import ENERGY_PROBLEMS
from tiltflow.sampling.settings import SamplerSettings
from tiltflow.sampling.train import train_sampler
from tiltflow.tilting.settings import FinetuneSettings
from tiltflow.tilting.train import finetune
from tiltflow.train import distributed as d
from tiltflow.train.store import load_state


def test_one_process_is_alone():
    x = torch.ones(2, requires_grad=True)
    x.sum().backward()
    assert d.join() == (0, 1) and d.sum_gradients([x], torch.ones(1)).tolist() == [1.0] and x.grad.tolist() == [1.0, 1.0]
    assert d.any_of(True) and not d.any_of(False) and d.own(x) is x and d.everyone(x) is x and d.brought(x) is x
    assert d.share_of(3) == 3 and d.mean({"a": 1.0, "b": [2.0]}) == {"a": 1.0, "b": [2.0]} and d.least(4) == 4
    d.together()
    d.leave()


def share(rank):
    """All that processes tell each other."""
    x = torch.tensor([1.0 + rank, 3.0], requires_grad=True)
    unused = torch.zeros(1, requires_grad=True)
    (x**2).sum().backward()
    (value,) = d.sum_gradients([x, unused], torch.tensor([1.0 + rank])).tolist()
    rows = torch.arange(6).reshape(6, 1)
    said = {
        "sums": [x.grad.tolist(), unused.grad.tolist(), value],
        "flags": [d.any_of(rank == 1), d.any_of(False)],
        "own": d.own(rows)[:, 0].tolist(),
        "everyone": d.everyone(d.own(rows))[:, 0].tolist(),
        "brought": len(d.brought(d.own(rows))),
        "mean": d.mean({"a": float(rank), "b": [2.0, rank]}),
        "least": d.least(5 - rank),
    }
    with pytest.raises(TiltflowError, match="a batch of 7 cannot be shared by 2 processes"):
        d.share_of(7)
    generator = torch.Generator().manual_seed(rank)
    d.align(generator)
    said["aligned"] = generator.initial_seed(), torch.rand((), generator=generator).item()
    weights = [torch.ones(2), torch.zeros(1)]
    d.agree(3, weights, torch.Generator())
    for facts, what in (
        ((3 + rank, weights, torch.Generator()), "round 4 instead of 3"),
        ((3, [w + rank for w in weights], torch.Generator()), "weights"),
        ((3, weights, torch.Generator().manual_seed(rank)), "random state"),
    ):
        with pytest.raises(TiltflowError, match=f"rank 1 does not start as rank 0 does: {what}"):
            d.agree(*facts)
    d.leave()
    assert d.world() == (0, 1)
    return said


def test_what_processes_tell_each_other():
    first, second = ranks(share)
    for said, rank in ((first, 0), (second, 1)):
        assert said["sums"] == [[6.0, 12.0], [0.0], 3.0] and said["flags"] == [True, False]
        assert said["own"] == [rank, rank + 2, rank + 4] and said["everyone"] == [0, 1, 2, 3, 4, 5]
        assert said["brought"] == (3 if rank else 6) and said["mean"] == {"a": 0.5, "b": [2.0, 0.5]} and said["least"] == 4
        assert said["aligned"][1] == first["aligned"][1]


def draw(n, part=None):
    g = torch.Generator().manual_seed(0)
    with d.draws(part):
        return [
            torch.randn(n, 2, generator=g), torch.rand((n,), generator=g), torch.randint(9, (2 * n, 1), generator=g),
            torch.rand((), generator=g), torch.randperm(5, generator=g), torch.rand(3, generator=None),
        ]  # fmt: skip


def three(rank):
    return draw(3)


def test_a_draw_of_rows_is_that_of_all_processes():
    alone, apart = draw(6), ranks(three)
    for mine in zip(*apart):
        assert mine[0].shape == mine[1].shape
    for whole, first, second in zip(alone[:3], *(a[:3] for a in apart)):
        assert torch.equal(torch.stack([first, second], 1).flatten(0, 1), whole)  # row i is of process i mod 2
    for whole, first, second in zip(alone[3:5], *(a[3:5] for a in apart)):
        assert torch.equal(whole, first) and torch.equal(whole, second)


def parts(rank):
    picked = torch.tensor([5, 0, 3, 8, 1, 7])  # rows 0 and 8 are of the first of two processes
    found = [d.part_of(picked, 0, 6, 6), d.part_of(picked, 4, 6, 6)]
    return [(p.rows.tolist(), p.places.tolist(), p.of, p.share, draw(len(p.places), p)[:3]) for p in found]


def test_a_draw_for_rows_of_a_minibatch():
    alone = draw(6)
    (first, none), (second, two) = ranks(parts)
    assert first[:4] == ([0, 4], [1, 3], 6, 2 / 6) and second[:4] == ([2, 1, 0, 3], [0, 2, 4, 5], 6, 4 / 6)
    for rows, places in ((first[4], [1, 3]), (second[4], [0, 2, 4, 5])):
        assert torch.equal(rows[0], alone[0][places]) and torch.equal(rows[1], alone[1][places])
        assert torch.equal(rows[2], alone[2].reshape(2, 6, 1)[:, places].flatten(0, 1))  # a block of rows after the other
    assert none[:4] == ([0], [0], 2, 0.0) and two[3] == 2 / 6  # one that has no row lends one that does not count


def tilt(checkpoint=None, rounds=6, resume=False, stop=None, method="adjoint_matching", **more):
    s = FinetuneSettings.of(method, rounds=rounds, tolerance=None, batch=16, steps=6, variance_samples=64)
    kept = {"minibatch": 30, "gradient_steps": 2, "buffer_rounds": 3, "accumulate": 20}
    s = replace(s, **kept | {"checkpoint_every": 3} | more)
    model = finetune(
        process(), right, 1.0, method, s, seed=1, checkpoint=checkpoint, resume=resume,
        callback=lambda row: row["iteration"] + 1 == stop,
    )  # fmt: skip
    return model.history, list(model.process.model.parameters())


def sample(checkpoint=None, rounds=6, resume=False, stop=None, method="weighted_adjoint_sampling", **more):
    problem = ENERGY_PROBLEMS["gmm40"]()
    s = SamplerSettings.of(method, problem.settings, rounds=rounds, batch=32, steps=8, hidden=16, checkpoint_every=3)
    s = replace(s, **{"minibatch": 24, "gradient_steps": 3, "buffer_rounds": 3, "learning_rate": 1e-3} | more)
    model = train_sampler(
        problem, method, s, seed=1, checkpoint=checkpoint, resume=resume, callback=lambda row: row["iteration"] + 1 == stop
    )
    weights = [*model.control.module.parameters(), *model.control.module.buffers()]
    return model.history + [model.energy.report()], weights


def trained(train, rank, **given):
    return train(**given)


def alike(one, other):
    """Two trainings are one, but for the clock and the order of sums."""
    for a, b in zip(one[0], other[0], strict=True):
        assert set(a) == set(b)
        for name in set(a) - {"seconds", "processor_seconds"}:
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-6), name
    assert all(torch.allclose(p, q, 1e-6, 1e-6) for p, q in zip(one[1], other[1], strict=True))


ONCE = {"minibatch": None, "buffer_rounds": 1, "gradient_steps": 1}
TRAININGS = [
    partial(tilt),
    partial(tilt, method="reinforce", **ONCE),
    partial(sample),
]
MORE = [
    partial(tilt, method="reciprocal_matching"),
    partial(tilt, method="path_weighted"),
    partial(tilt, method="reinforce_adjoint_matching"),
    partial(tilt, method="diffusion_dpo"),
    partial(tilt, method="socm", **ONCE),
    partial(tilt, method="draft_1", **ONCE),
    partial(sample, method="asbs"),
    partial(sample, method="bridge_matching"),
    partial(sample, method="pis", **ONCE),
]


@pytest.mark.parametrize("train", [*TRAININGS, *(pytest.param(t, marks=pytest.mark.slow) for t in MORE)])
def test_two_processes_train_what_one_does(train):
    alone = train()
    first, second = ranks(partial(trained, train))
    assert all(torch.equal(p, q) for p, q in zip(first[1], second[1]))
    alike(first, alone)


@pytest.mark.slow
@pytest.mark.parametrize("train", [tilt, sample])
def test_fifty_rounds_with_a_buffer_and_a_break(train, tmp_path):
    """On two processes, interrupted: as on one without a break. Its checkpoint is taken up by one process too."""
    train = partial(train, tmp_path / "checkpoint.safetensors", rounds=50, buffer_rounds=5)
    alone = train()
    ranks(partial(trained, train, stop=20))
    copy = (tmp_path / "checkpoint.safetensors").read_bytes()
    alike(ranks(partial(trained, train, resume=True))[0], alone)
    (tmp_path / "checkpoint.safetensors").write_bytes(copy)
    alike(train(resume=True), alone)


def refused(rank):
    said = []
    for train in (partial(tilt, batch=15), partial(tilt, method="log_variance", **ONCE), partial(sample, batch=15)):
        with pytest.raises(TiltflowError) as error:
            train()
        said.append(str(error.value))
    return said


def test_what_processes_cannot_share():
    shared, compared, other = ranks(refused)[1]
    assert shared == other and shared.startswith("a batch of 15 cannot be shared by 2 processes")
    assert "train it in one process" in compared


def dies(rank):
    d.together()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(LostProcess, match=r"^rank 1 died; start all ranks again .* the last checkpoint\.$"):
        d.together()
    return time.monotonic() - started


def hangs(rank):
    d.together()
    if rank == 1:
        time.sleep(100)
    with pytest.raises(LostProcess, match=r"^rank 1 did not answer for 1 s; start"):
        d.together()
    return 0.0


def ends(rank):
    d.together()
    if rank == 1:
        d.last_words(TiltflowError("no such energy."))
        return None
    with pytest.raises(LostProcess, match=r"^rank 1 has ended \(no such energy\); start all"):
        d.together()
    return 0.0


def hurried(fault, rank):
    d.GRACE = 0.5
    return fault(rank)


@pytest.mark.parametrize("fault", [dies, hangs, ends])
def test_a_process_that_is_lost_is_named(fault):
    [found] = ranks(partial(hurried, fault), seconds=1 if fault is hangs else 60, survivors=1)
    assert isinstance(found, float) and found < 10, found


ENERGY = """
import os, signal, time
rounds = []
def energy(x):
    fault = os.environ.get("FAULT")
    rounds.extend([0] * (len(x) == 16))  # half of the batch: a round of one of two processes
    if os.environ.get("RANK") == "1" and len(rounds) == 8:
        if fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hangs":
            time.sleep(1000)
    return 8 * (x.norm(dim=1) - 2) ** 2
"""
SAMPLER = ["train-sampler", "mine.py:energy", "--shape", "2", "--scale", "3", "--finest", "0.1", "--rounds", "10",
           "--batch", "32", "--steps", "6", "--draw-steps", "8", "--gradient-steps", "3", "--minibatch", "24",
           "--hidden", "8", "--samples", "200", "--compared", "100", "--checkpoint-every", "5",
           "--evidence", "0", "--json"]  # fmt: skip


ACCELERATE = ["accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCHERS = {
    "accelerate, one": [*ACCELERATE, "--cpu", "--num_processes", "1"],
    "accelerate, two": [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port"],
    "torchrun, two": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
}


def launched(folder, command, launcher="torchrun, two", **environment):
    """The command under a launcher: what came of it, and the document that the first process printed."""
    launcher = LAUNCHERS[launcher] + ([] if "one" in launcher else [str(free_port())])
    call = [sys.executable, "-m", *launcher, "-m", "tiltflow", *command]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, env=os.environ | environment, timeout=300)
    return done, json.loads(done.stdout.strip().splitlines()[-1]) if done.stdout.strip() else None


def curves(document):
    rows = [row for row in document["rows"] if row["kind"] == "iteration"]
    return [{k: v for k, v in row.items() if k != "kind" and "seconds" not in k} for row in rows]


@pytest.mark.slow
def test_a_sampler_under_a_launcher_outlives_its_processes(tmp_path):
    """One process prints and writes; one that dies or hangs ends the run, with its number; resumed, nothing differs."""
    (tmp_path / "mine.py").write_text(ENERGY)
    whole = launched(tmp_path, [*SAMPLER, "--out", "whole"])[1]
    summary = whole["rows"][0]
    assert summary["energy_calls"] == 10 and summary["energy_evaluations"] == 320
    for fault, told in (("dies", "died"), ("hangs", "did not answer for 40 s")):
        done, document = launched(tmp_path, [*SAMPLER, "--out", fault], FAULT=fault, TILTFLOW_TIMEOUT="40")
        assert document is None and done.returncode == 1
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert said[0].startswith(f"error: rank 1 {told};") and said[0].endswith("to go on from the last checkpoint.")
        assert load_state(tmp_path / fault / "checkpoint.safetensors")["iteration"] == 5
        resumed = launched(tmp_path, [*SAMPLER, "--out", fault, "--resume"])[1]
        assert curves(resumed) == curves(whole) and resumed["rows"][0]["energy_evaluations"] == 320


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_misuse(tmp_path):
    (tmp_path / "mine.py").write_text(ENERGY)
    done, document = launched(tmp_path, [*SAMPLER, "--batch", "33", "--out", "run"])
    assert document is None and "error: a batch of 33 cannot be shared by 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate, one", "accelerate, two"])
def test_a_pipeline_trains_under_a_launcher(tmp_path, launcher):
    """The same command, and the same curves."""
    pytest.importorskip("accelerate")
    import tiny_pipelines as tiny

    torch.set_default_dtype(torch.float32)
    tiny.build("stable_diffusion").save_pretrained(tmp_path / "pipe")
    (tmp_path / "mine.py").write_text("def bright(x, texts):\n    return x.flatten(1).mean(1)\n")
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    command = ["finetune-pipeline", "pipe", "--reward", "mine.py:bright", "--prompts", "prompts.txt", "--out", "run",
               "--rounds", "3", "--batch", "4", "--per-prompt", "2", "--steps", "4", "--rank", "2", "--samples", "4",
               "--strength", "1000", "--json"]  # fmt: skip
    document = launched(tmp_path, command, launcher)[1]
    assert document["rows"][0]["rounds"] == 3 and (tmp_path / "run" / "adapter").is_dir()
    assert [p.name for p in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint.safetensors"]
    alone = subprocess.run(
        [sys.executable, "-m", "tiltflow", *command, "--overwrite"], cwd=tmp_path, capture_output=True, text=True
    ).stdout
    for a, b in zip(curves(document), curves(json.loads(alone)), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
