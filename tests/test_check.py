"""check_reward: a good reward passes every line, each bad one fails the line that names its fault; λ in closed form."""

import math
from itertools import pairwise

import pytest
import torch

from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import Linear
from tiltflow.core.process import Process
from tiltflow.core.weights import ess
from tiltflow.problems.tilt import GaussianMixture, QuadraticReward, TiltProblem
from tiltflow.verdict.check_reward import check_reward, quick_check
from tiltflow.verdict.strength import largest_strength, predict_tilt

BASE = Process(Linear(), lambda x, t: x, "x1", (3,))


def good(x):
    return (x * torch.tensor([0.5, -0.2, 0.1]).to(x)).sum(1) + 0.3 * torch.sin(x[:, 0])


def report_of(reward, n=400, seed=0, **kw):
    generator = torch.Generator().manual_seed(seed)
    return check_reward(BASE, reward, samples=torch.randn(n, 3, generator=generator), generator=generator, **kw)


def status(report):
    return {line.name: line.status for line in report.lines}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_good_reward_passes_every_line(dtype, generator):
    samples = torch.randn(2_000, 3, generator=generator).to(dtype)
    report = check_reward(BASE, good, samples=samples, generator=generator, judge=lambda x: x[:, 0], strengths=[0.7])
    assert set(status(report).values()) == {"pass"} and report.status == "pass"
    strengths = [row.strength for row in report.strengths]
    assert strengths == sorted(strengths) and strengths[0] == 0 and {0.7, report.suggestion} <= set(strengths)
    (line,) = (line for line in report.lines if line.name == "gradient check")
    assert line.value < 1e-6 and "float64" in line.explanation


class Flipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return good(x)

    @staticmethod
    def backward(ctx, upstream):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            (grad,) = torch.autograd.grad(good(x).sum(), x)
        return -upstream[:, None] * grad


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, upstream):
        return upstream


NOISE = torch.Generator().manual_seed(1)
FROZEN = torch.nn.Linear(1, 1).requires_grad_(True)


def clamps(x):
    with torch.no_grad():
        x.clamp_(-0.3, 0.3)
    return x[:, 0]


def wipes(x):
    x.data[:, 1].mul_(0)
    return good(x)


def in_place(x):
    x.mul_(0.5).tanh_()
    return good(x)


def raises(x):
    raise KeyError("no such feature")


