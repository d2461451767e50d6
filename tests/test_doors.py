"""The front doors, in Python and on the command line alike: methods, faulty input, models that are what they say."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import torch
from models import GaussianVelocity, process, right
from safetensors.torch import load_file
from torch import nn

import tiltflow
from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import describe_fields
from tiltflow.methods.log_variance import LogVariance
from tiltflow.methods.registry import METHODS, ROWS, names
from tiltflow.run import job as flow
from tiltflow.sampling.settings import SamplerConfig
from tiltflow.tilting.job import TiltJob
from tiltflow.tilting.settings import TiltConfig
from tiltflow.tilting.weights import load_network
from tiltflow.train.settings import Training

MODELS = str(Path(__file__).with_name("models.py"))
NAMED = ["--base", f"{MODELS}:process", "--reward", f"{MODELS}:right"]
FEW = ["--rounds", 2, "--batch", 8, "--steps", 12, "--samples", 200, "--reference-samples", 200]
SMALL = tiltflow.FinetuneSettings.of(rounds=3, batch=8, steps=5)


@pytest.fixture(autouse=True)
def single():
    torch.set_default_dtype(torch.float32)


def called(*args):
    """A command in this process, without its page: its exit code, output and errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "page_of", lambda *outcome: None)
        patch.setattr(flow, "write_page", lambda folder, page: None)
        done = commands.tiltflow(*args)
    return done.returncode, done.stdout, done.stderr


# --- methods


