"""``tiltflow finetune-pipeline`` and ``export`` as users run them, on tiny pipelines saved to a folder."""

import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers as D
import tiny_pipelines as tiny
from commands import tiltflow

from tiltflow.pipelines.outcome import write_sounds
from tiltflow.verdict.paired import Judged, against_base

REWARDS = """
def brightness(x, texts):
    return x.flatten(1).mean(1)

def half(x, texts):
    return x[..., ::2].flatten(1).mean(1)

def darkness(x, texts):
    return -brightness(x, texts)
"""


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def here(tmp_path):
    """A pipeline's folder, rewards and prompts."""
    tiny.build("stable_diffusion").save_pretrained(tmp_path / "pipe")
    (tmp_path / "mine.py").write_text(REWARDS)
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    return tmp_path


def arguments(here, *more, **options):
    quick = {"rounds": 8, "batch": 8, "steps": 5, "rank": 2, "learning-rate": 0.02, "samples": 24, "strength": 200}
    quick |= {"reward": here / "mine.py:brightness", "prompts": here / "prompts.txt", "out": here / "run"} | options
    return ["finetune-pipeline", here / "pipe", *more, *(v for k, o in quick.items() for v in (f"--{k}", o))]


def test_a_run_leaves_everything(here):
    done = tiltflow(*arguments(here, "--json", "--judge", here / "mine.py:half", "--monitor", 4))
    document = json.loads(done.stdout)
    summary, *rows = document["rows"]
    judge = f"{here / 'mine.py'}:half"
    assert summary["reward_reached"] > summary["reward_base"] and summary[f"{judge}_reached"] > summary[f"{judge}_base"]
    assert (done.returncode, document["verdict"]) in ((0, "pass"), (0, "warn"), (3, "fail")), done.stderr
    lines = {r["name"]: r for r in rows if r["kind"] == "verdict"}
    assert lines["reward"]["low"] > 0 and lines[f"held-out {judge}"]["status"] == "pass"
    assert lines["reward"]["status"] == "warn" and "no effect" in lines["reward"]["explanation"]  # certain, and tiny
    history = [r for r in rows if r["kind"] == "iteration"]
    assert len(history) == 8 and [("judge" in r) for r in history] == [False] * 3 + [True] + [False] * 3 + [True]
    run = here / "run"
    page, card = ((run / name).read_text(encoding="utf-8") for name in ("report.html", "adapter/README.md"))
    assert "diversity kept" in page and "seed 0" in card and document["verdict"] in card and "mine.py:brightness" in card
    assert json.loads((run / "metrics.json").read_text())["rows"][0] == summary

    out = tiltflow("export", run, "--out", here / "merged", "--json")
    assert out.returncode == 0, out.stderr
    stock = D.StableDiffusionPipeline.from_pretrained(here / "pipe")
    stock.set_progress_bar_config(disable=True)
    merged = D.StableDiffusionPipeline.from_pretrained(here / "merged")
    merged.set_progress_bar_config(disable=True)

    def image(pipe):
        generator = torch.Generator().manual_seed(0)
        return torch.tensor(pipe("a", num_inference_steps=3, output_type="np", generator=generator)[0])

    plain = image(stock)
    stock.load_lora_weights(run / "adapter")
    assert torch.allclose(image(stock), image(merged), atol=1e-3) and (image(merged) - plain).abs().max() > 1e-3
    assert tiltflow("export", run, "--out", here / "merged").returncode == 2


