"""Deterministic Adjoint Matching: its target in closed form on a Gaussian, and by how much that is not ∇V."""

import pytest
import torch

from tiltflow.core.chain import memoryless_chain, uniform_grid
from tiltflow.core.control import FineTuned, tilted
from tiltflow.core.cost import RewardCost
from tiltflow.core.interpolant import Linear
from tiltflow.methods.deterministic import DeterministicAdjointMatching
from tiltflow.methods.reciprocal import linear_drift
from tiltflow.nn.mlp import MLP
from tiltflow.problems.tilt import GaussianMixture, QuadraticReward, TiltProblem
from tiltflow.train.method import State

S, B = 0.49, torch.tensor([0.8, -0.5])


@pytest.fixture
def setting():
    base = GaussianMixture.gaussian([0.0, 0.0], S * torch.eye(2))
    problem = TiltProblem("gaussian", base, QuadraticReward.of_direction(B))
    t = uniform_grid(400)
    chain = memoryless_chain(problem.process(), t, linear_drift(Linear(), S)(t[:-1]))
    control = FineTuned(tilted(problem.process(), MLP(4, 2, 8, 2)))
    return problem, chain, control, torch.Generator().manual_seed(0)


def test_the_adjoint_of_the_ode_is_the_flow_maps_slope(setting):
    """dX_1/dx_t = √(S/(t²S + (1−t)²)): the ODE of a Gaussian moves quantiles along."""
    problem, chain, control, generator = setting
    rows = DeterministicAdjointMatching(chain, RewardCost(problem.reward), 16).collect(State(control, generator)).material
    t = chain.t[rows["k"] + 1]
    variance = t**2 * S + (1 - t) ** 2
    expected = -(S / variance).sqrt()[:, None] * B
    assert torch.allclose(rows["a_next"], expected, atol=0.01)


def test_it_is_biased_where_the_lean_adjoint_is_exact(setting):
    """Known-bad by construction: ∇V = −tS/(t²S + (1−t)²) b, which the lean adjoint of the memoryless chain returns."""
    problem, chain, control, generator = setting
    rows = DeterministicAdjointMatching(chain, RewardCost(problem.reward), 16).collect(State(control, generator)).material
    t = chain.t[rows["k"] + 1]
    early = (t > 0.05) & (t < 0.3)
    exact = -(t * S / (t**2 * S + (1 - t) ** 2))[:, None] * B
    assert float((rows["a_next"] - exact)[early].norm() / exact[early].norm()) > 1.0
    last = t > 0.999
    assert torch.allclose(rows["a_next"][last], exact[last], atol=0.01)  # at the end both are ∇g: the sign is right


def test_the_loss_is_zero_at_its_own_target(setting):
    problem, chain, control, generator = setting

    class Target(torch.nn.Module):
        """v_base − ηa as X̂_1: B_k(X̂_1 − X̂_1 base) = −s_k² a_{k+1}."""

        def __init__(self, sign):
            super().__init__()
            self.sign = sign

        def mean(self, chain, k, x, base_mean=None, **condition):
            t = chain.t[k + 1].reshape(-1, 1)
            a = -(S / (t**2 * S + (1 - t) ** 2)).sqrt() * B
            return base_mean - self.sign * chain.std[k].reshape(-1, 1) ** 2 * a

    method = DeterministicAdjointMatching(chain, RewardCost(problem.reward), 16)
    rows = method.collect(State(control, generator)).material
    right, flipped = (float(method.loss(Target(sign), rows, generator)) for sign in (1, -1))
    assert right < 1e-4 * flipped
