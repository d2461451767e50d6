"""Training-free samplers: SMC is unbiased whatever its walk, best of N and guidance are biased exactly as their laws say."""

import math

import pytest
import torch

from tiltflow.core.chain import DriftChain, InterpolantChain, memoryless_chain, residual_variance, uniform_grid
from tiltflow.core.control import FineTuned
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.noise import Constant
from tiltflow.core.process import Process
from tiltflow.core.simulate import Step, sample
from tiltflow.core.weights import normalised, systematic
from tiltflow.methods import smc
from tiltflow.methods.best_of_n import BestOfN
from tiltflow.methods.guidance import GradientGuidance
from tiltflow.methods.smc import PathSMC, feynman_kac, urge
from tiltflow.problems.tilt import GaussianMixture, LinearQuadratic, QuadraticReward, TiltProblem, mixture2d


class Share:
    """A share of the optimal control: 0 the base, 1 the optimum."""

    def __init__(self, problem, share):
        self.process, self.share = problem.optimal(), share

    def mean(self, chain, k, x, base_mean=None, **condition):
        optimal = chain.mean(k, x, self.process.x1(x, chain.t[k].expand(len(x))))
        return torch.lerp(chain.base_mean(k, x) if base_mean is None else base_mean, optimal, self.share)

    def ratios(self, chain):
        return None


def gaussian(slope=2.0, quadratic=0.0, variance=0.25):
    reward = QuadraticReward(torch.tensor([slope]), torch.tensor([[quadratic]]))
    return TiltProblem("gaussian", GaussianMixture.gaussian([0.5], [[variance]]), reward)


def exact_chain(problem, steps, noiseless_last=False) -> InterpolantChain:
    """Of a 1-D Gaussian: with v_s = cβ²/(α²c + β²) all its marginals are exact."""
    t = uniform_grid(steps)
    c = problem.base.covariances[0, 0]
    v = c * (1 - t) ** 2 / (t**2 * c + (1 - t) ** 2)
    return memoryless_chain(problem.process(), t, v[:-1], noiseless_last)


def z_score(sampler, control, exact, generator, populations=60, n=150):
    """(mean Ẑ − Z)/its standard error over independent populations, and the relative standard error."""
    z = torch.tensor([sampler.sample(control, n, generator).log_z for _ in range(populations)]).exp()
    error = float(z.std()) / populations**0.5 + 1e-12 * exact  # under the optimal control every weight is Z
    return (float(z.mean()) - exact) / error, error / exact


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("preset", [feynman_kac, urge, PathSMC])
@pytest.mark.parametrize("share", [None, 0.5, 1.0])
def test_partition_function_is_unbiased(preset, share, threshold, generator):
    problem = gaussian()
    chain = exact_chain(problem, 5)
    sampler = preset(chain, RewardCost(problem.reward), threshold=threshold)
    control = None if share is None else Share(problem, share)
    score, relative = z_score(sampler, control, math.exp(problem.log_z), generator)
    assert abs(score) < 4
    assert relative < (1e-10 if share == 1.0 and preset is PathSMC and threshold == 0.0 else 0.06)


class Forgetful(PathSMC):
    """The twin that leaves out the last correction."""

    def correction(self, x, counted, **condition):
        return torch.zeros_like(counted)


@pytest.mark.parametrize("seed", [0, 1])
def test_omitted_weights_are_out_of_bounds(seed, monkeypatch):
    generator = torch.Generator().manual_seed(seed)
    problem = gaussian()
    chain, cost, exact = exact_chain(problem, 4), RewardCost(problem.reward), math.exp(problem.log_z)
    no_correction = Forgetful(chain, cost, smc.reward_ahead(cost))
    assert abs(z_score(no_correction, None, exact, generator, n=500)[0]) > 6
    monkeypatch.setattr(Step, "log_ratio", lambda step, dimension: torch.zeros(len(step.x)))
    for sampler, control in ((feynman_kac(chain, cost), Share(problem, 0.5)), (urge(chain, cost), None)):
        assert abs(z_score(sampler, control, exact, generator)[0]) > 8


def test_the_guided_walk_and_resampling_lower_the_variance(generator):
    """What the presets are for: at equal particles the guided weights spread least."""
    problem = gaussian(slope=4.0)
    chain, cost, exact = exact_chain(problem, 10), RewardCost(problem.reward), math.exp(problem.log_z)
    errors = [
        z_score(sampler, None, exact, generator, n=100)[1]
        for sampler in (PathSMC(chain, cost, threshold=0.0), feynman_kac(chain, cost), urge(chain, cost))
    ]
    assert errors[2] < 0.6 * errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("noiseless", [False, True])
