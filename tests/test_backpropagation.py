"""Backpropagation through the chain against basic Adjoint Matching, the continuous adjoint, and closed forms."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from tiltflow.core.chain import DriftChain, memoryless_chain, residual_variance, uniform_grid
from tiltflow.core.control import FineTuned, NetworkControl, tilted
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.noise import Constant
from tiltflow.core.simulate import event_sum, sample, simulate
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.methods.backpropagation import Backpropagation, discrete_adjoint, draft, refl
from tiltflow.nn.lora import LowRank, add_low_rank
from tiltflow.nn.mlp import MLP
from tiltflow.problems.tilt import GaussianMixture, LinearQuadratic, QuadraticReward, TiltProblem, mixture2d
from tiltflow.train.fit import fit
from tiltflow.train.method import State
from tiltflow.train.settings import Training


def network(inputs, outputs):
    torch.manual_seed(1)
    net = MLP(inputs, outputs, 16, 2)
    nn.init.normal_(net.last.weight, std=0.3)
    return net


def bump(x, t):
    return (1 + t) * x.square().sum(1).sin()


def fine_tuned(noiseless=False, steps=10):
    problem, g = mixture2d(), torch.Generator().manual_seed(5)
    t = uniform_grid(steps)
    v = residual_variance(problem.process(), t, problem.base.sample(2_000, g), g)
    chain = memoryless_chain(problem.process(), t, v, noiseless)
    control = FineTuned(tilted(problem.process(), network(4, 2)))
    return chain, control, RewardCost(lambda x: problem.reward(x) + x.sin().sum(1), 1.7, running=bump)


LQ = LinearQuadratic(
    torch.tensor([[0.3, -0.5], [0.4, 0.1]], dtype=torch.float64),
    torch.tensor([[1.0, 0.2], [0.2, 0.6]], dtype=torch.float64),
    torch.tensor([[0.8, 0.0], [0.0, 1.2]], dtype=torch.float64),
    sigma=0.8,
)


def linear_quadratic(steps=10):
    chain = DriftChain.build(
        lambda x, t: x @ LQ.drift.T, lambda n, g: torch.randn(n, 2, generator=g), uniform_grid(steps), Constant(LQ.sigma)
    )
    running, terminal = (lambda x, t: ((x @ LQ.state_cost) * x).sum(1)), (lambda x: -((x @ LQ.terminal) * x).sum(1))
    return chain, NetworkControl(network(2, 2)), RewardCost(terminal, running=running)


SETTINGS = {
    "fine-tuned": fine_tuned,
    "noiseless last step": lambda: fine_tuned(noiseless=True),
    "linear-quadratic": linear_quadratic,
}


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def gradient(control, loss):
    weights = [p for p in control.module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(weights, grads, strict=True)])


def gradient_of(method, control, rows=slice(None), seed=3):
    material = method.collect(State(control, seeded(seed))).material
    return gradient(control, method.loss(control, {n: v[rows] for n, v in material.items()}, seeded()))


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_discrete_adjoint_is_basic_adjoint_matching_path_by_path(setting):
    """The same noise, each path by itself; the lean adjoint and a cost without its KL have another gradient."""
    chain, control, cost = setting()
    paths, controlled = 3, int((chain.std > 0).sum())
    for i in range(paths):
        ours = gradient_of(discrete_adjoint(chain, cost, paths), control, slice(i, i + 1))
        rows = slice(i, None, paths)  # Adjoint Matching lays its rows out step by step, and averages over them
        basic, lean = (AdjointMatching(chain, cost, paths, adjoint=kind) for kind in ("full", "lean"))
        assert distance(controlled * gradient_of(basic, control, rows), ours) < 1e-8
        assert distance(controlled * gradient_of(lean, control, rows), ours) > 1e-2
        assert distance(gradient_of(draft(chain, cost, paths, last=None), control, slice(i, i + 1)), ours) > 1e-2


def continuous_adjoint(control, cost, t, x, with_control):
    """da/dt = −∇(b + σu)ᵀa − ∇(f + ½‖u‖²) backwards by Heun's method on the states x (K+1, B, 2); a at every t_k."""

    def slope(k, a):
        with torch.enable_grad():
            y, time = x[k].detach().requires_grad_(True), t[k].expand(x.shape[1])
            u = LQ.sigma * control.module(y, time)
            hamiltonian = event_sum((y @ LQ.drift.T) * a) + cost.running(y, time)
            if with_control:
                hamiltonian = hamiltonian + event_sum(LQ.sigma * u * a + 0.5 * u**2)
            return torch.autograd.grad(hamiltonian.sum(), y)[0]

    a = cost.grad(x[-1])
    out = [a]
    for k in reversed(range(len(t) - 1)):
        h = t[k + 1] - t[k]
        end = slope(k + 1, a)
        a = a + 0.5 * h * (end + slope(k, a + h * end))
        out.append(a)
    return torch.stack(out[::-1])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_continuous_adjoint_converges_at_first_order(seed):
    """Left-point a_k on the same Brownian paths: the error halves with h. Without the control's terms it stays."""
    finest, paths, g = 160, 16, seeded(seed)
    start, increments = torch.randn(paths, 2, generator=g), torch.randn(paths, finest, 2, generator=g)
    errors, wrong = [], []
    for steps in (40, 80, 160):
        chain, control, cost = linear_quadratic(steps)
        width = finest // steps
        noise = increments.reshape(paths, steps, width, 2).sum(2) / width**0.5
        discrete = gradient(control, discrete_adjoint(chain, cost).loss(control, {"x": start, "noise": noise}, g))
        with torch.no_grad():
            x = [start]
            for k in range(steps):
                x.append(control.mean(chain, k, x[-1]) + chain.std[k] * noise[:, k])
        for out, with_control in ((errors, True), (wrong, False)):
            a = continuous_adjoint(control, cost, chain.t, torch.stack(x), with_control)
            loss = sum(
                0.5 / steps * event_sum((LQ.sigma * (control.module(x[k], chain.t[k].expand(paths)) + a[k])) ** 2).mean()
                for k in range(steps)
            )
            out.append(distance(gradient(control, loss), discrete))
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2, abs=0.05)
    assert errors[-1] < 0.01
    assert wrong[0] / wrong[-1] < 1.5 and wrong[-1] > 0.02


