"""Values, objectives, control errors and the control problems with known answers, against closed forms and grids."""

import sys
from dataclasses import replace

import pytest
import torch

from tiltflow.core.chain import memoryless_chain, uniform_grid
from tiltflow.core.control import FineTuned, tilted
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.value import objective, value
from tiltflow.nn.mlp import MLP
from tiltflow.problems.control import (
    DoubleWell,
    ExactControl,
    control_error,
    double_well,
    linear_quadratic,
    quartic,
    solve_backward,
)
from tiltflow.problems.tilt import GaussianMixture, QuadraticReward, TiltProblem


def gaussian(steps=8):
    """An isotropic base, on which the memoryless chain is exact for any number of steps, and a quadratic reward."""
    base = GaussianMixture.gaussian([0.5, -0.2], 0.4 * torch.eye(2))
    reward = QuadraticReward(torch.tensor([0.6, -0.3]), torch.tensor([[0.5, 0.2], [0.2, 0.8]]))
    problem, t = TiltProblem("gaussian", base, reward), uniform_grid(steps)
    exact = 0.4 * (1 - t[:-1]) ** 2 / (0.4 * t[:-1] ** 2 + (1 - t[:-1]) ** 2)
    return problem, memoryless_chain(problem.process(), t, exact)


def z_scores(estimate, exact):
    return ((estimate.value - exact) / estimate.error).abs()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("k", [0, 3, 7])
def test_value_of_a_tilt_is_the_closed_form(seed, k):
    generator = torch.Generator().manual_seed(seed)
    problem, chain = gaussian()
    x = torch.randn(4, 2, generator=generator)
    exact = problem.value(x, chain.t[k].expand(4))
    found = value(chain, RewardCost(problem.reward), x, k, 20_000, generator)
    assert float(z_scores(found, exact).max()) < 4.5 and float(found.error.max()) < 0.02
    flipped = value(chain, RewardCost(lambda y: -problem.reward(y)), x, k, 20_000, generator)
    assert float(z_scores(flipped, exact).max()) > 10  # the sign of the cost


def test_a_control_near_the_optimum_lowers_the_error_and_keeps_the_value(generator):
    problem, chain = gaussian(40)
    cost, x = RewardCost(problem.reward), torch.randn(3, 2, generator=generator)
    t = chain.t[20].expand(3)
    base = value(chain, cost, x, 20, 4_000, generator)
    guided = value(chain, cost, x, 20, 4_000, generator, control=ExactTilt(problem))
    assert float((guided.error / base.error).max()) < 0.3
    assert float(z_scores(guided, problem.value(x, t)).max()) < 4.5


class ExactTilt:
    """The closed-form X̂_1 of the tilt as a control."""

    def __init__(self, problem):
        self.module, self.process = torch.nn.Module(), problem.optimal()

    def mean(self, chain, k, x, base_mean=None):
        t = chain.t[k] if isinstance(k, torch.Tensor) else chain.t[k].expand(len(x))
        return chain.mean(k, x, self.process.x1(x, t))

    def ratios(self, chain):
        return None


def riccati_chain(problem, steps):
    """V_k = xᵀF_k x + c_k of the Euler chain itself: F_k = hP + Mᵀ F (I + 2s²F)⁻¹ M, c_k = c + ½ log det(I + 2s²F)."""
    exact, h = problem.exact, problem.exact.horizon / steps
    eye = torch.eye(len(exact.drift))
    m, f, c = eye + h * exact.drift, exact.terminal, torch.zeros(())
    for _ in range(steps):
        g = eye + 2 * exact.sigma**2 * h * f
        c = c + 0.5 * torch.logdet(g)
        f = h * exact.state_cost + m.T @ f @ torch.linalg.inv(g) @ m
    return lambda x: ((x @ f) * x).sum(1) + c


@pytest.mark.parametrize("hard", [False, True])
def test_linear_quadratic_value_with_running_cost(hard, generator):
    problem = linear_quadratic(2, hard)
    x = torch.tensor([[0.0, 0.0], [0.6, -0.3], [-0.5, 0.4]])
    chain = problem.chain(20)
    exact = riccati_chain(problem, 20)(x)
    found = value(chain, problem.cost, x, 0, 20_000, generator)
    assert float(z_scores(found, exact).max()) < 4.5
    dropped = value(chain, replace(problem.cost, running=None), x, 0, 20_000, generator)
    assert float(z_scores(dropped, exact).min()) > 10  # without f
    # and the chain's value tends to that of the diffusion at rate h
    gaps = [float((riccati_chain(problem, n)(x) - problem.value(x, 0.0)).abs().max()) for n in (100, 200, 400)]
    assert gaps[2] < 0.006 and gaps[0] / gaps[1] == pytest.approx(2, abs=0.1) == gaps[1] / gaps[2]


