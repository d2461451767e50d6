"""Runs of the second job: resumed exactly, refused when misused; and a verdict that wrong samplers do not pass."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tiltflow.bench import sampling as bench_sampling
from tiltflow.core.errors import TiltflowError
from tiltflow.energies import ENERGY_PROBLEMS
from tiltflow.energies.tempering import Tempering
from tiltflow.run import job as flow
from tiltflow.run.folder import FORMAT, RunFolder
from tiltflow.run.open import load, open_run
from tiltflow.sampling.assess import assess_all
from tiltflow.sampling.drawn import Drawn
from tiltflow.sampling.job import SamplerJob
from tiltflow.sampling.names import load_problem
from tiltflow.sampling.settings import SamplerSettings
from tiltflow.verdict.sampler import judge_sampler

ENERGIES = str(Path(__file__).with_name("energies_by_name.py"))
TINY = SamplerSettings(rounds=54, batch=32, gradient_steps=1, minibatch=32, steps=10, hidden=16, layers=2)
UNEQUAL = ENERGY_PROBLEMS["unequal2d"]()
UNKNOWN = replace(UNEQUAL, sample=None, log_z=None, modes=None)


def config(**changes):
    usual = {"problem": "gaussian2d", "seed": 3, "samples": 300, "compared": 100, "settings": TINY}
    return SamplerJob(**(usual | changes))


# --- the verdict


def honest(problem, generator):
    x = UNEQUAL.sample(20_000, generator)
    return Drawn(x, problem.energy(x), 0.5 * torch.randn(len(x), generator=generator) - 0.125)


def one_mode(problem, generator):
    """A sampler that lost the mode of weight .3, and is perfect on the other: it cannot know."""
    x = UNEQUAL.sample(12_000, generator)
    x = x[x[:, 0] < 0][:6_000]
    return Drawn(x, problem.energy(x), torch.full((6_000,), math.log(0.7)))


def hot(problem, generator):
    """Temperature 2, with the path weights of a sampler that is right."""
    x = UNEQUAL.sample(20_000, generator)
    x = x + torch.randn(x.shape, generator=generator)  # N(m, 1) becomes N(m, 2)
    return honest(problem, generator)._replace(x=x, energy=problem.energy(x))


def untrained(problem, generator):
    x = 4 * torch.randn(6_000, 2, generator=generator)
    return Drawn(x, problem.energy(x), -problem.energy(x))


def diverged(problem, generator):
    drawn = honest(problem, generator)
    return drawn._replace(energy=drawn.energy.masked_fill(torch.arange(20_000) < 1_000, torch.inf))


def lines_of(problem, sampler, generator, compared=700):
    row = assess_all(problem, sampler(problem, generator), None, None, generator, compared).row
    verdict = judge_sampler(row)
    return verdict.status, {line.name: line.status for line in verdict.lines}


def test_a_sampler_that_is_right_passes(generator):
    status, lines = lines_of(UNEQUAL, honest, generator)
    assert status == "pass" and len(lines) >= 6, lines


@pytest.mark.parametrize(
    ("sampler", "sees"),
    [
        (one_mode, ("log Z", "mode weights (total variation)")),
        (hot, ("temperature", "agreement with the reference")),
        (untrained, ("energy W2 over its floor",)),
        (diverged, ("rejected energies",)),
    ],
)
def test_samplers_that_are_wrong_fail(sampler, sees, generator):
    status, lines = lines_of(UNEQUAL, sampler, generator)
    assert status == "fail" and all(lines[name] == "fail" for name in sees), lines


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [(honest, "cannot tell"), (one_mode, "cannot tell"), (hot, "fail"), (untrained, "fail"), (diverged, "fail")],
)
def test_without_a_reference_nothing_passes(sampler, expected, generator):
    """The lost mode is not seen, and the verdict says that it could not; the wrong temperature is seen all the same."""
    status, lines = lines_of(UNKNOWN, sampler, generator)
    assert status == expected and lines["lost modes"] == "cannot tell", lines
    if sampler is hot:
        assert lines["virial identity"] == "fail" and lines["path weights ESS"] == "pass"


def test_few_good_paths_cannot_tell():
    known = {"samples": 10_000, "rejected": 0, "elbo": -9.0, "log_z": 0.0, "log_z_std": 0.02, "log_z_error": 0.0}
    assert judge_sampler(known | {"ess": 0.5}).status == "pass"
    verdict = judge_sampler(known | {"ess": 0.005})
    assert verdict.status == "cannot tell"
    assert [line.status for line in verdict.lines] == ["pass", "cannot tell", "cannot tell"]
    both = {"log_z_forward": 0.0, "log_z_forward_std": 0.02, "eubo": 1.0, "energy_w2": 1.0, "energy_w2_floor": 0.9}
    assert judge_sampler(known | both | {"ess": 0.5, "forward_ess": 0.4}).status == "pass"
    apart = judge_sampler(known | both | {"ess": 0.5, "forward_ess": 0.4, "log_z_forward": 0.5})
    assert apart.status == "fail" and any(x.name == "log Z from both sides" and x.status == "fail" for x in apart.lines)


# --- the run


class Stopped(Exception):
    pass


def run(path, settings=None, stop_at=None, **kw):
    wanted = settings or config()

    def progress(what, done, total, note):
        if stop_at is not None and done == stop_at:
            raise Stopped

    return flow.run(wanted, path, command="tiltflow train-sampler", tell=progress, **kw)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    path = tmp_path_factory.mktemp("sampler") / "run"
    document = run(path)
    torch.set_default_dtype(before)
    return path, document


def test_what_a_run_leaves(finished):
    path, document = finished
    assert set(document) == {"command", "version", "seed", "device", "rows", "verdict"}
    assert json.loads((path / "metrics.json").read_text()) == document
    kinds = [row["kind"] for row in document["rows"]]
    assert kinds[0] == "summary" and kinds.count("iteration") == TINY.rounds and "verdict" in kinds
    summary = document["rows"][0]
    assert summary["energy_calls"] == TINY.rounds and summary["energy_evaluations"] == TINY.rounds * TINY.batch
    assert {"w2", "w2_floor", "w2_resampled", "energy_w2", "log_z_error", "log_z_forward", "ess"} <= set(summary)
    saved = load_file(path / "samples.safetensors")
    assert saved["x"].shape == (300, 2) and saved["energy"].shape == saved["log_weights"].shape == (300,)
    torch.testing.assert_close(saved["energy"], ENERGY_PROBLEMS["gaussian2d"]().energy(saved["x"]))
    page = (path / "report.html").read_text(encoding="utf-8")
    assert "://" not in page and "<script" not in page and 'class="samples"' in page
    for heading in ("Energies", "Sorted path weights", "Reference", "W2 of energies", "Path weights"):
        assert heading in page, heading


def test_a_finished_run_draws_the_same_again(finished):
    path, _ = finished
    assert open_run(path) == config()
    drawn = load(path).sample(300, seed=10_003)
    assert torch.equal(drawn.x, load_file(path / "samples.safetensors")["x"])


def test_resume_equals_uninterrupted(finished, tmp_path):
    path, document = finished
    with pytest.raises(Stopped):
        run(tmp_path / "run", stop_at=52)
    resumed = run(tmp_path / "run", resume=True)
    for name in ("weights.safetensors", "samples.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (path / name).read_bytes()
    timed = ("seconds", "train_seconds")
    first, second = ({k: v for k, v in d["rows"][0].items() if k not in timed} for d in (document, resumed))
    assert first == second and first["energy_evaluations"] > 0
    other = run(tmp_path / "other", config(seed=4))
    assert other["rows"][0]["median_energy"] != first["median_energy"]  # the comparison can fail


def test_the_folder_is_refused(finished):
    path, _ = finished
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(TiltflowError, match="already holds a run"):
        run(path)
    with pytest.raises(TiltflowError, match="cannot resume"):
        run(path, config(seed=9), resume=True)
    whole = {"job": "train-sampler", "format": FORMAT, **config().config()}
    with RunFolder(path, whole, resume=True), pytest.raises(TiltflowError, match="in use"):
        run(path, overwrite=True)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"rounds": 0}}, "rounds must be a whole number of at least 1"),
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"settings": {"sigma_max": -1.0}}, "sigma_max must be a finite number above 0"),
        ({"settings": {"sigma_min": math.nan}}, "sigma_min must be a finite number above 0"),
        ({"settings": {"sigma_min": 9.0, "sigma_max": 2.0}}, "sigma_min must be below sigma_max"),
        ({"settings": {"sigma_min": 9.0}}, "finest < scale"),
        ({"scale": -1.0}, "scale must be a finite number above 0"),
        ({"samples": 0}, "samples must be a whole number from 2"),
        ({"seed": 99999999999999999999}, "seed must be a whole number"),
        ({"device": "meta"}, "device 'meta' is not usable here"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(TiltflowError, match=message):
        config(**(changes | {"settings": replace(TINY, **changes.get("settings", {}))})).check()


@pytest.mark.parametrize(
    ("energy", "check"),
    [
        ("detached", "differentiable"), ("wrong_length", "output length"), ("nan", "finite value"),
        ("raises", "no such atom"), ("constant", "gradient norm"), ("wrong_forces", "gradient check"),
        ("blow_up", "finite value"),
    ],
)  # fmt: skip
def test_energies_are_checked(energy, check):
    with pytest.raises(TiltflowError, match=check):
        config(problem=f"{ENERGIES}:{energy}", shape=(2,), scale=2.0, finest=0.1).check()


def test_symmetries_are_checked():
    lengths = {"scale": 2.0, "finest": 0.1}
    for name, shape, space, message in [
        ("springs", (3, 2), "particles", None),
        ("labelled", (3, 2), "particles", "permutation"),
        ("angles", (2,), "torus", None),
        ("bowl", (2,), "torus", "periodicity"),
    ]:
        wanted = config(problem=f"{ENERGIES}:{name}", shape=shape, space=space, **lengths)
        if message is None:
            wanted.check()
        else:
            with pytest.raises(TiltflowError, match=message):
                wanted.check()


def test_problems_by_name(generator):
    x = torch.randn(5, 2, generator=generator)
    own = dict(shape=(2,), scale=2.0, finest=0.1)
    exact = load_problem(f"{ENERGIES}:problem").energy(x)
    for name in ("bowl", "Forces"):
        torch.testing.assert_close(load_problem(f"{ENERGIES}:{name}", **own).energy(x), exact)
    with pytest.raises(TiltflowError, match="--scale and --finest"):
        load_problem(f"{ENERGIES}:bowl", (2,))
    with pytest.raises(TiltflowError, match="is a int; an energy maps"):
        load_problem(f"{ENERGIES}:NUMBER", **own)
    with pytest.raises(TiltflowError, match="unknown problem 'nope'"):
        load_problem("nope")
    with pytest.raises(TiltflowError, match="leave out --shape"):
        load_problem("gmm9", (2,))


# --- the benchmark


@pytest.mark.parametrize(("method", "expected"), [("pis", 2 * 3 * 8 * 4), ("idem", 3 * 8 * 4 + 3 * (8 + 16 + 16))])
def test_every_row_through_the_network_counts(method, expected, monkeypatch):
    settings = {"rounds": 3, "batch": 8, "minibatch": 20, "buffer_rounds": 2, "gradient_steps": 3, "steps": 4, "hidden": 16}
    problem = replace(ENERGY_PROBLEMS["gaussian2d"](), settings=settings)
    monkeypatch.setattr(bench_sampling, "COMPARED", 50)
    monkeypatch.setattr(bench_sampling, "SAMPLES", 100)
    row = bench_sampling.bench_one(problem, "gaussian2d", method, 0)
    assert row["network_evaluations"] == expected
    assert row["gradient_steps"] == (3 if method == "pis" else 9)


def test_parallel_tempering_is_a_method(monkeypatch):
    plan = Tempering(top=10.0, replicas=4, chains=50, steps=400, burn_in=200, relax=50)
    problem = replace(UNEQUAL, tempering=plan)
    monkeypatch.setattr(bench_sampling, "COMPARED", 200)
    row = bench_sampling.bench_one(problem, "unequal2d", "parallel_tempering", 0)
    assert list(row)[: len(bench_sampling.COLUMNS)] == list(bench_sampling.COLUMNS)
    assert row["mode_tv"] < 0.05 and row["ess"] is None and row["gradient_steps"] == 0
    assert row["energy_evaluations"] == 50 * 50 + (200 + 400 + 1) * 4 * 50
    assert judge_sampler(row).status in ("pass", "warn")


def test_a_reference_of_ones_own(tmp_path, generator):
    import numpy as np

    file, wrong = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(file, UNEQUAL.sample(50, generator).numpy())
    np.save(wrong, np.zeros((5, 3)))
    assert bench_sampling._problem("unequal2d", file).reference().shape == (50, 2)
    for path, message in ((wrong, "got (5, 3)"), (tmp_path / "z.npy", "not a NumPy file")):
        with pytest.raises(TiltflowError) as caught:
            bench_sampling._problem("unequal2d", path)
        assert message in str(caught.value)


def test_minutes_become_rounds_by_processor_time(monkeypatch):
    """Rounds of half a processor second, by the median of a pilot without its first; twice the threads, twice the rounds."""

    class Planned(Exception):
        pass

    def train(problem, method, settings, seed):
        if settings.rounds != 4:
            raise Planned(settings.rounds)
        return SimpleNamespace(history=[{"processor_seconds": s} for s in (9.0, 0.5, 0.5, 0.5)])

    monkeypatch.setattr(bench_sampling, "train_sampler", train)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with pytest.raises(Planned, match=f"^{360 * threads}$"):
            bench_sampling.bench_one(load_problem("unequal2d"), "unequal2d", "weighted_adjoint_sampling", 0, minutes=3)


@pytest.mark.parametrize(
    ("name", "method", "field", "value"),
    [
        ("gmm40", "idem", "gradient_steps", 20), ("gmm40", "weighted_adjoint_sampling", "gradient_steps", 100),
        ("lj13", "pis", "batch", 64),
    ],
)  # fmt: skip
def test_baselines_that_diverge_or_do_not_fit_are_treated_gently(monkeypatch, name, method, field, value):
    """Only they, and in the pilot too."""

    def train(problem, method, settings, seed):
        raise TiltflowError(f"{method} {getattr(settings, field)}")

    monkeypatch.setattr(bench_sampling, "train_sampler", train)
    with pytest.raises(TiltflowError, match=f"^{method} {value}$"):
        bench_sampling.bench_one(load_problem(name), name, method, 0, minutes=1)
