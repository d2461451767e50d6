"""Several processes that train together, on gloo: they train what one would, and none waits for ever for another."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from models import process, right
from ranks import ranks

from tiltflow import TiltflowError
from tiltflow.core.errors import LostProcess
from tiltflow.energies import ENERGY_PROBLEMS, Evaluator
from tiltflow.sampling.settings import SamplerSettings
from tiltflow.sampling.train import train_sampler
from tiltflow.tilting.settings import FinetuneSettings
from tiltflow.tilting.train import finetune
from tiltflow.train import distributed as d


def test_one_process_is_alone():
    x = torch.ones(2, requires_grad=True)
    x.sum().backward()
    assert d.join() == (0, 1) and d.sum_gradients([x], 3.0) == 3.0 and x.grad.tolist() == [1.0, 1.0]
    assert d.any_of(True) and not d.any_of(False) and d.own(x) is x and d.everyone(x) is x and d.brought(x) is x
    assert d.share_of(3) == 3 and d.mean({"a": 1.0, "b": [2.0]}) == {"a": 1.0, "b": [2.0]} and d.least(4) == 4
    d.together()
    d.leave()


def share(rank):
    """All that processes tell each other."""
    x = torch.tensor([1.0 + rank, 3.0], requires_grad=True)
    unused = torch.zeros(1, requires_grad=True)
    (x**2).sum().backward()
    value = d.sum_gradients([x, unused], 1.0 + rank)
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


def test_a_draw_of_rows_is_that_of_all_processes():
    alone, apart = draw(6), ranks(lambda rank: draw(3))
    for mine in zip(*apart):
        assert mine[0].shape == mine[1].shape
    for whole, first, second in zip(alone[:3], *(a[:3] for a in apart)):
        assert torch.equal(torch.stack([first, second], 1).flatten(0, 1), whole)  # row i is of process i mod 2
    for whole, first, second in zip(alone[3:5], *(a[3:5] for a in apart)):
        assert torch.equal(whole, first) and torch.equal(whole, second)


def test_a_draw_for_rows_of_a_minibatch():
    picked = torch.tensor([5, 0, 3, 8, 1, 7])  # rows 0 and 8 are of the first of two processes

    def work(rank):
        parts = [d.part_of(picked, 0, 6, 6), d.part_of(picked, 4, 6, 6)]
        return [(p.rows.tolist(), p.places.tolist(), p.of, p.share, draw(len(p.places), p)[:3]) for p in parts]

    alone = draw(6)
    (first, none), (second, two) = ranks(work)
    assert first[:4] == ([0, 4], [1, 3], 6, 2 / 6) and second[:4] == ([2, 1, 0, 3], [0, 2, 4, 5], 6, 4 / 6)
    for rows, places in ((first[4], [1, 3]), (second[4], [0, 2, 4, 5])):
        assert torch.equal(rows[0], alone[0][places]) and torch.equal(rows[1], alone[1][places])
        assert torch.equal(rows[2], alone[2].reshape(2, 6, 1)[:, places].flatten(0, 1))  # a block of rows after the other
    assert none[:4] == ([0], [0], 2, 0.0) and two[3] == 2 / 6  # one that has no row lends one that does not count


def tilt(checkpoint=None, rounds=6, resume=False, method="adjoint_matching", **more):
    s = FinetuneSettings.of(method, rounds=rounds, tolerance=None, batch=16, steps=6, variance_samples=64, checkpoint_every=3)
    s = replace(s, **{"minibatch": 30, "gradient_steps": 2, "buffer_rounds": 3, "accumulate": 20} | more)
    model = finetune(process(), right, 1.0, method, s, seed=1, checkpoint=checkpoint, resume=resume)
    return model.history, list(model.process.model.parameters())


def sample(checkpoint=None, rounds=6, resume=False, method="weighted_adjoint_sampling", **more):
    problem = ENERGY_PROBLEMS["gmm40"]()
    s = SamplerSettings.of(method, problem.settings, rounds=rounds, batch=32, steps=8, hidden=16, checkpoint_every=3)
    s = replace(s, **{"minibatch": 24, "gradient_steps": 3, "buffer_rounds": 3, "learning_rate": 1e-3} | more)
    energy = Evaluator(problem.energy)
    model = train_sampler(problem, method, s, seed=1, energy=energy, checkpoint=checkpoint, resume=resume)
    return model.history + [energy.report()], [*model.control.module.parameters(), *model.control.module.buffers()]


def alike(one, other, tolerance=2e-4):
    """Two trainings, but for the clock."""
    for a, b in zip(one[0], other[0], strict=True):
        assert set(a) == set(b)
        for name in set(a) - {"seconds", "processor_seconds"}:
            assert torch.allclose(torch.tensor(a[name]).double(), torch.tensor(b[name]).double(), tolerance, tolerance), (
                name, a[name], b[name]
            )  # fmt: skip
    assert all(torch.allclose(p, q, tolerance, tolerance) for p, q in zip(one[1], other[1], strict=True))


ONCE = {"minibatch": None, "buffer_rounds": 1, "gradient_steps": 1}


@pytest.mark.parametrize("train, method, more", [
    (tilt, "adjoint_matching", {}),
    (tilt, "reinforce", ONCE),
    (sample, "weighted_adjoint_sampling", {}),
])  # fmt: skip
def test_two_processes_train_what_one_does(train, method, more):
    first, second = ranks(lambda rank: train(method=method, **more))
    alone = train(method=method, **more)
    assert all(torch.equal(p, q) for p, q in zip(first[1], second[1]))
    alike(first, alone)


def dies(rank):
    d.together()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(LostProcess, match=r"^rank 1 died or hangs .* with --resume\.$"):
        d.together()
    return time.monotonic() - started


def hangs(rank):
    d.together()
    if rank == 1:
        time.sleep(100)
    with pytest.raises(LostProcess, match=r"^rank 1 died or hangs \(no answer within 1 s\)"):
        d.together()
    return 0.0


def ends(rank):
    d.together()
    if rank == 1:
        d.last_words(TiltflowError("no such energy."))
        return None
    with pytest.raises(LostProcess, match=r"^rank 1 has ended \(no such energy\); the last"):
        d.together()
    return 0.0


@pytest.mark.parametrize("fault", [dies, hangs, ends])
def test_a_process_that_is_lost_is_named(fault, monkeypatch):
    monkeypatch.setattr(d, "GRACE", 0.5)
    [found] = ranks(fault, seconds=1 if fault is hangs else 60, survivors=1)
    assert isinstance(found, float) and found < 10, found