@pytest.mark.parametrize("seed", [0, 1])
def test_objective_is_the_value_plus_kl(seed):
    """J(0) = E[f + g] in closed form; J(u*) is E V(x_0) up to the step, with far less noise; any other control has more."""
    generator = torch.Generator().manual_seed(seed)
    problem = linear_quadratic(2, hard=True)
    chain, n = problem.chain(100), 10_000
    best = objective(chain, ExactControl(problem.control), problem.cost, n, generator)
    start = 0.5 * torch.randn(200_000, 2, generator=generator)
    assert best.value == pytest.approx(float(problem.value(start, 0.0).mean()), abs=4 * best.error + 0.03)
    assert best.value == pytest.approx(best.energy + best.running + best.terminal, abs=0.1)
    none = objective(chain, None, problem.cost, n, generator)
    variance, total, h = 0.25, 0.0, 0.01
    for _ in range(100):
        total += h * 2 * variance
        variance = (1 + h) ** 2 * variance + h
    assert none.energy == 0 and none.value == pytest.approx(total + variance, abs=4 * none.error)
    weak = objective(chain, ExactControl(lambda x, t: 0.5 * problem.control(x, t)), problem.cost, n, generator)
    wrong = objective(chain, ExactControl(lambda x, t: -problem.control(x, t)), problem.cost, n, generator)
    assert best.value + 0.05 < weak.value < none.value < wrong.value
    assert best.error < 0.3 * none.error


def test_control_error_of_multiples_of_the_optimum(generator):
    """On optimal paths the error of c·u* is (1 − c)², path by path."""
    problem = linear_quadratic(3)
    chain = problem.chain(40)
    for c, expected in ((1.0, 0.0), (0.5, 0.25), (-1.0, 4.0)):
        multiple = ExactControl(lambda x, t, c=c: c * problem.control(x, t))
        found = control_error(chain, multiple, problem.control, 500, generator)
        assert found.optimal == pytest.approx(expected, abs=1e-12) and found.optimal_error < 1e-10
        assert (found.own < 1e-12) == (c == 1)
    none = control_error(chain, None, problem.control, 4_000, generator)
    assert none.optimal == pytest.approx(1) and none.own > 1 + 4 * none.own_error  # uncontrolled paths stray further out


def transfer(kappa, nu, steps, bound=2.6, points=1301):
    """V_0 of the Euler chain by quadrature with its own kernel."""
    x, h = torch.linspace(-bound, bound, points), 1 / steps
    kernel = torch.exp(-0.5 * (x[None] - (x - 4 * h * kappa * x * (x**2 - 1))[:, None].clamp(-bound, bound)) ** 2 / h)
    kernel = kernel / kernel.sum(1, keepdim=True)
    phi = torch.exp(-quartic(nu, x))
    for _ in range(steps):
        phi = kernel @ phi
    return x, -phi.log()


@pytest.mark.parametrize("kappa, nu", [(1.0, 1.0), (5.0, 3.0)])
def test_double_well_grid_is_the_limit_of_the_chain(kappa, nu):
    problem = DoubleWell(torch.tensor([kappa]), torch.tensor([nu]))
    values = {}
    for steps in (200, 400):
        x, v = transfer(kappa, nu, steps)
        inside = x.abs() < 1.8
        values[steps] = v[inside]
    limit = 2 * values[400] - values[200]  # Richardson
    exact = problem.value(x[inside][:, None], 0.0)
    assert float((limit - exact).abs().max()) < 2e-3 < 0.05 * float(exact.max())
    # u* = −V', symmetric wells, and the end condition
    e, y = 1e-3, torch.linspace(-1.5, 1.5, 13)[:, None]
    slope = (problem.value(y + e, 0.8) - problem.value(y - e, 0.8)) / (2 * e)
    assert float((problem.control(y, 0.8)[:, 0] + slope).abs().max()) < 0.01
    assert torch.allclose(problem.control(y, 0.8), -problem.control(-y, 0.8), atol=1e-8)
    assert torch.allclose(problem.value(y, 1.0), problem.cost.value(y), atol=1e-3)