def test_mode_weights_of_the_mixture(noiseless, generator):
    """Against the closed form, and the weights are needed: without them the walk under half the control is out of bounds."""
    problem = mixture2d()
    t = uniform_grid(40)
    v = residual_variance(problem.process(), t, problem.base.sample(4_000, generator), generator)
    chain, cost = memoryless_chain(problem.process(), t, v, noiseless), RewardCost(problem.reward)
    populations, n = 8, 500

    def mode_weights(sampler, control, weighted=True):
        rows = []
        for _ in range(populations):
            x, log_w, _ = sampler.sample(control, n, generator)
            w = normalised(log_w if weighted else torch.zeros_like(log_w))
            rows.append(torch.stack([w[problem.base.component(x) == i].sum() for i in range(3)]))
        rows = torch.stack(rows)
        return rows.mean(0), rows.std(0) / populations**0.5

    chain_bias = 0.01  # O(1/K), of the base chain's own mode weights and ends
    half = Share(problem, 0.5)
    for sampler, control in ((feynman_kac(chain, cost), None), (urge(chain, cost), None), (feynman_kac(chain, cost), half)):
        mean, error = mode_weights(sampler, control)
        assert ((mean - problem.target.weights).abs() < 4 * error + chain_bias).all()
        assert error.max() < 0.02
    mean, error = mode_weights(PathSMC(chain, cost, threshold=0.0), half, weighted=False)
    assert (mean - problem.target.weights).abs().max() > 4 * float(error.max()) + 5 * chain_bias
    log_z = torch.tensor([urge(chain, cost).sample(None, n, generator).log_z for _ in range(populations)])
    assert abs(float(log_z.exp().mean().log()) - problem.log_z) < 4 * float(log_z.std()) / populations**0.5 + chain_bias


def test_running_cost_enters_the_weights(generator):
    """Linear-quadratic control from a point: log Z = −V(x_0, 0) of the Riccati equation, up to O(h)."""
    problem = LinearQuadratic(torch.tensor([[0.2]]), torch.tensor([[1.0]]), torch.tensor([[1.0]]), sigma=1.0)
    start = torch.full((1, 1), 0.7)
    chain = DriftChain.build(lambda x, t: 0.2 * x, lambda n, g: start.expand(n, 1), uniform_grid(80), Constant(1.0))
    cost = RewardCost(lambda x: -x.square().sum(1), running=lambda x, t: x.square().sum(1))
    log_z = -float(problem.value(start, 0.0))
    for sampler in (feynman_kac(chain, cost), urge(chain, cost)):
        assert abs(sampler.sample(None, 20_000, generator).log_z - log_z) < 0.04
    without = RewardCost(cost.reward)
    assert abs(feynman_kac(chain, without).sample(None, 5_000, generator).log_z - log_z) > 0.2


def test_feynman_kac_needs_no_gradient(generator):
    """A reward of steps: Z = E e^{λ1[x > .5]} = (1 + e^λ)/2 on N(.5, .25)."""
    problem = gaussian()
    chain = exact_chain(problem, 5)
    cost = RewardCost(lambda x: (x[:, 0] > 0.5).to(x.dtype), 2.0)
    score, _ = z_score(feynman_kac(chain, cost), None, (1 + math.exp(2)) / 2, generator)
    assert abs(score) < 4
    with pytest.raises(TiltflowError, match="detached"):
        urge(chain, cost).sample(None, 10, generator)


def test_systematic_resampling_copies_in_proportion(generator):
    log_w = torch.randn(50, generator=generator)
    share = 50 * normalised(log_w)
    counts = torch.stack([torch.bincount(systematic(log_w, generator), minlength=50) for _ in range(2_000)])
    assert ((counts >= share.floor() - 1e-9) & (counts <= share.ceil() + 1e-9)).all()
    assert (counts.double().mean(0) - share).abs().max() < 4 * 0.5 / 2_000**0.5


def test_smc_misuse(generator):
    problem = gaussian()
    chain, cost = exact_chain(problem, 3), RewardCost(problem.reward)
    with pytest.raises(TiltflowError, match="threshold"):
        feynman_kac(chain, cost, threshold=1.5)

    def x1(x, t, shift):
        return problem.base.x1(x, t, problem.interpolant) + 0 * shift[:, None]

    conditional = memoryless_chain(Process(problem.interpolant, x1, "x1", (1,)), chain.t, torch.ones(3))
    cost = RewardCost(lambda x, shift: x[:, 0] + shift)
    with pytest.raises(TiltflowError, match="once per condition"):
        feynman_kac(conditional, cost).sample(None, 4, generator, shift=torch.arange(4.0))
    log_z = [urge(conditional, cost).sample(None, 4_000, generator, shift=torch.full((4_000,), s)).log_z for s in (0.0, 1.0)]
    assert log_z[1] - log_z[0] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("candidates", "unit_mean"), [(1, 0.0), (2, math.pi**-0.5), (3, 1.5 * math.pi**-0.5)])
