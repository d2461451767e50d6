"""The memoryless chain and its rivals: marginals at every t, path weights of both kinds, the ODE."""

from dataclasses import replace

import pytest
import torch

from tiltflow.core.chain import (
    euler_maruyama,
    memoryless_chain,
    power_grid,
    residual_variance,
    times,
    uniform_grid,
)
from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import VP, Cosine, Follmer, Linear
from tiltflow.core.noise import Constant, Memoryless, zero
from tiltflow.core.ode import ode
from tiltflow.core.process import Process
from tiltflow.core.simulate import sample, simulate
from tiltflow.core.weights import ess, evidence, log_mean_exp
from tiltflow.problems.tilt import GaussianMixture, QuadraticReward, TiltProblem, mixture2d

LINEAR = Linear()


def gaussian(variance, path=LINEAR, mean=1.0):
    v = torch.as_tensor(variance)
    base = GaussianMixture.gaussian(torch.full((len(v),), mean), torch.diag(v))
    return TiltProblem("gaussian", base, QuadraticReward.of_direction(torch.full((len(v),), 0.3)), path)


def exact_residual_variance(variance, path, t):
    """Var(X_1|X_s) = cβ²/(α²c + β²) for N(·, c), per coordinate (K, d)."""
    a2, b2 = path.alpha(t[:-1])[:, None] ** 2, path.beta(t[:-1])[:, None] ** 2
    return variance * b2 / (a2 * variance + b2)


def marginals(chain, mean0, variance0):
    """Exact mean and variance of every x_k of a chain over a diagonal Gaussian base, by its affine recursion."""
    d = len(mean0)
    m, v, out = mean0, variance0, [(mean0, variance0)]
    for k in range(len(chain.std)):
        zero_row = torch.zeros(1, d)
        offset = chain.base_mean(k, zero_row)[0]
        slope = torch.diagonal(chain.base_mean(k, torch.eye(d)) - offset)
        m, v = slope * m + offset, slope**2 * v + chain.std[k] ** 2
        out.append((m, v))
    return out


def worst_marginal_error(problem, chain):
    """Largest relative error of a marginal standard deviation over all t_k, and of the mean in units of it."""
    d = len(problem.base.means[0])
    path, variance = problem.interpolant, torch.diagonal(problem.base.covariances[0])
    follmer = float(path.beta(torch.zeros(()))) == 0.0
    worst = 0.0
    start = torch.zeros(d) if follmer else torch.ones(d)
    for k, (m, v) in enumerate(marginals(chain, torch.zeros(d), start)):
        t = chain.t[k]
        exact = path.alpha(t) ** 2 * variance + path.beta(t) ** 2
        if float(exact.min()) == 0.0:
            continue
        error_std = ((v / exact).sqrt() - 1).abs().max()
        error_mean = ((m - path.alpha(t) * problem.base.means[0]) / exact.sqrt()).abs().max()
        worst = max(worst, float(error_std), float(error_mean))
    return worst


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 40])
@pytest.mark.parametrize("path", [Linear(), Cosine(), Follmer(2.0), Follmer(1.5, 10.0)], ids=repr)
def test_chain_is_exact_at_every_t_on_isotropic_gaussians(path, steps):
    problem, t = gaussian([0.25, 0.25], path), power_grid(steps, 1.3, 1.1)
    v = exact_residual_variance(torch.tensor([0.25]), path, t)[:, 0] if steps else None
    if isinstance(path, Follmer):
        v = torch.where(t[:-1] == 0, torch.tensor(0.25), torch.nan_to_num(v))
    chain = memoryless_chain(problem.process(), t, v)
    assert worst_marginal_error(problem, chain) < (2e-6 if isinstance(path, Follmer) else 1e-12)


def test_per_coordinate_variance_is_exact_on_anisotropic_gaussians_and_the_scalar_is_not():
    variance = torch.tensor([0.04, 1.0])
    problem, t = gaussian(variance), uniform_grid(10)
    v = exact_residual_variance(variance, Linear(), t)
    assert worst_marginal_error(problem, memoryless_chain(problem.process(), t, v)) < 1e-12
    scalar = worst_marginal_error(problem, memoryless_chain(problem.process(), t, v.mean(1)))
    assert 0.1 < scalar < 0.25


