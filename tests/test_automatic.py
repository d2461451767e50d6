"""Sampling an energy by stages: closed forms, independent implementations, and cases from users."""

import json
import math
from functools import partial

import pytest
import torch
from commands import tiltflow as command
from scipy.stats import multivariate_normal, multivariate_t

import tiltflow
from tiltflow import EnergyProblem, Evaluator, TiltflowError
from tiltflow.core.geometry import Centred
from tiltflow.core.weights import evidence, pareto_k
from tiltflow.energies import ENERGY_PROBLEMS, population
from tiltflow.energies import anchor as mixtures
from tiltflow.energies.anchor import HEAVY, Full, Isotropic, Product, fitted
from tiltflow.energies.annealing import anneal
from tiltflow.energies.population import adapt, weigh
from tiltflow.sampling.automatic import ANNEALED, MIXTURE, sample
from tiltflow.sampling.settings import AutomaticSettings

QUICK = AutomaticSettings(draws=3_000, rounds=6, particles=64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def problem(energy, dim, scale, finest, **known):
    return EnergyProblem(name="mine", energy=energy, event_shape=(dim,), scale=scale, finest=finest, **known)


def gaussian(mean, std):
    return lambda x: 0.5 * (((x - mean) / std) ** 2).sum(1)


WEIGHTS, MEANS = double([0.3, 0.7]), double([[-1.0, 0.5], [2.0, 1.0]])
FACTORS = double([[[1.0, 0.0], [0.6, 0.5]], [[0.4, 0.0], [-0.2, 0.7]]])
ANCHORS = {
    "isotropic": Isotropic(WEIGHTS, MEANS, double([0.5, 1.5])),
    "full": Full(WEIGHTS, MEANS, FACTORS),
    "product": Product(double([[0.3, 0.7], [0.6, 0.4]]), MEANS.T.contiguous(), double([[0.5, 1.5], [0.2, 0.8]])),
}
ANCHORS |= {f"{name}, heavy": type(a)(*list(vars(a).values())[:3], HEAVY) for name, a in ANCHORS.items()}


def independent(name, x):
    """The log-density by SciPy, component by component."""
    anchor = ANCHORS[name]
    law = multivariate_normal.pdf if anchor.dof is None else partial(multivariate_t.pdf, df=anchor.dof)

    def mixture(x, weights, means, shapes):
        parts = zip(weights.tolist(), means.numpy(), shapes.numpy())
        return sum(w * torch.as_tensor(law(x.numpy(), m, s)) for w, m, s in parts).log()

    if isinstance(anchor, Product):
        shapes = anchor.variances[..., None, None]
        return sum(mixture(x[:, i], anchor.weights[i], anchor.means[i, :, None], shapes[i]) for i in range(2))
    if isinstance(anchor, Isotropic):
        return mixture(x, WEIGHTS, MEANS, anchor.variances[:, None, None] * torch.eye(2))
    return mixture(x, WEIGHTS, MEANS, FACTORS @ FACTORS.mT)


@pytest.mark.parametrize("name", ANCHORS)
def test_a_mixture_is_the_one_it_says(name):
    """Its density is that of an independent implementation, and its draws follow it: E[r/q] is 1 for another law r."""
    anchor, x = ANCHORS[name], 3 * torch.randn(50, 2, generator=generator(), dtype=torch.float64)
    assert torch.allclose(anchor.log_prob(x), independent(name, x), atol=1e-10)
    for seed in range(3):
        drawn = anchor.sample(20_000, generator(seed))
        other = Isotropic(double([1.0]), double([[0.5, 0.8]]), double([0.3]))
        found = evidence(other.log_prob(drawn) - anchor.log_prob(drawn))
        assert abs(found.log_z) < 4 * found.log_z_error


@pytest.mark.parametrize("name", ANCHORS)
def test_expectation_maximisation_climbs_and_finds_the_law_again(name):
    anchor, w = ANCHORS[name], torch.full((1_000,), 1e-3, dtype=torch.float64)
    x, fresh = anchor.sample(1_000, generator(1)), anchor.sample(2_000, generator(2))
    found = fitted(x, fresh, generator(3), most=8)
    again = anchor.refitted(x, w)
    best = anchor.log_prob(fresh).mean()
    assert again.log_prob(x).mean() > anchor.log_prob(x).mean() - 5e-3  # EM climbs, up to the shrinkage
    assert found.log_prob(fresh).mean() > best - 0.04


def test_weights_of_points_count():
    """Points of two clusters, one weighted nine times the other."""
    x = torch.cat([torch.randn(1_000, 2, generator=generator(), dtype=torch.float64) + c for c in (-5.0, 5.0)])
    w = torch.cat([torch.full((1_000,), 9.0), torch.full((1_000,), 1.0)]).double()
    found = Full.started(x, w / w.sum(), 2, generator(1))
    heavy = int(found.weights.argmax())
    assert float(found.weights[heavy]) == pytest.approx(0.9, abs=0.02)
    assert torch.allclose(found.means[heavy], double([-5.0, -5.0]), atol=0.2)


def test_related_points_choose_no_larger_mixture():
    """Held-out points decide: 60 points of a Gaussian, seen five times each, are no mixture."""
    x = torch.randn(60, 4, generator=generator(), dtype=torch.float64).repeat(5, 1)
    held = torch.randn(400, 4, generator=generator(1), dtype=torch.float64)
    assert fitted(x, held, generator()).components <= 2 < fitted(x, x, generator()).components


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_annealing_finds_log_z_of_a_gaussian(seed):
    """N(1, ½²) in 4-D, from N(0, 3²): log Z = 4 log(½√2π), within four standard errors of eight islands."""
    mine = problem(gaussian(1.0, 0.5), 4, 3.0, 0.05)
    told = []
    found = anneal(mine, Evaluator(mine.energy), 8, 128, 5, generator(seed), told.append)
    value, error = found.evidence
    assert abs(value - 4 * math.log(0.5 * math.sqrt(2 * math.pi))) < 4 * error < 0.5
    assert told == sorted(told) and told[-1] == 1.0 and len(found.rungs) == len(told)
    assert float(found.x.mean()) == pytest.approx(1.0, abs=0.1) and float(found.x.std()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weighted_draws_of_any_mixtures_have_the_right_log_z(seed):
    """Two proposals, neither of them the target: balanced weights are exact. Weighted by one of them alone they are not."""
    target = ENERGY_PROBLEMS["gaussian2d"]()
    proposals = [ANCHORS["full"], ANCHORS["isotropic, heavy"]]
    drawn = weigh(proposals, lambda x: target.energy(x).double(), 40_000, generator(seed))
    found = evidence(drawn.log_weights)
    assert abs(found.log_z) < 4 * found.log_z_error < 0.1
    wrong = evidence(-drawn.energy - proposals[0].log_prob(drawn.x))
    assert abs(wrong.log_z) > 0.1


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["unequal2d", "gaussian2d"])
def test_named_problems_pass(name, seed):
    found = sample(ENERGY_PROBLEMS[name](), 4_000, QUICK, seed=seed)
    verdict = found.verdict(compared=1_000)
    assert verdict.status in ("pass", "warn"), verdict  # 4,000 samples in the plane do not tell T = 1 from 1.05
    assert found.stage == MIXTURE and found.log_z.ess > 0.9


def test_a_twin_goes_where_a_mixture_of_gaussians_would_not():
    """From N(0, 1) to a product of t with two degrees of freedom, whose tails are heavier than those of any mixture here."""
    start = Isotropic(double([1.0]), double([[0.0, 0.0]]), double([1.0]))

    def energy(x):
        return (1.5 * torch.log1p(x**2 / 2)).sum(1)

    found = adapt(energy, [start], 4_000, 4, generator())
    assert {q.dof for q in found} >= {HEAVY}
    alone, both = (weigh(q, energy, 20_000, generator(1)).log_weights for q in ([start], found))
    assert pareto_k(alone) < 0.7 < pareto_k(both)  # weights of a Gaussian's draws hide a tail that none of them reaches


def test_weights_without_the_proposal_fail(monkeypatch):
    """The bad twin: w = e^{−E} is the law of q·e^{−E}."""
    monkeypatch.setattr(population, "log_mixture", lambda proposals, x: torch.zeros(len(x), dtype=x.dtype))
    assert sample(ENERGY_PROBLEMS["unequal2d"](), 4_000, QUICK).verdict(compared=1_000).status == "fail"


def student(x):
    return (1.5 * torch.log1p(x**2 / 2)).sum(1)


def gamma(y):
    return (3 * y.exp() - 2 * y).sum(1)


def moons(z):
    both = torch.logaddexp(-0.5 * ((z[:, 0] - 2) / 0.6) ** 2, -0.5 * ((z[:, 0] + 2) / 0.6) ** 2)
    return 0.5 * ((z.norm(dim=1) - 2) / 0.4) ** 2 - both


def box(x):
    return torch.where((x.abs() < 3).all(1), 2 * ((x - 1) ** 2).sum(1), torch.inf)


CASES = {
    "heavy tails": (problem(student, 4, 4.0, 0.1), 4 * (0.5 * math.log(2 * math.pi) - math.lgamma(1.5))),
    "box": (problem(box, 2, 1.5, 0.05), 0.4516),  # 2 log(½√2π · P(−8 < z < 4) of a standard normal z)
    "far": (problem(gaussian(100.0, 5.0), 10, 100.0, 0.5), 10 * math.log(5 * math.sqrt(2 * math.pi))),
    "moons": (problem(moons, 2, 3.0, 0.04), None),
}


@pytest.mark.parametrize("name", CASES)
def test_cases_from_users(name):
    mine, log_z = CASES[name]
    found = sample(mine, 8_000, QUICK, seed=0)
    if log_z is not None:
        assert abs(found.log_z.value - log_z) < 4 * found.log_z.error + 1e-4, found.log_z
    if name == "heavy tails":  # P(max |x| > 15) = .0190; samplers with Gaussian tails find nothing there
        share = float((found.x.abs().amax(1) > 15).double().mean())
        assert share == pytest.approx(0.019, abs=4 * math.sqrt(0.019 / 8_000))
    if name == "moons":
        assert float((found.x[:, 0] > 0).double().mean()) == pytest.approx(0.5, abs=0.02)
    if name == "box":
        assert float(found.x.abs().max()) < 3
    assert found.verdict(compared=1_000, evidence=0).status == "cannot tell"  # no reference, no classical run


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_cases_from_users_agree_with_a_classical_run(name):
    found = sample(CASES[name][0], 10_000).verdict()
    line = next(line for line in found.lines if line.name == "agreement with an independent classical run")
    assert found.status in ("pass", "warn") and line.status in ("pass", "warn"), found


@pytest.mark.slow
def test_twenty_gamma_variables():
    found = sample(problem(gamma, 20, 2.0, 0.05), 4_000)
    assert abs(found.log_z.value + 20 * 2 * math.log(3)) < 4 * found.log_z.error


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["gmm40", "many-well", "ring", "gmm9"])
def test_hard_problems_pass(name, seed):
    found = sample(ENERGY_PROBLEMS[name](), 10_000, seed=seed)
    assert found.verdict().status in ("pass", "warn") and found.log_z.ess > 0.5