def test_draft_one_is_autograd_through_the_last_step():
    chain, control, cost = fine_tuned()
    path = simulate(chain, control, chain.source(8, g := seeded()), g)
    end = control.mean(chain, 9, path.x[9]) + (path.x[10] - path.mean[9])
    exact = gradient(control, cost.value(end).mean())
    assert distance(gradient_of(draft(chain, cost, 8), control), exact) < 1e-8
    assert distance(gradient_of(draft(chain, cost, 8, last=2), control), exact) > 1e-2
    assert distance(gradient_of(Backpropagation(chain, cost, 8, last=1), control), exact) > 1e-2  # with its KL


def test_draft_of_all_steps_is_backpropagation_of_the_reward():
    chain, control, cost = fine_tuned()
    x = chain.source(8, g := seeded())
    for k in range(10):
        x = control.mean(chain, k, x) + chain.std[k] * torch.randn(8, 2, generator=g)
    exact = gradient(control, cost.value(x).mean())
    for last in (None, 10):
        assert distance(gradient_of(draft(chain, cost, 8, last), control), exact) < 1e-8
    assert distance(gradient_of(draft(chain, cost, 8, 9), control), exact) > 1e-3


def test_noiseless_last_step_is_the_base_s_with_kl_and_the_model_s_without():
    chain, control, cost = fine_tuned(noiseless=True)
    path = simulate(chain, control, chain.source(8, g := seeded()), g)
    x, t = path.x[9], chain.t[9].expand(8)
    one = draft(chain, cost, 8)
    assert distance(gradient_of(one, control), gradient(control, cost.value(control.process.x1(x, t)).mean())) < 1e-8
    reward = one.collect(State(control, seeded())).metrics["reward"]
    assert reward == pytest.approx(float(cost.reward(control.process.x1(x, t).detach()).mean()))
    metrics = Backpropagation(chain, cost, 8, last=1).collect(State(control, seeded())).metrics
    drawn = sample(chain, control, chain.source(8, g := seeded()), g)
    assert metrics["reward"] == pytest.approx(float(cost.reward(drawn.x).mean()))
    assert metrics["kl"] == pytest.approx(float(drawn.kl.mean()))
    assert abs(metrics["reward"] - reward) > 1e-3
    # with its KL, the last step with gradient is the last one with noise, seen through the base's own
    energy = 0.5 * event_sum(((control.mean(chain, 8, path.x[8]) - chain.base_mean(8, path.x[8])) / chain.std[8]) ** 2)
    y = control.mean(chain, 8, path.x[8]) + (path.x[9] - path.mean[8])
    running = 0.1 * (bump(path.x[8], chain.t[8].expand(8)) + bump(y, t))
    exact = gradient(control, (energy + running + cost.value(chain.base_mean(9, y))).mean())
    assert distance(gradient_of(Backpropagation(chain, cost, 8, last=1), control), exact) < 1e-8


