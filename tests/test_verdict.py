"""The verdict on samplers that are right, and on samplers that are wrong on purpose: each wrong one must fail.

It is told samples, base samples, cost and path weights, nothing else.
"""

import pytest
import torch

from tiltflow.bench.tilt import chain_of, mode_weights
from tiltflow.core.chain import euler_maruyama, times, uniform_grid
from tiltflow.core.control import FineTuned
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.noise import Constant
from tiltflow.core.simulate import sample
from tiltflow.metrics.distance import total_variation
from tiltflow.problems.tilt import mixture2d
from tiltflow.verdict.line import AS_DRAWN, EXACT, REWARD, graded, overall
from tiltflow.verdict.paired import Judged, against_base
from tiltflow.verdict.tilt import BASE, TRUTH, judge_samples, scored

N = 20_000
PROBLEM = mixture2d()
COST = RewardCost(PROBLEM.reward)


class Optimal:
    """The exact control, as far as a chain can follow it."""

    module = None

    def mean(self, chain, k, x, base_mean=None, **condition):
        return chain.mean(k, x, PROBLEM.optimal().x1(x, times(chain, k, x)))

    def ratios(self, chain):
        return None


def draw(chain, control, seed=1):
    generator = torch.Generator().manual_seed(seed)
    runs = sample(chain, control, chain.source(N, generator), generator)
    return runs.x, PROBLEM.reward(runs.x) + runs.log_ratio


@pytest.fixture(scope="module")
def chain():
    torch.set_default_dtype(torch.float64)
    return chain_of(PROBLEM, 40, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base_samples(chain):
    return draw(chain, None, seed=2)[0]


def judged(samples, log_weights, base_samples, exact, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth = PROBLEM.target.sample(N, generator) if exact else None
    sets = {AS_DRAWN: samples, BASE: base_samples} | ({TRUTH: truth} if exact else {})
    values = scored(COST, {}, sets)
    log_ratio = None if log_weights is None else log_weights - values[REWARD][AS_DRAWN]
    return judge_samples(sets, values, log_ratio, generator)


def exact_tv(x):
    return total_variation(mode_weights(PROBLEM, x), PROBLEM.target.weights)


@pytest.fixture(scope="module")
def cases(chain):
    """name → (samples, log path weights)."""
    torch.set_default_dtype(torch.float64)
    honest = draw(chain, Optimal())
    keep = PROBLEM.target.component(honest[0]) != 0
    flipped = RewardCost(lambda x: -PROBLEM.reward(x))
    generator = torch.Generator().manual_seed(3)
    wrong_sign = train_twin(flipped, 60, generator, chain)
    half = train_twin(COST, 15, torch.Generator().manual_seed(4), chain)
    remembering = euler_maruyama(PROBLEM.process(), uniform_grid(40), Constant(1.0))
    biased = train_twin(COST, 150, torch.Generator().manual_seed(5), remembering)
    return {
        "honest": honest,
        "mode dropped": (honest[0][keep], honest[1][keep]),
        "sign flipped": draw(chain, wrong_sign),
        "half trained": draw(chain, half),
        "sigma 1": draw(remembering, biased),
    }


def train_twin(cost, rounds, generator, chain):
    from tiltflow.core.control import tilted
    from tiltflow.methods.adjoint_matching import AdjointMatching
    from tiltflow.nn.mlp import MLP
    from tiltflow.train.fit import fit
    from tiltflow.train.method import State
    from tiltflow.train.settings import Training

    torch.manual_seed(0)
    control = FineTuned(tilted(PROBLEM.process(), MLP(4, 2, 32, 2)))
    method = AdjointMatching(chain, cost, batch=128)
    fit(method, State(control, generator), Training(rounds=rounds, learning_rate=8e-3, ema=0.9))
    return control


@pytest.mark.parametrize("exact", [True, False], ids=["closed form", "base weights only"])
def test_honest_sampler_passes(cases, base_samples, exact):
    assert exact_tv(cases["honest"][0]) < 0.02
    verdict = judged(*cases["honest"], base_samples, exact)
    assert verdict.status in ("pass", "warn"), verdict
    assert verdict.status == "pass", verdict


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["mode dropped", "sign flipped", "half trained", "sigma 1"])
def test_wrong_samplers_fail(cases, base_samples, name, seed):
    samples, log_weights = cases[name]
    if name == "half trained":
        assert exact_tv(samples) >= 0.1  # else it is not the case we mean
    with_truth = judged(samples, log_weights, base_samples, True, seed)
    assert with_truth.status == "fail", (name, exact_tv(samples), with_truth)
    for weights in (log_weights, None):
        without = judged(samples, weights, base_samples, False, seed)
        assert without.status in ("fail", "cannot tell"), (name, exact_tv(samples), without)


def test_few_samples_cannot_tell(cases, base_samples):
    samples, log_weights = cases["honest"]
    verdict = judged(samples[:60], log_weights[:60], base_samples[:300], False)
    assert verdict.status == "cannot tell"


def test_a_poor_reference_cannot_tell():
    strong = RewardCost(lambda x: 8 * PROBLEM.reward(x))
    generator = torch.Generator().manual_seed(0)
    x = PROBLEM.base.sample(2_000, generator)
    assert judge_samples(x, x, scored(strong, {}, x, x), None, generator).lines[0].status == "cannot tell"


def test_grades():
    assert graded("d", 0.01, 0.01, 0.05, 0.1, "").status == "pass"
    assert graded("d", 0.07, 0.005, 0.05, 0.1, "").status == "warn"
    assert graded("d", 0.20, 0.01, 0.05, 0.1, "").status == "fail"
    assert graded("d", 0.10, 0.05, 0.05, 0.1, "").status == "cannot tell"
    assert graded("d", float("nan"), 0.05, 0.05, 0.1, "").status == "cannot tell"
    lines = [graded("d", v, 0.001, 0.05, 0.1, "") for v in (0.01, 0.07)]
    assert overall(lines) == "warn" and overall(lines[:1]) == "pass"


def test_non_finite_samples_are_refused(base_samples):
    bad = base_samples.clone()
    bad[3, 0] = float("nan")
    with pytest.raises(TiltflowError, match="1 of them not finite"):
        judge_samples(bad, base_samples, scored(COST, {}, base_samples, base_samples), None, torch.Generator())


def test_a_constant_judge_is_a_line_that_cannot_tell(base_samples):
    """A score that is the same everywhere, or but for rounding, says nothing; it must not end the run."""
    for score in (lambda x: torch.ones(len(x)), lambda x: 0.1 + 0 * x[:, 0], lambda x: torch.zeros(len(x))):
        own = torch.Generator().manual_seed(0)
        values = scored(COST, {"flat": score}, base_samples, base_samples)
        verdict = judge_samples(base_samples, base_samples, values, None, own)
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
