"""Derivatives, κ, η, the four predictors as inverses, and the memoryless residual."""

import math
from typing import get_args

import pytest
import torch

from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import VP, Cosine, Follmer, Linear
from tiltflow.core.noise import Constant, Memoryless, memoryless_residual, zero
from tiltflow.core.process import Predicts, Process, from_x1, to_x1

PATHS = [Linear(), Cosine(), VP(), Follmer(2.0), Follmer(3.0, ratio=20.0)]
T = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_derivatives_equal_autograd(path):
    for value, derivative in ((path.alpha, path.d_alpha), (path.beta, path.d_beta)):
        t = T.clone().requires_grad_(True)
        (exact,) = torch.autograd.grad(value(t).sum(), t)
        assert torch.allclose(derivative(T), exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_kappa_and_eta_follow_their_definitions(path):
    a, b, da, db = path.alpha(T), path.beta(T), path.d_alpha(T), path.d_beta(T)
    assert torch.allclose(path.kappa(T), da / a)
    assert torch.allclose(path.eta(T), b * (da / a * b - db))
    assert torch.allclose(path.wronskian(T), b * da - a * db)


def test_linear_memoryless_noise_is_the_papers():
    assert torch.allclose(Memoryless(Linear())(T) ** 2, 2 * (1 - T) / T)
    h = 1 / 40
    assert torch.allclose(Memoryless(Linear(), offset=h)(T) ** 2, 2 * (1 - T + h) / (T + h))
    wrong = ((1 - T) / T) ** 2  # σ = (1−t)/t, printed on one slide
    assert not torch.allclose(Memoryless(Linear())(T) ** 2, wrong, rtol=0.1)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("predicts", get_args(Predicts))
def test_predictors_are_inverses(path, predicts, generator):
    x, x1 = torch.randn(2, 19, 3, generator=generator)
    out = from_x1(x1, x, T, path, predicts)
    assert torch.allclose(to_x1(out, x, T, path, predicts), x1, rtol=1e-9, atol=1e-9)
    process = Process(path, lambda x, t: from_x1(x1, x, t, path, predicts), predicts, (3,))
    assert torch.allclose(process.x1(x, T), x1, rtol=1e-9, atol=1e-9)
    a, b = path.alpha(T)[:, None], path.beta(T)[:, None]
    assert torch.allclose(a * process.x1(x, T) + b * process.x0(x, T), x, rtol=1e-9, atol=1e-9)
    kappa, eta = path.kappa(T)[:, None], path.eta(T)[:, None]
    assert torch.allclose(process.velocity(x, T), kappa * x + eta * process.score(x, T), rtol=1e-8, atol=1e-8)


def test_residual_tells_memoryless_from_constant():
    assert memoryless_residual(Linear(), Memoryless(Linear())) < 1e-4
    assert memoryless_residual(Cosine(), Memoryless(Cosine())) < 1e-4
    assert memoryless_residual(Linear(), Constant(0.2)) == pytest.approx(0.97, abs=0.005)
    assert memoryless_residual(Linear(), Constant(1.0)) == pytest.approx(0.46, abs=0.005)
    assert memoryless_residual(Linear(), zero) == pytest.approx(1.0)
    vp = VP(0.1, 10.0)  # a real schedule starts at α_0 > 0, and that is the residual
    alpha0 = float(vp.alpha(torch.zeros(())))
    assert alpha0 == pytest.approx(math.exp(-0.25 * 10.1), rel=1e-6)
    assert memoryless_residual(vp, Memoryless(vp)) == pytest.approx(alpha0, rel=1e-3)


def test_residual_equals_simulated_correlation(generator):
    n, steps, sigma = 20_000, 400, 1.0
    x = x0 = torch.randn(n, generator=generator)
    for k in range(steps):  # N(0, 1) data on the linear path: score −x/(t² + (1−t)²)
        t = k / steps
        m = t**2 + (1 - t) ** 2
        drift = (2 * t - 1) / m * x - sigma**2 / 2 * x / m
        x = x + drift / steps + sigma * steps**-0.5 * torch.randn(n, generator=generator)
    correlation = float(torch.corrcoef(torch.stack([x0, x]))[0, 1])
    assert correlation == pytest.approx(memoryless_residual(Linear(), Constant(sigma)), abs=0.02)


def test_misuse_is_named():
    with pytest.raises(TiltflowError, match="predicts='noise'"):
        Process(Linear(), lambda x, t: x, "noise", (2,))  # type: ignore[arg-type]
    bad = Process(Linear(), lambda x, t: x[:, :1], "x1", (2,))
    with pytest.raises(TiltflowError, match=r"returned \(4, 1\)"):
        bad.x1(torch.zeros(4, 2), torch.full((4,), 0.5))
