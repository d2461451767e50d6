"""Every method through one protocol: rows, metrics, a differentiable loss, exact resume; the worked example of the docs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tiltflow.bench import names as benches
from tiltflow.bench.budget import Budget, Counter, counted
from tiltflow.bench.control import ControlSettings
from tiltflow.bench.control import bench_problem as bench_control_problem
from tiltflow.bench.digits import DigitsSettings, bench_method
from tiltflow.bench.tilt import (
    METHOD,
    TILT_PROBLEMS,
    TiltSettings,
    _bench_named,
    bench_problem,
    bench_tilt,
    chain_of,
    evaluate,
    train,
)
from tiltflow.core.control import FineTuned, tilted
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.methods.registry import METHODS, chosen, names
from tiltflow.nn.mlp import MLP
from tiltflow.problems.tilt import mixture2d
from tiltflow.train.fit import fit
from tiltflow.train.method import State
from tiltflow.train.settings import Training

TRAINED, FREE = names("finetune", trained=True), names("finetune", trained=False)
SMALL = TiltSettings(steps=6, budget=2, batch=32, sample_steps=8, samples=200, w2_samples=50, w2_draws=1, hidden=8, layers=2)


@pytest.fixture(autouse=True)
def single():
    torch.set_default_dtype(torch.float32)


def setting(name, reward=None):
    problem, generator = mixture2d(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    chain = chain_of(problem, 12, generator)
    cost = RewardCost(reward or problem.reward)
    method = METHODS[name].made(chain=chain, cost=cost, batch=32, generator=generator)
    return method, FineTuned(tilted(problem.process(), MLP(4, 2, 8, 2))), generator


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_method_keeps_the_protocol(name):
    method, control, generator = setting(name)
    collected = method.collect(State(control, generator))
    assert len({len(v) for v in collected.material.values()}) == 1
    assert {"reward", "kl"} <= set(collected.metrics)
    assert not any(v.requires_grad for v in collected.material.values())
    for item in method.auxiliary.values():
        item.load_state_dict(item.state_dict())
    loss = method.loss(control, collected.material, generator)
    assert loss.shape == () and bool(torch.isfinite(loss))
    loss.backward()
    assert sum(float(p.grad.abs().sum()) for p in control.module.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("name", TRAINED)
def test_a_resumed_run_equals_the_uninterrupted_one(name, tmp_path):
    settings = Training(final_learning_rate=1.0, checkpoint_every=2, **{"minibatch": 16, **METHODS[name].training})

    def run(rounds, resume, checkpoint):
        method, control, generator = setting(name)
        fit(method, State(control, generator), replace(settings, rounds=rounds), checkpoint, resume)
        return [p.detach().clone() for p in control.module.parameters()]

    whole = run(4, False, tmp_path / "whole")
    run(2, False, tmp_path / "part")
    resumed = run(4, True, tmp_path / "part")
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    shorter = run(3, False, tmp_path / "other")
    assert not all(torch.equal(a, b) for a, b in zip(whole, shorter, strict=True))  # the comparison can fail


@pytest.mark.parametrize("name", TRAINED)
def test_methods_that_need_no_gradient_take_any_reward_and_the_others_refuse(name):
    def one_round():
        method, control, generator = setting(name, lambda x: (x[:, 0] > 0).float())
        return method.loss(control, method.collect(State(control, generator)).material, generator)

    if METHODS[name].needs_gradient:
        with pytest.raises(TiltflowError, match="detached"):
            one_round()
    else:
        assert bool(torch.isfinite(one_round()))


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("name", FREE)
def test_a_training_free_method_keeps_the_protocol(name, tuned):
    problem, generator = mixture2d(), torch.Generator().manual_seed(0)
    chain = chain_of(problem, 12, generator)
    control = FineTuned(tilted(problem.process(), MLP(4, 2, 8, 2)))
    method = METHODS[name].made(chain=chain, cost=RewardCost(problem.reward))
    drawn = method.sample(control if tuned else None, 40, generator)
    assert drawn.x.shape == (40, 2) and drawn.log_weights.shape == (40,)
    assert bool(torch.isfinite(drawn.x).all()) and bool(torch.isfinite(drawn.log_weights).all())
    assert drawn.log_z is None or abs(drawn.log_z - problem.log_z) < 2


def test_a_budget_decides_the_rounds_and_is_not_overspent():
    problem, counter = mixture2d(), Counter()
    train(problem, 0, replace(SMALL, budget=Budget(5_000, 10_000)), counter=counter, method="adjoint_matching_plain")
    assert counter.base == 13 * 32 * 12 and counter.reward == 13 * 64  # 12 evaluations a path: 6 simulated, 6 adjoint
    train(problem, 0, replace(SMALL, budget=Budget(10**9, 200)), counter=counter, method="adjoint_matching_plain")
    assert counter.reward == 3 * 64
    with pytest.raises(TiltflowError, match="whole budget"):
        train(problem, 0, replace(SMALL, budget=Budget(100, 100)), method="adjoint_matching_plain")


@pytest.mark.parametrize("name", ["adjoint_matching_endpoint", "draft_1", "best_of_4", "urge"])
def test_rows_of_the_table(name):
    rows = bench_problem(mixture2d(), 0, SMALL, name)
    assert [r["sampler"] for r in rows if r["sampler"] != "exact"] == (["sde", "ode"] if name in TRAINED else ["sde"])
    for row in rows:
        assert {"w2", "w2_floor", "mode_tv", "base_evaluations", "reward_calls", "seconds", "peak_memory_mb"} <= set(row)
        assert row["biased"] == bool(METHODS[name].bias)
        assert row["base_evaluations"] > 0 and row["reward_calls"] > 0


def test_the_exact_control_scores_well_in_the_table():
    problem = mixture2d()
    settings = replace(SMALL, sample_steps=60, samples=4000, w2_samples=400)
    sde, ode, exact = evaluate(problem, counted(problem.optimal(), Counter()), 0, settings)
    assert sde["mode_tv"] < 0.03 and ode["mode_tv"] < 0.03 and sde["ess"] > 0.85 and abs(sde["spread"] - 1) < 0.05
    assert exact["mode_tv"] < 0.03
    base, _, weighted = evaluate(problem, counted(problem.process(), Counter()), 0, settings)
    assert base["mode_tv"] > 0.2  # the base itself is not the tilt,
    assert weighted["mode_tv"] < 0.05  # its weighted paths are


@pytest.mark.parametrize("name", ["adjoint_matching", "draft_1", "feynman_kac"])
def test_row_of_the_digits_table(name):
    x = torch.rand(40, 1, 28, 28) * 2 - 1
    reference = (x, torch.zeros(40))
    settings = DigitsSettings(
        steps=4, budget=1, batch=8, minibatch=16, samples=16, path_samples=8, w2_samples=8, w2_draws=1
    )
    (row,) = bench_method(name, 0, settings, reference)
    assert {"reward", "judge_thickness", "diversity", "w2", "seconds", "base_evaluations", "reward_calls"} <= set(row)
    assert ("kl" in row) == (name in TRAINED)


@pytest.mark.parametrize("method", ["adjoint_matching_plain", "log_variance", "socm"])
def test_row_of_the_control_table(method):
    settings = ControlSettings(steps=10, rounds=60, batch=64, hidden=16, layers=2, learning_rate=1e-2, paths=200)
    (row,) = bench_control_problem("linear-quadratic", method, 0, settings)
    assert row["control_error"] < 0.8  # without a control it is 1
    assert row["objective"] > row["objective_exact"] - 4 * row["objective_standard_error"] - 0.05


def test_a_method_that_diverges_costs_no_other_its_row(monkeypatch):
    problem = mixture2d()
    monkeypatch.setitem(TILT_PROBLEMS, "broken", lambda: replace(problem, reward=lambda x: x[:, 0] * float("nan")))
    rows = _bench_named("broken", "adjoint_matching_plain", 0, SMALL, 1)
    assert all("NaN" in row["error"] and row["method"] == "adjoint_matching_plain" for row in rows)


def test_benches_take_the_rows_of_the_one_table_that_apply():
    assert names("finetune") == benches.TILT and set(benches.TILT) == {*TRAINED, *FREE}
    assert set(benches.TILT) - set(benches.DIGITS) == {"adjoint_matching_endpoint", "socm", "reciprocal_matching"}
    assert set(benches.CONTROL) == {
        "adjoint_matching", "adjoint_matching_plain", "adjoint_matching_basic", "discrete_adjoint", "log_variance", "socm",
        "reinforce",
    }  # fmt: skip
    assert (*names("sample"), "automatic") == benches.SAMPLING and "parallel_tempering" in benches.SAMPLING
    assert METHOD in benches.TILT and chosen("all", benches.TILT) == benches.TILT


def test_unknown_names_are_refused():
    for text, usable, wrong in [
        ("nope", benches.TILT, "nope"),
        ("adjoint_matching_plain, socm", benches.DIGITS, "socm"),
        ("draft_1", benches.CONTROL, "draft_1"),
        ("reinforce", benches.SAMPLING, "reinforce"),
    ]:
        with pytest.raises(TiltflowError, match=f"unknown method '{wrong}'"):
            chosen(text, usable)
    with pytest.raises(TiltflowError, match="unknown problem"):
        bench_tilt(("nope",), 0)


def test_the_worked_example_of_the_docs_runs_and_finds_log_z(capsys):
    page = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
    definition, use = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(definition.splitlines()) <= 40
    example: dict = {"__name__": "worked_example"}
    exec(definition, example)
    exec(use, example)
    printed = [float(word) for word in capsys.readouterr().out.split()]
    assert printed[1] == pytest.approx(0.625) and printed[0] == pytest.approx(printed[1], abs=0.03)
    assert example["tuned"].history[-1]["iteration"] == 199
