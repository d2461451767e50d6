"""Every predictor at both ends of time, where its conversion is 0/0: the limits, against closed forms."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import nn

from tiltflow.core.chain import euler_maruyama, memoryless_chain, power_grid, residual_variance, uniform_grid
from tiltflow.core.control import FineTuned
from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import VP, Cosine, Follmer, Linear
from tiltflow.core.noise import Constant
from tiltflow.core.ode import ode
from tiltflow.core.process import Predicts, Process
from tiltflow.core.simulate import sample, simulate
from tiltflow.problems.tilt import GaussianMixture, three_modes
from tiltflow.tilting.settings import FinetuneSettings
from tiltflow.tilting.train import finetune

PATHS = [Linear(), Cosine()]
MEAN = torch.tensor([0.5, 0.17], dtype=torch.float64)  # of three_modes: .5·2 − .3 − .2 and 1.7·(.3 − .2)


class Exact(nn.Module):
    """What a perfect network of each kind returns on a mixture, in a form that is finite on all of [0, 1], and trainable.

    ``offset`` is an error of the output that does not depend on t.
    """

    def __init__(self, mixture, path, predicts, offset=0.0):
        super().__init__()
        self.mixture, self.path, self.predicts, self.offset = mixture, path, predicts, offset

    def forward(self, x, t):
        path, score = self.path, self.mixture.score(x, t, self.path)
        b = path.beta(t)[:, None]
        if self.predicts == "eps":
            return -b * score + self.offset
        if self.predicts == "score":
            return score + self.offset
        x1 = self.mixture.x1(x, t, path)
        if self.predicts == "x1":
            return x1
        if isinstance(path, VP):
            return path.kappa(t)[:, None] * (x + score)
        return path.d_alpha(t)[:, None] * x1 - path.d_beta(t)[:, None] * b * score


def exact(path, predicts, mixture=None, **kw):
    mixture = mixture or three_modes()
    return Process(path, Exact(mixture, path, predicts, **kw), predicts, (mixture.means.shape[1],))


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("predicts", get_args(Predicts))
def test_at_the_noise_the_denoiser_is_the_mean_of_the_data(path, predicts, generator):
    base, x, t = exact(path, predicts), 2 * torch.randn(64, 2, generator=generator), torch.zeros(64)
    assert torch.allclose(base.x1(x, t), MEAN.expand(64, 2), atol=1e-10)
    assert torch.allclose(base.x0(x, t), x, atol=1e-10) and torch.allclose(base.score(x, t), -x, atol=1e-10)
    v = path.d_alpha(t)[:, None] * MEAN + path.d_beta(t)[:, None] * x
    assert torch.allclose(base.velocity(x, t), v, atol=1e-10)


def vp_gaussian(x, t):
    """E[X_1|x] of N(1, .25) on VP."""
    a = VP().alpha(t)[:, None]
    return 1 + 0.25 * a * (x - a) / (0.25 * a**2 + 1 - a**2)


@pytest.mark.parametrize("path", [*PATHS, VP()], ids=repr)
@pytest.mark.parametrize("predicts", get_args(Predicts))
def test_at_the_data_noise_and_velocity_and_score_have_their_limits(path, predicts, generator):
    mixture = three_modes()
    base, x, t = exact(path, predicts), mixture.sample(64, generator), torch.ones(64)
    assert torch.allclose(base.x1(x, t), x, atol=1e-9)
    if predicts != "eps":  # a network's own output is returned as it is
        assert torch.equal(base.x0(x, t), torch.zeros_like(x))
    score = mixture.score(x)
    if predicts == "eps" and isinstance(path, VP):
        for of in (base.score, base.velocity):
            with pytest.raises(TiltflowError, match="square root"):
                of(x, t)
        return
    if predicts == "x1" and isinstance(path, VP):  # the closed form as the mixture has it goes through √0
        base = Process(path, vp_gaussian, "x1", (2,))
        mixture = GaussianMixture.gaussian([1.0, 1.0], 0.25 * torch.eye(2))
        score = mixture.score(x)
    assert torch.allclose(base.score(x, t), score, rtol=1e-6, atol=1e-8)
    v = path.kappa(t)[:, None] * x + path.eta(t)[:, None] * score
    assert torch.allclose(base.velocity(x, t), v, rtol=1e-6, atol=1e-8)
    near = torch.full((64,), 1 - 1e-6)  # and they are the limits of what lies beside them
    assert torch.allclose(base.velocity(x, near), v, atol=1e-3)


@pytest.mark.parametrize("path", [Follmer(2.0), Follmer(1.5, 10.0)], ids=repr)
def test_the_point_source(path):
    x, t = torch.zeros(3, 2), torch.zeros(3)
    factors = {"velocity": 0.5 * path.d_alpha(t)[:, None], "x1": torch.ones(3, 1), "score": torch.ones(3, 1) / path.variance}
    for predicts, factor in factors.items():  # what a network says at t = 0, x = 0: E[X_1] times this
        base = Process(path, lambda x, t, factor=factor: factor * MEAN.expand_as(x), predicts, (2,))
        for name, times in factors.items():
            assert torch.allclose(getattr(base, name)(x, t), times * MEAN), (predicts, name)
        assert torch.equal(base.x0(x, t), x)
    with pytest.raises(TiltflowError, match="point source"):
        exact(path, "eps").x1(x, t)


def test_rows_at_the_end_and_rows_between_in_one_batch(generator):
    x, t = torch.randn(6, 2, generator=generator), torch.tensor([0.0, 0.3, 0.0, 0.7, 1.0, 1.0])
    for path in PATHS:
        x1 = exact(path, "x1")
        for predicts in ("eps", "score", "velocity"):
            base = exact(path, predicts)
            for name in ("x1", "x0", "velocity", "score"):
                if predicts == {"x0": "eps"}.get(name, name):
                    continue
                together = getattr(base, name)(x, t)
                alone = torch.cat([getattr(base, name)(x[i : i + 1], t[i : i + 1]) for i in range(6)])
                assert torch.allclose(together, alone, atol=1e-12)
                assert torch.allclose(together[:4], getattr(x1, name)(x, t)[:4], atol=1e-8)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_limits_are_differentiable(path, generator):
    """J = ∂X̂_1/∂x is 0 at t = 0 and finite beside it; a weight of the network has the gradient of a central difference."""
    x = torch.randn(5, 2, generator=generator).requires_grad_(True)
    base = exact(path, "eps")
    (grad,) = torch.autograd.grad(base.x1(x, torch.tensor([0.0, 0.0, 0.4, 0.0, 0.9])).sum(), x)
    assert grad[[0, 1, 3]].abs().max() < 1e-9 and bool(torch.isfinite(grad).all()) and grad[2].abs().max() > 0.01

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    base = Process(path, lambda x, t: net(torch.cat([x, t[:, None]], 1)), "eps", (2,))
    t, weight = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.0]), net[0].weight

    def loss():
        return base.x1(x.detach(), t).square().sum()

    (exact_grad,) = torch.autograd.grad(loss(), weight)
    h, numeric = 1e-6, torch.zeros_like(weight)
    with torch.no_grad():
        for i in range(weight.numel()):
            w = weight.view(-1)
            w[i] += h
            up = loss()
            w[i] -= 2 * h
            numeric.view(-1)[i] = (up - loss()) / (2 * h)
            w[i] += h
    assert torch.allclose(exact_grad, numeric, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("predicts", ["eps", "score"])
def test_every_marginal_of_the_chain_is_that_of_the_velocity_form(path, predicts):
    """The same noise through both chains at K = 20: equal states, not only equal laws. Likewise the ODE and σ = .5."""
    generator = torch.Generator().manual_seed(1)
    t, velocity, base = uniform_grid(20), exact(path, "velocity"), exact(path, predicts)
    x1 = three_modes().sample(500, generator)
    v = [residual_variance(p, t, x1, torch.Generator().manual_seed(2)) for p in (velocity, base)]
    assert torch.allclose(*v, rtol=1e-8)
    x0 = base.source(200, generator, torch.float64)
    for build in (lambda p: memoryless_chain(p, t, v[0]), lambda p: euler_maruyama(p, t, Constant(0.5))):
        a, b = (simulate(build(p), None, x0, torch.Generator().manual_seed(3)).x for p in (velocity, base))
        assert torch.allclose(a, b, atol=1e-7)
    for method in ("euler", "heun"):
        assert torch.allclose(ode(base, x0, 20, method), ode(velocity, x0, 20, method), atol=1e-7)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_an_epsilon_would_have_been_wrong(path, generator):
    """The bad twin, X̂_1(x, 10⁻³) for X̂_1(x, 0), is off where the limit is exact; and so is the limit without ċ/c."""
    base, x = exact(path, "eps"), torch.randn(64, 2, generator=generator)
    assert (base.x1(x, torch.full((64,), 1e-3)) - MEAN).abs().max() > 1e-3
    t = torch.zeros(64)
    if path == Linear():
        from tiltflow.core.limits import slope

        dropped = -slope(lambda s: base.model(x, s), t)
        assert (dropped - MEAN).abs().max() > 1


def test_a_constant_error_of_the_network_does_not_enter_the_limit(generator):
    """eps(x, 0) = x + .01 makes (x − eps)/α infinite; the limit is taken as if eps(x, 0) were x, and stays the mean."""
    x, t = torch.randn(16, 2, generator=generator), torch.zeros(16)
    base = exact(Linear(), "eps", offset=0.01)
    assert torch.allclose(base.x1(x, t), MEAN.expand(16, 2) - 0 * x, atol=1e-10)
    beside = base.x1(x, t + 1e-4)
    assert (beside - MEAN).abs().max() > 50  # which is why no small time stands in for 0


def test_networks_without_a_derivative_in_t_are_refused_in_a_sentence():
    x, t = torch.zeros(2, 2), torch.zeros(2)
    table = nn.Embedding(1000, 2)
    integer = Process(Linear(), lambda x, t: x + table((999 * t).long()), "eps", (2,))
    with pytest.raises(TiltflowError, match="timesteps"):
        integer.x1(x, t)
    assert bool(torch.isfinite(replace(integer, interpolant=VP()).x1(x, t)).all())  # α_0 > 0: no limit is needed

    once = Process(Linear(), lambda x, t: x + Once.apply(t)[:, None], "eps", (2,))
    with pytest.raises(TiltflowError, match="cannot take"):
        once.x1(x, t)


class Once(torch.autograd.Function):
    """t², differentiable once only."""

    @staticmethod
    def forward(ctx, t):
        ctx.save_for_backward(t)
        return t**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_attention_is_differentiated_in_t():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    base = Process(Linear(), lambda x, t: layer(x + t[:, None, None]), "eps", (4, 8))
    x, h = torch.randn(3, 4, 8), 1e-6
    with torch.no_grad():
        numeric = (layer(x + h) - layer(x - h)) / (2 * h)
        assert torch.allclose(base.x1(x, torch.zeros(3)), x - numeric, atol=1e-6)
    base.x1(x, torch.zeros(3)).sum().backward()  # through the softmax and its second derivative
    with torch.inference_mode(), pytest.raises(TiltflowError, match="no_grad"):
        base.x1(x, torch.zeros(3))


class Trainable(nn.Module):
    """The exact velocity or noise of N(0, .25 I) on the linear path and a small network beside it that starts at zero."""

    def __init__(self, predicts):
        super().__init__()
        torch.manual_seed(0)
        self.predicts, self.net = predicts, nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 2))
        nn.init.zeros_(self.net[2].weight)
        nn.init.zeros_(self.net[2].bias)

    def forward(self, x, t):
        t = t[:, None]
        slope = (1 - t if self.predicts == "eps" else 0.25 * t - (1 - t)) / (0.25 * t**2 + (1 - t) ** 2)
        return slope * x + self.net(torch.cat([x, t], 1))


@pytest.mark.parametrize("seed", [0, 1])
def test_fine_tuning_an_eps_base_reaches_the_tilt_of_the_velocity_base(seed):
    """N(0, .25 I) tilted by e^{x_1} is N((.25, 0), .25 I); ± .03 is what 4,000 draws and K = 20 leave."""
    settings = FinetuneSettings(
        rounds=25, gradient_steps=4, buffer_rounds=4, batch=96, steps=20, warmup=0, learning_rate=2e-2
    )
    reached = {}
    for predicts in ("velocity", "eps"):
        base = Process(Linear(), Trainable(predicts), predicts, (2,))
        generator = torch.Generator().manual_seed(seed)
        tuned = finetune(base, lambda x: x[:, 0], 1.0, settings=settings, seed=seed)
        x = sample(tuned.chain, FineTuned(tuned.process), tuned.chain.source(4_000, generator), generator).x
        flow = ode(tuned.process, tuned.process.source(4_000, generator, torch.float64), 40)
        reached[predicts] = x
        for end in (x, flow):
            assert torch.allclose(end.mean(0), torch.tensor([0.25, 0.0]), atol=0.06), (predicts, end.mean(0))
            assert torch.allclose(end.std(0), torch.tensor([0.5, 0.5]), atol=0.04), (predicts, end.std(0))
    assert torch.allclose(reached["eps"].mean(0), reached["velocity"].mean(0), atol=0.03)


def test_uneven_grids_meet_both_ends(generator):
    base, x0 = exact(Cosine(), "score"), torch.randn(8, 2, generator=generator)
    t = power_grid(7, 1.5, 1.5)
    v = residual_variance(base, t, three_modes().sample(200, generator), generator)
    assert bool(torch.isfinite(simulate(memoryless_chain(base, t, v), None, x0, generator).x).all())