def test_the_list_names_every_method():
    code, out, _ = called("list", "--json")
    rows = json.loads(out)["rows"]
    listed = {row["name"]: row for row in rows if row["kind"] == "methods"}
    assert code == 0 and list(listed) == [row.name for row in ROWS]
    assert listed["flow_grpo"]["needs"] == "values only" and "λ is lost" in listed["flow_grpo"]["bias"]
    assert {row["kind"] for row in rows} == {"methods", "problems", "energies", "rewards", "bases"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_through_the_command_line_or_says_why_not(method, tmp_path):
    code, out, err = called("finetune", *NAMED, *FEW, "--method", method, "--out", tmp_path / "run", "--json")
    if "finetune" not in METHODS[method].jobs:
        assert code == 2 and f"the method {method!r} samples from an energy: use train_sampler" in err
        assert not (tmp_path / "run").exists()
        return
    assert code in (0, 3), err
    summary = json.loads(out)["rows"][0]
    assert summary["method"] == method and (summary["path_ess"] is None) == (not METHODS[method].trained)
    drawn = called("sample", tmp_path / "run", "--trust", "-n", 5, "--json")
    assert drawn[0] == 0 and json.loads(drawn[1])["rows"][0]["shape"] == [5, 2], drawn[2]


@pytest.mark.parametrize("method", names("sample", trained=True))
def test_every_sampler_runs_through_the_command_line(method, tmp_path):
    few = ["--rounds", 2, "--batch", 16, "--steps", 5, "--draw-steps", 5, "--hidden", 8, "--samples", 100, "--compared", 40]
    code, out, err = called("train-sampler", "gaussian2d", *few, "--method", method, "--out", tmp_path / "run", "--json")
    assert code in (0, 3), err
    assert json.loads(out)["rows"][0]["method"] == method


def test_a_reward_without_gradient_is_named_and_so_are_the_methods_that_take_it(tmp_path):
    code, _, err = called("finetune", *NAMED[:2], "--reward", f"{MODELS}:judge", *FEW, "--out", tmp_path / "run")
    assert code == 2 and "detached" in err and all(name in err for name in names("finetune", without=("gradient",)))
    with pytest.raises(TiltflowError, match=r"detached.*values only: .*reinforce"):
        tiltflow.finetune(process(), lambda x: (x[:, 0] > 0).float(), settings=SMALL)
    settings = tiltflow.FinetuneSettings.of("reinforce", rounds=2, batch=8, steps=5)
    tiltflow.finetune(process(), lambda x: (x[:, 0] > 0).float(), 1.0, "reinforce", settings)


def test_a_method_of_ones_own_goes_through_the_front_door():
    settings = tiltflow.FinetuneSettings.of(LogVariance, rounds=2, steps=5)
    tuned = tiltflow.finetune(process(), right, 1.0, LogVariance, settings)
    assert tuned.sample(3).shape == (3, 2) and len(tuned.history) == 2
    with pytest.raises(TiltflowError, match="not in the table"):
        tuned.save("nowhere")


# --- faulty input, by both doors

FAULTS = [
    ("steps", 0, "a whole number from 1"),
    ("steps", 9223372036854775807, "a whole number from 1"),
    ("gradient_steps", 0, "of at least 1"),
    ("rounds", -3, "of at least 1"),
    ("batch", -5, "of at least 2"),
    ("batch", 1, "of at least 2"),
    ("minibatch", 0, "of at least 1"),
    ("buffer_rounds", 0, "of at least 1"),
    ("learning_rate", -1.0, "above 0"),
    ("learning_rate", float("nan"), "above 0"),
    ("learning_rate", float("inf"), "above 0"),
    ("final_learning_rate", 2.0, "from 0 to 1"),
    ("ema", 2.0, "from 0 to 1"),
    ("ema", float("nan"), "from 0 to 1"),
    ("clip", -1.0, "above 0"),
    ("gradient_clip", 0.0, "above 0"),
    ("max_cost_gradient", float("nan"), "above 0"),
    ("random_steps", 5, "give last_steps as well"),
    ("last_steps", 0, "from 1 to steps"),
    ("last_steps", 99, "from 1 to steps"),
    ("rank", 0, "of at least 1"),
    ("sigma", float("nan"), "of at least 0"),
    ("chi", float("nan"), "a finite number"),
    ("variance_samples", 1, "of at least 2"),
    ("warmup", -1, "of at least 0"),
]
JOB_FAULTS = [
    ("seed", 99999999999999999999, "a whole number"),
    ("seed", -1, "a whole number"),
    ("strength", float("nan"), "of at least 0"),
    ("strength", -2.0, "of at least 0"),
    ("samples", 0, "from 100"),
    ("reference_samples", 5, "from 100"),
    ("guidance", float("inf"), "above 0"),
    ("interpolant", "spiral", "linear, cosine, vp"),
    ("predicts", "everything", "one of velocity"),
]


@pytest.mark.parametrize(("field", "value", "message"), FAULTS)
def test_faulty_settings_are_refused_by_both_doors(field, value, message, tmp_path):
    with pytest.raises(TiltflowError, match=message):
        tiltflow.FinetuneSettings(**{field: value})
    code, out, err = called("finetune", *NAMED, f"--{field.replace('_', '-')}", value, "--out", tmp_path / "run")
    assert code == 2 and message in err and "Traceback" not in err and out == "" and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("field", "value", "message"), JOB_FAULTS)
def test_faulty_jobs_are_refused_by_both_doors(field, value, message, tmp_path):
    with pytest.raises(TiltflowError, match=message):
        TiltJob(base=f"{MODELS}:process", reward=f"{MODELS}:right", **{field: value})
    code, _, err = called("finetune", *NAMED, f"--{field.replace('_', '-')}", value, "--out", tmp_path / "run")
    assert code == 2 and message in err and "Traceback" not in err and not (tmp_path / "run").exists()


SAMPLER_FAULTS = [
    ("rounds", -3, "of at least 1"),
    ("batch", -5, "of at least 2"),
    ("gradient_steps", 0, "of at least 1"),
    ("steps", 0, "a whole number from 1"),
    ("draw_steps", 10**18, "a whole number from 1"),
    ("learning_rate", float("nan"), "above 0"),
    ("ema", 1.5, "from 0 to 1"),
    ("sigma_min", -1.0, "above 0"),
    ("sigma_max", float("inf"), "above 0"),
    ("max_cost_gradient", 0.0, "above 0"),
    ("minimum_ess", 1.0, "above 0 and at most 1"),
    ("minimum_ess", float("nan"), "above 0 and at most 1"),
    ("hot", 0.5, "of at least 1"),
    ("cooling", float("nan"), "from 0 to 1"),
    ("hidden", 0, "of at least 1"),
    ("noise", "pink", "one of geometric, constant"),
]


