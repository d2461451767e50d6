"""SOCM: the target's weighted mean is u* for any matrices, the lean adjoint is one choice, and learned ones help."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tiltflow.core.adjoint import lean_adjoint
from tiltflow.core.chain import DriftChain, memoryless_chain, residual_variance, uniform_grid
from tiltflow.core.control import NetworkControl
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Euclidean
from tiltflow.core.noise import Constant
from tiltflow.core.simulate import Path
from tiltflow.core.value import weighted_paths
from tiltflow.core.weights import ess, normalised
from tiltflow.methods.socm import SOCM, LearnedMatrices, reparametrised, stein_terms
from tiltflow.nn.mlp import MLP
from tiltflow.problems.control import DoubleWell, ExactControl, LinearQuadraticProblem, control_error
from tiltflow.problems.tilt import LinearQuadratic, mixture2d
from tiltflow.train.fit import fit
from tiltflow.train.method import State
from tiltflow.train.settings import Training


def problem():
    """A rotation with state and end costs: u* is linear in x."""
    drift, q = torch.tensor([[0.3, 0.8], [-0.6, 0.1]]), torch.diag(torch.tensor([0.5, 0.9]))
    return LinearQuadraticProblem(LinearQuadratic(drift, 0.4 * torch.eye(2), q, sigma=1.0), 0.5)


def chain_optimum(steps):
    """Matrices U_k (K, 2, 2) of the chain's own optimum u_k* = U_k x = ((I + 2s²F_{k+1})⁻¹ − I) M x / s."""
    exact, h, eye = problem().exact, 1 / steps, torch.eye(2)
    m, f, out = eye + h * exact.drift, exact.terminal, []
    for _ in range(steps):
        shrink = torch.linalg.inv(eye + 2 * h * f)
        out.append((shrink - eye) @ m / h**0.5)
        f = h * exact.state_cost + m.T @ f @ shrink @ m
    return torch.stack(out[::-1])


def arbitrary(steps, seed):
    """Random matrices of order one with the identity at [k, k]."""
    generator = torch.Generator().manual_seed(seed)
    matrices = 0.7 * torch.randn(steps, steps, 2, 2, generator=generator) + 0.5 * torch.eye(2)
    matrices[torch.arange(steps), torch.arange(steps)] = torch.eye(2)
    return matrices


def worst(matrices, weight, paths, terms, chain):
    """Largest z-score and standard error of Σ w (−s_k a_k − u_k*) ⊗ (1, x_k) over steps and entries."""
    u = torch.einsum("kde,kbe->kbd", chain_optimum(len(chain.std)), paths.x[:-1])
    a = reparametrised(*(v.transpose(0, 1) for v in terms), matrices).transpose(0, 1)
    gap = -chain.std[:, None, None] * a - u
    features = torch.cat([torch.ones_like(paths.x[:-1, :, :1]), paths.x[:-1]], 2)
    items = torch.einsum("kbd,kbf->kbdf", gap, features)
    w = weight[:, None, None]
    error = (w**2 * items**2).sum(1).sqrt()
    return float(((w * items).sum(1) / error).abs().max()), float(error.max())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("policy", ["base", "half of u*"])
def test_the_weighted_target_has_mean_u_star_for_any_matrices(seed, policy):
    """E*[(−s_k a_k − u_k*) ⊗ (1, x_k)] = 0 in all 48 entries; without weights, or with N_k(k+1) ≠ I, it is not."""
    generator = torch.Generator().manual_seed(seed)
    lq, n = problem(), 40_000
    chain = lq.chain(8)
    control = None if policy == "base" else ExactControl(lambda x, t: 0.5 * lq.control(x, t))
    paths = weighted_paths(chain, control, lq.cost, chain.source(n, generator), generator)
    assert ess(paths.log_weight) > 0.3
    terms = stein_terms(chain, paths, lq.cost)
    weight, even = normalised(paths.log_weight), torch.full((n,), 1 / n)
    for matrices in (arbitrary(8, seed), arbitrary(8, 100 + seed), torch.eye(2).expand(8, 8, 2, 2)):
        z, error = worst(matrices, weight, paths, terms, chain)
        assert z < 4.8 and error < 0.06
        assert worst(matrices, even, paths, terms, chain)[0] > 10
        stretched = matrices.clone()
        stretched[torch.arange(8), torch.arange(8)] = 1.3 * torch.eye(2)
        assert worst(stretched, weight, paths, terms, chain)[0] > 10
    dropped = stein_terms(chain, paths, RewardCost(lq.cost.reward))
    assert worst(torch.eye(2).expand(8, 8, 2, 2), weight, paths, dropped, chain)[0] > 10  # ∇f left out


