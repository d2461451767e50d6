"""Adjoints against autograd through the simulation, and what Adjoint Matching converges to."""

from dataclasses import replace
from types import SimpleNamespace

import pretend
import pytest
import torch

from tiltflow.core.adjoint import full_adjoint, lean_adjoint
from tiltflow.core.chain import DriftChain, at, euler_maruyama, memoryless_chain, residual_variance, uniform_grid
from tiltflow.core.control import FineTuned, NetworkControl, tilted
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Euclidean
from tiltflow.core.interpolant import Linear
from tiltflow.core.noise import Constant
from tiltflow.core.process import Process
from tiltflow.core.simulate import event_sum, sample, simulate
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.nn.mlp import MLP
from tiltflow.problems.tilt import GaussianMixture, LinearQuadratic, QuadraticReward, TiltProblem, mixture2d
from tiltflow.train.fit import fit
from tiltflow.train.loss import QuantileMask, reduce_terms
from tiltflow.train.method import State
from tiltflow.train.settings import Training


def setting(running=None, steps=12):
    problem = mixture2d()
    generator = torch.Generator().manual_seed(5)
    t = uniform_grid(steps)
    x1 = problem.base.sample(2_000, generator)
    chain = memoryless_chain(problem.process(), t, residual_variance(problem.process(), t, x1, generator))
    torch.manual_seed(1)
    net = MLP(4, 2, 16, 2)
    torch.nn.init.normal_(net.last.weight, std=0.3)
    control = FineTuned(tilted(problem.process(), net))
    cost = RewardCost(problem.reward, 1.7, running=running)
    path = simulate(chain, control, chain.source(6, generator), generator)
    return chain, control, cost, path


def future_cost(chain, control, cost, path, k, lean):
    """Σ_{j≥k} (½‖u_j‖² + h f) + g as a function of x_k with the path's own noise and, if lean, its own controls."""
    start = path.x[k].clone().requires_grad_(True)
    x, total = start, torch.zeros(start.shape[0])
    for j in range(k, len(path.mean)):
        std = at(chain.std, j, x)
        base = chain.base_mean(j, x)
        noise = path.x[j + 1] - path.mean[j]
        if cost.running is not None:
            total = total + float(chain.t[j + 1] - chain.t[j]) * cost.running(x, chain.t[j].expand(len(x)))
        if lean:
            x = base + (path.mean[j] - chain.base_mean(j, path.x[j])).detach() + noise
        else:
            mean = control.mean(chain, j, x)
            total = total + 0.5 * event_sum(((mean - base) / std) ** 2)
            x = mean + noise
    total = total - cost.strength * cost.reward(x)
    return torch.autograd.grad(total.sum(), start)[0]


def test_paths_may_be_kept_on_another_device():
    """Kept on the CPU, all work elsewhere."""

    class Doubling:
        t, std, geometry, controlled = uniform_grid(3), torch.full((3,), 0.5), Euclidean(), torch.arange(3)

        def base_mean(self, k, x):
            assert x.device == pretend.DEVICE
            return 2 * x

        def mean(self, chain, k, x, base_mean=None):
            return self.base_mean(k, x)

        def ratios(self, chain):
            return None

    cpu, chain, cost = torch.device("cpu"), Doubling(), SimpleNamespace(grad=lambda x: -x, running=None)
    with pretend.accelerator() as device:
        x0, generator = torch.ones(4, 2, device=str(device)), torch.Generator(str(device))
        path = simulate(chain, chain, x0, generator, cpu)
        adjoint = lean_adjoint(chain, path, cost, x0.device)
        near = simulate(chain, chain, x0, generator)
        rows = dict.fromkeys(("x", "a_next", "base_mean"), torch.ones(5, 2)) | {"weight": torch.ones(5)}
        loss = AdjointMatching(chain, cost).loss(chain, rows | {"k": torch.zeros(5, dtype=torch.long)}, generator)
    assert [v.device for v in (*path, *adjoint)] == [cpu] * 4 and path.x.shape == (4, 4, 2) == adjoint.a.shape
    assert near.x.device == loss.device == pretend.DEVICE


