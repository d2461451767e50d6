"""REINFORCE has the gradient of J; Flow-GRPO raises the reward, with a strength of its own."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tiltflow.core.chain import at, memoryless_chain, times, uniform_grid
from tiltflow.core.control import FineTuned, NetworkControl, tilted
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.process import Process
from tiltflow.core.simulate import event_sum, sample
from tiltflow.methods.policy_gradient import PolicyGradient, flow_grpo, reinforce
from tiltflow.nn.mlp import MLP
from tiltflow.problems.tilt import GaussianMixture, QuadraticReward, TiltProblem
from tiltflow.train.fit import fit
from tiltflow.train.method import State
from tiltflow.train.settings import Training


class Affine(nn.Module):
    """a x + b t + c: three weights."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, x, t):
        a, b, c = self.values
        return a * x + b * t[:, None] + c


def gaussian(slope=1.0, quadratic=0.0):
    """N(.5, .25) and its exact chain; r = slope·x − ½ quadratic·x²."""
    reward = QuadraticReward(torch.tensor([slope]), torch.tensor([[quadratic]]))
    return TiltProblem("gaussian", GaussianMixture.gaussian([0.5], [[0.25]]), reward)


def exact_chain(problem, steps, noiseless_last=False):
    t = uniform_grid(steps)
    v = 0.25 * (1 - t) ** 2 / (0.25 * t**2 + (1 - t) ** 2)
    return memoryless_chain(problem.process(), t, v[:-1], noiseless_last)


def bump(x, t):
    return 2 * (1 + t) * x.square().sum(1).sin()


def objective_gradient(chain, cost, control, paths, generator):
    """∇J by differentiating the simulation: the discrete adjoint."""
    x = chain.source(paths, generator)
    total = torch.zeros(paths)
    for k in range(len(chain.std)):
        std = at(chain.std, k, x)
        base = chain.base_mean(k, x)
        mean = control.mean(chain, k, x, base_mean=base) if std > 0 else base
        if std > 0:
            total = total + 0.5 * event_sum(((mean - base) / std) ** 2)
        total = total + float(chain.t[k + 1] - chain.t[k]) * cost.running(x, times(chain, k, x))
        x = mean + std * torch.randn(x.shape, generator=generator)
    total = total - cost.strength * cost.reward(x)
    return torch.autograd.grad(total.mean(), control.module.values)[0]


def z_scores(method, cost, control, generator, rounds=50):
    """Per weight: (mean gradient of the loss over rounds − ∇J)/standard error of both."""

    def spread(rows):
        rows = torch.stack(rows)
        return rows.mean(0), rows.std(0) / rows.shape[0] ** 0.5

    def estimate():
        loss = method.loss(control, method.collect(State(control, generator)).material, generator)
        return torch.autograd.grad(loss, control.module.values)[0]

    exact, noise = spread([objective_gradient(method.chain, cost, control, 1_000, generator) for _ in range(rounds)])
    mean, error = spread([estimate() for _ in range(rounds)])
    return (mean - exact) / (error**2 + noise**2).sqrt()


@pytest.mark.parametrize(("seed", "group", "noiseless"), [(0, None, False), (1, 4, False), (2, None, True), (3, 4, True)])
def test_reinforce_has_the_gradient_of_the_objective(seed, group, noiseless):
    generator = torch.Generator().manual_seed(seed)
    problem = gaussian(1.0, 1.0)
    chain, cost = exact_chain(problem, 4, noiseless), RewardCost(problem.reward, 1.5, running=bump)
    control = NetworkControl(Affine([-0.8, 1.5, 1.0]))
    method = reinforce(chain, cost, batch=2_000, group=group)
    assert z_scores(method, cost, control, generator).abs().max() < 4
    clipped = replace(method, clip=0.1)  # where collected all ratios are 1: no bound binds
    assert z_scores(clipped, cost, control, generator, 20).abs().max() < 4
    flipped = replace(method, cost=RewardCost(lambda x: -problem.reward(x), 1.5, running=bump))
    assert z_scores(flipped, cost, control, generator, 20).abs().max() > 8  # sign twin
    short_sighted = replace(method, future_kl=False)
    assert z_scores(short_sighted, cost, control, generator).abs().max() > 8  # the KL of later steps left out
    without_f = replace(method, cost=RewardCost(problem.reward, 1.5))
    assert z_scores(without_f, cost, control, generator, 20).abs().max() > 8