def test_refl_scores_the_prediction_from_a_late_step():
    chain, control, cost = fine_tuned()
    method, seen = refl(chain, cost, 4, stop=3), set()
    for seed in range(20):
        material = method.collect(State(control, seeded(seed))).material
        (k,) = material["k"].unique().tolist()
        seen.add(k)
        exact = gradient(control, cost.value(control.process.x1(material["x"], chain.t[k].expand(4))).mean())
        assert distance(gradient(control, method.loss(control, material, seeded())), exact) < 1e-8
        assert distance(gradient_of(draft(chain, cost, 4, last=10 - k), control, seed=seed), exact) > 1e-3
    assert seen == {7, 8, 9}


@pytest.mark.parametrize("last, kl, low_rank", [(None, True, False), (3, False, False), (4, True, True)])
def test_checkpointing_has_the_same_gradient(last, kl, low_rank):
    chain, control, cost = fine_tuned()
    if low_rank:
        add_low_rank(control.module.net, 2, seeded())
        for layer in control.module.net.modules():
            if isinstance(layer, LowRank):
                nn.init.normal_(layer.b, std=0.3)
    calls = []
    control.module.net.register_forward_hook(lambda *_: calls.append(1))
    counts, grads = [], []
    for checkpointing in (False, True):
        method = Backpropagation(chain, cost, 4, last, kl, checkpointing=checkpointing)
        material = method.collect(State(control, seeded())).material
        calls.clear()
        grads.append(gradient(control, method.loss(control, material, seeded())))
        counts.append(len(calls))
    assert distance(grads[1], grads[0]) < 1e-12 and grads[0].norm() > 0.1
    assert counts == [last or 10, 2 * (last or 10)]  # the second time each step is evaluated again, not kept


class PerStep(nn.Module):
    """θ_k + φ_k x at the steps of a uniform grid."""

    def __init__(self, steps):
        super().__init__()
        self.offset, self.slope = (nn.Parameter(0.3 * torch.randn(steps)) for _ in range(2))

    def forward(self, x, t):
        k = (t * len(self.offset)).round().long()
        return self.offset[k][:, None] + self.slope[k][:, None] * x


def train(problem, chain, seed, make, rounds=150):
    torch.manual_seed(seed)
    control = NetworkControl(PerStep(len(chain.std)))
    state = State(control, seeded(seed))
    method = make(chain, RewardCost(problem.reward), 32)
    fit(method, state, Training(rounds=rounds, learning_rate=0.1, betas=(0.9, 0.95), ema=0.9, gradient_clip=1e9))
    return control, state.generator