def test_double_well_value_by_base_paths_and_the_sign_of_the_drift(generator):
    problem = DoubleWell(torch.ones(2), torch.ones(2))
    x = torch.tensor([[0.0, 0.0], [1.0, -0.4], [1.6, 0.2]])
    for k, t in ((0, 0.0), (150, 0.75)):
        found = value(problem.chain(200), problem.cost, x, k, 10_000, generator)
        exact = problem.value(x, t)
        bound = 4.5 * found.error + 0.01  # the chain's own V is up to .004 per dimension off at 200 steps
        assert bool(((found.value - exact).abs() < bound).all()) and float(bound.max()) < 0.06
        flipped = solve_backward(lambda y: -quartic(1.0, y), lambda y: quartic(1.0, y))
        wrong = sum(flipped.at(flipped.value, x[:, i], t) for i in range(2))
        assert bool(((found.value - wrong).abs() > 3 * bound).any())


def test_double_well_control_is_optimal(generator):
    """In ten dimensions J(u*) is the chain's V(0) up to O(h), with little noise; u = 0 and the flipped sign are worse."""
    problem, n = double_well(), 2_000
    chain = problem.chain(200)
    exact = sum(many * float(transfer(kappa, nu, 200)[1][650]) for many, kappa, nu in ((3, 5.0, 3.0), (7, 1.0, 1.0)))
    best = objective(chain, ExactControl(problem.control), problem.cost, n, generator)
    none = objective(chain, None, problem.cost, n, generator)
    flipped = objective(chain, ExactControl(lambda x, t: -problem.control(x, t)), problem.cost, n, generator)
    bound = 0.03 + 4 * best.error  # at 200 steps the diffusion's u* is .025 above the chain's own optimum, at 400 .014
    assert exact - 4 * best.error < best.value < exact + bound
    assert best.error < 0.4 * none.error
    assert none.value > exact + 4 * bound and flipped.value > none.value + 0.5


def test_problems_speak_one_interface(generator):
    for problem in (linear_quadratic(4), double_well(4)):
        chain = problem.chain(60)
        x = chain.source(5, generator)
        assert x.shape == problem.control(x, 0.5).shape == (5, 4)
        assert problem.value(x, 0.5).shape == problem.cost.value(x).shape == (5,)
        control, k = ExactControl(problem.control), torch.tensor([3, 7, 3, 59, 0])
        rows = torch.cat([control.mean(chain, int(j), x[i : i + 1]) for i, j in enumerate(k)])
        assert torch.allclose(control.mean(chain, k, x), rows)


def test_misuse(generator, monkeypatch):
    problem, chain = gaussian()
    with pytest.raises(TiltflowError, match=r"0…8"):
        value(chain, RewardCost(problem.reward), torch.zeros(1, 2), 9, 10, generator)
    with pytest.raises(TiltflowError, match="one length"):
        DoubleWell(torch.ones(2), torch.ones(3))
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    with pytest.raises(TiltflowError, match=r"tiltflow\[report\]"):
        double_well(1).value(torch.zeros(1, 1), 0.0)


def test_conditions_are_repeated_for_every_path(generator):
    problem, chain = gaussian()
    x, strength = torch.zeros(3, 2), torch.tensor([0.0, 0.5, 1.0])

    class Conditional:
        """The same chain, which takes and ignores the condition."""

        t, std, geometry = chain.t, chain.std, chain.geometry

        def base_mean(self, k, x, strength):
            assert strength.shape == x.shape[:1]
            return chain.base_mean(k, x)

    cost = RewardCost(lambda y, strength: strength * problem.reward(y))
    found = value(Conditional(), cost, x, 2, 5_000, generator, strength=strength)
    assert float(found.value[0]) == 0 and float(found.error[0]) < 1e-7
    assert abs(float(found.value[2] - problem.value(x[:1], chain.t[2:3]))) < 4.5 * float(found.error[2])


def test_untrained_fine_tuning_has_the_value_of_the_base(generator):
    problem, chain = gaussian()
    cost = RewardCost(problem.reward)
    j = objective(chain, FineTuned(tilted(problem.process(), MLP(4, 2, 8, 2))), cost, 2_000, generator)
    assert j.energy < 1e-20 and j.value == pytest.approx(j.terminal)
