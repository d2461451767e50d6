"""The verdict on samplers that are right, and on samplers that are wrong on purpose: each wrong one must fail.

It is told samples, base samples, cost and path weights, nothing else. The benchmark of the verdict has all cases on more
bases and seeds.
"""

import pytest
import torch

from tiltflow.bench.tilt import mode_weights
from tiltflow.bench.verdict import cases, closed_form, judged, rows_of, summary
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.metrics.distance import total_variation
from tiltflow.problems.tilt import mixture2d
from tiltflow.verdict.line import AS_DRAWN, BY_ODE, EXACT, SEVERITY, best_way, graded, overall
from tiltflow.verdict.paired import Judged, against_base
from tiltflow.verdict.tilt import BASE, judge_samples, scored
from tiltflow.verdict.weighted import Weighted, own_neighbours

N = 20_000
PROBLEM = mixture2d()
COST = RewardCost(PROBLEM.reward)


@pytest.fixture(scope="module")
def ground():
    torch.set_default_dtype(torch.float64)
    return closed_form(PROBLEM)


@pytest.fixture(scope="module")
def base_samples():
    torch.set_default_dtype(torch.float64)
    return PROBLEM.base.sample(N, torch.Generator().manual_seed(2))


def verdict_on(sets, log_ratio=None, strength=1.0, seed=0):
    cost = RewardCost(PROBLEM.reward, strength)
    return judge_samples(sets, scored(cost, {}, sets), log_ratio, torch.Generator().manual_seed(seed), strength=strength)


def lines_of(verdict, way):
    return {line.name: line for line in verdict.lines if line.way == way}


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_wrong_samplers_do_not_pass_and_honest_ones_do_not_fail(ground, seed):
    rows = list(rows_of(ground, seed))
    assert not [row for row in rows if row["wrong"]]
    decided = [row for row in rows if not row["honest"]]
    assert sum(row["answer"] in ("fail", "refused") for row in decided) > 0.7 * len(decided)  # not by saying nothing
    rates = {row["case"]: row for row in summary(rows) if row["base"] == "all"}
    assert rates["false pass"]["verdicts"] == len(decided) and rates["false fail"]["share"] == 0


def test_an_honest_sampler_passes_in_every_way(ground, base_samples):
    """With samples enough to tell; and if its own are few, nobody can."""
    generator = torch.Generator().manual_seed(0)
    drawn, flowed = ground.paths(N, generator), ground.flow(N, generator)
    found = verdict_on({AS_DRAWN: drawn.x, BASE: base_samples, BY_ODE: flowed}, drawn.log_ratio)
    assert found.status == "pass" and found.ways == {AS_DRAWN: "pass", BY_ODE: "pass", EXACT: "pass"}, found
    (score,) = found.scores
    exact = float(PROBLEM.reward(PROBLEM.target.sample(N, generator)).mean())
    assert [score.reached, score.ode, score.exact, score.reference] == pytest.approx([exact] * 4, abs=0.03)
    assert total_variation(mode_weights(PROBLEM, drawn.x), PROBLEM.target.weights) < 0.02
    few = verdict_on({AS_DRAWN: drawn.x[:60], BASE: base_samples[:300]}, drawn.log_ratio[:60])
    assert few.status == "cannot tell"
    assert lines_of(few, EXACT)["effective draws"].status == "cannot tell"


def test_the_best_way_answers(ground, base_samples):
    """A control that is half right fails as drawn, and passes under its path weights, which know."""
    drawn = ground.rough(N, torch.Generator().manual_seed(0))
    found = verdict_on({AS_DRAWN: drawn.x, BASE: base_samples}, drawn.log_ratio)
    assert found.ways == {EXACT: "pass", AS_DRAWN: "fail"} and found.status == "pass" and next(iter(found.ways)) == EXACT
    assert lines_of(found, AS_DRAWN)["total variation at most"].status != "fail"
    without = verdict_on({AS_DRAWN: drawn.x, BASE: base_samples})
    assert without.status == "fail" and list(without.ways) == [AS_DRAWN]


def test_what_changed_nothing_fails_however_it_is_drawn(base_samples):
    found = verdict_on({AS_DRAWN: base_samples[:4000], BASE: base_samples}, torch.zeros(4000))
    assert lines_of(found, "")["effect"].status == "fail" and set(found.ways.values()) == {"fail"}
    unasked = verdict_on({AS_DRAWN: base_samples[:4000], BASE: base_samples}, torch.zeros(4000), strength=0.0)
    assert "effect" not in lines_of(unasked, "")
    weak = verdict_on({AS_DRAWN: base_samples[:4000], BASE: base_samples}, torch.zeros(4000), strength=1e-4)
    assert lines_of(weak, "")["effect"].status == "fail" and weak.status == "fail"


def test_a_poor_reference_vouches_for_nothing(ground, base_samples):
    """Exact samples, and wrong ones, of a tilt that the base's samples hardly reach: no line that leans on them answers."""
    generator = torch.Generator().manual_seed(0)
    for x in (PROBLEM.target.sample(2000, generator), base_samples[:2000]):
        found = verdict_on({AS_DRAWN: x, BASE: base_samples[2000:6000]}, torch.zeros(2000), strength=12.0)
        assert lines_of(found, "")["reference effective size"].value < 200 and found.status == "cannot tell"
        leaning = [line for line in found.lines if line.name != "total variation at most"]
        assert {line.status for line in leaning} == {"cannot tell"}


