"""docs/foreign-models.md: every example is run, with a network of that convention whose exact answer is known.

The data are a Gaussian mixture, so E[X_1 | X_t = x], and with it the velocity on any path, has a closed form. A case gives
the network in its own convention; the process that the example builds must have the mixture's velocity in tiltflow's.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import tiltflow
from tiltflow.core.cost import RewardCost
from tiltflow.core.process import from_x1
from tiltflow.problems.tilt import GaussianMixture

PAGE = (Path(__file__).parent.parent / "docs" / "foreign-models.md").read_text(encoding="utf-8")
DATA = GaussianMixture.isotropic([0.6, 0.4], [[1.0, 0.0], [-1.0, 0.5]], 0.4)
LINEAR, VP = tiltflow.Linear(), tiltflow.VP(0.1, 20.0)
SIGMA_MAX, C = 80.0, 2.5
BLOCKS: dict[str, list[str]] = {}
for section in re.split(r"^#+ ", PAGE, flags=re.M)[1:]:
    BLOCKS[section.split("\n")[0]] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def exact(x, t, path=LINEAR, data=DATA, predicts="velocity"):
    """What the mixture's model predicts on a path, with t = 1 for data."""
    return from_x1(data.x1(x, t, path), x, t, path, predicts)


class Foreign(nn.Module):
    """A network with the given function, and a weight that must be found for training."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, *args, **condition):
        return self.weight * self.function(*args, **condition)


def run(title, which=0, **names):
    """The names that a block of the guide leaves behind, given ``names``."""
    exec(BLOCKS[title][which], names)
    return names


@pytest.fixture
def x():
    return 1.5 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


TIMES = torch.linspace(0.05, 0.95, 64, dtype=torch.float64)


def velocity_is_exact(base, x, t=TIMES, data=DATA, **condition):
    """The process has the mixture's velocity and the network's weight."""
    assert len(list(base.model.parameters())) == 1
    found, want = base.velocity(x, t, **condition), exact(x, t, base.interpolant, data)
    return bool(torch.isfinite(found).all()) and torch.allclose(found, want, rtol=1e-6, atol=1e-8)


def test_every_block_is_in_a_test():
    tests = Path(__file__).read_text(encoding="utf-8")
    assert [title for title, blocks in BLOCKS.items() if blocks and f'"{title}"' not in tests] == []
    assert [title for title, blocks in BLOCKS.items() if len(blocks) > 1] == ["Class conditions"]


def test_the_predictors(x):
    nets = {p: Foreign(lambda x, t, p=p: exact(x, t, VP, predicts=p)) for p in ("velocity", "eps", "x1", "score")}
    bases = run("What the model predicts", nets=nets)["bases"]
    assert len(bases) == 4
    assert all(velocity_is_exact(base, x) for base in bases.values())
    assert not velocity_is_exact(tiltflow.Process(VP, nets["eps"], "x1", (2,)), x)


def v_prediction(x, t):
    one = DATA.x1(x, t, VP)
    alpha, beta = VP.alpha(t)[:, None], VP.beta(t)[:, None]
    return alpha * (x - alpha * one) / beta - beta * one


def timesteps(x, n):
    """A DDPM's noise prediction from its own table, n = 0 … 999."""
    assert n.dtype == torch.long and n.min() >= 0 and n.max() <= 999
    bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[n]
    alpha, beta = bar.sqrt(), (1 - bar).sqrt()
    return (x - alpha[:, None] * noised_mean(x, alpha, beta)) / beta[:, None]


def noised_mean(x, alpha, beta):
    """E[X_1 | αX_1 + βX_0 = x] component by component, written anew."""
    m, w, v = DATA.means, DATA.weights, 0.4**2
    variance = (alpha**2 * v + beta**2)[:, None]
    gap = x[:, None] - alpha[:, None, None] * m
    share = torch.softmax(w.log() - 0.5 * (gap**2).sum(-1) / variance, 1)
    return (share[..., None] * (m + (alpha[:, None] * v / variance)[..., None] * gap)).sum(1)


def test_the_independent_posterior_mean_agrees(x):
    assert torch.allclose(noised_mean(x, VP.alpha(TIMES), VP.beta(TIMES)), DATA.x1(x, TIMES, VP))


def columns(x, t):
    assert t.shape == (len(x), 1)
    return exact(x, t[:, 0] / 1000)


def edm(y, sigma):
    assert sigma.max() <= SIGMA_MAX * (1 + 1e-12)
    return noised_mean(y, torch.ones_like(sigma), sigma)


def test_a_network_in_the_same_convention(x):
    assert velocity_is_exact(run("Your own model", net=Foreign(exact))["base"], x)


CASES = {
    "v-prediction": (v_prediction, "x1", VP),
    "Time runs the other way": (lambda x, s: -exact(x, 1 - s), "velocity", LINEAR),
    "Sigma in the place of time": (edm, "x1", LINEAR),
}


