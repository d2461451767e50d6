"""A verdict on samplers that a lost twentieth cannot fool: its instruments against closed forms, and known-bad twins."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from arviz_stats.base import array_stats

from tiltflow import EnergyProblem, Evaluator
from tiltflow.core.geometry import Centred, Euclidean, Torus
from tiltflow.core.weights import pareto_k, truncated
from tiltflow.energies import ENERGY_PROBLEMS, temperature
from tiltflow.energies.annealing import anneal
from tiltflow.energies.exchange import exchange
from tiltflow.metrics.regions import Sample, apart
from tiltflow.sampling.assess import assess_all
from tiltflow.sampling.drawn import Drawn
from tiltflow.sampling.evidence import beside_classical, classical
from tiltflow.verdict.sampler import judge_sampler

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "sampler_verdict.py"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("spread", [0.1, 0.7, 2.0])
def test_pareto_k_is_that_of_an_independent_implementation(spread):
    heavy = -torch.rand(200, generator=generator(), dtype=torch.float64).log()
    for log_w in (spread * normal(200), spread * normal(10_000), spread * heavy):
        theirs = float(array_stats.psislw(-log_w.double().numpy())[1])  # of log likelihoods
        assert pareto_k(log_w) == pytest.approx(theirs, abs=1e-6)
    assert math.isnan(pareto_k(torch.zeros(20))) and pareto_k(torch.zeros(100)) == -1


def test_weights_whose_mean_is_infinite_cannot_tell():
    """w = u^{−1.2} has no mean; what its sample mean says is no log Z, however near it comes."""
    log_w = -1.2 * torch.rand(10_000, generator=generator(), dtype=torch.float64).log()
    row = {"samples": 10_000, "rejected": 0, "elbo": 0.0, "log_z": 2.0, "log_z_std": 0.01, "log_z_error": 0.0, "ess": 0.4}
    assert judge_sampler(row).status == "pass"
    found = judge_sampler(row | {"pareto_k": pareto_k(log_w)})
    assert {line.status for line in found.lines if line.name.startswith(("log Z", "weights"))} == {"cannot tell"}


def test_truncated_weights():
    """One weight that carries the rest is cut to √N times the mean; weights that no one carries are left."""
    even = 0.5 * normal(10_000)
    assert torch.equal(truncated(even), even)
    one = even.index_put((torch.tensor(3),), torch.tensor(20.0, dtype=torch.float64))
    cut = truncated(one)
    assert float(cut[3].exp() / one.exp().mean()) == pytest.approx(100) and torch.equal(cut[4:], one[4:])


def lost(x, share):
    """Without the rows whose second coordinate is among the largest."""
    edge = x[:, 1].sort().values[round((1 - share) * len(x)) - 1]
    return x[x[:, 1] <= edge]


def test_two_sets_of_one_law_are_not_apart_and_a_lost_tail_is_seen():
    scores = []
    for seed in range(6):
        x, y = normal(4_000, 3, seed=seed), normal(4_000, 3, seed=100 + seed)
        scores.append(apart(Sample(x), Sample(y), list("abc"), generator(seed)).score)
        found = apart(Sample(lost(x, 0.02)), Sample(y), list("abc"), generator(seed))
        assert found.score > 1 and found.lost >= 0.005 and found.seen < 0.02, found
        back = apart(Sample(y), Sample(lost(x, 0.02)), list("abc"), generator(seed))
        assert back.score > 1 and back.lost == 0.0  # what the others lack, the samples did not lose
    assert max(scores) < 1


def test_related_rows_are_worth_fewer():
    """Fifty draws, forty times each: as rows they would be apart from their own law, as groups they are not."""
    groups = torch.arange(50).repeat(40)
    wrong = 0
    for seed in range(3):
        x, y = normal(50, 2, seed=seed)[groups], normal(2_000, 2, seed=100 + seed)
        found = apart(Sample(x, groups), Sample(y), ["a", "b"], generator(seed))
        assert found.score < 1 and found.seen > 0.2
        wrong += apart(Sample(x), Sample(y), ["a", "b"], generator(seed)).score > 1
    assert wrong == 3


def box(x):
    return torch.where((x.abs() < 1).all(1), 2 * x.sum(1), torch.inf)


def spring(x):
    return 2 * x.square().flatten(1).sum(1)


def test_temperature():
    """Gaussians at T = 1 and 1.3; e^{−2x} on a box, whose walls the virial identity does not bear; angles; particles."""
    x = normal(6_000, 5)
    lengths = (0.05, 3.0)
    for t in (1.0, 1.3):
        found = temperature(lambda x: 0.5 * x.square().sum(1), t**0.5 * x, lengths, Euclidean(), generator(1))
        assert abs(found.value - t) < 4 * found.standard_error < 0.1
    u = torch.rand(6_000, 2, generator=generator(2), dtype=torch.float64)
    walled = -(math.exp(2) - u * (math.exp(2) - math.exp(-2))).log() / 2
    found = temperature(box, walled, (0.01, 1.0), Euclidean(), generator(3))
    assert abs(found.value - 1) < 4 * found.standard_error < 0.3
    angles = torch.distributions.VonMises(0.0, 2.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        phi = angles.sample((6_000, 1)).double()
    found = temperature(lambda phi: -2 * phi.cos().sum(1), phi, (0.1, 3.0), Torus(), generator(4))
    assert abs(found.value - 1) < 4 * found.standard_error < 0.2
    x = Centred().project(0.5 * normal(4_000, 4, 2))
    found = temperature(spring, x, (0.05, 1.0), Centred(), generator(5))
    assert abs(found.value - 1) < 4 * found.standard_error < 0.1


def test_exchange_of_replicas():
    """N(1, ½²) in 4-D: log Z, mean and spread; and a chain's states are related, so that its island is its group."""
    mine = EnergyProblem(
        name="mine", energy=lambda x: 2 * (x - 1).square().sum(1), event_shape=(4,), scale=3.0, finest=0.05
    )
    for seed in range(2):
        start = anneal(mine, Evaluator(mine.energy), 8, 32, 3, generator(seed), keep=4)
        assert all(rung.x.shape == (32, 4) for rung in start.rungs)
        found = exchange(mine, Evaluator(mine.energy), start, 30, 3, generator(seed))
        value, error = found.log_z
        assert abs(value - 4 * math.log(0.5 * math.sqrt(2 * math.pi))) < 4 * error < 0.8
        assert found.x.shape == (30 * 32, 4) and len(found.islands) == 960 and 0.1 < found.swaps < 1
        assert torch.equal(found.energy, mine.energy(found.x))
        assert float(found.x.mean()) == pytest.approx(1, abs=0.06) and float(found.x.std()) == pytest.approx(0.5, abs=0.05)


