"""check_base: exact bases pass every line; each broken twin is named by its own line."""

import json
from dataclasses import replace
from typing import get_args

import pytest
import torch
from click.testing import CliRunner
from test_ends_of_time import Exact, exact
from torch import nn

from tiltflow.core.control import tilted
from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import VP, Cosine, Linear
from tiltflow.core.process import Predicts, Process
from tiltflow.problems.tilt import GaussianMixture, mixture2d
from tiltflow.verdict.base_consistency import readings
from tiltflow.verdict.check_base import check_base, require_base, starts_at_base

PATHS = {"linear": Linear(), "cosine": Cosine(), "vp": VP()}


def report_of(base, seed=0, samples=500, steps=12, **kw):
    return check_base(base, generator=torch.Generator().manual_seed(seed), samples=samples, steps=steps, **kw)


def status(report):
    return {line.name: line.status for line in report.lines}


def line_of(report, name):
    (line,) = (line for line in report.lines if line.name == name)
    return line


def failing(report):
    return [line.name for line in report.lines if line.status == "fail"]


class Around(nn.Module):
    """A function of (network, x, t) as a network."""

    def __init__(self, net, f):
        super().__init__()
        self.net, self.f = net, f

    def forward(self, x, t, **condition):
        return self.f(self.net, x, t, **condition)


def twin(base, f):
    return replace(base, model=Around(base.model, f))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("predicts", get_args(Predicts))
def test_exact_bases_pass_every_line(path, predicts):
    """In float64; a wrong reading of one of them is never preferred, whichever seed."""
    report = report_of(exact(PATHS[path], predicts), seed=len(path), samples=1_000, steps=20)
    assert set(status(report).values()) == {"pass"}, failing(report)
    assert len(report.lines) == 21
    assert line_of(report, "consistency").value < 0.05
    assert line_of(report, "denoiser").value == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("path,predicts", [("linear", "velocity"), ("linear", "eps"), ("linear", "x1"), ("vp", "eps")])
def test_flipped_time_is_named(path, predicts):
    base = exact(PATHS[path], predicts)
    report = report_of(twin(base, lambda net, x, t: net(x, 1 - t)))
    assert "direction of time" in failing(report) and "1 − t" in line_of(report, "direction of time").explanation
    assert set(failing(report)) <= {"consistency", "direction of time"}, failing(report)


def test_the_other_convention_of_velocities_is_named():
    """t = 0 is data and v points at the noise, as in SD3 and FLUX: −v(x, 1 − t) fits."""
    report = report_of(twin(exact(Linear(), "velocity"), lambda net, x, t: -net(x, 1 - t)))
    assert "negate" in line_of(report, "direction of time").explanation and "direction of time" in failing(report)


WRONG = [("velocity", "eps"), ("velocity", "x1"), ("eps", "velocity"), ("x1", "velocity"), ("score", "eps")]


@pytest.mark.parametrize("truth,said", WRONG)
def test_a_wrong_predictor_is_named(truth, said):
    report = report_of(replace(exact(Linear(), truth), predicts=said))
    line = line_of(report, "predictor")
    assert line.status == "fail" and f"predict {truth}, not {said}" in line.explanation
    assert set(failing(report)) <= {"consistency", "predictor", "magnitude"}


ELSEWHERE = [("cosine", "linear", "velocity"), ("linear", "cosine", "x1"), ("cosine", "linear", "eps")]
ELSEWHERE += [("vp", "linear", "eps")]


@pytest.mark.parametrize("truth,said,predicts", ELSEWHERE)
def test_a_wrong_interpolant_is_named(truth, said, predicts):
    report = report_of(replace(exact(PATHS[truth], predicts), interpolant=PATHS[said]))
    line = line_of(report, "interpolant")
    assert line.status == "fail" and type(PATHS[truth]).__name__ in line.explanation
    assert set(failing(report)) <= {"consistency", "interpolant"}


