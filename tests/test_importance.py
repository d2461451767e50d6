"""Path weights in training: the end-point target, its share, tempering; and the β-weighted change of an x1 network."""

import pytest
import torch
from torch import nn

from tiltflow.adjoint import lean_adjoint
from tiltflow.chain import at, euler_maruyama, memoryless_chain, residual_variance, uniform_grid
from tiltflow.control import Blend, FineTuned
from tiltflow.cost import RewardCost
from tiltflow.errors import TiltflowError
from tiltflow.finetune import tuned_process
from tiltflow.methods.adjoint_matching import AdjointMatching, endpoint_share, mixed_target
from tiltflow.noise import Constant
from tiltflow.problems import GaussianMixture, QuadraticReward, TiltProblem, mixture2d, mixture32d
from tiltflow.simulate import simulate
from tiltflow.weights import ess, normalised, tempered


def chain_of(problem, generator, steps=15):
    t = uniform_grid(steps)
    x1 = problem.base.sample(4_000, generator)
    return memoryless_chain(problem.process(), t, residual_variance(problem.process(), t, x1, generator))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_endpoint_and_adjoint_targets_have_the_same_mean_under_path_weights(seed):
    """On a Gaussian with a linear reward the adjoint is the same for all paths, so it is −u*/s exactly."""
    generator = torch.Generator().manual_seed(seed)
    base = GaussianMixture.gaussian([0.5], [[0.25]])
    problem = TiltProblem("gaussian", base, QuadraticReward.of_direction([1.0]))
    chain = chain_of(problem, generator)
    n = 40_000
    path = simulate(chain, None, chain.source(n, generator), generator)
    adjoint = lean_adjoint(chain, path, RewardCost(problem.reward))
    share = torch.ones(len(path.mean))
    endpoint = mixed_target(chain, path, adjoint.base_mean, adjoint.a[1:], share)
    weight = normalised(problem.reward(path.x[-1]))[:, None]
    for k in range(len(endpoint)):
        exact = -at(chain.std, k, path.x[k]) * adjoint.a[k + 1]
        estimate = -at(chain.std, k, path.x[k]) * endpoint[k]
        error = float((weight**2 * (estimate - exact) ** 2).sum().sqrt())
        assert abs(float((weight * (estimate - exact)).sum())) < 4 * error
        assert error < 0.02
    unweighted = sum(float(-(at(chain.std, k, path.x[k]) * endpoint[k]).mean()) for k in range(len(endpoint)))
    exact_sum = sum(float(-(at(chain.std, k, path.x[k]) * adjoint.a[k + 1]).mean()) for k in range(len(endpoint)))
    assert abs(unweighted) < 0.2 * exact_sum  # the known-bad twin: without weights the end point says nothing
    half = mixed_target(chain, path, adjoint.base_mean, adjoint.a[1:], 0.5 * share)
    assert torch.allclose(half, 0.5 * (endpoint + adjoint.a[1:]))


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