@pytest.mark.slow
def test_all_weights_leave_a_pipeline(here):
    """It is one that stock diffusers loads, with its card; its unet alone has moved, and there is nothing to merge."""
    done = tiltflow(*arguments(here, "--json", rank="none", **{"learning-rate": 0.002}))
    assert done.returncode in (0, 3), done.stderr
    assert json.loads(done.stdout)["rows"][0]["reward_reached"] > json.loads(done.stdout)["rows"][0]["reward_base"]
    base, whole = (D.StableDiffusionPipeline.from_pretrained(f) for f in (here / "pipe", here / "run" / "pipeline"))
    for name in ("unet", "vae", "text_encoder"):
        pairs = zip(getattr(base, name).parameters(), getattr(whole, name).parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs) == (name == "unet")
    card = (here / "run" / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# All weights of") and not (here / "run" / "adapter").exists()
    again = tiltflow("export", here / "run", "--out", here / "merged")
    assert again.returncode == 2 and "is the pipeline already" in again.stderr


def counted(folder):
    """A judge that says how many samples it was asked about, and one whose reward has no gradient."""
    (folder / "mine.py").write_text(REWARDS + """
def counting(x, texts):
    with open(__file__ + ".count", "a") as f:
        f.write(f"{len(texts)}\\n")
    return half(x, texts)

def plain(x, texts):
    import torch
    return torch.from_numpy(x.numpy().reshape(len(x), -1).mean(1))
""")
    return folder / "mine.py.count"


def test_a_judge_is_called_once_per_sample(here):
    """Two samples before anything is written; then those before and after, once each, a batch of 8 at a time."""
    count = counted(here)
    done = tiltflow(*arguments(here, "--json", "--judge", here / "mine.py:counting", rounds=1, samples=10))
    assert done.returncode in (0, 3), done.stderr
    assert count.read_text().split() == ["2", "8", "2", "8", "2"]


def test_a_run_without_a_gradient_is_opened_again(here):
    """Flow-GRPO on a reward of numpy: the run loads as a model with the verdict's numbers, and `sample` draws from it."""
    import tiltflow as tf

    counted(here)
    options = {"reward": here / "mine.py:plain", "method": "flow_grpo", "per-prompt": 4, "rounds": 2}
    done = tiltflow(*arguments(here, "--json", **options))
    assert done.returncode in (0, 3), done.stderr
    summary = json.loads(done.stdout)["rows"][0]
    config = json.loads((here / "run" / "config.json").read_text())
    assert config["job"] == "finetune-pipeline" and config["prompts"] == ["a", "b"] and config["method"] == "flow_grpo"
    kept = config["settings"]
    assert kept["gradient_steps"] == 4 and kept["guidance_in"] == ["rollout", "control", "adjoint"]
    (here / "run").rename(here / "moved")
    model = tf.load(here / "moved", trust=True)
    scores = model.verdict(samples=24).scores
    assert scores[0].reached == pytest.approx(summary["reward_reached"], abs=1e-6)
    assert scores[0].base == pytest.approx(summary["reward_base"], abs=1e-6)
    drawn = tiltflow("sample", here / "moved", "--trust", "-n", 3, "--json", "--out", here / "drawn.safetensors")
    assert drawn.returncode == 0 and json.loads(drawn.stdout)["rows"][0]["shape"] == [3, 3, 16, 16], drawn.stderr
    again = tiltflow("sample", here / "moved", "--trust", "--noise", "ode", "--out", here / "other.safetensors")
    assert again.returncode == 2 and "leave out noise" in again.stderr
    wrong = tiltflow(*arguments(here, reward=here / "mine.py:plain", out=here / "none"))
    assert wrong.returncode == 2 and "flow_grpo" in wrong.stderr and not (here / "none").exists()


def test_a_method_that_trains_nothing(here):
    done = tiltflow(*arguments(here, "--json", method="best_of_4", samples=8))
    assert done.returncode in (0, 3), done.stderr
    summary = json.loads(done.stdout)["rows"][0]
    assert summary["kl"] is None and summary["rounds"] == 0 and not (here / "run" / "adapter").exists()
    for command, said in ((["export", here / "run"], "no finished run"), (["compare", here / "run"], "has no KL")):
        failed = tiltflow(*command, "--out", here / "x")
        assert failed.returncode == 2 and said in failed.stderr, failed.stderr


def test_metrics_grow_during_the_run(here, monkeypatch):
    import tiltflow.pipelines.watch as module
    import tiltflow.run.job as run

    seen, judge = [], module.Watch.__call__

    def look(self, tilted, row):
        path = here / "run" / "metrics.json"
        seen.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        return judge(self, tilted, row)

    monkeypatch.setattr(module.Watch, "__call__", look)
    monkeypatch.setattr(run, "EVERY", 0.0)
    assert tiltflow(*arguments(here, rounds=3)).returncode in (0, 3)
    assert seen == [0, 1, 2]


def test_a_picture_that_fails_does_not_cost_the_verdict(here, monkeypatch):
    import tiltflow.pipelines.outcome as module

    monkeypatch.setattr(module, "gallery", lambda *args, **more: 1 / 0)
    done = tiltflow(*arguments(here, "--json", rounds=1))
    document = json.loads((here / "run" / "metrics.json").read_text())
    assert done.returncode in (0, 3) and document["verdict"] in ("pass", "warn", "fail", "cannot tell")
    assert any("ZeroDivisionError" in row.get("report_error", "") for row in document["rows"])


def metrics(folder, strength, kl, judge="sharp"):
    scores = {"reward_base": 0.0, "reward_reached": kl / 2, f"{judge}_base": 1.0, f"{judge}_reached": 1 + kl - kl**2}
    row = {"kind": "summary", "strength": strength, "kl": kl, **scores}
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"rows": [row], "verdict": "pass"}))
    return folder