@pytest.mark.parametrize("down", [False, True])
def test_integer_timesteps_are_named(down):
    """A network that expects 0 … 999, up to the data or down to it, as the DDPM family does."""
    base = exact(VP() if down else Linear(), "eps" if down else "velocity")
    report = report_of(twin(base, lambda net, x, t: net(x, 1 - t / 999 if down else t / 999)))
    line = line_of(report, "timesteps")
    assert line.status == "fail" and ("999·(1 − t)" if down else "999·t") in line.explanation
    assert set(failing(report)) <= {"consistency", "timesteps", "magnitude"}


def test_a_network_that_ignores_t_is_named():
    report = report_of(twin(exact(Linear(), "velocity"), lambda net, x, t: net(x, 0 * t + 0.3)))
    assert line_of(report, "timesteps").status == "fail" and "hardly depends" in line_of(report, "timesteps").explanation


@pytest.mark.parametrize("predicts", ["velocity", "eps"])
def test_a_scaled_output_is_inconsistent_and_no_reading_is_blamed(predicts):
    report = report_of(twin(exact(Linear(), predicts), lambda net, x, t: 1.3 * net(x, t)))
    line = line_of(report, "consistency")
    assert line.status == ("warn" if predicts == "velocity" else "fail") and "scaled" in line.explanation
    assert not {"direction of time", "predictor", "interpolant", "timesteps"} & set(failing(report))


def mutates(net, x, t):
    out = net(x, t)
    x.mul_(0.5)
    return out