def test_errors_respect_weights():
    """The error of a weighted mean over many sets of weighted rows is the one that each set states; of diversity too."""
    found = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(500, 2, generator=generator)
        rows = Weighted(x, x[:, 0], generator)
        means = rows.mean(x[:, 0])
        found.append((float(means[0]), float(means[1:].std()), *rows.diversity()))
    mean, error, diversity, its_error = torch.tensor(found).T
    assert float(mean.mean()) == pytest.approx(1.0, abs=0.05)
    assert float(error.mean() / mean.std()) == pytest.approx(1.0, abs=0.25)
    assert 0.8 < float(its_error.mean() / diversity.std()) < 2.0
    assert float(error.mean()) > 1.3 / 500**0.5  # resampled rows taken as independent would say 1/√500


def test_own_neighbours():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4000, 3, generator=generator), torch.randn(4000, 3, generator=generator)
    even = torch.zeros(4000)
    target = Weighted(y, even, generator)
    share, error, n = own_neighbours(Weighted(x, even, generator), target)
    assert n >= 999 and abs(share - 0.5) < 3 * error
    assert own_neighbours(Weighted(x[:100].repeat(40, 1), even, generator), target)[0] > 0.95
    jittered = x[:1] + 1e-3 * torch.randn(4000, 3, generator=generator)
    assert own_neighbours(Weighted(jittered, even, generator), target)[0] > 0.95


def test_cases_are_what_they_say(ground):
    """Each known-bad sampler is wrong by the closed form: modes, means and mean rewards."""
    named = {case.name: case for case in cases(ground, torch.Generator().manual_seed(0))}
    weights = PROBLEM.target.weights
    mode = int((weights - 0.25).abs().argmin())

    def share(name):
        return float((PROBLEM.target.component(named[name].sets[AS_DRAWN]) == mode).double().mean())

    w = float(weights[mode])
    assert share("mode dropped") == 0 and share("mode doubled") == pytest.approx(2 * w / (1 + w), abs=0.04)
    assert share("exact samples") == pytest.approx(w, abs=0.04)
    rewards = {name: float(PROBLEM.reward(case.sets[AS_DRAWN]).mean()) for name, case in named.items()}
    exact = rewards["exact samples"]
    assert rewards["reward hacked"] == pytest.approx(exact, abs=0.05) and rewards["constant noise"] < exact - 0.05
    assert rewards["strength 30 % too small"] < exact - 0.05 < rewards["well trained, as drawn"]
    flipped = rewards["reward's sign flipped"]
    assert flipped < float(PROBLEM.reward(PROBLEM.base.sample(N, torch.Generator().manual_seed(0))).mean()) - 0.1
    verdict = judged(ground, named["exact samples"], PROBLEM.base.sample(N, torch.Generator().manual_seed(1)), None, 0)
    assert verdict.status in SEVERITY[:3]


def test_grades():
    assert graded("d", 0.01, 0.01, 0.05, 0.1, "").status == "pass"
    assert graded("d", 0.07, 0.005, 0.05, 0.1, "").status == "warn"
    assert graded("d", 0.20, 0.01, 0.05, 0.1, "").status == "fail"
    assert graded("d", 0.10, 0.05, 0.05, 0.1, "").status == "cannot tell"
    assert graded("d", float("nan"), 0.05, 0.05, 0.1, "").status == "cannot tell"
    lines = [graded("d", v, 0.001, 0.05, 0.1, "") for v in (0.01, 0.07)]
    assert overall(lines) == "warn" and overall(lines[:1]) == "pass"
    ways = [lines[1]._replace(way="b"), lines[0]._replace(way="a"), lines[0]]
    assert best_way(ways, []).ways == {"a": "pass", "b": "warn"} and best_way(ways, []).status == "pass"
    assert best_way([*ways, lines[0]._replace(status="fail")], []).status == "fail"  # what all ways share


def test_non_finite_samples_are_refused(base_samples):
    bad = base_samples.clone()
    bad[3, 0] = float("nan")
    with pytest.raises(TiltflowError, match="1 of them not finite"):
        sets = {AS_DRAWN: base_samples, BASE: base_samples}
        judge_samples(sets | {AS_DRAWN: bad}, scored(COST, {}, sets), None, torch.Generator())


def test_a_constant_judge_is_a_line_that_cannot_tell(base_samples):
    """A score that is the same everywhere, or but for rounding, says nothing; it must not end the run."""
    for score in (lambda x: torch.ones(len(x)), lambda x: 0.1 + 0 * x[:, 0], lambda x: torch.zeros(len(x))):
        own = torch.Generator().manual_seed(0)
        sets = {AS_DRAWN: base_samples, BASE: base_samples}
        verdict = judge_samples(sets, scored(COST, {"flat": score}, sets), None, own)
        (line,) = (line for line in verdict.lines if "flat" in line.name)
        assert line.status == "cannot tell" and "constant" in line.explanation


def test_a_judge_that_is_nan_cannot_tell():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50, generator=generator)
    before = Judged(noise, {"reward": noise, "held": noise}, noise, 1.0)
    good = against_base(before, before._replace(scores={"reward": noise + 1 + 0.1 * noise, "held": noise + 0.1 * noise}))
    assert [line.status for line in good] == ["pass", "warn", "pass"]
    nan = torch.full((50,), torch.nan)
    bad = against_base(before, before._replace(scores={"reward": nan, "held": nan}, diversity=float("nan")))
    assert [line.status for line in bad] == ["cannot tell"] * 3
