"""Training ends where more of it would not help, not before, and resumes exactly on either side of that decision."""

import math
from dataclasses import replace

import pytest
import torch
from test_fit_and_run import SETTINGS, SmallRun, Stopped, same

from tiltflow.train.criterion import FEWEST, resumed, settled, until
from tiltflow.train.settings import Training


def rows(bounds, seconds=1.0):
    return [{"elbo": float(b), "seconds": seconds, "until": None} for b in bounds]


def noisy(curve, seed, noise=0.02):
    return rows(torch.tensor(curve) + noise * torch.randn(len(curve), generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("seed", range(5))
def test_it_ends_on_a_plateau_and_not_on_a_slope(seed):
    """−e^{−i/40}, nats short of log Z: what is left when it ends is small; a straight slope never ends."""
    curve = noisy([-math.exp(-i / 40) for i in range(600)], seed)
    ends = next(n for n in range(FEWEST, 600) if settled(curve[:n], 0.005))
    assert 80 < ends < 500 and math.exp(-ends / 40) < 0.1
    slope = noisy([0.01 * i for i in range(600)], seed)
    assert not any(settled(slope[:n], 0.005) for n in range(600))
    flat = noisy([0.0] * 140, seed)
    assert any(settled(flat[:n], 0.005) for n in range(60, 140))
    assert settled(noisy([-0.01 * i for i in range(100)], seed), 0.005)  # it got worse: no more of it


def test_a_decision_is_kept_and_time_bounds_it():
    flat = rows([0.0] * 40)
    assert until(flat, 0.005, None) == 50 and until(flat, None, None) is None and until([], 0.005, 1.0) is None
    found = [*flat, {"elbo": 9.0, "seconds": 1.0, "until": 50, "at_most": 60}]
    assert resumed([], 60) is None and resumed(flat, 60) is None and resumed(found, 60) == resumed(found, 90) == 50
    ended = found + found[-1:] * 9
    assert resumed(ended, 60) == 50 and resumed(ended, 90) == 90  # it is trained further if it is given more rounds
    assert until(rows([0.1 * i for i in range(40)], 6.0), None, 5.0) is None  # 4 of 5 minutes
    assert until(rows([0.1 * i for i in range(41)], 6.0), None, 5.0) == 51
    assert until([{"seconds": 1.0}] * 100, 0.005, None) is None  # a method that knows no bound


def test_the_rate_falls_over_the_last_fifth():
    plain, ended = Training(rounds=100), Training(rounds=100, tolerance=0.01)
    assert plain.rate(50) < 0.6e-3
    assert ended.rate(79) == ended.rate(10) == 1e-3 and ended.rate(99) < 0.1e-3
    assert ended.rate(39, until=50) == 1e-3 and ended.rate(49, until=50) < 0.1e-3


@pytest.mark.parametrize("stop_at", [7, 45])
def test_resuming_is_exact_before_and_after_the_decision(stop_at, tmp_path):
    settings = replace(SETTINGS, rounds=80, tolerance=1e9)  # settled as soon as that can be asked
    whole = SmallRun().fit(tmp_path / "whole", settings=settings)
    assert len(whole[1]) == FEWEST + FEWEST // 4 and [row["until"] for row in whole[1]][FEWEST - 2 :][:2] == [None, 50]
    with pytest.raises(Stopped):
        SmallRun().fit(tmp_path / "part", stop_at=stop_at, settings=settings)
    assert same(whole, SmallRun(seed=9).fit(tmp_path / "part", resume=True, settings=settings))
    assert same(whole, SmallRun(seed=9).fit(tmp_path / "part", resume=True, settings=settings))
    further = SmallRun(seed=9).fit(tmp_path / "part", resume=True, settings=replace(settings, rounds=90))
    assert len(further[1]) == 90
