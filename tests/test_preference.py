"""Diffusion-DPO: its start, its stationary point in closed form on a Gaussian, and where that is not the optimal control."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tiltflow.core.chain import euler_maruyama, memoryless_chain, uniform_grid
from tiltflow.core.control import FineTuned, NetworkControl, tilted
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.noise import Constant
from tiltflow.core.process import Process
from tiltflow.core.simulate import sample
from tiltflow.methods.preference import PreferencePairs
from tiltflow.nn.mlp import MLP
from tiltflow.problems.tilt import GaussianMixture, QuadraticReward, TiltProblem, mixture2d
from tiltflow.train.fit import fit
from tiltflow.train.method import State
from tiltflow.train.settings import Training

C = 0.25


def gaussian(slope=1.0):
    return TiltProblem("gaussian", GaussianMixture.gaussian([0.5], [[C]]), QuadraticReward.of_direction([slope]))


def exact_chain(problem, steps, noiseless_last=False):
    t = uniform_grid(steps)
    v = C * (1 - t) ** 2 / (C * t**2 + (1 - t) ** 2)
    return memoryless_chain(problem.process(), t, v[:-1], noiseless_last)


class PerStep(nn.Module):
    """One number per step: u_k = s_k · value_k, the same for all x."""

    def __init__(self, chain, u):
        super().__init__()
        self.t = chain.t[:-1]
        self.u = nn.Parameter(u.clone())
        self.std = chain.std

    def forward(self, x, t):
        k = torch.searchsorted(self.t, t.contiguous())
        return (self.u / self.std)[k][:, None].expand_as(x)


def slopes(chain):
    """J_{k+1} = dX̂_1/dx at t_{k+1}, of the Gaussian base."""
    t = chain.t[1:]
    return t * C / (t**2 * C + (1 - t) ** 2)


def stationary(chain, slope, beta=1.0):
    """u_k = λ∇r C/(β K s_k J_{k+1})."""
    return slope * C / (beta * len(chain.std) * chain.std * slopes(chain))


def optimal(chain, slope):
    """u*_k = s_k J_{k+1} λ∇r."""
    return slope * chain.std * slopes(chain)


def shift(chain, u):
    """Of the end mean: Σ s_k u_k J_{k+1}."""
    return float((chain.std * u * slopes(chain)).sum())


def gradient_scores(method, u, generator, rounds=40):
    """Mean gradient of the loss in every u_k over its standard error."""
    control = NetworkControl(PerStep(method.chain, u))
    rows = []
    for _ in range(rounds):
        material = method.collect(State(control, generator)).material
        rows.append(torch.autograd.grad(method.loss(control, material, generator), control.module.u)[0])
    rows = torch.stack(rows)
    return rows.mean(0) / (rows.std(0) / rounds**0.5)


def test_the_loss_starts_at_log_2(generator):
    problem = mixture2d()
    chain = memoryless_chain(problem.process(), uniform_grid(8), torch.ones(8))
    control = FineTuned(tilted(problem.process(), MLP(4, 2, 16, 2)))
    for labels in ("bradley-terry", "reward"):
        method = PreferencePairs(chain, RewardCost(problem.reward), 16, labels=labels)
        material = method.collect(State(control, generator)).material
        assert float(method.loss(control, material, generator).detach()) == pytest.approx(math.log(2), abs=1e-14)
    nn.init.normal_(control.module.net.last.weight)
    assert abs(float(method.loss(control, material, generator).detach()) - math.log(2)) > 1e-3


@pytest.mark.parametrize(("seed", "beta", "on_policy"), [(0, 1.0, False), (1, 2.0, False), (2, 1.0, True)])
def test_stationary_point_on_a_gaussian_has_the_right_end_law(seed, beta, on_policy):
    """Bradley–Terry pairs, linear reward: no gradient at u_k = λ∇r C/(β K s_k J_{k+1}), whose end mean is right."""
    generator = torch.Generator().manual_seed(seed)
    problem, slope = gaussian(1.5), 1.5
    chain = exact_chain(problem, 5)
    method = PreferencePairs(chain, RewardCost(problem.reward), 2_000, beta, on_policy=on_policy)
    u = stationary(chain, slope, beta)
    assert shift(chain, u) == pytest.approx(slope * C / beta, rel=1e-12)
    assert gradient_scores(method, u, generator).abs().max() < 4
    assert gradient_scores(method, -u, generator, 10).abs().max() > 8  # sign twin
    assert gradient_scores(replace(method, labels="reward"), u, generator, 10).abs().max() > 8  # no finite optimum
    u_star = optimal(chain, slope) / beta  # the same end law, by the optimal path: not where the loss is stationary
    assert shift(chain, u_star) == pytest.approx(slope * C / beta, rel=1e-12)
    assert gradient_scores(method, u_star, generator, 10).abs().max() > 8
    assert float((u**2).sum()) > 1.02 * float((u_star**2).sum())  # and its KL is the least


def trained(method, problem, generator, rounds=150, **kw):
    torch.manual_seed(0)
    control = FineTuned(tilted(problem.process(), MLP(2, 1, 32, 2)))
    fit(method, State(control, generator), Training(rounds=rounds, learning_rate=5e-3, ema=0.95, **kw))
    chain = method.chain
    return float(sample(chain, control, chain.source(8_000, generator), generator).x.mean())


def test_training_reaches_the_end_mean(generator):
    problem = gaussian()  # tilted by e^x: mean .75
    chain = exact_chain(problem, 8)
    cost = RewardCost(lambda x: problem.reward(x).detach())  # values only
    assert trained(PreferencePairs(chain, cost, 2_000), problem, generator) == pytest.approx(0.75, abs=0.06)


@pytest.mark.slow
def test_the_twins_of_preference_pairs_do_not_reach_it(generator):
    problem = gaussian()
    chain = exact_chain(problem, 8)
    cost = RewardCost(lambda x: problem.reward(x).detach())
    flipped = PreferencePairs(chain, RewardCost(lambda x: -problem.reward(x)), 2_000)
    assert trained(flipped, problem, generator) == pytest.approx(0.25, abs=0.06)
    by_reward = PreferencePairs(chain, cost, 2_000, labels="reward")
    assert trained(by_reward, problem, generator, 60) > 0.9  # labels without noise know no strength


def test_last_noiseless_step_and_conditions(generator):
    problem = gaussian()

    def x1(x, t, shift):
        return problem.base.x1(x, t, problem.interpolant) + 0 * shift[:, None]

    chain = exact_chain(problem, 4, noiseless_last=True)
    conditional = replace(chain, base=Process(problem.interpolant, x1, "x1", (1,)))

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x, t, shift):
            return self.weight * (shift[:, None] + 1)

    method = PreferencePairs(
        conditional,
        RewardCost(lambda x, shift: (1 - 2 * shift) * x[:, 0]),
        200,
        labels="reward",
        conditions=lambda n, generator: {"shift": (torch.arange(n) % 2).double()},
    )
    control = NetworkControl(Zero())
    material = method.collect(State(control, generator)).material
    sign = 1 - 2 * material["condition.shift"]
    assert (sign * (material["winner"] - material["loser"])[:, 0] >= 0).all()
    loss = method.loss(control, material, generator)
    assert float(loss.detach()) == pytest.approx(math.log(2))
    (grad,) = torch.autograd.grad(loss, control.module.weight)
    assert grad.isfinite().all()


def test_misuse():
    problem = gaussian()
    chain, cost = exact_chain(problem, 3), RewardCost(problem.reward)
    with pytest.raises(TiltflowError, match="memoryless"):
        PreferencePairs(euler_maruyama(problem.process(), uniform_grid(3), Constant(1.0)), cost)
    with pytest.raises(TiltflowError, match="beta"):
        PreferencePairs(chain, cost, beta=0.0)
    with pytest.raises(TiltflowError, match="labels"):
        PreferencePairs(chain, cost, labels="human")