def test_vp_chain_keeps_only_the_residual_of_its_start():
    problem, t = gaussian([0.25], VP()), uniform_grid(40)
    v = exact_residual_variance(torch.tensor([0.25]), VP(), t)
    assert worst_marginal_error(problem, memoryless_chain(problem.process(), t, v)) < 0.01  # α_0 = .0066


def test_known_bad_chains_fail_the_marginal_check():
    problem, t = gaussian([0.25]), uniform_grid(10)
    v = exact_residual_variance(torch.tensor([0.25]), Linear(), t)
    good = memoryless_chain(problem.process(), t, v)
    assert worst_marginal_error(problem, good) < 1e-12
    dropped = replace(good, std=(good.std**2 - good.b**2 * v).sqrt())  # without the variance term
    assert worst_marginal_error(problem, dropped) > 0.2
    em = euler_maruyama(problem.process(), t, Memoryless(Linear(), offset=0.1))
    half = replace(em, std=em.std / 2**0.5)  # the memoryless factor 2 of σ² = 2η dropped from the noise
    assert worst_marginal_error(problem, half) > 0.2


@pytest.mark.parametrize("sigma", [zero, Constant(0.2), Constant(1.0)])
def test_euler_maruyama_converges_to_the_marginals_at_first_order(sigma):
    problem = gaussian([0.25])
    errors = [
        worst_marginal_error(problem, euler_maruyama(problem.process(), uniform_grid(steps), sigma))
        for steps in (100, 200, 400)
    ]
    assert 1.6 < errors[0] / errors[1] < 2.5 and 1.6 < errors[1] / errors[2] < 2.5
    assert errors[2] < 0.05


def test_offset_noise_is_right_at_the_end_only():
    """Why the chain exists: the paper's discretisation ends well, but its early marginals are 40 % too wide."""
    problem, steps = gaussian([0.25]), 40
    em = euler_maruyama(problem.process(), uniform_grid(steps), Memoryless(Linear(), offset=1 / steps))
    end = marginals(em, torch.zeros(1), torch.ones(1))[-1][1].sqrt()
    assert float(end) == pytest.approx(0.5, rel=0.01)
    assert worst_marginal_error(problem, em) > 0.3


def test_infinite_noise_is_refused_with_the_way_out():
    with pytest.raises(TiltflowError, match="offset"):
        euler_maruyama(gaussian([0.25]).process(), uniform_grid(10), Memoryless(Linear()))


def test_residual_variance_estimate(generator):
    variance, t = torch.tensor([0.04, 1.0]), uniform_grid(8)
    problem = gaussian(variance)
    x1 = problem.base.sample(40_000, generator)
    v = residual_variance(problem.process(), t, x1, generator, per_coordinate=True)
    assert torch.allclose(v, exact_residual_variance(variance, Linear(), t), rtol=0.05)
    scalar = residual_variance(problem.process(), t, x1, generator)
    assert torch.allclose(scalar, v.mean(1), rtol=0.05)


class Optimal:
    """The exact control of a tilt problem."""

    module = None

    def __init__(self, problem):
        self.process = problem.optimal()

    def mean(self, chain, k, x, base_mean=None, **condition):
        return chain.mean(k, x, self.process.x1(x, times(chain, k, x)))

    def ratios(self, chain):
        return None


@pytest.fixture(scope="module")
def mixture_runs():
    torch.set_default_dtype(torch.float64)
    problem = mixture2d()
    generator = torch.Generator().manual_seed(3)
    t = uniform_grid(20)
    v = residual_variance(problem.process(), t, problem.base.sample(5_000, generator), generator)
    chain = memoryless_chain(problem.process(), t, v)
    n = 20_000
    base = sample(chain, None, chain.source(n, generator), generator)
    optimal = sample(chain, Optimal(problem), chain.source(n, generator), generator)
    return problem, chain, base, optimal


def test_path_weights_give_log_z(mixture_runs):
    problem, _, base, optimal = mixture_runs
    for runs in (base, optimal):  # unbiased for any control: the base's own paths and the optimal ones
        kernel = evidence(problem.log_target(runs.x) + runs.log_kernel_ratio)
        assert abs(kernel.log_z - problem.log_z) < 4 * kernel.log_z_error + 0.003
        assert kernel.elbo < problem.log_z
    assert ess(problem.reward(optimal.x) + optimal.log_ratio) > 0.9
    assert base.kl.max() == 0 and base.log_ratio.abs().max() == 0
    flipped = log_mean_exp(problem.reward(optimal.x) - optimal.log_ratio)  # the known-bad twin: ratio upside down
    assert abs(flipped - problem.log_z) > 0.1