@pytest.mark.parametrize(("field", "value", "message"), SAMPLER_FAULTS)
def test_faulty_settings_of_samplers_are_refused_by_both_doors(field, value, message, tmp_path):
    with pytest.raises(TiltflowError, match=message):
        tiltflow.SamplerSettings(**{field: value})
    code, out, err = called("train-sampler", "gmm9", f"--{field.replace('_', '-')}", value, "--out", tmp_path / "run")
    assert code == 2 and message in err and "Traceback" not in err and out == "" and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["gmm9", "--method", "draft_1"], "'draft_1' tilts a base towards a reward: use finetune"),
        (["gmm9", "--method", "parallel_tempering"], "trains nothing"),
        (["gmm9", "--method", "magic"], "unknown method 'magic'"),
        (["gmm9", "--sigma-min", 3, "--sigma-max", 2], "sigma_min must be below sigma_max"),
        (["gmm9", "--scale", "nan"], "above 0"),
        (["gmm9", "--shape", 2], "leave out --shape"),
        (["gmm9", "--samples", 0], "from 2"),
        (["gmm9", "--seed", -1], "a whole number"),
        (["nope"], "unknown problem 'nope'"),
        ([":"], "names no function"),
    ],
)
def test_faulty_samplers_write_nothing(args, message, tmp_path):
    code, _, err = called("train-sampler", *args, "--out", tmp_path / "run")
    assert code == 2 and message in err and "Traceback" not in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("args", [["--help"], ["finetune", "--help"], ["finetune", "--steps", "0", "--out", "x"], ["nope"]])
def test_help_and_misuse_do_not_wait_for_torch(args, tmp_path):
    code = "import sys, time; t = time.process_time(); sys.argv = ['tiltflow', *sys.argv[1:]]\n"
    code += "from tiltflow.cli import main\ntry:\n    main()\nexcept SystemExit as e:\n    end = e.code\n"
    code += "print(end, 'torch' in sys.modules, time.process_time() - t, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=tmp_path, check=False)
    end, torch_there, seconds = done.stderr.split()[-3:]
    assert end == ("0" if "--help" in args else "2") and torch_there == "False" and float(seconds) < 0.5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--chi", -1], "makes σ² = 2η + χ negative"),
        (["--sigma", 1.0, "--chi", 1.0], "leave one of them out"),
        (["--sigma", 1.0, "--allow-biased", "--method", "path_weighted"], "needs the memoryless schedule"),
        (["--method", "reinforce", "--buffer-rounds", 3], "uses each round once"),
        (["--method", "socm", "--last-steps", 3], "takes no last_steps"),
        (["--base", ":"], "names no function"),
        (["--base", "::"], "names no function"),
        (["--reward", f"{MODELS}:constant"], "constant"),
        (["--reward", f"{MODELS}:wrong_length"], "output length"),
        (["--judge", f"{MODELS}:nothing"], "has no 'nothing'"),
        (["--conditions", f"{MODELS}:right", "--reward", "inpainting"], "draws its own conditions"),
        (["--device", "abacus"], "not usable here"),
        (["--log", "paper"], "unknown log 'paper'"),
    ],
)
def test_faulty_combinations_write_nothing(args, message, tmp_path):
    code, _, err = called("finetune", *NAMED, *FEW, "--out", tmp_path / "run", *args)
    assert code == 2 and message in err and "Traceback" not in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("cls", [TiltConfig, tiltflow.FinetuneSettings, SamplerConfig, tiltflow.SamplerSettings, Training])
def test_every_setting_has_a_sentence_and_an_option(cls):
    silent = [f.name for f in describe_fields(cls) if not (f.help.endswith(".") and f.help[0] == f.help[0].upper())]
    assert not silent
    command = "finetune" if cls in (TiltConfig, tiltflow.FinetuneSettings, Training) else "train-sampler"
    shown = called(command, "--help")[1]
    for field in describe_fields(cls):
        option = "--" + field.name.replace("_", "-")
        if field.name not in ("settings", "problem"):
            assert option in shown or option.removesuffix("s") in shown, option