def trained(method, problem, generator, rounds=120, gradient_steps=1):
    torch.manual_seed(0)
    control = FineTuned(tilted(problem.process(), MLP(2, 1, 32, 2)))
    settings = Training(rounds=rounds, learning_rate=1e-2, ema=0.95, gradient_steps=gradient_steps)
    history = fit(method, State(control, generator), settings)
    chain = method.chain
    return sample(chain, control, chain.source(8_000, generator), generator).x, history


def detached(x):
    return x[:, 0].detach()


def test_reinforce_reaches_the_tilt_without_a_gradient_of_the_reward(generator):
    problem = gaussian()  # tilted by e^x: N(.75, .25)
    chain = exact_chain(problem, 10)
    x, history = trained(reinforce(chain, RewardCost(detached), 512), problem, generator)
    assert float(x.mean()) == pytest.approx(0.75, abs=0.05)  # standard error .0056, training noise about .02
    assert history[0]["kl"] < 1e-12 and history[-1]["reward"] > 0.6
    down, _ = trained(reinforce(chain, RewardCost(lambda x: -detached(x)), 512), problem, generator, 60)
    assert float(down.mean()) < 0.45  # sign twin


def test_flow_grpo_raises_the_reward_with_a_strength_of_its_own(generator):
    problem = gaussian()
    chain = exact_chain(problem, 10)
    rows = [
        flow_grpo(chain, RewardCost(detached, strength), 64, 16)
        .collect(State(NetworkControl(Affine([0.3, 0.2, 0.1])), torch.Generator().manual_seed(3)))
        .material["advantage"]
        for strength in (1.0, 3.0)
    ]
    assert torch.allclose(rows[0], rows[1], atol=1e-6)  # λ cancels
    x, _ = trained(flow_grpo(chain, RewardCost(detached), 256, kl=0.5), problem, generator, 60, gradient_steps=4)
    assert float(x.mean()) > 0.9  # above the tilt's .75: 1/(β std) = 4 times the strength asked for


def test_clip_stops_a_rewarded_move_and_no_other(generator):
    """With β = 0, a row whose ratio has passed 1 + c in the direction of its advantage has no gradient."""
    problem = gaussian()
    method = PolicyGradient(exact_chain(problem, 4), RewardCost(detached), batch=400, kl=0.0, clip=0.2)
    control = NetworkControl(Affine([0.0, 0.0, 0.0]))
    material = method.collect(State(control, generator)).material
    nn.init.constant_(control.module.values, 0.7)
    for i in range(0, 1_600, 37):
        row = {name: v[i : i + 1] for name, v in material.items()}
        std = at(method.chain.std, row["k"], row["x"])
        after, before = ((row["x_next"] - m) / std for m in (control.mean(method.chain, row["k"], row["x"]), row["mean"]))
        ratio, advantage = float((0.5 * (before**2 - after**2)).detach().exp()), float(row["advantage"])
        (grad,) = torch.autograd.grad(method.loss(control, row, generator), control.module.values)
        bound = ratio > 1.2 if advantage > 0 else ratio < 0.8
        assert bool((grad == 0).all()) == bound


def test_groups_share_their_condition(generator):
    """r depends on the condition: compared within groups, the condition itself is no merit."""
    problem = gaussian()

    def x1(x, t, shift):
        return problem.base.x1(x, t, problem.interpolant) + 0 * shift[:, None]

    chain = memoryless_chain(Process(problem.interpolant, x1, "x1", (1,)), uniform_grid(3), torch.ones(3))

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x, t, shift):
            return self.weight * x

    def conditions(n, generator):
        return {"shift": 1_000 * torch.arange(n).double()}

    cost = RewardCost(lambda x, shift: x[:, 0] + shift)
    control = NetworkControl(Zero())
    for method in (flow_grpo(chain, cost, 40, 8, conditions=conditions), reinforce(chain, cost, 40, 8, conditions)):
        material = method.collect(State(control, generator)).material
        shift = material["condition.shift"].reshape(3, 5, 8)
        assert (shift == shift[..., :1]).all() and len(shift.unique()) == 5
        advantage = material["advantage"].reshape(3, 5, 8)
        assert advantage.abs().max() < 10 and advantage.sum(2).abs().max() < 1e-6
        assert method.loss(control, material, generator).isfinite()


def test_misuse():
    chain, cost = exact_chain(gaussian(), 3), RewardCost(detached)
    for batch, group in ((1, None), (10, 1), (10, 4)):
        with pytest.raises(TiltflowError, match="group"):
            reinforce(chain, cost, batch, group)
    with pytest.raises(TiltflowError, match="clip"):
        flow_grpo(chain, cost, clip=0.0)