def test_chain_weights_agree_between_base_and_optimal_paths(mixture_runs):
    problem, _, base, optimal = mixture_runs
    from_base = evidence(problem.reward(base.x) + base.log_ratio)
    from_optimal = evidence(problem.reward(optimal.x) + optimal.log_ratio)
    error = (from_base.log_z_error**2 + from_optimal.log_z_error**2) ** 0.5
    assert abs(from_base.log_z - from_optimal.log_z) < 4 * error  # both target the chain's own law


def test_girsanov_kl_has_its_sign(mixture_runs):
    problem, _, _, optimal = mixture_runs
    reward = problem.target.weights @ (problem.target.means @ problem.reward.linear)
    exact = float(reward) - problem.log_z  # KL(p* ‖ p_base) = .270; the chain's is larger by O(1/K)
    assert float(optimal.kl.mean()) == pytest.approx(exact, abs=0.07)


@pytest.mark.parametrize("method,steps,tolerance", [("euler", 200, 0.02), ("heun", 40, 0.02), ("dopri5", 40, 0.02)])
def test_ode_reaches_the_data(method, steps, tolerance, generator):
    problem = gaussian([0.04, 1.0])
    x = ode(problem.process(), problem.process().source(20_000, generator, torch.float64), steps, method)
    assert torch.allclose(x.mean(0), torch.ones(2), atol=0.03)
    assert torch.allclose(x.std(0), torch.tensor([0.2, 1.0]), rtol=tolerance)


def test_ode_orders(generator):
    problem = gaussian([0.25])
    x0 = torch.tensor([[1.5]])
    exact = 1 + 0.5 * x0  # the flow map of a Gaussian is affine: mean + std·x_0
    for method, order in (("euler", 1), ("heun", 2)):
        # compare before the last step, which is Euler's by construction
        errors = [float((ode(problem.process(), x0, k, method) - exact).abs()) for k in (20, 40, 80)]
        assert errors[1] / errors[2] > 2**order * 0.8


def test_ode_misuse():
    problem = gaussian([0.25])
    with pytest.raises(TiltflowError, match="unknown ODE method 'rk99'"):
        ode(problem.process(), torch.zeros(1, 1), method="rk99")


def test_grid_and_variance_misuse():
    process = gaussian([0.25]).process()
    with pytest.raises(TiltflowError, match="rise strictly"):
        memoryless_chain(process, torch.tensor([0.0, 0.5, 0.5, 1.0]), torch.ones(3))
    with pytest.raises(TiltflowError, match="residual_variance"):
        memoryless_chain(process, uniform_grid(3), torch.ones(4))
    em = euler_maruyama(process, uniform_grid(4), Constant(1.0))
    with pytest.raises(TiltflowError, match="noising kernel"):
        _ = em.noising_kernel


def test_simulate_returns_every_state(generator):
    problem = gaussian([0.25])
    chain = memoryless_chain(problem.process(), uniform_grid(5), torch.full((5,), 0.1))
    path = simulate(chain, None, chain.source(7, generator), generator)
    assert path.x.shape == (6, 7, 1) and path.mean.shape == (5, 7, 1)


@pytest.mark.parametrize("path", [LINEAR, Cosine(), VP(), Follmer(1.3, 4.0)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("per_coordinate", [False, True])
def test_the_mean_in_terms_of_the_velocity_is_that_of_its_end_point(path, per_coordinate, generator):
    velocity, t = Process(path, lambda x, t: torch.sin(x) + t[:, None], "velocity", (2,)), power_grid(6, 2.0)
    spread = torch.linspace(0.1, 0.4, 12).reshape(6, 2)
    chain = memoryless_chain(velocity, t, spread if per_coordinate else spread.mean(1))
    x = torch.randn(6, 2, generator=generator)
    for k in (0, 3, 5, torch.arange(6)):
        exact = chain.mean(k, x, velocity.x1(x, times(chain, k, x)))
        assert torch.allclose(chain.base_mean(k, x), exact, rtol=1e-12, atol=1e-12)
        single = chain.base_mean(k, x.float())
        assert single.dtype == torch.float32 and torch.allclose(single, exact.float(), rtol=1e-4, atol=1e-5)
    drawn = simulate(chain, None, x.float(), generator)
    assert drawn.x.dtype == torch.float32 == drawn.mean.dtype