def test_runs_of_several_strengths_are_compared(tmp_path):
    """Rows in the order of λ, the base first; the picture; runs of other scores and unfinished ones are named."""
    runs = [metrics(tmp_path / str(i), strength, kl) for i, (strength, kl) in enumerate(((9, 1.5), (3, 0.5)))]
    done = tiltflow("compare", *runs, "--json", "--out", tmp_path / "p.png")
    assert done.returncode == 0, done.stderr
    assert [(r["strength"], r["kl"], r["sharp_reached"]) for r in json.loads(done.stdout)["rows"]] == [
        (3, 0.5, 1.25), (9, 1.5, 0.25)
    ]  # fmt: skip
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    text = tiltflow("compare", *runs).stdout.splitlines()
    assert text[0].split() == ["λ", "KL", "reward", "sharp"] and text[1].split() == ["0", "0", "0", "1"]
    mine = tmp_path / "rew.py"
    mine.write_text("keep")
    refused = tiltflow("compare", *runs, "--out", mine)
    assert refused.returncode == 2 and "exists" in refused.stderr and mine.read_text() == "keep"
    other = metrics(tmp_path / "other", 5, 1.0, "legible")
    (tmp_path / "metrics.json").write_text(json.dumps({"rows": [{"kind": "iteration", "strength": 1, "kl": 1}]}))
    for wrong, said in ((other, "other has other scores"), (tmp_path, "holds no finished run")):
        failed = tiltflow("compare", *runs, wrong)
        assert failed.returncode == 2 and said in failed.stderr


def test_a_hacked_reward_is_stopped(here):
    """The judge is the reward turned round: training ends at the first look, and the verdict is fail (exit 3)."""
    done = tiltflow(*arguments(here, "--json", "--judge", here / "mine.py:darkness", "--monitor", 4))
    document = json.loads(done.stdout)
    assert done.returncode == 3 and document["verdict"] == "fail" and document["rows"][0]["rounds"] == 4
    (line,) = [r for r in document["rows"] if r.get("name") == "reward hacking"]
    assert "stopped after round 4" in line["explanation"] and line["value"] < 0