# --- models


@pytest.fixture(scope="module")
def tuned():
    torch.set_default_dtype(torch.float32)
    return tiltflow.finetune(process(), right, 1.0, settings=tiltflow.FinetuneSettings.of(rounds=60, learning_rate=1e-2))


def test_the_programs_of_the_house(tuned, tmp_path):
    x = tuned.sample(64)
    exact = tuned.sample(4000, exact=True)
    assert x.shape == (64, 2) and float(exact[:, 0].mean()) == pytest.approx(0.25, abs=0.03)  # N(0, .25) tilted by e^x
    verdict = tuned.verdict(judges={"held out": lambda x: (x[:, 0] > 0).float()})
    assert verdict.status == "pass" and {s.name for s in verdict.scores} == {"reward", "held out"}
    tuned.save(tmp_path / "mine")
    again = tiltflow.load(tmp_path / "mine", base=process(), reward=right)
    assert torch.equal(again.sample(9), tuned.sample(9)) and not torch.equal(again.sample(9), tuned.sample(9, seed=1))
    with pytest.raises(TiltflowError, match="give its base"):
        tiltflow.load(tmp_path / "mine", reward=right)
    with pytest.raises(TiltflowError, match="already holds a run"):
        tuned.save(tmp_path / "mine")
    settings = tiltflow.SamplerSettings.of(rounds=2, batch=16, steps=5, draw_steps=5)
    from tiltflow.energies import ENERGY_PROBLEMS

    problem = ENERGY_PROBLEMS["gaussian2d"]()
    s = tiltflow.train_sampler(problem, settings=settings, seed=0)
    assert s.sample(10).x.shape == (10, 2) and s.verdict(200, 50).lines
    s.save(tmp_path / "sampler")
    assert torch.equal(tiltflow.load(tmp_path / "sampler", problem=problem).sample(7).x, s.sample(7).x)


def test_exact_samples_undo_what_was_not_learned():
    """Hardly trained, the chain is short of the tilt; its weighted paths are not."""
    settings = tiltflow.FinetuneSettings.of(rounds=1, batch=16)
    model = tiltflow.finetune(process(), right, 1.0, settings=settings)
    for seed in range(3):
        plain, exact = (float(model.sample(4000, exact=e, seed=seed)[:, 0].mean()) for e in (False, True))
        assert plain < 0.15 and exact == pytest.approx(0.25, abs=4 * 0.5 / 1000**0.5)