def test_where_paths_are_kept_changes_nothing():
    chain, control, cost, _ = setting()
    rounds = [
        AdjointMatching(chain, cost, 8, keep=keep, importance=True).collect(State(control, torch.Generator().manual_seed(1)))
        for keep in (None, torch.device("cpu"))
    ]
    assert all(torch.equal(v, rounds[1].material[name]) for name, v in rounds[0].material.items())
    with pytest.raises(TiltflowError, match="leave keep out"):
        share = torch.full((12,), 0.5)
        AdjointMatching(chain, cost, importance=True, endpoint_share=share, keep=torch.device("cpu"))


def bump(x, t):
    return (1 + t) * x.square().sum(1).sin()


@pytest.mark.parametrize("running", [None, bump], ids=["f=0", "f"])
@pytest.mark.parametrize("kind", ["lean", "full"])
def test_adjoint_equals_autograd_along_the_path(kind, running):
    chain, control, cost, path = setting(running)
    if kind == "lean":
        a = lean_adjoint(chain, path, cost).a
    else:
        a = full_adjoint(chain, control, path, cost).a
    for k in range(len(path.mean)):
        exact = future_cost(chain, control, cost, path, k, kind == "lean")
        assert (a[k] - exact).abs().max() < 1e-8 * max(1.0, float(exact.abs().max()))


class Turning(torch.nn.Module):
    """A base whose Jacobian is not symmetric, conditional or not; it counts its evaluations."""

    def __init__(self, d=2):
        super().__init__()
        self.turn, self.calls = torch.nn.Parameter(torch.randn(d, d, generator=torch.Generator().manual_seed(3))), 0

    def forward(self, x, t, side=None):
        self.calls += 1
        return torch.sin(x @ self.turn + t[:, None] * (1 if side is None else side[:, None]))


def turning(name, d=2):
    base, t = Turning(d), uniform_grid(5)
    if name == "drift":
        return base, DriftChain.build(base, lambda n, g: torch.randn(n, d, generator=g), t, Constant(0.8))
    process = Process(Linear(), base, "x1" if name == "x1" else "velocity", (d,))
    if name == "euler_maruyama":
        return base, euler_maruyama(process, t, Constant(0.7))
    spread = torch.linspace(0.1, 0.3, 5 * d).reshape(5, d) if name == "per_coordinate" else 0.1 * torch.ones(5)
    return base, memoryless_chain(process, t, spread, name == "noiseless_last")


@pytest.mark.parametrize("name", ["memoryless", "x1", "per_coordinate", "noiseless_last", "euler_maruyama", "drift"])
@pytest.mark.parametrize("side", [None, torch.linspace(-1, 1, 7)], ids=["free", "conditional"])
@pytest.mark.parametrize("running", [None, bump], ids=["f=0", "f"])
def test_jacobians_of_many_steps_at_once_change_nothing(name, side, running, generator, monkeypatch):
    base, chain = turning(name)
    condition = {} if side is None else {"side": side}
    cost = RewardCost(lambda x, **condition: torch.sin(x).sum(1), running=running)
    path = simulate(chain, None, chain.source(7, generator), generator, **condition)

    def found(call, rows):
        monkeypatch.setattr("tiltflow.core.adjoint.CALL", call)
        monkeypatch.setattr("tiltflow.core.adjoint.ROWS", rows)
        base.calls = 0
        return lean_adjoint(chain, path, cost, **condition), base.calls

    each, calls = found(-1, 0)
    assert calls == 5
    for rows, calls in ((1000, 1), (22, 2)):  # blocks of all, and of three steps
        once = found(2**22, rows)
        assert once[1] == calls
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(each, once[0], strict=True))
    right = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda own, a, j: right(own, a, j.mT))  # the Jacobian, not its transpose
    assert (found(2**22, 1000)[0].a - each.a).abs().max() > 0.01