BAD = {
    "two axes": (lambda x: good(x)[:, None], "output shape", "(32, 1)"),
    "one number": (lambda x: good(x).mean(), "output shape", "()"),
    "not a tensor": (lambda x: good(x).tolist(), "output shape", "list"),
    "wrong length": (lambda x: good(x)[1:], "output length", "(31,)"),
    "squeeze": (lambda x: good(x)[:, None].squeeze() if len(x) > 1 else good(x).repeat(2), "output length", "(2,)"),
    "whole numbers": (lambda x: good(x).long(), "dtype", "int64"),
    "nan": (lambda x: good(x).sqrt(), "finite value", "NaN or infinite"),
    "infinite": (lambda x: good(x).clamp_min(0).log(), "finite value", "NaN or infinite"),
    "one infinite": (lambda x: torch.where(x[:, 0] > 2.5, torch.inf, good(x)), "finite value", "NaN or infinite"),
    "noisy": (lambda x: good(x) + torch.rand(len(x), generator=NOISE), "deterministic", "random"),
    "normalised": (lambda x: good(x) / good(x).norm(), "batch independent", "rows are mixed"),
    "reordered": (lambda x: good(x).sort().values, "batch independent", "rows are mixed"),
    "constant": (lambda x: 0 * x.sum(1) + 3, "varies", "nothing to tilt"),
    "detached": (lambda x: good(x.detach()), "differentiable", "detached"),
    "detached, with weights": (
        lambda x: good(x.detach()) + FROZEN(torch.zeros(1, 1, dtype=torch.float32))[0, 0],
        "differentiable",
        "detached",
    ),
    "gradient nan": (lambda x: good(x) + (0 * x[:, 1]).sqrt(), "finite gradient", "sqrt"),
    "flipped gradient": (Flipped.apply, "gradient check", "float64"),
    "wrong factor": (lambda x: 2 * good(x) - good(x).detach(), "gradient check", "float64"),
    "straight through": (lambda x: StraightThrough.apply(x).sum(1), "gradient check", "float64"),
    "steps": (lambda x: (x > 0).to(x).sum(1) + 0 * x.sum(1), "gradient norm", "nothing to follow"),
    "changed behind autograd": (clamps, "input unchanged", "x.clone()"),
    "wiped": (wipes, "input unchanged", "x.clone()"),
    "raises": (raises, "output shape", "KeyError: 'no such feature'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_reward_fails_its_line_and_is_named(name):
    reward, culprit, words = BAD[name]
    report = report_of(reward)
    assert report.status == "fail"
    failing = [line for line in report.lines if line.status == "fail"]
    assert failing[0].name == culprit and words in failing[0].explanation
    assert {line.name for line in failing} <= {culprit, "differentiable", "gradient norm"}  # no line cries for another
    assert len(report.lines) == 17


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_float32_rewards_are_checked_with_their_own_tolerance(seed):
    """A reward that refuses doubles, one that rounds to float32 inside, and the flipped twin of the first."""

    def only_float32(x):
        if x.dtype != torch.float32:
            raise RuntimeError("mat1 and mat2 must have the same dtype")
        return good(x)

    def rounds(x):
        return good(x.float()).to(x)

    def flipped(x):
        return 2 * only_float32(x).detach() - only_float32(x)

    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(400, 3, generator=generator).float()
    for reward, expected in ((only_float32, "pass"), (rounds, "pass"), (flipped, "fail")):
        report = check_reward(BASE, reward, samples=samples, generator=generator)
        (line,) = (line for line in report.lines if line.name == "gradient check")
        assert line.status == expected and "in float32" in line.explanation
        assert ("in float64, differences" if reward is rounds else "not in float64: RuntimeError") in line.explanation


def test_a_rough_reward_cannot_be_told_by_differences():
    report = report_of(lambda x: good(x) + 1e-3 * torch.sin(1e7 * x).sum(1))
    assert status(report)["gradient check"] == "cannot tell"


def test_heavy_tailed_gradients_warn_and_a_few_samples_warn():
    report = report_of(lambda x: good(x) + (5 * x[:, 0]).exp() / 100)
    assert status(report)["gradient tail"] == "warn"
    assert status(report_of(good, n=400))["strength"] == "warn"


def test_failing_judge_is_named():
    report = report_of(good, judge=lambda x: x)
    assert status(report)["judge"] == "fail"
    assert all(row.judge is None for row in report.strengths)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_strengths_on_a_gaussian_equal_the_closed_form(seed):
    """r = b·x on N(m, C): mean b·m + λ b'Cb, log Z = λ b·m + ½λ² b'Cb, ESS exp(−λ² b'Cb)."""
    b, m = torch.tensor([0.5, -1.0, 0.3]), torch.tensor([0.1, 0.2, -0.3])
    c = torch.tensor([[1.0, 0.2, 0.0], [0.2, 0.5, 0.1], [0.0, 0.1, 0.8]])
    problem = TiltProblem("p", GaussianMixture.gaussian(m, c), QuadraticReward.of_direction(b))
    generator = torch.Generator().manual_seed(seed)
    samples = problem.base.sample(20_000, generator)
    report = check_reward(problem.process(), problem.reward, samples=samples, generator=generator, judge=lambda x: 2 * x @ b)
    variance, start = float(b @ c @ b), float(b @ m)
    assert report.suggestion == pytest.approx(math.sqrt(math.log(20) / variance), rel=0.1)
    rows = [row for row in report.strengths if row.strength <= 1.01 * report.suggestion]
    assert len(rows) == 5 and rows[0].mean_reward_error == pytest.approx((variance / 20_000) ** 0.5, rel=0.05)
    for row in rows:
        s = row.strength
        assert abs(row.mean_reward - start - s * variance) < 4 * row.mean_reward_error
        assert abs(row.ess - math.exp(-(s**2) * variance)) < 4 * row.ess_error + 1e-9
        assert abs(row.log_z - s * start - 0.5 * s**2 * variance) < 4 * row.log_z_error + 1e-9
        assert row.judge == pytest.approx(2 * row.mean_reward)
        assert row.judge_error == pytest.approx(2 * row.mean_reward_error)
    wrong = predict_tilt(-problem.reward(samples), 1.0)  # the bad twin: the reward's sign flipped
    assert abs(wrong.mean_reward - start - variance) > 10 * wrong.mean_reward_error


def test_standard_errors_are_the_spread_over_seeds():
    generator = torch.Generator().manual_seed(0)
    rows = [predict_tilt(torch.randn(2_000, generator=generator), 0.8) for _ in range(200)]
    for value, error in (("mean_reward", "mean_reward_error"), ("ess", "ess_error"), ("log_z", "log_z_error")):
        spread = float(torch.tensor([getattr(row, value) for row in rows]).std())
        assert spread == pytest.approx(sum(getattr(row, error) for row in rows) / 200, rel=0.25)


def test_largest_strength_is_the_crossing_of_a_monotone_curve(generator):
    rewards = torch.randn(1_000, generator=generator) ** 3
    curve = [ess(s * rewards) for s in torch.linspace(0, 5, 40).tolist()]
    assert all(after <= before for before, after in pairwise(curve))
    for threshold in (0.05, 0.5):
        assert ess(largest_strength(rewards, threshold) * rewards) == pytest.approx(threshold, rel=1e-4)
        assert largest_strength(10 * rewards, threshold) == pytest.approx(largest_strength(rewards, threshold) / 10)
    assert largest_strength((rewards > 0).double()) is None  # half the samples have the highest value: no limit
    assert largest_strength(torch.ones(10)) is None
    assert status(report_of(lambda x: torch.sigmoid(1e3 * x[:, 0])))["strength"] == "warn"


def test_one_condition_for_all_samples(generator):
    """Only the first row of a condition is used, in the dtype of x; other arguments pass as they are."""
    seen = []

    def reward(x, centre, power):
        assert centre.shape == (len(x), 3) and centre.dtype == x.dtype and power == 2
        seen.append(centre)
        return -((x - centre) ** power).sum(1)

    centres = torch.tensor([[1.0, 0.0, 0.0], [9.0, 9.0, 9.0]], dtype=torch.float32)
    report = report_of(reward, n=2_000, centre=centres, power=2)
    assert report.status == "pass" and all((c == centres[0]).all() for c in seen)


def test_misuse_is_an_error_not_a_line(generator):
    x = torch.randn(200, 3, generator=generator)
    for samples, kw, message in (
        (x[:50], {}, "at least 100"),
        (x[:, :2], {}, r"\(N, 3\)"),
        (x / 0, {}, "not finite"),
        (x, {"strengths": [-1.0]}, "negate the reward"),
        (x, {"strengths": [math.nan]}, "negate the reward"),
    ):
        with pytest.raises(TiltflowError, match=message):
            check_reward(BASE, good, samples=samples, generator=generator, **kw)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("needs_gradient", [True, False])
def test_the_door_stops_a_bad_reward_and_names_it(name, needs_gradient, generator):
    reward, culprit, words = BAD[name]
    x = torch.randn(32, 3, generator=generator)
    beyond = {"one infinite", "flipped gradient", "wrong factor", "straight through"}  # dear
    gradient = {"differentiable", "gradient norm", "finite gradient", "input unchanged"}
    if name in beyond or (not needs_gradient and culprit in gradient):
        quick_check(reward, x, generator, needs_gradient)
    else:
        with pytest.raises(TiltflowError, match=culprit) as raised:
            quick_check(reward, x, generator, needs_gradient)
        assert words in str(raised.value) or culprit == "output length"


def test_a_reward_may_change_what_it_is_given(generator):
    """It is given a copy: value, gradient and the caller's samples are those of the pure twin."""
    x = torch.randn(32, 3, generator=generator)
    before = x.clone()
    mine, twin = RewardCost(in_place), RewardCost(lambda x: good((0.5 * x).tanh()))
    assert torch.equal(mine.value(x), twin.value(x)) and torch.allclose(mine.grad(x), twin.grad(x), atol=1e-12)
    assert torch.equal(RewardCost(clamps).value(x), RewardCost(lambda x: x[:, 0].clamp(-0.3, 0.3)).value(x))
    assert torch.equal(x, before)
    quick_check(in_place, x, generator, True)
    assert status(report_of(in_place))["input unchanged"] == "pass" and report_of(in_place).status == report_of(good).status
    assert torch.equal(x, before)


def test_the_door_takes_conditions_and_few_samples(generator):
    x = torch.randn(8, 3, generator=generator)
    quick_check(lambda x, c: -((x - c) ** 2).sum(1), x, generator, True, c=torch.ones(8, 3))
    with pytest.raises(TiltflowError, match="finite"):
        quick_check(good, torch.full((8, 3), torch.nan), generator, True)
