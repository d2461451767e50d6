"""Weighted flow matching on N(m, σ²) with the reward b·x: every preset's end mean has a closed form."""

import pytest
import torch
from torch import nn

from tiltflow.core.chain import memoryless_chain, uniform_grid
from tiltflow.core.control import FineTuned
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.process import Process
from tiltflow.core.weights import ess
from tiltflow.methods.reciprocal import linear_drift
from tiltflow.methods.weighted_flow_matching import (
    WeightedFlowMatching,
    advantage_weighted,
    online_reward_weighted,
    path_weighted,
    reward_weighted,
)
from tiltflow.problems.tilt import GaussianMixture, QuadraticReward, TiltProblem
from tiltflow.train.method import State

MEAN, VARIANCE, SLOPE, STRENGTH = 0.5, 0.36, 1.0, 1.5
SHIFT = STRENGTH * VARIANCE * SLOPE  # of the mean, by one tilt
TILTED = MEAN + SHIFT


class Shifted(nn.Module):
    """X̂_1 of N(μ, VARIANCE) on the linear path, μ the only weight: it holds every tilt, and the loss is quadratic in μ."""

    def __init__(self, mean):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))

    def forward(self, x, t):
        gain = t * VARIANCE / (t**2 * VARIANCE + (1 - t) ** 2)
        return self.mean + gain[:, None] * (x - t[:, None] * self.mean)


def setup(mean=MEAN, steps=10):
    base = GaussianMixture.gaussian([MEAN], [[VARIANCE]])
    problem = TiltProblem("gaussian", base, QuadraticReward.of_direction([SLOPE]))
    t = uniform_grid(steps)
    chain = memoryless_chain(problem.process(), t, linear_drift(problem.interpolant, VARIANCE)(t[:-1]))
    control = FineTuned(Process(problem.interpolant, Shifted(mean), "x1", (1,)))
    return chain, RewardCost(lambda x: SLOPE * x.detach()[:, 0], STRENGTH), control  # a reward without a gradient


def minimise(method, control, generator):
    """One round and the exact minimiser of its loss: two gradients at the same noise determine the parabola."""
    mu = control.module.mean
    material = method.collect(State(control, generator)).material
    seed, slopes, at = generator.get_state(), [], mu.item()
    for value in (at, at + 1.0):
        generator.set_state(seed)
        mu.data.fill_(value)
        (slope,) = torch.autograd.grad(method.loss(control, material, generator), mu)
        slopes.append(float(slope))
    mu.data.fill_(at - slopes[0] / (slopes[1] - slopes[0]))
    return mu.item()


def ends(preset, rounds=1, start=MEAN, seeds=12, **settings):
    """End means of independent runs: their mean and its standard error (11 degrees of freedom: 4 of them is p = .002)."""
    out = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        chain, cost, control = setup(start)
        method = preset(chain, cost, batch=4_000, draws=4, **settings)
        for _ in range(rounds):
            end = minimise(method, control, generator)
        out.append(end)
    values = torch.tensor(out)
    return float(values.mean()), float(values.std() / seeds**0.5)


def test_reward_weighted_minimiser_is_the_tilt():
    mean, error = ends(reward_weighted)
    assert error < 0.01 and abs(mean - TILTED) < 4 * error
    unweighted, _ = ends(lambda chain, cost, **s: WeightedFlowMatching(chain, cost, temperature=1e6, **s))
    assert abs(unweighted - TILTED) > 20 * error  # known-bad twin: no weights
    flipped, _ = ends(lambda chain, cost, **s: reward_weighted(chain, RewardCost(lambda x: -cost.reward(x), STRENGTH), **s))
    assert abs(flipped - TILTED) > 20 * error  # and the reward's sign


def test_path_weighted_moves_to_the_tilt_and_stays_there():
    """At the optimum all path weights are equal, so a round moves μ by sampling noise only."""
    chain, cost, control = setup(TILTED)
    method = path_weighted(chain, cost, batch=4_000)
    collected = method.collect(State(control, torch.Generator().manual_seed(0)))
    assert collected.metrics["ess"] == pytest.approx(1.0, abs=1e-9)
    assert collected.metrics["reward"] == pytest.approx(SLOPE * TILTED, abs=0.04)
    for start, rounds in ((TILTED, 3), (MEAN, 3), (TILTED + SHIFT, 3)):
        mean, error = ends(path_weighted, rounds, start)
        assert error < 0.01 and abs(mean - TILTED) < 4 * error, start


def test_uncorrected_online_weights_drift_past_the_tilt():
    """Known-biased by construction: n rounds tilt n times. The bound that path_weighted keeps is broken."""
    for rounds in (1, 3):
        mean, error = ends(online_reward_weighted, rounds)
        assert abs(mean - (MEAN + rounds * SHIFT)) < 4 * error
    assert abs(mean - TILTED) > 20 * error


def test_advantage_weights_settle_where_tilt_and_pull_balance():
    """μ − m ← (μ − m + SHIFT/T)/(1 + κ): fixed point SHIFT/(Tκ), the tilt at κ = 1/T; κ = 0 never settles."""
    for temperature, kl, fixed in ((1.0, None, MEAN + SHIFT), (2.0, 1.0, MEAN + SHIFT / 2)):
        mean, error = ends(advantage_weighted, 1, fixed, temperature=temperature, kl=kl)
        assert abs(mean - fixed) < 4 * error
        moved, error = ends(advantage_weighted, 1, MEAN, temperature=temperature, kl=kl)
        pull = 1 / temperature if kl is None else kl
        assert abs(moved - (MEAN + SHIFT / temperature / (1 + pull))) < 4 * error
    mean, error = ends(advantage_weighted, 1, TILTED, kl=0.0)
    assert abs(mean - TILTED) > 20 * error


def test_tempering_is_a_choice(generator):
    chain, cost, control = setup()
    wild = RewardCost(cost.reward, 20.0)
    state = State(control, generator)
    plain = reward_weighted(chain, wild, batch=2_000).collect(state).material["weight"]
    tempered = reward_weighted(chain, wild, batch=2_000, minimum_ess=0.5).collect(state).material["weight"]
    assert ess(plain.log()) < 0.1 and ess(tempered.log()) == pytest.approx(0.5, abs=1e-3)


def test_misuse_is_refused():
    chain, cost, _ = setup()
    with pytest.raises(TiltflowError, match="path_ratio"):
        WeightedFlowMatching(chain, cost, source="base", path_ratio=True)
    with pytest.raises(TiltflowError, match="temperature"):
        WeightedFlowMatching(chain, cost, temperature=0.0)
    with pytest.raises(TiltflowError, match="kl"):
        advantage_weighted(chain, cost, kl=-1.0)