def test_products_of_base_jacobians_give_the_lean_adjoint(generator):
    """On a nonlinear base, path by path with the path's own Jacobians, running cost included; other matrices do not."""
    tilt, steps = mixture2d(), 7
    t = uniform_grid(steps)
    x1 = tilt.base.sample(2_000, generator)
    chain = memoryless_chain(tilt.process(), t, residual_variance(tilt.process(), t, x1, generator))
    cost = RewardCost(lambda x: x.sin().sum(1), 1.3, running=lambda x, t: (1 + t) * x.square().sum(1).sin())
    for _ in range(3):
        paths = weighted_paths(chain, None, cost, chain.source(1, generator), generator)
        jacobian = torch.autograd.functional.jacobian
        jacobians = [jacobian(lambda x, k=k: chain.base_mean(k, x[None])[0], paths.x[k, 0]) for k in range(steps)]
        matrices = torch.zeros(steps, steps, 2, 2)
        for k in range(steps):
            matrices[k, k] = torch.eye(2)
            for j in range(k + 1, steps):
                matrices[k, j] = jacobians[j] @ matrices[k, j - 1]
        c, y = (v.transpose(0, 1) for v in stein_terms(chain, paths, cost))
        a = lean_adjoint(chain, Path(paths.x, paths.base_mean), cost).a[1:, 0]
        scale = 1 + float(y.abs().max()) * float(matrices.abs().max())
        assert float((reparametrised(c, y, matrices)[0] - a).abs().max()) < 1e-10 * scale
        assert float((reparametrised(c, y, 0.9 * matrices)[0] - a).abs().max()) > 1e-2


def test_a_noiseless_last_step_belongs_to_the_terminal_cost(generator):
    """g(mean(x_{K−1})) on the shortened chain has the same terms."""
    tilt, steps = mixture2d(), 6
    t = uniform_grid(steps)
    x1 = tilt.base.sample(2_000, generator)
    chain = memoryless_chain(tilt.process(), t, residual_variance(tilt.process(), t, x1, generator), noiseless_last=True)
    cost = RewardCost(lambda x: x.sin().sum(1))
    paths = weighted_paths(chain, None, cost, chain.source(5, generator), generator)
    short = replace(chain, t=chain.t[:-1], a=chain.a[:-1], b=chain.b[:-1], std=chain.std[:-1])
    pulled = RewardCost(lambda x: chain.base_mean(steps - 1, x).sin().sum(1))
    cut = paths._replace(x=paths.x[:-1], base_mean=paths.base_mean[:-1])
    for a, b in zip(stein_terms(chain, paths, cost), stein_terms(short, cut, pulled)):
        assert a.shape == (steps - 1, 5, 2) and torch.allclose(a, b)
    control = NetworkControl(MLP(2, 2, 8, 2))
    method = SOCM(chain, cost, LearnedMatrices(2), batch=6)
    assert torch.isfinite(method.loss(control, method.collect(State(control, generator)).material, generator))