BROKEN = {
    "mutates x": (mutates, "input unchanged", "changes x"),
    "mutates t": (lambda net, x, t: net(x, t.clamp_(max=0.5)), "input unchanged", "changes t"),
    "wrong shape": (lambda net, x, t: net(x, t)[:, :1], "output shape", "(17, 1)"),
    "not a tensor": (lambda net, x, t: (net(x, t),), "output shape", "tuple"),
    "column of times": (lambda net, x, t: net(x, t[:, 0]), "output shape", "(B, 1)"),
    "scalar time": (lambda net, x, t: net(x, t[None].expand(len(x)) if t.ndim == 0 else 1 / 0), "output shape", "scalar"),
    "raises": (lambda net, x, t: {}["weights"], "output shape", "KeyError"),
    "nan at 0": (lambda net, x, t: net(x, t) + (0 * t / t)[:, None], "finite at t = 0", "t = 0"),
    "nan between": (lambda net, x, t: torch.where(t[:, None] == 0.5, torch.nan, net(x, t)), "finite between", "t = 0.5"),
    "infinite nearby": (lambda net, x, t: net(x, t) / (t[:, None] != 0.999), "finite between", "0.999"),
    "noisy": (lambda net, x, t: net(x, t) + 0.01 * torch.rand_like(x), "deterministic", "random"),
    "normalises": (lambda net, x, t: net(x - x.mean(0), t), "batch independent", "mixed"),
    "first t for all": (lambda net, x, t: net(x, t[:1].expand(len(x))), "batch independent", "one t"),
    "detached": (lambda net, x, t: net(x, t).detach(), "differentiable", "detached"),
    "explodes": (lambda net, x, t: net(x, t) + 1e4, "magnitude", "explodes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_network_fails_its_line(name):
    f, culprit, words = BROKEN[name]
    report = report_of(twin(exact(Linear(), "velocity"), f), samples=200)
    assert failing(report)[0] == culprit and words in line_of(report, culprit).explanation, failing(report)
    others = {"explodes": {"consistency"}}.get(name, set())
    assert set(failing(report)) <= {culprit, *others}, failing(report)


def test_nan_at_the_data_warns_because_nothing_goes_there():
    report = report_of(twin(exact(Linear(), "velocity"), lambda net, x, t: net(x, t) + (0 * t / (1 - t))[:, None]))
    assert line_of(report, "finite at t = 1").status == "warn" and report.status == "warn"


def test_training_mode_is_named_and_running_statistics_are_put_back():
    torch.manual_seed(0)

    class Normed(Around):
        def __init__(self, net):
            super().__init__(net, lambda net, x, t: net(x, t))
            self.norm, self.drop = nn.BatchNorm1d(2), nn.Dropout(0.1)

    base = exact(Linear(), "velocity")
    for train, use, words in (
        (True, lambda m: lambda net, x, t: net(x, t) + 0.01 * m.norm(x), "norm (BatchNorm1d)"),
        (True, lambda m: lambda net, x, t: m.drop(net(x, t)), "drop (Dropout)"),
    ):
        model = Normed(base.model)
        model.f = use(model)
        before = {name: b.clone() for name, b in model.named_buffers()}
        report = report_of(replace(base, model=model.train(train)), samples=200)
        assert "evaluation mode" in failing(report) and words in line_of(report, "evaluation mode").explanation
        assert all(torch.equal(b, before[name]) for name, b in model.named_buffers()) and model.training
        model.eval()
        assert line_of(report_of(replace(base, model=model), samples=200), "evaluation mode").status == "pass"


def test_dtypes_are_told():
    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    base = Process(Linear(), Around(net, lambda net, x, t: net(x)), "x1", (2,))
    assert "float64 for float64 samples; float32 samples: RuntimeError" in line_of(report_of(base), "dtype").explanation
    half = replace(base, model=Around(nn.Linear(2, 2, dtype=torch.bfloat16), lambda net, x, t: net(x)))
    line = line_of(report_of(half), "dtype")
    assert line.status == "fail" and "bfloat16" in line.explanation and "torch.float64" in line.explanation
    casts = twin(exact(Linear(), "velocity"), lambda net, x, t: net(x, t).bfloat16())
    line = line_of(report_of(casts, samples=200), "dtype")
    assert line.status == "warn" and "bfloat16 for float64" in line.explanation
    whole = twin(exact(Linear(), "velocity"), lambda net, x, t: net(x, t).long())
    assert line_of(report_of(whole, samples=200), "dtype").status == "fail"


def test_an_eps_network_that_is_wrong_at_the_noise_is_told_by_how_much():
    """eps(x, 0) = x + δ: δ·(1 − t)/t is what the first of 20 steps sees, 19 δ, over a spread of 1.4."""
    base = exact(Linear(), "eps")
    for offset, expected in ((1e-4, "pass"), (0.02, "warn"), (0.06, "fail")):  # gone where the rest of the check looks
        report = report_of(twin(base, lambda net, x, t, d=offset: net(x, t) + d * (t[:, None] < 0.01)), steps=20)
        line = line_of(report, "output at t = 0")
        assert line.value == pytest.approx(19 * offset / 1.4, rel=0.05) and line.status == expected
        assert f"{offset:.2g}" in line.explanation


def test_a_wiggle_in_t_spoils_the_limit_and_is_named():
    """.01·sin(500 t), as features of high frequency in t leave it: an error of .007 in eps, and of 5 in X̂_1(x, 0)."""
    report = report_of(twin(exact(Linear(), "eps"), lambda net, x, t: net(x, t) + 0.01 * (500 * t[:, None]).sin()))
    line = line_of(report, "mean at t = 0")
    assert line.status == "fail" and "derivative in t" in line.explanation and line.value > 1
    velocity = twin(exact(Linear(), "velocity"), lambda net, x, t: net(x, t) + 0.01 * (500 * t[:, None]).sin())
    assert not failing(report_of(velocity))


def test_a_field_that_is_no_denoiser_has_an_asymmetric_jacobian():
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    report = report_of(twin(exact(Linear(), "x1"), lambda net, x, t: net(x, t) + x @ turn.to(x)))
    assert line_of(report, "denoiser").status == "warn" and line_of(report, "denoiser").value < 0.6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_marginals_of_unlike_coordinates_are_off_by_what_the_chain_is(seed):
    """One residual variance for coordinates of variance .04 and 1 leaves a marginal up to a third off at K = 5."""
    for variances, off in (([0.04, 1.0], True), ([0.25, 0.25], False)):
        mixture = GaussianMixture.gaussian([0.0, 0.0], torch.diag(torch.tensor(variances)))
        line = line_of(report_of(exact(Linear(), "x1", mixture), seed, samples=1_000, steps=5), "chain marginals")
        assert (line.status == "fail" and 0.15 < line.value < 0.25) if off else line.status == "pass"


def mixture_of(labels):
    return 2.0 * (2.0 * labels[:, None] - 1) * torch.tensor([1.0, 0.0]).to(labels)


def labelled(x, t, label):
    """X̂_1 of N((±2, 0), .25 I) on the linear path."""
    a, b, m = t[:, None], 1 - t[:, None], mixture_of(label)
    return m + 0.25 * a * (x - a * m) / (0.25 * a**2 + b**2)


def labels(n, generator):
    return {"label": torch.randint(2, (n,), generator=generator).double()}


def test_conditional_bases_are_checked_row_by_row():
    base = Process(Linear(), labelled, "x1", (2,))
    report = report_of(base, conditions=labels)
    assert set(status(report).values()) == {"pass"} and line_of(report, "conditions").value > 0.1
    wrong = replace(base, model=lambda x, t, label: labelled(x, t, label * (t < 0.4)))
    assert "consistency" in failing(report_of(wrong, conditions=labels))
    ignores = replace(base, model=lambda x, t, label: labelled(x, t, 0 * label))
    assert line_of(report_of(ignores, conditions=labels), "conditions").status == "warn"
    assert "label" in line_of(report_of(base), "output shape").explanation  # a base that needs them, and has none


def test_images_are_checked_too():
    mixture = GaussianMixture.isotropic([1.0], [[0.3] * 6], 0.5)
    flat = Exact(mixture, Linear(), "x1")
    base = Process(Linear(), lambda x, t: flat(x.flatten(1), t).reshape(x.shape), "x1", (1, 2, 3))
    assert report_of(base).status == "pass"


def test_the_readings_are_what_they_say():
    base = exact(Linear(), "velocity")
    said = [(r.line, r.words) for r in readings(base)]
    assert len(said) == len(set(said)) == 9 and {line for line, _ in said} == {
        "direction of time", "timesteps", "predictor", "interpolant"
    }  # fmt: skip


def test_tuned_must_start_at_the_base(generator):
    base = exact(Linear(), "velocity")
    assert starts_at_base(base, base, generator) == 0
    copy = tilted(base, lambda x, t, **c: torch.zeros_like(x[:, :2]))
    assert starts_at_base(base, copy, generator) < 1e-12
    moved = tilted(base, lambda x, t, **c: 0.1 + torch.zeros_like(x[:, :2]))
    assert 0.03 < starts_at_base(base, moved, generator) < 0.3
    assert starts_at_base(base, twin(base, lambda net, x, t: net(x, t) / 0), generator) == float("inf")
    conditional = Process(Linear(), labelled, "x1", (2,))
    assert starts_at_base(conditional, conditional, generator, labels) == 0


def test_misuse_is_an_error_not_a_line(generator):
    for kw in ({"samples": 10}, {"steps": 1}):
        with pytest.raises(TiltflowError, match="at least 200"):
            check_base(exact(Linear(), "x1"), generator=generator, **kw)


def test_command_line():
    from tiltflow.cli.check import check_base_command

    models = __file__.replace("test_check_base.py", "models.py")
    options = ["--base", f"{models}:velocity", "--shape", "2", "--samples", "400", "--json"]
    right = CliRunner().invoke(check_base_command, [*options, "--predicts", "velocity"])
    document = json.loads(right.stdout)
    assert right.exit_code == 0 and document["verdict"] == "pass" and len(document["rows"]) == 21
    wrong = CliRunner().invoke(check_base_command, [*options, "--predicts", "x1"])
    rows = {row["name"]: row for row in json.loads(wrong.stdout)["rows"]}
    assert wrong.exit_code == 3 and rows["predictor"]["status"] == "fail"
    assert rows["predictor"]["explanation"].startswith("it seems to predict velocity")
    misuse = CliRunner().invoke(check_base_command, [*options, "--predicts", "x1", "--steps", "0"])
    assert misuse.exit_code == 2 and "'--steps': 0 is not in the range" in misuse.stderr



@pytest.mark.parametrize("seed", range(6))
def test_the_door_refuses_a_flipped_time_from_few_samples(seed):
    """200 samples leave the right reading an inconsistency of .07 at times: it is 70 times better than the declared one."""
    base = mixture2d().process()
    require_base(base, torch.Generator().manual_seed(seed))
    flipped = replace(base, model=lambda x, t: base.model(x, 1 - t))
    with pytest.raises(TiltflowError, match="direction of time"):
        require_base(flipped, torch.Generator().manual_seed(seed))