def test_the_public_surface_is_small_and_whole():
    shown = [name for name in dir(tiltflow) if not name.startswith("_")]
    assert 20 <= len(shown) <= 30 and sorted(shown) == sorted(tiltflow._WHERE)
    for name in shown:
        assert getattr(tiltflow, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'sampler'"):
        _ = tiltflow.sampler


class Denoiser(nn.Module):
    """X̂_1 of N(0, .25 I) data on the linear path, plus weights to train."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.extra = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 2))
        nn.init.zeros_(self.extra[2].weight)
        nn.init.zeros_(self.extra[2].bias)

    def forward(self, x, t):
        t = t[:, None]
        return 0.25 * t / (0.25 * t**2 + (1 - t) ** 2) * x + self.extra(torch.cat([x, t], 1))


def test_saved_weights_speak_the_convention_of_the_base_or_refuse_to_be_mistaken(tuned, tmp_path):
    tuned.save(tmp_path / "velocity")
    mine = GaussianVelocity()
    mine.load_state_dict(load_file(tmp_path / "velocity" / "weights.safetensors"))  # the user's own class
    x, t = torch.randn(5, 2), torch.full((5,), 0.3)
    torch.testing.assert_close(mine(x, t), tuned.process.velocity(x, t))
    base = tiltflow.Process(tiltflow.Linear(), Denoiser(), "x1", (2,))
    model = tiltflow.finetune(base, right, 1.0, settings=tiltflow.FinetuneSettings.of(rounds=20, learning_rate=1e-2))
    model.save(tmp_path / "x1")
    found = load_file(tmp_path / "x1" / "weights.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        Denoiser().load_state_dict(found)
    assert len(Denoiser().load_state_dict(found, strict=False).missing_keys) == 4
    torch.testing.assert_close(model.module(x, t), model.process.x1(x, t))  # what is right in the user's own code
    again = tiltflow.load(tmp_path / "x1", base=base, reward=right)
    assert torch.equal(again.sample(5), model.sample(5))
    shutil.copy(tmp_path / "velocity" / "weights.safetensors", tmp_path / "x1" / "weights.safetensors")
    with pytest.raises(TiltflowError, match="is not what the run wrote"):
        tiltflow.load(tmp_path / "x1", base=base, reward=right)
    with pytest.raises(TiltflowError, match="does not hold the weights of an x1 network"):
        load_network(tmp_path / "x1", model.process)


# --- runs


def test_a_finished_run_is_a_base_moves_and_is_trained_further(tmp_path):
    out, few = tmp_path / "run", [*NAMED, *FEW]
    assert called("finetune", *few, "--out", out)[0] in (0, 3)
    moved = tmp_path / "deep" / "moved"
    moved.parent.mkdir()
    shutil.copytree(out, moved)
    assert called("sample", moved, "--trust", "-n", 3)[0] == 0
    code, _, err = called("finetune", *few, "--rounds", 5, "--resume", "--out", moved)
    assert code in (0, 3), err
    rows = json.loads((moved / "metrics.json").read_text())["rows"]
    assert [row["iteration"] for row in rows if row["kind"] == "iteration"] == [0, 1, 2, 3, 4]
    code, _, err = called("finetune", *few, "--batch", 16, "--resume", "--out", moved)
    assert code == 2 and "settings.batch: 8 then, 16 now" in err
    code, _, err = called("finetune", "--base", moved, "--trust", *NAMED[2:], *FEW, "--out", tmp_path / "next")
    assert code in (0, 3), err
    first, second = tiltflow.load(moved, trust=True), tiltflow.load(tmp_path / "next", trust=True)
    x, t = torch.randn(4, 2), torch.full((4,), 0.5)
    torch.testing.assert_close(second.base.x1(x, t), first.process.x1(x, t))


def gaussian(shape):
    """N(0, .25 I) data of any shape, with one weight to train."""

    class Velocity(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(()))

        def forward(self, x, t):
            t = t.reshape(-1, *(1,) * (x.ndim - 1))
            return (0.25 * t - (1 - t)) / (0.25 * t**2 + (1 - t) ** 2) * x + self.shift

    return tiltflow.Process(tiltflow.Linear(), Velocity(), "velocity", shape)


@pytest.mark.parametrize("shape", [(1,), (3,), (3, 3), (4, 8, 8), (3, 4, 8, 8)])
def test_events_of_any_shape_are_judged_and_reported(shape, tmp_path, monkeypatch):
    from tiltflow.tilting import job as tilting

    monkeypatch.setattr(tilting, "load_base", lambda *args: gaussian(shape))
    job = TiltJob(
        base="gaussian", reward=f"{MODELS}:total", settings=tiltflow.FinetuneSettings.of(rounds=2, batch=8, steps=5),
        samples=200, reference_samples=300,
    )  # fmt: skip
    result = flow.run(job, tmp_path / "run")
    assert result["verdict"] is not None and not any("report_error" in row for row in result["rows"])
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert tuple(load_file(tmp_path / "run" / "samples.safetensors")["samples"].shape) == (200, *shape)


def test_a_judge_is_asked_once_per_sample_and_a_broken_picture_costs_nothing(tmp_path, monkeypatch):
    import models

    seen = []
    monkeypatch.setattr(models, "judge", lambda x: seen.append(len(x)) or (x[:, 0] > 0).to(x.dtype))
    job = TiltJob(
        base="models:process", reward="models:right", judges=("models:judge",), samples=200, reference_samples=300,
        settings=SMALL,
    )  # fmt: skip
    monkeypatch.setattr(flow, "write_page", lambda folder, page: 1 / 0)
    told = []
    result = flow.run(job, tmp_path / "run", tell=lambda *news: told.append(news[:3]))
    assert sum(seen) == 200 + 300 + 200  # as drawn, of the base, by the ODE
    assert result["verdict"] is not None and result["rows"][-1]["report_error"] == "ZeroDivisionError: division by zero"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == result
    stages = {what: (done, total) for what, done, total in told}
    assert all(done == total for done, total in stages.values()), stages  # every bar reaches its end
    assert {"samples of the base", "scores: models:judge", "verdict", "report"} <= set(stages)
    assert list(stages)[:2] == ["variances of the chain", "fine-tuning"]
    assert [done for what, done, _ in told if what == "variances of the chain"] == list(range(6 + 1))


def test_metrics_grow_and_rounds_are_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "EVERY", 0.0)
    monkeypatch.setattr(flow, "write_page", lambda folder, page: None)
    grown = []

    def tell(what, done, total, note):
        path = tmp_path / "run" / "metrics.json"
        if what == "fine-tuning" and path.is_file():
            grown.append(len(json.loads(path.read_text())["rows"]))

    job = TiltJob(base=f"{MODELS}:process", reward=f"{MODELS}:right", samples=200, reference_samples=300, settings=SMALL)
    flow.run(job, tmp_path / "run", tell=tell, log="tensorboard")
    assert grown == [1, 2]
    assert any(p.name.startswith("events.out") for p in (tmp_path / "run" / "log").iterdir())
    flow.run(job, tmp_path / "run", overwrite=True)  # the log is the run's own
    assert not (tmp_path / "run" / "log").exists()


def test_a_verdict_needs_no_picture(tmp_path, monkeypatch):
    """Without matplotlib: it is said before training, and all but the page is there."""
    from tiltflow.report import page

    monkeypatch.setattr(page, "NEEDED", ("matplotlib", "no_such_package"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    done = commands.tiltflow("finetune", *NAMED, *FEW, "--out", tmp_path / "run")
    assert done.returncode in (0, 3) and "verdict:" in done.stdout and "report:  none" in done.stdout
    assert done.stderr.index("no_such_package") < done.stderr.index("fine-tuning")
    assert not (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "metrics.json").is_file()


def test_a_conditional_model_is_judged_under_conditions_it_has_not_seen(tmp_path):
    """N(m, ¼ I) tilted by e^{x − m}: the mean moves by ¼, whatever the condition m."""
    named = ["--base", f"{MODELS}:conditional", "--conditions", f"{MODELS}:means", "--reward", f"{MODELS}:near"]
    few = ["--rounds", 60, "--learning-rate", 1e-2, "--samples", 1000, "--reference-samples", 1000]
    code, out, err = called("finetune", *named, *few, "--judge", f"{MODELS}:near", "--out", tmp_path / "run", "--json")
    assert code in (0, 3), err
    document = json.loads(out)
    lines = [row for row in document["rows"] if row["kind"] == "verdict" and row["name"].startswith("reward gap")]
    assert [line["way"] for line in lines[:3]] == ["as drawn", "ode", "exact"]
    assert [line["name"][-10:] for line in lines[::3]] == [f"(unseen {i})" for i in range(1, 9)]
    summary = document["rows"][0]
    assert summary["reward_base"] == pytest.approx(0.0, abs=0.05)
    assert summary["reward_reached"] == pytest.approx(0.25, abs=0.05)
    assert summary["reward_ode"] == pytest.approx(0.25, abs=0.06)
    assert called("sample", tmp_path / "run", "--trust", "-n", 20, "--exact")[0] == 0
    model = tiltflow.load(tmp_path / "run", trust=True)
    assert model.report(tmp_path / "again", samples=200, reference_samples=200).stat().st_size > 10_000
    without = called("finetune", *named[:2], "--reward", f"{MODELS}:right", "--out", tmp_path / "other")
    assert without[0] == 2 and "mean" in without[2]
