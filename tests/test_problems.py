"""The closed forms themselves, against autograd, quadrature, simulation and finite differences."""

import pytest
import torch

from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import VP, Cosine, Linear
from tiltflow.problems.tilt import (
    TILT_PROBLEMS,
    GaussianMixture,
    LinearQuadratic,
    QuadraticReward,
    TiltProblem,
    mixture2d,
    mixture2d_rare,
)

PROBLEMS = [make() for make in TILT_PROBLEMS.values()]


def ids(problem):
    return problem.name


@pytest.mark.parametrize("problem", PROBLEMS, ids=ids)
def test_target_is_base_times_exp_reward(problem, generator):
    x = problem.base.sample(100, generator)
    assert torch.allclose(problem.target.log_prob(x), problem.log_target(x) - problem.log_z, atol=1e-8)


@pytest.mark.parametrize("problem", PROBLEMS, ids=ids)
def test_log_z_by_importance_sampling(problem, generator):
    r = problem.reward(problem.base.sample(200_000, generator))
    z, error = r.exp().mean(), r.exp().std() / 200_000**0.5
    assert abs(float(z) - torch.tensor(problem.log_z).exp()) < 4 * error


def test_published_figures():
    assert mixture2d().log_z == pytest.approx(0.0055, abs=5e-5)
    assert torch.allclose(mixture2d().target.weights, torch.tensor([0.227, 0.271, 0.502]), atol=6e-4)
    assert mixture2d_rare().log_z == pytest.approx(1.120, abs=5e-4)
    assert torch.allclose(mixture2d_rare().target.weights, torch.tensor([0.859, 0.130, 0.011]), atol=6e-4)


@pytest.mark.parametrize("path", [Linear(), Cosine(), VP()], ids=repr)
def test_score_denoiser_value_and_control(path, generator):
    problem = TiltProblem("p", mixture2d().base, QuadraticReward.of_direction([-0.4, -0.3]), path)
    x = torch.randn(50, 2, generator=generator, requires_grad=True)
    t = torch.linspace(0.1, 0.9, 50)
    (score,) = torch.autograd.grad(problem.base.log_prob(x, t, path).sum(), x)
    assert torch.allclose(problem.base.score(x, t, path), score, atol=1e-9)
    assert torch.allclose(problem.process().score(x, t), score, atol=1e-8)  # Tweedie: X̂_1 agrees with the score
    (dv,) = torch.autograd.grad(problem.value(x, t).sum(), x)
    sigma = (2 * path.eta(t)).sqrt()[:, None]
    assert torch.allclose(problem.control(x, t), -sigma * dv, atol=1e-8)
    difference = problem.optimal().velocity(x, t) - problem.process().velocity(x, t)
    assert torch.allclose(problem.control(x, t), (2 / sigma) * difference, atol=1e-7)  # u = (2/σ)(v* − v)


def test_value_is_the_conditional_expectation(generator):
    """V(x, t) = −log E[e^{r(X_1)} | X_t = x] by rejection-free importance sampling over X_1 ~ p_base."""
    problem = mixture2d()
    x, t = torch.tensor([[0.4, 0.1]]), torch.tensor([0.4])
    x1 = problem.base.sample(400_000, generator)
    log_kernel = -0.5 * ((x - 0.4 * x1) ** 2).sum(1) / 0.6**2
    w = torch.softmax(log_kernel, 0)
    estimate = -torch.log((w * problem.reward(x1).exp()).sum())
    assert float(problem.value(x, t)) == pytest.approx(float(estimate), abs=0.01)


def test_anisotropic_gaussian_with_quadratic_reward():
    base = GaussianMixture.gaussian([1.0, -1.0], [[0.5, 0.2], [0.2, 1.0]])
    reward = QuadraticReward(torch.tensor([0.3, -0.2]), torch.tensor([[1.0, 0.1], [0.1, 0.5]]))
    target, log_z = reward.tilt(base)
    precision = torch.linalg.inv(base.covariances[0]) + reward.quadratic
    assert torch.allclose(torch.linalg.inv(target.covariances[0]), precision)
    grid = torch.linspace(-8, 8, 801)
    x = torch.cartesian_prod(grid, grid)
    z = ((base.log_prob(x) + reward(x)).exp().sum() * (grid[1] - grid[0]) ** 2).log()
    assert log_z == pytest.approx(float(z), abs=1e-6)


def test_inverse_problem_posterior_by_kalman():
    h, o, std = torch.tensor([[1.0, 0.5]]), torch.tensor([0.7]), 0.5
    prior = GaussianMixture.gaussian([0.2, -0.1], [[1.0, 0.3], [0.3, 0.8]])
    posterior, log_z = QuadraticReward.log_likelihood(h, o, std).tilt(prior)
    m, c = prior.means[0], prior.covariances[0]
    s = h @ c @ h.T + std**2
    gain = c @ h.T @ torch.linalg.inv(s)
    assert torch.allclose(posterior.means[0], m + gain @ (o - h @ m))
    assert torch.allclose(posterior.covariances[0], c - gain @ h @ c)
    evidence = torch.distributions.MultivariateNormal(h @ m, s).log_prob(o)
    assert log_z == pytest.approx(float(evidence))


def test_reward_that_outgrows_the_base_is_refused():
    with pytest.raises(TiltflowError, match="not normalisable"):
        QuadraticReward(torch.zeros(1), -2 * torch.eye(1)).tilt(GaussianMixture.gaussian([0.0], [[1.0]]))


def lq() -> LinearQuadratic:
    drift = torch.tensor([[0.2, 0.5], [-0.3, 0.1]])
    return LinearQuadratic(drift, 0.3 * torch.eye(2), torch.diag(torch.tensor([0.5, 1.0])), sigma=0.7)


def test_riccati_solves_the_hjb_equation():
    problem, t, e = lq(), 0.37, 1e-5
    f = problem.riccati(t)
    derivative = (problem.riccati(t + e) - problem.riccati(t - e)) / (2 * e)
    a = problem.drift
    residual = derivative + a.T @ f + f @ a - 2 * problem.sigma**2 * f @ f + problem.state_cost
    assert residual.abs().max() < 1e-7
    assert torch.allclose(problem.riccati(1.0), problem.terminal)
    wrong = derivative + a.T @ f + f @ a - 2 * problem.sigma**2 * f @ f - problem.state_cost  # f with the wrong sign
    assert wrong.abs().max() > 0.1


def test_value_is_the_cost_of_the_optimal_control(generator):
    problem, steps, n = lq(), 200, 20_000
    h = 1 / steps
    x = x0 = torch.randn(n, 2, generator=generator)
    cost = torch.zeros(n)
    for k in range(steps):
        u = problem.control(x, k * h)
        cost += h * (0.5 * (u**2).sum(1) + ((x @ problem.state_cost) * x).sum(1))
        noise = torch.randn(n, 2, generator=generator)
        x = x + h * (x @ problem.drift.T + problem.sigma * u) + problem.sigma * h**0.5 * noise
    cost += ((x @ problem.terminal) * x).sum(1)
    difference = cost - problem.value(x0, 0.0)
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / n**0.5 + 0.01