def test_jacobians_are_for_small_events_networks_and_batches(generator):
    for d, paths, calls in ((1, 4000, 3), (2, 30, 1), (2, 5000, 5), (8, 2, 5)):
        base, chain = turning("memoryless", d)
        path = simulate(chain, None, chain.source(paths, generator), generator)
        base.calls = 0
        lean_adjoint(chain, path, RewardCost(lambda x: x.sum(1)))
        assert base.calls == calls
    wide = torch.nn.Parameter(torch.zeros(2**20))
    base, chain = turning("memoryless")
    base.register_parameter("more", wide)
    path = simulate(chain, None, chain.source(30, generator), generator)
    base.calls = 0
    lean_adjoint(chain, path, RewardCost(lambda x: x.sum(1)))
    assert base.calls == 5


def test_sign_of_the_adjoint():
    """ã_K = +∇g = −λ∇r: a control that follows −ã climbs the reward."""
    chain, _, cost, path = setting()
    a = lean_adjoint(chain, path, cost).a
    assert torch.allclose(a[-1], -1.7 * torch.tensor([-0.4, -0.3]).expand_as(a[-1]))


def test_drift_free_adjoint_is_constant(generator):
    chain = DriftChain.build(
        lambda x, t: torch.zeros_like(x), lambda n, g: torch.zeros(n, 2), uniform_grid(10), Constant(1.0)
    )
    path = simulate(chain, None, chain.source(5, generator), generator)
    a = lean_adjoint(chain, path, RewardCost(lambda x: -(x**2).sum(1))).a
    assert torch.equal(a, a[-1:].expand_as(a))


def tilt_1d(variance=0.25, slope=1.0):
    return TiltProblem(
        "gaussian", GaussianMixture.gaussian([0.5], [[variance]]), QuadraticReward.of_direction([slope])
    )


def trained(problem, chain, seed, rounds=150, cost=None, **kw):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    control = FineTuned(tilted(problem.process(), MLP(2, 1, 32, 2)))
    method = AdjointMatching(chain, cost or RewardCost(problem.reward), batch=128, **kw)
    fit(method, State(control, generator), Training(rounds=rounds, learning_rate=1e-2, ema=0.95))
    return control, generator


def chain_1d(problem, generator, steps=20):
    t = uniform_grid(steps)
    x1 = problem.base.sample(4_000, generator)
    return memoryless_chain(problem.process(), t, residual_variance(problem.process(), t, x1, generator))


def end_mean(chain, control, generator):
    return float(sample(chain, control, chain.source(8_000, generator), generator).x.mean())


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_adjoint_matching_reaches_the_tilt_and_its_bad_twins_do_not(seed, generator):
    problem = tilt_1d()  # N(.5, .25) tilted by e^x is N(.75, .25)
    chain = chain_1d(problem, generator)
    exact, tolerance = 0.75, 0.03  # standard error of the mean .0056, training noise about .01
    control, g = trained(problem, chain, seed)
    assert end_mean(chain, control, g) == pytest.approx(exact, abs=tolerance)
    flipped, g = trained(problem, chain, seed, cost=RewardCost(lambda x: -problem.reward(x)))
    assert end_mean(chain, flipped, g) < 0.4  # the sign of the adjoint flipped
    half = replace(chain, std=chain.std / 2**0.5)  # the memoryless factor 2 dropped
    weak, g = trained(problem, half, seed)
    assert abs(end_mean(chain, weak, g) - exact) > 3 * tolerance


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_constant_noise_is_biased(seed, generator):
    """σ = 1 remembers X_0: the tilt reaches only part of the way, whatever the training."""
    problem = tilt_1d(variance=1.0)  # the exact tilt is N(1.5, 1); corr(X_0, X_1) = .46 leaves 1 − .46² of the shift
    chain = euler_maruyama(problem.process(), uniform_grid(40), Constant(1.0))
    control, g = trained(problem, chain, seed)
    assert end_mean(chain, control, g) == pytest.approx(0.5 + 1 - 0.46**2, abs=0.07)
    assert end_mean(chain, control, g) < 1.4