def test_best_of_n_is_the_maximum_of_n(candidates, unit_mean, generator):
    problem = gaussian()
    chain, n = exact_chain(problem, 5), 20_000
    exact, bound = 0.5 + 0.5 * unit_mean, 4 * 0.5 / n**0.5
    x, log_w, log_z = BestOfN(chain, RewardCost(problem.reward), candidates).sample(None, n, generator)
    assert abs(float(x.mean()) - exact) < bound
    assert not log_w.any() and log_z is None
    if candidates > 1:
        worst = BestOfN(chain, RewardCost(lambda x: -problem.reward(x)), candidates).sample(None, n, generator).x
        assert abs(float(worst.mean()) - exact) > 10 * bound  # sign twin
        tilt_mean = 0.5 + 2 * 0.25  # and the strength plays no part: this is not the tilt
        assert abs(float(x.mean()) - tilt_mean) > 5 * bound
        spread = torch.distributions.Normal(0.5, 0.5).cdf(x)  # F(x)^N is uniform
        log_density = math.log(candidates) + (candidates - 1) * spread.log()
        kl = BestOfN(chain, RewardCost(problem.reward), candidates).kl
        assert abs(float(log_density.mean()) - kl) < 4 * float(log_density.std()) / n**0.5


def guided_moments(chain, scale, slope, quadratic, mean0, variance):
    """Mean and variance of the guided walk on N(mean0, variance) with r = slope·x − ½ quadratic·x²: all is linear."""
    m, c = 0.0, 1.0
    for k, t in enumerate(chain.t[:-1].tolist()):
        j = t * variance / (t**2 * variance + (1 - t) ** 2)  # X̂_1 = offset + j x
        offset = mean0 - j * t * mean0
        a, b, s2 = (float(v[k]) for v in (chain.a, chain.b, chain.std**2))
        step = a + b * j - scale * s2 * quadratic * j**2
        m = step * m + b * offset + scale * s2 * j * (slope - quadratic * offset)
        c = step**2 * c + s2
    return m, c


@pytest.mark.parametrize("quadratic", [0.0, 3.0])
def test_guidance_on_a_gaussian(quadratic, generator):
    """The sampler's moments are those of its linear recursion; twins: the sign, and the gradient at x_k instead of X̂_1."""
    problem = gaussian(1.0, quadratic)
    chain, n = exact_chain(problem, 10), 20_000
    m, c = guided_moments(chain, 1.0, 1.0, quadratic, 0.5, 0.25)
    bounds = 4 * (c / n) ** 0.5, 4 * c * (2 / n) ** 0.5
    x = GradientGuidance(chain, RewardCost(problem.reward)).sample(None, n, generator).x
    assert abs(float(x.mean()) - m) < bounds[0] and abs(float(x.var()) - c) < bounds[1]
    flipped = GradientGuidance(chain, RewardCost(lambda x: -problem.reward(x))).sample(None, n, generator).x
    assert abs(float(flipped.mean()) - m) > 5 * bounds[0]
    twice = GradientGuidance(chain, RewardCost(problem.reward), 2.0).sample(None, n, generator).x
    assert abs(float(twice.mean()) - m) > 5 * bounds[0] or abs(float(twice.var()) - c) > 5 * bounds[1]


def test_guidance_is_right_for_a_linear_reward_and_biased_for_a_quadratic_one():
    """Linear: variance exact for any K, mean to O(1/K). Quadratic: ∇V has a factor 1/(1 + qv_t) that ∇r(X̂_1) has not."""
    for steps in (10, 40, 160):
        m, c = guided_moments(exact_chain(gaussian(), steps), 1.0, 1.0, 0.0, 0.5, 0.25)
        assert abs(c - 0.25) < 1e-12
        assert abs(m - 0.75) < 1.0 / steps
    target = gaussian(1.0, 3.0).target
    m, c = guided_moments(exact_chain(gaussian(), 2_000), 1.0, 1.0, 3.0, 0.5, 0.25)
    assert (float(target.means), float(target.covariances)) == pytest.approx((3 / 7, 1 / 7))
    assert (m, c) == pytest.approx((0.412, 0.130), abs=1e-3)  # too strong: too narrow, for any number of steps


def test_guidance_on_top_of_a_control_and_over_a_noiseless_step(generator):
    problem = gaussian(1.0)
    chain, cost = exact_chain(problem, 40, noiseless_last=True), RewardCost(problem.reward)
    n = 5_000
    plain = sample(chain, Share(problem, 1.0), chain.source(n, generator), generator).x
    both = GradientGuidance(chain, cost).sample(Share(problem, 1.0), n, generator).x
    assert float(both.mean() - plain.mean()) == pytest.approx(0.25, abs=0.05)  # one tilt more
    with pytest.raises(TiltflowError, match="scale"):
        GradientGuidance(chain, cost, -1.0)
    with pytest.raises(TiltflowError, match="candidate"):
        BestOfN(chain, cost, 0)


def test_samplers_run_from_a_fine_tuned_model(generator):
    problem = gaussian()
    model = torch.nn.Module()
    model.forward = lambda x, t: problem.target.x1(x, t, problem.interpolant)
    control = FineTuned(Process(problem.interpolant, model, "x1", (1,)))
    chain, cost = exact_chain(problem, 20), RewardCost(problem.reward)
    for sampler in (feynman_kac(chain, cost), urge(chain, cost)):
        x, log_w, log_z = sampler.sample(control, 2_000, generator)
        assert log_z == pytest.approx(problem.log_z, abs=0.1)
        assert float((normalised(log_w)[:, None] * x).sum()) == pytest.approx(1.0, abs=0.06)
