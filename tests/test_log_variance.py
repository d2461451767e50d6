"""Log-variance: zero at the optimum, the gradient of the KL on own paths, and training on a reward without a gradient."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tiltflow.core.chain import DriftChain, InterpolantChain, memoryless_chain, residual_variance, uniform_grid
from tiltflow.core.control import FineTuned, NetworkControl, tilted
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.noise import Constant
from tiltflow.core.simulate import sample
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.methods.log_variance import LogVariance
from tiltflow.nn.mlp import MLP
from tiltflow.problems.tilt import GaussianMixture, QuadraticReward, TiltProblem
from tiltflow.train.buffer import Buffer
from tiltflow.train.fit import fit
from tiltflow.train.method import State
from tiltflow.train.settings import Training


def gaussian(steps=12):
    """An isotropic base tilted linearly: V is linear in x, so a chain of fixed variance reaches P* exactly."""
    base = GaussianMixture.gaussian([0.5, -1.0], 0.25 * torch.eye(2))
    problem, t = TiltProblem("gaussian", base, QuadraticReward.of_direction([1.0, 0.4])), uniform_grid(steps)
    exact = 0.25 * (1 - t[:-1]) ** 2 / (0.25 * t[:-1] ** 2 + (1 - t[:-1]) ** 2)
    return problem, memoryless_chain(problem.process(), t, exact)


class Slope(nn.Module):
    """θ · (−∇V): θ = 1 is the optimum, u_k = θ s_k t_{k+1} C b / (t_{k+1}² C + (1 − t_{k+1})²)."""

    def __init__(self, problem, chain, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))
        c, t = 0.25, chain.t[1:]
        self.slope = t * c / (t**2 * c + (1 - t) ** 2)
        self.direction = problem.reward.linear
        self.t = chain.t

    def forward(self, x, t):
        k = torch.searchsorted(self.t, t - 1e-9)
        return self.theta * self.slope[k][:, None] * self.direction


def loss_at(theta, seed, flip=1.0, **settings):
    generator = torch.Generator().manual_seed(seed)
    problem, chain = gaussian()
    control = NetworkControl(Slope(problem, chain, theta))
    method = LogVariance(chain, RewardCost(lambda x: flip * problem.reward(x)), **settings)
    loss = method.loss(control, method.collect(State(control, generator)).material, generator)
    loss.backward()
    energy = float((control.module.slope**2 * chain.std**2).sum() * (problem.reward.linear**2).sum())
    return float(loss.detach()), float(control.module.theta.grad), energy


@pytest.mark.parametrize("policy", ["control", "base"])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_are_zero_at_the_optimum(seed, policy):
    """On any paths; −r instead of r leaves Var(2r) > .5, a control 10 % off .01 times the energy."""
    loss, gradient, energy = loss_at(1.0, seed, policy=policy)
    assert loss < 1e-10 and abs(gradient) < 1e-8
    assert loss_at(1.0, seed, flip=-1.0, policy=policy)[0] > 0.5
    assert loss_at(0.9, seed, policy=policy)[0] > 0.005 * energy


@pytest.mark.parametrize("theta", [0.0, 0.7, 1.4])
def test_loss_and_gradient_on_own_paths_are_those_of_the_kl(theta):
    """log dP^θ/dP* is Gaussian of variance (θ−1)²E, and KL(P^θ‖P*) = ½(θ−1)²E with E the energy of u*: the loss is 2 KL."""
    for seed in range(3):
        n = 8_000
        loss, gradient, energy = loss_at(theta, seed, batch=n)
        error = 4.5 * (2 / n) ** 0.5  # relative, of a sample variance of Gaussians
        assert loss == pytest.approx((theta - 1) ** 2 * energy, rel=error)
        assert gradient == pytest.approx(2 * (theta - 1) * energy, rel=error)
        assert abs(gradient + 2 * (theta - 1) * energy) > 0.5 * energy  # the opposite sign is far off


def random_starts(steps=10):
    """dX = .5X dt + dB from N(0, 1), f = x, g = 2x: V is linear, u* = −∇V is known backwards and V(x_0) varies."""
    t = uniform_grid(steps)
    chain = DriftChain.build(lambda x, t: 0.5 * x, lambda n, g: torch.randn(n, 1, generator=g), t, Constant(1.0))
    cost, h = RewardCost(lambda x: -2 * x[:, 0], running=lambda x, t: x[:, 0]), 1 / steps
    slopes = [2.0]  # ∇V_K, …, ∇V_0
    for _ in range(steps):
        slopes.append((1 + 0.5 * h) * slopes[-1] + h)
    table = torch.tensor(slopes[::-1])

    class Exact(nn.Module):
        def forward(self, x, t):
            return -table[(t * steps).round().long() + 1][:, None]

    return chain, cost, NetworkControl(Exact())


def test_paths_are_compared_within_their_start(generator):
    chain, cost, control = random_starts()
    method = LogVariance(chain, cost, batch=64, paths_per_start=4)
    state, buffer = State(control, generator), Buffer(10_000)
    for state.iteration in range(3):
        buffer.add(method.collect(state).material)
    assert len(buffer.items["start"].unique()) == 48
    for [(batch, _)] in buffer.batches(50, 3, generator):  # rows in any order, some starts with one row left
        assert method.loss(control, batch, generator).item() < 1e-10
    mixed = buffer.items | {"start": torch.zeros_like(buffer.items["start"])}
    assert method.loss(control, mixed, generator).item() > 1  # known-bad twin: V(x_0) counts as variance
    without = LogVariance(chain, replace(cost, running=None), batch=64, paths_per_start=4)
    assert without.loss(control, without.collect(state).material, generator).item() > 0.05  # f dropped


def test_conditions_go_with_their_start(generator):
    """A condition λ per start, r = λ b·x and the optimal u = λ u*: zero; mixing the conditions is not."""
    problem, chain = gaussian()
    slope = Slope(problem, chain, 1.0)

    class Conditional(nn.Module):
        def forward(self, x, t, strength):
            return strength[:, None] * slope(x, t)

    class Taking(InterpolantChain):
        """The same chain, whose base ignores the condition."""

        def base_mean(self, k, x, strength):
            return super().base_mean(k, x)

    taking = Taking(chain.base, chain.t, chain.a, chain.b, chain.std, True)
    method = LogVariance(
        taking,
        RewardCost(lambda x, strength: strength * problem.reward(x)),
        batch=32,
        paths_per_start=8,
        conditions=lambda n, g: {"strength": 1 + torch.rand(n, generator=g)},
    )
    control = NetworkControl(Conditional())
    material = method.collect(State(control, generator)).material
    assert method.loss(control, material, generator).item() < 1e-10
    swapped = material | {"condition.strength": material["condition.strength"].flip(0)}
    assert method.loss(control, swapped, generator).item() > 1e-3


def grade(x):
    """Marks of a judge: 2 sigmoid((x − .5)/.2), rounded to quarters. Its gradient is zero wherever there is one."""
    return (8 * torch.sigmoid((x[:, 0] - 0.5) / 0.2)).round() / 4


def graded(sign=1.0):
    """P*(x > .5) by quadrature: about .777 for N(.5, .25) tilted by the marks, .223 against them."""
    x = torch.linspace(-4.5, 5.5, 100_001)[:, None]
    density = torch.softmax(-2 * (x[:, 0] - 0.5) ** 2 + sign * grade(x), 0)
    return float(density[x[:, 0] > 0.5].sum())


def trained(reward, seed, method=LogVariance, rounds=150):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    problem = TiltProblem("gaussian", GaussianMixture.gaussian([0.5], [[0.25]]), QuadraticReward.of_direction([1.0]))
    t, x1 = uniform_grid(12), problem.base.sample(4_000, generator)
    chain = memoryless_chain(problem.process(), t, residual_variance(problem.process(), t, x1, generator))
    control = FineTuned(tilted(problem.process(), MLP(2, 1, 32, 2)))
    history = fit(
        method(chain, RewardCost(reward), batch=128),
        State(control, generator),
        Training(rounds=rounds, learning_rate=1e-2, ema=0.95),
    )
    x = sample(chain, control, chain.source(8_000, generator), generator).x
    return float((x > 0.5).double().mean()), history


@pytest.mark.parametrize("seed", [0, 1])
def test_a_reward_without_gradient_is_reached(seed):
    """Standard error .005, the step of a chain of fixed variance about .015, training noise about .005; the base has .5."""
    share, history = trained(grade, seed)
    assert graded() == pytest.approx(0.777, abs=1e-3)
    assert share == pytest.approx(graded(), abs=0.04)
    assert history[-1]["ess"] > 0.9 > history[0]["ess"] + 0.1


def test_the_sign_of_the_reward_and_what_adjoints_make_of_marks():
    share, _ = trained(lambda x: -grade(x), 0)
    assert share == pytest.approx(graded(-1.0), abs=0.04)
    stuck, _ = trained(grade, 0, AdjointMatching, rounds=20)
    assert stuck == pytest.approx(0.5, abs=0.03)  # ∇r = 0: Adjoint Matching learns nothing


def test_misuse():
    problem, chain = gaussian()
    cost = RewardCost(problem.reward)
    with pytest.raises(TiltflowError, match="divide batch"):
        LogVariance(chain, cost, batch=10, paths_per_start=4)
    with pytest.raises(TiltflowError, match="row to row"):
        LogVariance(chain, cost, conditions=lambda n, g: {})
    drift, cost, _ = random_starts()
    with pytest.raises(TiltflowError, match="start from one point"):
        LogVariance(drift, cost)
    LogVariance(replace(drift, initial=lambda n, g: torch.zeros(n, 1)), cost)
