"""Path weights in training: the end-point target, its share, tempering; and the β-weighted change of an x1 network."""

import models
import pytest
import torch
from torch import nn

from tiltflow.core.chain import euler_maruyama, memoryless_chain, residual_variance, uniform_grid
from tiltflow.core.control import Blend, FineTuned, tilted
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.noise import Constant
from tiltflow.core.simulate import sample
from tiltflow.core.weights import ess, normalised, tempered
from tiltflow.methods.adjoint_matching import AdjointMatching, endpoint_share
from tiltflow.problems.tilt import GaussianMixture, QuadraticReward, TiltProblem, mixture2d, mixture32d
from tiltflow.tilting.chain import tuned_process
from tiltflow.tilting.settings import FinetuneSettings
from tiltflow.tilting.train import finetune
from tiltflow.train.method import State


def chain_of(problem, generator, steps=15):
    t = uniform_grid(steps)
    x1 = problem.base.sample(4_000, generator)
    return memoryless_chain(problem.process(), t, residual_variance(problem.process(), t, x1, generator))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_endpoint_rows_and_adjoint_rows_have_the_same_mean_under_path_weights(seed):
    """On a Gaussian with a linear reward the adjoint is the same for all paths, so it is −u*/s exactly."""
    generator = torch.Generator().manual_seed(seed)
    base = GaussianMixture.gaussian([0.5], [[0.25]])
    problem = TiltProblem("gaussian", base, QuadraticReward.of_direction([1.0]))
    chain, cost = chain_of(problem, generator), RewardCost(problem.reward)
    control = FineTuned(tilted(problem.process(), nn.Linear(2, 1).requires_grad_(False)))
    control.module.net.forward = lambda x, t: torch.full_like(x[:, :1], 0.05)  # not u*, so that the weights matter

    def rows(share):
        own = torch.Generator().manual_seed(10 + seed)
        method = AdjointMatching(chain, cost, 40_000, importance=True, endpoint_share=torch.full((15,), share))
        return method.collect(State(control, own)).material

    adjoint, endpoint = rows(0.0), rows(1.0)
    assert torch.equal(adjoint["weight"], endpoint["weight"]) and not torch.equal(adjoint["x"], endpoint["x"])
    for k in range(15):
        here = adjoint["k"] == k
        s = float(chain.std[k])
        exact = -s * adjoint["a_next"][here]
        assert float(exact.std()) < 1e-5
        estimate, weight = -s * endpoint["a_next"][here], endpoint["weight"][here, None] / 40_000
        error = float((weight**2 * (estimate - exact) ** 2).sum().sqrt())
        assert abs(float((weight * (estimate - exact)).sum())) < 4 * error
        assert error < 0.02
    unweighted = sum(float((s * endpoint["a_next"][endpoint["k"] == k]).mean()) for k, s in enumerate(chain.std.tolist()))
    exact_sum = sum(float((s * adjoint["a_next"][adjoint["k"] == k]).mean()) for k, s in enumerate(chain.std.tolist()))
    assert unweighted > 0.8 * exact_sum  # the known-bad twin (both negative): without weights it repeats the policy
    mixed = rows(0.5)
    from_paths = (mixed["x"] == adjoint["x"]).all(1).double().mean()
    assert abs(float(from_paths) - 0.5) < 0.01


def test_share_is_large_where_modes_separate_and_small_for_mild_adjoints(generator):
    separated = mixture32d()
    share = endpoint_share(chain_of(separated, generator, 40), RewardCost(separated.reward), 500, generator)
    assert float(share[5:15].min()) > 0.5 and float(share[-5:].max()) < 0.05
    base = GaussianMixture.gaussian(torch.zeros(32), torch.eye(32))
    mild = TiltProblem("gaussian", base, QuadraticReward.of_direction(torch.full((32,), 0.2)))
    assert float(endpoint_share(chain_of(mild, generator), RewardCost(mild.reward), 200, generator).max()) < 0.1


def test_endpoint_share_needs_path_weights_and_a_memoryless_chain(generator):
    problem = mixture2d()
    chain = chain_of(problem, generator)
    with pytest.raises(TiltflowError, match="importance=True"):
        AdjointMatching(chain, RewardCost(problem.reward), endpoint_share=torch.ones(15))
    biased = euler_maruyama(problem.process(), uniform_grid(15), Constant(1.0))
    with pytest.raises(TiltflowError, match="memoryless"):
        AdjointMatching(biased, RewardCost(problem.reward), importance=True, endpoint_share=torch.ones(15))


def test_tempering_keeps_half_the_samples_and_leaves_good_weights_alone(generator):
    mild, wild = 0.1 * torch.randn(1000, generator=generator), 10 * torch.randn(1000, generator=generator)
    assert torch.equal(tempered(mild), normalised(mild))
    assert ess(tempered(wild).log()) == pytest.approx(0.5, abs=1e-3)
    assert ess(wild) < 0.05


def test_blend_starts_at_the_base_and_needs_no_second_base_evaluation(generator):
    problem = mixture2d()
    chain = chain_of(problem, generator)
    net = nn.Linear(2, 2)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return problem.process().x1(x, t) + self.net(x)

    process = tuned_process(problem.process(), Network())
    assert isinstance(process.model, Blend)
    x, k = torch.randn(6, 2, generator=generator), torch.tensor([0, 3, 6, 9, 12, 14])
    base_mean = chain.base_mean(k, x)
    control = FineTuned(process)
    assert torch.allclose(control.mean(chain, k, x), control.mean(chain, k, x, base_mean=base_mean))
    assert (control.mean(chain, k, x) - base_mean).abs().max() > 0.01
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    assert torch.allclose(control.mean(chain, k, x), base_mean)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_where_the_reward_saturates_unweighted_paths_reach_it(seed):
    """N(0, ¼ I) and 40 log σ(8(x − ¼)): the exact mean by quadrature; in 60 rounds tempered weights stay far below."""
    z = torch.linspace(-2, 2, 20_001, dtype=torch.float64)
    r = torch.nn.functional.logsigmoid(8 * (z - 0.25))
    exact = float((torch.softmax(40 * r - 2 * z**2, 0) * r).sum())

    def reward(x):
        return torch.nn.functional.logsigmoid(8 * (x[:, 0] - 0.25))

    def reached(method):
        settings = FinetuneSettings(rounds=60, batch=48, gradient_steps=2, buffer_rounds=4, steps=20, learning_rate=1e-2)
        torch.manual_seed(seed)
        tuned = finetune(models.process(), reward, 40.0, method, settings, seed=seed)
        generator = torch.Generator().manual_seed(5)
        x0 = tuned.chain.source(4_000, generator)
        return float(reward(sample(tuned.chain, FineTuned(tuned.process), x0, generator).x).mean())

    assert exact == pytest.approx(-0.0119, abs=1e-4)
    assert reached("adjoint_matching_plain") == pytest.approx(exact, abs=0.02) and reached("adjoint_matching") < exact - 0.05