@pytest.mark.parametrize("title", CASES)
def test_the_wrapped_network_has_the_exact_velocity_and_the_bare_one_has_not(title, x):
    function, predicts, path = CASES[title]
    net = Foreign(function)
    assert velocity_is_exact(run(title, net=net)["base"], x)
    assert not velocity_is_exact(tiltflow.Process(path, net, predicts, (2,)), x)


def test_times_of_another_shape(x):
    net = Foreign(columns)
    assert velocity_is_exact(run("Times of another shape", net=net)["base"], x)
    with pytest.raises(AssertionError):
        tiltflow.Process(LINEAR, net, "velocity", (2,)).velocity(x, TIMES)


def test_integer_timesteps_are_exact_on_the_grid_and_near_vp(x):
    base = run("Integer timesteps", net=Foreign(timesteps))["base"]
    t = torch.arange(1, 40, dtype=torch.float64)[torch.arange(64) % 39] / 40
    assert velocity_is_exact(base, x, t)
    assert torch.allclose(base.interpolant.alpha(t), VP.alpha(t), atol=2e-3)  # the continuous limit of the same rates
    assert not velocity_is_exact(tiltflow.Process(VP, base.model, "eps", (2,)), x, t)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.isfinite(base.x1(x[:2], ends)).all()
    assert torch.equal(base.x1(x[1:2], ends[1:]), x[1:2])


def test_sigma_is_bounded_at_the_start(x):
    base = run("Sigma in the place of time", net=Foreign(edm))["base"]
    at_zero = base.x1(x, torch.zeros(64, dtype=torch.float64))
    mean = (DATA.weights[:, None] * DATA.means).sum(0)
    assert (at_zero - mean).abs().max() < 0.1


def test_noise_of_another_scale(x):
    scaled = GaussianMixture(DATA.weights, DATA.means / C, DATA.covariances / C**2)
    net = Foreign(lambda y, t: C * exact(y / C, t, data=scaled))
    names = run("Noise of another scale", net=net, score=lambda data: data[:, 0])
    assert velocity_is_exact(names["base"], x, data=scaled)
    assert torch.equal(names["reward"](x), C * x[:, 0])
    assert not velocity_is_exact(tiltflow.Process(LINEAR, net, "velocity", (2,)), x, data=scaled)


def test_normalised_data(x):
    mean, std = torch.tensor([3.0, -1.0], dtype=torch.float64), 2.0
    names = run("Normalised data", net=Foreign(exact), score=lambda data: data[:, 0], mean=mean, std=std)
    assert velocity_is_exact(names["base"], x)
    assert torch.equal(names["reward"](x), 3.0 + 2.0 * x[:, 0])


def of_class(x, t, y):
    parts = torch.stack([exact(x, t, data=GaussianMixture.isotropic([1.0], DATA.means[i][None], 0.4)) for i in (0, 1)])
    return parts[y, torch.arange(len(x))]


def test_a_fixed_class(x):
    second = GaussianMixture.isotropic([1.0], DATA.means[1][None], 0.4)
    base = run("Class conditions", 0, net=Foreign(of_class))["base"]
    assert velocity_is_exact(base, x, data=second) and not velocity_is_exact(base, x)


def test_all_classes_at_once(x):
    torch.set_default_dtype(torch.float64)
    try:
        names = run("Class conditions", 1, net=Foreign(of_class))
    finally:
        torch.set_default_dtype(torch.float32)
    y = torch.arange(64) % 2
    assert torch.equal(names["base"].velocity(x, TIMES, y=y), of_class(x, TIMES, y))
    rows = names["conditions"](8, torch.Generator().manual_seed(0))
    assert rows["y"].shape == (8,)
    assert torch.equal(names["reward"](x, y), torch.where(y == 1, x[:, 0], -x[:, 0]))


def test_latents_are_decoded_in_the_reward(x):
    decoder = nn.Linear(2, 5, dtype=torch.float64)
    names = run("Latent models", net=Foreign(exact), decoder=decoder, score=lambda image: image.sum(1))
    assert velocity_is_exact(names["base"], x)
    assert not any(p.requires_grad for p in decoder.parameters())
    grad = RewardCost(names["reward"]).grad(x)  # of g = −r
    assert torch.allclose(grad, (-decoder.weight.sum(0) / 0.5).expand(64, -1))


def test_samples_of_the_base_show_a_wrong_wrapper(capsys):
    net = Foreign(lambda x, s: -exact(x, 1 - s))
    right = run("Time runs the other way", net=net)["base"]
    mean, covariance = DATA.moments(1.0, LINEAR)
    x = run("Is the wrapper right?", base=right)["x"]
    error = 4 * covariance.diagonal().sqrt() / 2000**0.5  # four standard errors
    assert ((x.mean(0) - mean).abs() < error + 0.01).all()
    flipped = run("Is the wrapper right?", base=tiltflow.Process(LINEAR, net, "velocity", (2,)))["x"]
    assert not ((flipped.mean(0) - mean).abs() < error + 0.01).all()