@pytest.mark.slow
def test_importance_weights_full_adjoint_and_subsets_reach_the_tilt_too(generator):
    problem = tilt_1d()
    chain = chain_1d(problem, generator)
    for kw in (
        {"importance": True},
        {"adjoint": "full"},
        {"last_steps": 5, "random_steps": 5},
        {"mask": QuantileMask(0.95)},
        {"clip": 50.0},
    ):
        control, g = trained(problem, chain, 0, **kw)
        assert end_mean(chain, control, g) == pytest.approx(0.75, abs=0.04), kw


@pytest.mark.slow
def test_linear_quadratic_control_is_learned(generator):
    """Explicit control, state cost f ≠ 0, no interpolant: against the Riccati solution."""
    problem = LinearQuadratic(torch.tensor([[0.2]]), torch.tensor([[1.0]]), torch.tensor([[1.0]]), sigma=1.0)
    chain = DriftChain.build(
        lambda x, t: x @ problem.drift.to(x).T,
        lambda n, g: torch.randn(n, 1, generator=g),
        uniform_grid(40),
        Constant(1.0),
    )
    cost = RewardCost(lambda x: -x.square().sum(1), running=lambda x, t: x.square().sum(1))
    torch.manual_seed(0)
    control = NetworkControl(MLP(1, 1, 32, 2))
    method = AdjointMatching(chain, cost, batch=128)
    fit(method, State(control, generator), Training(rounds=200, learning_rate=1e-2, ema=0.95))
    x = torch.linspace(-1, 1, 9)[:, None]
    for t in (0.0, 0.5, 0.9):
        u = control.module(x, torch.full((9,), t)).detach()
        assert (u - problem.control(x, t)).abs().max() < 0.25  # u* is up to 2.5
        assert (u - 0.5 * problem.control(x, t)).abs().max() > 0.3  # and far from half of it
    runs = sample(chain, control, chain.source(8_000, generator), generator, cost.running)
    total = runs.kl + runs.running + cost.value(runs.x)
    expected = float(problem.value(torch.ones(1, 1), 0.0))  # E x² = 1: E V(X_0) = V(1)
    assert float(total.mean()) == pytest.approx(expected, abs=0.1)


def test_zero_strength_has_no_gradient(generator):
    chain, control, _, _ = setting()
    torch.nn.init.zeros_(control.module.net.last.weight)
    method = AdjointMatching(chain, RewardCost(mixture2d().reward, 0.0), batch=8)
    loss = method.loss(control, method.collect(State(control, generator)).material, generator)
    loss.backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-12 for p in control.module.parameters())


def test_terms_are_clipped_before_the_mean_and_masked():
    terms = torch.tensor([1.0, 2.0, 100.0])
    assert float(reduce_terms(terms, clip=5.0)) == pytest.approx(8 / 3)
    mask = QuantileMask(0.6)
    assert float(reduce_terms(terms, mask=mask)) < 2
    other = QuantileMask()
    other.load_state_dict(mask.state_dict())
    assert torch.equal(other.threshold, mask.threshold)


def test_misuse(generator):
    problem = tilt_1d()
    chain = chain_1d(problem, generator, 5)
    with pytest.raises(TiltflowError, match="negate the reward"):
        RewardCost(problem.reward, -1.0)
    with pytest.raises(TiltflowError, match="5 controlled"):
        AdjointMatching(chain, RewardCost(problem.reward), last_steps=4, random_steps=4)
    with pytest.raises(TiltflowError, match=r"nn\.Module"):
        FineTuned(problem.process())
    x = torch.zeros(3, 1)
    for reward, message in (
        (lambda x: x, "one number per sample"),
        (lambda x: x.sum(), "one number per sample"),
        (lambda x: x.detach().sum(1), "detached"),
        (lambda x: x.sum(1) / 0, "NaN or infinite"),
        (lambda x: x.sum(1).sqrt(), "gradient is NaN"),
    ):
        with pytest.raises(TiltflowError, match=message):
            RewardCost(reward).grad(x)
