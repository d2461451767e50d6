"""Models of other conventions as a Process, ten lines each: the raw model is named by check_base, the wrapped one passes.

The guide for foreign models quotes these wrappers. Each network is exact, in its own convention, on the same mixture.
"""

import torch
from torch import nn

from tiltflow.core.control import FineTuned
from tiltflow.core.interpolant import VP, Linear
from tiltflow.core.process import Process
from tiltflow.core.simulate import sample
from tiltflow.problems.tilt import GaussianMixture, three_modes
from tiltflow.tilting.settings import FinetuneSettings
from tiltflow.tilting.train import finetune
from tiltflow.verdict.check_base import check_base

DATA = three_modes()


def failing(process, **kw):
    report = check_base(process, generator=torch.Generator().manual_seed(0), samples=500, steps=12, **kw)
    return {line.name for line in report.lines if line.status == "fail"}


class Flux(nn.Module):
    """τ = 0 is data, x = (1 − τ) data + τ noise, the network returns noise − data (SD3, FLUX)."""

    def forward(self, x, tau):
        t = 1 - tau
        x1 = DATA.x1(x, t, Linear())
        x0 = -(1 - t)[:, None] * DATA.score(x, t, Linear())
        return x0 - x1


class FluxVelocity(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t, **condition):
        return -self.net(x, 1 - t, **condition)


def test_flipped_time():
    assert "direction of time" in failing(Process(Linear(), Flux(), "velocity", (2,)))
    assert not failing(Process(Linear(), FluxVelocity(Flux()), "velocity", (2,)))


class DDPM(nn.Module):
    """The noise at timestep 0 (data) … 999 (noise) of the linear schedule, β from 1e-4 to .02: VP(.1, 20)."""

    def forward(self, x, timestep):
        t = 1 - timestep / 999
        return -VP().beta(t)[:, None] * DATA.score(x, t, VP())


class DDPMNoise(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t, **condition):
        return self.net(x, 999 * (1 - t), **condition)


def test_integer_timesteps():
    assert "timesteps" in failing(Process(VP(), DDPM(), "eps", (2,)))
    assert not failing(Process(VP(), DDPMNoise(DDPM()), "eps", (2,)))


class Column(nn.Module):
    """Takes t of shape (B, 1) and concatenates."""

    def forward(self, x, t):
        return DATA.x1(torch.cat([x, t], 1)[:, :-1], t[:, 0], Linear())


class ColumnTimes(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t, **condition):
        return self.net(x, t[:, None], **condition)


def test_times_in_a_column():
    assert "output shape" in failing(Process(Linear(), Column(), "x1", (2,)))
    assert not failing(Process(Linear(), ColumnTimes(Column()), "x1", (2,)))


class EDM(nn.Module):
    """D(y, σ) = E[X_1 | X_1 + σ·noise = y] (variance exploding: EDM, k-diffusion)."""

    def forward(self, y, sigma):
        scale = (1 + sigma**2).rsqrt()  # the same conditional mean, seen through a path with α² + β² = 1
        alpha, beta = scale, sigma * scale
        log_alpha, path = alpha.log(), VP()
        b, a = path.beta_min, path.beta_max - path.beta_min
        s = (-b + (b**2 - 4 * a * log_alpha).sqrt()) / a  # ½(b s + ½ a s²) = −log α
        assert torch.allclose(path.beta(1 - s), beta, atol=1e-6)
        return DATA.x1(scale[:, None] * y, 1 - s, path)


class EDMDenoiser(nn.Module):
    """X̂_1 on any path with α_0 > 0: x = αX_1 + βX_0 is α(X_1 + (β/α)X_0)."""

    def __init__(self, net, path):
        super().__init__()
        self.net, self.path = net, path

    def forward(self, x, t, **condition):
        alpha, beta = self.path.alpha(t), self.path.beta(t)
        return self.net(x / alpha[:, None], beta / alpha, **condition)


def test_variance_exploding_scalings():
    assert "consistency" in failing(Process(VP(), EDM(), "x1", (2,)))
    assert not failing(Process(VP(), EDMDenoiser(EDM(), VP()), "x1", (2,)))


class Classes(nn.Module):
    """X̂_1 of N((±2, 0), .25 I), the sign by a class 0 or 1."""

    def forward(self, x, t, label):
        m = (4.0 * label[:, None] - 2) * torch.tensor([1.0, 0.0]).to(x)
        a, b = t[:, None], 1 - t[:, None]
        return m + 0.25 * a * (x - a * m) / (0.25 * a**2 + b**2)


class OneClass(nn.Module):
    """A class for every sample, known beforehand."""

    def __init__(self, net, label):
        super().__init__()
        self.net, self.label = net, label

    def forward(self, x, t):
        return self.net(x, t, label=torch.full((len(x),), self.label, device=x.device))


def any_class(n, generator):
    return {"label": torch.randint(2, (n,), generator=generator)}


def test_classes_as_a_condition_or_fixed():
    assert "output shape" in failing(Process(Linear(), Classes(), "x1", (2,)))
    assert not failing(Process(Linear(), Classes(), "x1", (2,)), conditions=any_class)
    assert not failing(Process(Linear(), OneClass(Classes(), 1), "x1", (2,)))


class Latents(nn.Module):
    """The velocity of N(0, .25 I) latents, plus weights to train."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 2))
        nn.init.zeros_(self.net[2].weight)
        nn.init.zeros_(self.net[2].bias)

    def forward(self, z, t):
        t = t[:, None]
        return (0.25 * t - (1 - t)) / (0.25 * t**2 + (1 - t) ** 2) * z + self.net(torch.cat([z, t], 1))


def decode(z):
    """A decoder: latents scaled by .5, as an autoencoder's are, to images (B, 1, 1, 2)."""
    return (z / 0.5)[:, None, None, :]


def test_a_latent_model_is_tilted_in_its_latents_by_a_reward_of_what_they_decode_to(generator):
    """r = (first pixel)/2 is z_1, so N(0, .25 I) goes to N((.25, 0), .25 I)."""
    base = Process(Linear(), Latents(), "velocity", (2,))
    assert not failing(base)
    settings = FinetuneSettings(
        rounds=25, gradient_steps=4, buffer_rounds=4, batch=96, steps=20, warmup=0, learning_rate=2e-2
    )
    tuned = finetune(base, lambda z: decode(z)[:, 0, 0, 0] / 2, 1.0, settings=settings)
    z = sample(tuned.chain, FineTuned(tuned.process), tuned.chain.source(4_000, generator), generator).x
    assert torch.allclose(z.mean(0), torch.tensor([0.25, 0.0]), atol=0.06) and decode(z).shape == (4_000, 1, 1, 2)


def test_a_base_of_the_wrong_scale_is_told():
    """Pixels 0 … 255 in place of about one: the warning that says to scale them."""
    pixels = GaussianMixture.isotropic([0.5, 0.5], [[60.0, 60.0], [-60.0, -60.0]], 10.0)
    base = Process(Linear(), lambda x, t: pixels.x1(x, t, Linear()), "x1", (2,))
    report = check_base(base, generator=torch.Generator().manual_seed(0), samples=500, steps=12)
    (line,) = (line for line in report.lines if line.name == "magnitude")
    assert line.status == "warn" and "scale the data" in line.explanation