def test_learned_matrices_lower_the_loss_at_the_optimum(generator):
    """With u = u* the loss is target noise alone: training N cuts it, and the mean stays u*."""
    lq, steps = problem(), 10
    chain, optimum = lq.chain(steps), chain_optimum(steps)

    class Optimal(nn.Module):
        def forward(self, x, t):  # u_k / s_k
            return steps**0.5 * torch.einsum("bde,be->bd", optimum[(t * steps).round().long()], x)

    control, matrices = NetworkControl(Optimal()), LearnedMatrices(2)
    method = SOCM(chain, lq.cost, matrices, batch=2_000)
    test = method.collect(State(control, generator)).material
    before = float(method.loss(control, test, generator).detach())
    optimiser = torch.optim.Adam(matrices.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        material = method.collect(State(control, generator)).material
        method.loss(control, {name: v[:256] for name, v in material.items()}, generator).backward()
        optimiser.step()
    after = float(method.loss(control, test, generator).detach())
    assert after < 0.6 * before
    paths = weighted_paths(chain, control, lq.cost, chain.source(20_000, generator), generator)
    learned = matrices(chain.t).detach()
    z, _ = worst(learned, normalised(paths.log_weight), paths, stein_terms(chain, paths, lq.cost), chain)
    assert z < 4.8


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_training_reaches_the_optimal_control(seed):
    """The control error falls from 1 to less than .02 (measured .003); rewarded for the distance instead, it grows."""
    errors = {}
    for sign in (1.0, -1.0) if seed == 0 else (1.0,):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        lq, steps = problem(), 20
        chain = lq.chain(steps)
        cost = lq.cost if sign > 0 else RewardCost(lambda x: 0.2 * x.square().sum(1))
        control = NetworkControl(MLP(2, 2, 32, 2))
        method = SOCM(chain, cost, LearnedMatrices(2), batch=128)
        assert set(method.auxiliary) == {"matrices"}
        before = [p.detach().clone() for p in method.matrices.parameters()]
        history = fit(method, State(control, generator), Training(rounds=150, learning_rate=1e-2, ema=0.95))
        assert any(not torch.equal(a, b) for a, b in zip(before, method.matrices.parameters()))
        errors[sign] = control_error(chain, control, lq.control, 1_000, generator).optimal
        if sign > 0:
            assert history[-1]["ess"] > history[0]["ess"] + 0.2
    assert errors[1.0] < 0.02 and errors.get(-1.0, 9.0) > 2


def best_multiple(well, steps):
    """θ = E*Σ u*·E*[z|x] / E*Σ ‖u*‖², the multiple of the diffusion's u* that fits the chain's best, by quadrature."""
    x, std, top, bottom = torch.linspace(-2.4, 2.4, 801), steps**-0.5, 0.0, 0.0
    noise = (x - (x - 4 / steps * well.kappa * x * (x**2 - 1)).clamp(-2.4, 2.4)[:, None]) / std
    kernel = torch.softmax(-0.5 * noise**2, 1)
    phi = [(-well.cost.value(x[:, None])).exp()]
    for _ in range(steps):
        phi.append(kernel @ phi[-1])
    p = (x.abs() < 1e-9).double()
    for k in range(steps):
        now, after = phi[steps - k], phi[steps - k - 1]
        u = std * well.control(x[:, None], k / steps)[:, 0]
        top, bottom = top + p @ (u * ((kernel * noise) @ after / now)), bottom + p @ u**2
        p = ((p / now) @ kernel) * after
    return float(top / bottom)


@pytest.mark.parametrize("seed", [0, 1])
def test_double_well_target_is_the_exact_control(seed):
    """Its projection on the grid's u* is 1 + O(h), to four standard errors; for −g it is negative."""
    generator = torch.Generator().manual_seed(seed)
    well, batches, n = DoubleWell(torch.ones(1), 2 * torch.ones(1)), 8, 4_000
    exact = best_multiple(well, 40)
    assert 1 < best_multiple(well, 160) < exact == pytest.approx(1.025, abs=0.002)
    chain, matrices = well.chain(40), LearnedMatrices(1, gamma=4.0)(uniform_grid(40)).detach()

    def multiple(cost):
        paths = weighted_paths(chain, None, cost, chain.source(n, generator), generator)
        c, y = (v.transpose(0, 1) for v in stein_terms(chain, paths, cost))
        a = reparametrised(c, y, matrices).transpose(0, 1)
        u = torch.stack([ExactControl(well.control).scaled(chain, k, paths.x[k]) for k in range(40)])
        weight = normalised(paths.log_weight)
        overlap, size = (u * -chain.std[:, None, None] * a).sum((0, 2)), (u * u).sum((0, 2))
        return float(weight @ overlap / (weight @ size))

    found = torch.tensor([multiple(well.cost) for _ in range(batches)])
    error = float(found.std()) / batches**0.5
    assert abs(float(found.mean()) - exact) < 4 * error < 0.25
    assert multiple(RewardCost(lambda x: well.cost.value(x))) < 0


def test_conditions_reach_the_base_the_reward_and_the_control(generator):
    seen = set()

    class Base:
        """Brownian motion from 0."""

        t, std, geometry = uniform_grid(4), torch.full((4,), 0.5), Euclidean()
        controlled = torch.arange(4)

        def base_mean(self, k, x, side):
            seen.add("base")
            return x

        def source(self, n, generator):
            return torch.zeros(n, 2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(0.1))

        def forward(self, x, t, side):
            seen.add("control")
            return self.gain * side[:, None] * torch.ones_like(x)

    method = SOCM(
        Base(),
        RewardCost(lambda x, side: side * x.sum(1)),
        LearnedMatrices(2),
        batch=6,
        conditions=lambda n, g: {"side": torch.randn(n, generator=g)},
    )
    control = NetworkControl(Net())
    material = method.collect(State(control, generator)).material
    assert seen == {"base", "control"} and len({len(v) for v in material.values()}) == 1
    side = material["condition.side"][:, None, None]
    a = reparametrised(material["c"], material["y"], torch.eye(2).expand(4, 4, 2, 2))
    assert torch.allclose(a, -side.expand_as(a))  # drift-free: N = I is the constant lean adjoint
    method.loss(control, material, generator).backward()
    assert control.module.gain.grad is not None


def test_misuse(generator):
    lq = problem()
    chain = lq.chain(5)

    class Fixed(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, t):
            return self.value

    with pytest.raises(TiltflowError, match="identity"):
        SOCM(chain, lq.cost, Fixed(1.3 * arbitrary(5, 0)))
    with pytest.raises(TiltflowError, match=r"must be \(5, 5, d, d\)"):
        SOCM(chain, lq.cost, Fixed(torch.eye(2)))
    gap = DriftChain(chain.drift, chain.initial, chain.t, chain.std * torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]))
    paths = weighted_paths(chain, None, lq.cost, chain.source(3, generator), generator)
    with pytest.raises(TiltflowError, match="before a noisy one"):
        stein_terms(gap, paths, lq.cost)
    image = DriftChain.build(lambda x, t: x, lambda n, g: torch.zeros(n, 1, 2, 2), uniform_grid(5), Constant(1.0))
    method = SOCM(image, RewardCost(lambda x: x.sum((1, 2, 3))), LearnedMatrices(4), batch=4)
    with pytest.raises(TiltflowError, match="vectors"):
        method.collect(State(NetworkControl(nn.Identity()), generator))