def spring(x):
    """A harmonic trap for the particles' coordinates about their centre: N(0, ½²) on the subspace."""
    return 2 * x.square().flatten(1).sum(1)


def test_particles_stay_an_annealed_population():
    mine = EnergyProblem(name="spring", energy=spring, event_shape=(4, 2), geometry=Centred(), scale=1.0, finest=0.05)
    found = sample(mine, 3_000, QUICK)
    assert found.stage == ANNEALED and found.log_z.ess is None and not found.proposals
    assert abs(found.log_z.value - 6 * math.log(0.5 * math.sqrt(2 * math.pi))) < 4 * found.log_z.error
    assert float(found.x.mean(1).abs().max()) < 1e-5
    assert float(spring(found.x).mean()) == pytest.approx(3.0, abs=0.2)  # ½ kT for each of six


def test_poor_weights_leave_the_annealed_population(monkeypatch):
    monkeypatch.setattr(mixtures, "STEPS", 1)
    strict = AutomaticSettings(draws=500, rounds=1, particles=64, least_ess=1.0)
    found = sample(ENERGY_PROBLEMS["unequal2d"](), 500, strict)
    assert found.stage == ANNEALED and found.x.shape == (500, 2)


def test_the_same_seed_gives_the_same_samples():
    mine, few = problem(gaussian(0.0, 1.0), 2, 2.0, 0.1), AutomaticSettings(draws=200, rounds=2, particles=16, islands=2)
    first, second, other = (sample(mine, 200, few, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.x, second.x) and not torch.equal(first.x, other.x)
    assert first.energy.evaluations == second.energy.evaluations > 0


def test_energies_that_no_draw_has():
    nowhere = problem(lambda x: torch.where(x[:, 0] > 50, x.square().sum(1), torch.inf), 2, 1.0, 0.1)
    with pytest.raises(TiltflowError, match="does its base not cover the target"):
        sample(nowhere, 100, QUICK)
    with pytest.raises(TiltflowError, match="seed"):
        sample(nowhere, 100, QUICK, seed=-1)


def test_the_command_leaves_a_run(tmp_path):
    out = tmp_path / "run"
    few = ["--draws", 1_000, "--rounds", 4, "--particles", 64, "--samples", 2_000, "--compared", 500]
    done = command("sample-energy", "unequal2d", *few, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    summary = document["rows"][0]
    assert document["verdict"] in ("pass", "warn") and summary["method"] == MIXTURE and summary["energy_evaluations"] > 0
    assert sum(r["kind"] == "iteration" for r in document["rows"]) >= 1
    assert {p.name for p in out.iterdir()} >= {"config.json", "metrics.json", "report.html", "samples.safetensors"}
    assert "leaves no model" in command("sample", out).stderr
    assert tiltflow.sample is sample


@pytest.mark.parametrize(
    "wrong", [("--islands", 1), ("--particles", 3), ("--rounds", 0), ("--least-ess", 2), ("--draws", "nan"), ("--scale", -1)]
)
def test_misuse_writes_nothing(tmp_path, wrong):
    done = command("sample-energy", "unequal2d", *wrong, "--out", tmp_path / "run")
    assert done.returncode == 2 and wrong[0][2:].replace("-", "_") in done.stderr.replace("-", "_")
    assert not (tmp_path / "run").exists()
