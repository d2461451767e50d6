"""Flow matching: the minimiser is the closed-form velocity; labels drop; a resumed run is the whole one."""

import pytest
import torch
from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import Cosine, Linear
from tiltflow.core.process import Process, expand
from tiltflow.train.flow_matching import FlowMatching, drop_labels, flow_matching_loss, pretrain
from tiltflow.train.settings import Training

MEAN, STD = torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([0.5, 1.5], dtype=torch.float64)


class AffinePredictor(nn.Module):
    """a_b(t) x + c_b(t) on 8 bins of t, per coordinate: enough for a Gaussian; convex."""

    bins = 8

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2, self.bins, 2, dtype=torch.float64))
        self.sign = sign

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a, c = self.table[:, (t * self.bins).long().clamp(max=self.bins - 1)]
        return a * x + c


def gaussian_x1(interpolant, x: Tensor, t: Tensor) -> Tensor:
    """E[X_1|x] = m + α S/(α²S + β²) (x − αm) for data N(m, S)."""
    alpha, beta = expand(interpolant.alpha(t), x), expand(interpolant.beta(t), x)
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + beta**2) * (x - alpha * MEAN)


class Exact(nn.Module):
    """Closed-form predictor of a Gaussian data set plus a constant offset."""

    def __init__(self, process: Process, offset: float = 0.0) -> None:
        super().__init__()
        self.process = process
        self.offset = nn.Parameter(torch.full((2,), offset, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        truth = Process(
            self.process.interpolant, lambda x, t: gaussian_x1(self.process.interpolant, x, t), "x1", (2,)
        )
        value = {"x1": truth.x1, "velocity": truth.velocity, "eps": truth.x0, "score": truth.score}[
            self.process.predicts
        ]
        return value(x, t) + self.offset


def data(n: int, generator: torch.Generator) -> Tensor:
    return MEAN + STD * torch.randn(n, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("predicts", ["velocity", "x1", "eps", "score"])
@pytest.mark.parametrize("interpolant", [Linear(), Cosine()])
def test_closed_form_is_stationary(predicts, interpolant):
    """The loss has zero gradient at the exact predictor, whatever it predicts, and a clear one beside it."""

    def slope(offset: float, seed: int) -> Tensor:
        hollow = Process(interpolant, lambda x, t: x, predicts, (2,))
        model = Exact(hollow, offset)
        process = Process(interpolant, model, predicts, (2,))
        generator = torch.Generator().manual_seed(seed)
        flow_matching_loss(process, data(40_000, generator), generator).backward()
        return model.offset.grad

    exact = torch.stack([slope(0.0, seed) for seed in range(6)])
    spread = exact.std(0) / 6**0.5
    assert (exact.mean(0).abs() < 5 * spread).all(), (exact.mean(0), spread)
    off = slope(0.3, 0)
    assert (off > 10 * spread).all(), (off, spread)


class FlippedNoise(FlowMatching):
    """The known-bad twin: the sign of X_0 is flipped in the target only."""

    def loss(self, control, material, generator):
        x1, x0, t = material["x1"], material["x0"], material["t"][:, None]
        prediction = control.module(t * x1 + (1 - t) * x0, material["t"])
        return (prediction - (x1 + x0)).square().mean()


def regress(kind: type[FlowMatching], seed: int) -> float:
    """Fit the affine table and return its mean squared velocity error against the closed form."""
    generator = torch.Generator().manual_seed(seed)
    model = AffinePredictor()
    method = kind(Process(Linear(), model, "velocity", (2,)), lambda n, g: (data(n, g), {}), 1024)
    pretrain(method, Training(rounds=600, learning_rate=2e-2, ema=0.98), generator)
    t = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    t = t.repeat_interleave(500)
    x1 = data(len(t), generator)
    x = t[:, None] * x1 + (1 - t[:, None]) * torch.randn(x1.shape, generator=generator, dtype=x1.dtype)
    exact = Process(Linear(), lambda x, t: gaussian_x1(Linear(), x, t), "x1", (2,)).velocity(x, t)
    with torch.no_grad():
        return (model(x, t) - exact).square().mean().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_regression_finds_the_closed_form_velocity(seed):
    assert regress(FlowMatching, seed) < 0.03


def test_flipped_noise_sign_is_caught():
    assert regress(FlippedNoise, 0) > 0.3


def test_loss_refuses_another_event_shape():
    process = Process(Linear(), AffinePredictor(), "velocity", (3,))
    with pytest.raises(TiltflowError, match=r"\(2,\)"):
        flow_matching_loss(process, torch.zeros(4, 2), torch.Generator())


def test_drop_labels_share():
    labels = torch.arange(10).repeat(2000)
    dropped = drop_labels(labels, 0.1, torch.Generator().manual_seed(0))
    assert abs((dropped == -1).double().mean().item() - 0.1) < 0.01
    assert torch.equal(dropped[dropped >= 0], labels[dropped >= 0])


def test_conditions_reach_the_model():
    seen = []

    def draw(n, generator):
        return data(n, generator), {"label": torch.arange(n)}

    class Labelled(AffinePredictor):
        def forward(self, x, t, label):
            seen.append(label)
            return super().forward(x, t)

    method = FlowMatching(Process(Linear(), Labelled(), "velocity", (2,)), draw, 5)
    pretrain(method, Training(rounds=1), torch.Generator())
    assert seen[0].tolist() == [0, 1, 2, 3, 4]


class Killed(Exception):
    """The power cut of the resume test."""


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    def run(checkpoint, die_at: int | None = None, resume: bool = False) -> list[Tensor]:
        model = AffinePredictor()
        method = FlowMatching(Process(Linear(), model, "velocity", (2,)), lambda n, g: (data(n, g), {}), 64)

        def callback(row):
            if row["iteration"] == die_at:
                raise Killed

        generator = torch.Generator().manual_seed(7)
        settings = Training(rounds=40, checkpoint_every=10)
        pretrain(method, settings, generator, checkpoint=checkpoint, resume=resume, callback=callback)
        return [model.table.detach(), generator.get_state()]

    whole = run(tmp_path / "a.safetensors")
    with pytest.raises(Killed):
        run(tmp_path / "b.safetensors", die_at=25)
    resumed = run(tmp_path / "b.safetensors", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))