@pytest.mark.slow
def test_an_interrupted_run_is_resumed(here, monkeypatch):
    import tiltflow.pipelines.watch as module

    small = {"rounds": 12, "steps": 3, "batch": 2, "samples": 16}
    plain = tiltflow(*arguments(here, "--json", **small | {"out": here / "whole"}))
    judge = module.Watch.__call__

    def interrupt(self, tuned, row):
        if row["iteration"] == 10:
            raise KeyboardInterrupt
        return judge(self, tuned, row)

    with monkeypatch.context() as patch:
        patch.setattr(module.Watch, "__call__", interrupt)
        assert tiltflow(*arguments(here, **small)).returncode == 130
    again = tiltflow(*arguments(here, "--json", "--resume", **small))
    first, second = (json.loads(done.stdout)["rows"][0] for done in (plain, again))
    assert all(first[k] == second[k] for k in first if "seconds" not in k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance-in": "rollout,everywhere"}, "--guidance-in must be a tuple of one of rollout, control, adjoint"),
        ({"prompts": "none.txt"}, "no prompt file"),
        ({"reward": "nowhere:f"}, "cannot import 'nowhere'"),
        ({"monitor": 3}, "name a judge"),
        ({"micro-batch": "half"}, "--micro-batch must be a whole number"),
        ({"strength": -1}, "at least 0"),
        ({"strength": "nan"}, "--strength"),
        ({"rounds": 0}, "--rounds"),
        ({"steps": 0}, "--steps"),
        ({"batch": -5}, "--batch"),
        ({"samples": 0}, "--samples"),
        ({"seed": 99999999999999999999}, "--seed"),
        ({"learning-rate": -1}, "--learning-rate"),
        ({"ema": 2}, "--ema"),
        ({"clip": -1}, "--clip"),
        ({"random-steps": 5}, "give last_steps as well"),
        ({"dtype": "float8"}, "--dtype"),
        ({"method": "nothing"}, "unknown method 'nothing'"),
        ({"method": "reciprocal_matching"}, "does not apply to pipelines"),
        ({"method": "adjoint_sampling"}, "samples from an energy"),
    ],
)
def test_misuse(here, options, message):
    done = tiltflow(*arguments(here, **options))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (here / "run").exists()


def test_no_pipeline_and_no_run(here, tmp_path):
    done = tiltflow("finetune-pipeline", tmp_path, *arguments(here)[2:])
    assert done.returncode == 2 and "holds no diffusers pipeline" in done.stderr
    done = tiltflow("export", tmp_path, "--out", tmp_path / "x")
    assert done.returncode == 2 and "is not a run folder" in done.stderr


@pytest.mark.parametrize(
    ("reward", "judge", "diversity", "statuses"),
    [
        (1.0, 1.0, 1.0, ["pass", "pass", "pass"]),
        (-1.0, 0.0, 0.7, ["fail", "warn", "warn"]),
        (0.0, -1.0, 0.3, ["cannot tell", "fail", "fail"]),
    ],
)
def test_the_verdict_names_what_is_wrong(reward, judge, diversity, statuses):
    """Risen, fallen and unchanged rewards and judges; collapsed diversity."""
    noise = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, zero = torch.zeros(50, 1), torch.zeros(50)
    before = Judged(x, {"reward": noise, "judge": noise}, zero, 1.0)
    shake = 0.1 * noise.flip(0)
    after = Judged(x, {"reward": noise + shake + reward, "judge": noise + shake + judge}, zero, diversity)
    assert [line.status for line in against_base(before, after)] == statuses


@pytest.mark.parametrize(("name", "rate"), [("stable_audio", 8), ("audioldm2", 16)])
def test_audio_is_written_at_the_rate_of_the_pipeline(tmp_path, name, rate):
    wavfile = pytest.importorskip("scipy.io.wavfile")
    files = write_sounds(tmp_path, "after", 0.1 * torch.ones(5, 2, 64), tiny.build(name))
    found, sound = wavfile.read(tmp_path / "after-3.wav")
    assert found == rate and sound.shape == (64, 2) and (tmp_path / "after-3.wav").read_bytes() == files[3]
    assert len(files) == 4 and not (tmp_path / "after-4.wav").exists()