def gaussian(steps=8):
    problem = TiltProblem("gaussian", GaussianMixture.gaussian([0.5], [[0.25]]), QuadraticReward.of_direction([1.0]))
    t = uniform_grid(steps)
    alpha, beta = t, 1 - t
    v = 0.25 * beta**2 / (0.25 * alpha**2 + beta**2)  # Var(X_1 | X_t), exact: so is the chain
    chain = memoryless_chain(problem.process(), t, v[:-1])
    optimum = 0.25 * alpha / (0.25 * alpha**2 + beta**2)  # −∇V(x, t) = ∂E[X_1 | X_t = x]/∂x
    return problem, chain, optimum[1:]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_discrete_adjoint_finds_the_optimal_control_and_its_bad_twins_do_not(seed):
    """N(.5, .25) tilted by e^x is N(.75, .25). At u* the gradient has no noise, so the weights themselves converge."""
    problem, chain, optimum = gaussian()

    @torch.no_grad()
    def error(control):
        s = chain.std  # of u_k = s_k(θ_k + φ_k x), at x = ±1
        return float((s * ((control.module.offset - optimum).abs() + control.module.slope.abs())).max())

    control, g = train(problem, chain, seed, discrete_adjoint)
    assert error(control) < 0.005  # u* is between .04 and .27
    drawn = sample(chain, control, chain.source(20_000, g), g).x
    assert float(drawn.mean()) == pytest.approx(0.75, abs=0.02)  # standard error .0035
    assert float(drawn.std()) == pytest.approx(0.5, abs=0.02)
    flipped, g = train(replace(problem, reward=QuadraticReward.of_direction([-1.0])), chain, seed, discrete_adjoint)
    assert error(flipped) > 0.3
    assert float(sample(chain, flipped, chain.source(4_000, g), g).x.mean()) == pytest.approx(0.25, abs=0.04)
    means = []  # the reward alone drifts away, the further the longer
    for rounds in (50, 150):
        drifted, g = train(problem, chain, seed, partial(draft, last=None), rounds)
        means.append(float(sample(chain, drifted, chain.source(4_000, g), g).x.mean()))
    assert error(drifted) > 0.3 and means[0] > 1 and means[1] > means[0] + 1


def test_objective_is_the_free_energy_at_the_optimum():
    """E[Σ½‖u‖² + g] = −log Z at u*, and above it elsewhere."""
    problem, chain, optimum = gaussian()
    control = NetworkControl(PerStep(8))
    method = discrete_adjoint(chain, RewardCost(problem.reward), 20_000)
    for scale, low, high in ((1.0, -0.02, 0.02), (0.0, 0.05, 1.0), (2.0, 0.05, 1.0)):
        with torch.no_grad():
            control.module.offset.copy_(scale * optimum)
            control.module.slope.zero_()
        loss = float(method.loss(control, method.collect(State(control, seeded())).material, seeded()).detach())
        assert low < loss + problem.log_z < high


def test_conditions_reach_base_control_and_reward():
    """Rows keep their condition through any shuffling; a clipped cost clips the gradient that enters at the end."""

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5))

        def forward(self, x, t, c):
            return self.weight * c + 0 * x

    chain = DriftChain.build(lambda x, t, c: c - x, lambda n, g: torch.zeros(n, 1), uniform_grid(4), Constant(1.0))
    control = NetworkControl(Shift())
    cost = RewardCost(lambda x, c: 5 * (x * c).sum(1))
    method = draft(chain, cost, 6, None, conditions=lambda n, g: {"c": torch.randn(n, 1, generator=g)})
    material = method.collect(State(control, seeded())).material
    assert {len(v) for v in material.values()} == {6}
    reach = sum(0.25 * 0.75**j for j in range(4))  # ∂x_K/∂weight = reach · c
    rows = torch.tensor([4, 1])
    c = material["condition.c"][rows]
    batch = {n: v[rows] for n, v in material.items()}
    expected = float(-(5 * reach * c**2).mean())
    assert float(gradient(control, method.loss(control, batch, seeded()))) == pytest.approx(expected)
    clipped = replace(method, cost=replace(cost, max_grad_norm=1e-3))
    expected = float(-(1e-3 * reach * c.abs()).mean())
    assert float(gradient(control, clipped.loss(control, batch, seeded()))) == pytest.approx(expected)


def test_misuse():
    chain, control, cost = fine_tuned(noiseless=True, steps=4)
    drift, network_control, drift_cost = linear_quadratic(4)
    for settings in ({"last": 0}, {"last": 5}, {"stop": 0, "kl": False}, {"stop": 5, "kl": False}):
        with pytest.raises(TiltflowError, match="4 steps"):
            Backpropagation(chain, cost, **settings)
    for settings in ({"kl": True}, {"kl": False, "last": 1}, {"kl": False, "checkpointing": True}):
        with pytest.raises(TiltflowError, match="pass kl=False"):
            Backpropagation(chain, cost, stop=2, **settings)
    with pytest.raises(TiltflowError, match="use a FineTuned control"):
        refl(drift, drift_cost, stop=2).collect(State(network_control, seeded()))
    with pytest.raises(TiltflowError, match="makes 3 of the chain's 4 steps"):
        Backpropagation(chain, cost, last=4).collect(State(control, seeded()))
    draft(chain, cost, last=4).collect(State(control, seeded()))