UNEQUAL = ENERGY_PROBLEMS["unequal2d"]()
UNKNOWN = replace(UNEQUAL, sample=None, log_z=None, modes=None)


@pytest.fixture(scope="module")
def run():
    found, said = classical(UNKNOWN, UNKNOWN.energy, 320_000, generator(7))
    assert found is not None, said
    return found


def without_left(x):
    return x[x[:, 0] > 0]


TWINS = {
    "honest": lambda x: x[:10_000],
    "a mode of weight .7": without_left,
    "5 % of a tail": lambda x: lost(x, 0.05),
    "10 % of a tail": lambda x: lost(x, 0.1),
    "hot": lambda x: x + 0.5 * torch.randn(x.shape, generator=generator(9)),
}


@pytest.mark.parametrize("name", TWINS)
def test_without_a_reference_a_classical_run_is_evidence(run, name):
    x = TWINS[name](UNEQUAL.sample(30_000, generator(1)))[:10_000]
    drawn = Drawn(x, UNEQUAL.energy(x), None)
    row = assess_all(UNKNOWN, drawn, None, None, generator(), 500).row
    found = judge_sampler(row | beside_classical(UNKNOWN, drawn, run))
    assert (found.status != "fail") if name == "honest" else (found.status == "fail"), found
    if name == "honest":
        assert not any(line.name == "lost modes" or line.status == "cannot tell" for line in found.lines), found
    lines = judge_sampler(row | beside_classical(UNKNOWN, drawn, run) | {"classical_drift": 1.1}).lines
    assert next(x for x in lines if x.name.startswith("agreement")).status == "cannot tell"  # it has not settled


@pytest.mark.parametrize("weight", [0.03, 0.05, 0.1])
def test_a_lost_mode_of_known_weight_fails(weight):
    """Case 9: the sampler, and its path weights, are perfect on all the others."""
    shares = torch.tensor([0.6 - weight, 0.4, weight], dtype=torch.float64)
    means = torch.tensor([[-5.0, 0.0], [5.0, 0.0], [0.0, 6.0]], dtype=torch.float64)
    energy = replace(UNEQUAL.energy, weights=shares, means=means)
    mine = replace(UNKNOWN, energy=energy, scale=5.0, modes=UNEQUAL.modes._replace(centres=means, weights=shares))
    x = energy.sample(8_000, generator(2))
    for some, expected in ((x, "pass"), (x[x[:, 1] < 3], "fail")):
        row = assess_all(mine, Drawn(some[:5_000], energy(some[:5_000]), None), None, None, generator(), 500).row
        line = next((line for line in judge_sampler(row).lines if line.name == "lost modes"), None)
        assert (line is None) == (expected == "pass") and (line is None or line.status == "fail")


def test_a_run_that_has_no_budget_is_said(run):
    for budget, said in ((0, "There was no"), (10_000, "the budget of 10000"), (130_000, "130000 energies do not suffice")):
        found, why = classical(UNKNOWN, UNKNOWN.energy, budget, generator())
        assert found is None and said in why


@pytest.mark.slow
def test_the_benchmark_of_verdicts_has_no_false_pass():
    spec = importlib.util.spec_from_file_location("sampler_verdict", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = [row for problem in script.problems()[:6:2] for row in script.verdicts(problem, 0)]
    wrong = [row for row in rows if row["wrong"]]
    assert len(rows) >= 60 and not wrong, wrong
