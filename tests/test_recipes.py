"""The recipes with a small flow of their own: network, texts, judges; a whole study on a toy, interrupted and resumed."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tiltflow.core.chain import memoryless_chain, uniform_grid
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import Linear
from tiltflow.core.process import Process
from tiltflow.methods.registry import METHODS
from tiltflow.tilting.model import TiltedModel
from tiltflow.tilting.settings import FinetuneSettings

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
RECIPES = Path(__file__).parents[1] / "recipes"


def recipe(name):
    sys.path.insert(0, str(RECIPES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(RECIPES))


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------------------------ the models


def test_patches_come_back_where_they_were():
    """Without blocks, cut and paste as the identity: X̂_1 is x, for patches and channels of any shape."""
    small = recipe("small_flow")
    event, patch = (3, 4, 6), (2, 3)
    width = 3 * 2 * 3
    net = small.PatchFlow(event, patch, symbols=5, longest=2, width=width, blocks=0)
    net.norm = nn.Identity()
    with torch.no_grad():
        net.place.zero_()
        net.cut.weight.copy_(torch.eye(width).reshape(width, 3, 2, 3))
        net.paste.weight.copy_(torch.eye(width))
        net.cut.bias.zero_(), net.paste.bias.zero_()
    x = torch.randn(7, *event)
    assert torch.equal(net(x, torch.rand(7), torch.zeros(7, 2, dtype=torch.long)), x)


def test_text_and_time_matter():
    small = recipe("small_flow")
    torch.manual_seed(0)
    net = small.PatchFlow((1, 4, 4), (2, 2), symbols=3, longest=2, width=16, blocks=2)
    for block in net.blocks:
        nn.init.normal_(block.shape.weight, std=0.2)
    x, text = torch.randn(2, 1, 4, 4), torch.tensor([[1, 2], [3, 0]])
    out = net(x, torch.tensor([0.3, 0.3]), text)
    assert (net(x, torch.tensor([0.3, 0.9]), text) - out)[1].abs().max() > 1e-3
    changed = net(x, torch.tensor([0.3, 0.3]), torch.tensor([[1, 2], [3, 1]]))
    assert torch.allclose(changed[0], out[0], atol=1e-6) and (changed - out)[1].abs().max() > 1e-3


def test_guidance_is_a_line_through_both_velocities():
    small = recipe("small_flow")
    torch.manual_seed(0)
    net = small.PatchFlow((1, 4, 4), (2, 2), symbols=3, longest=2, width=16, blocks=1)
    x, t, text = torch.randn(5, 1, 4, 4), torch.rand(5), torch.randint(1, 4, (5, 2))
    given, without = net(x, t, text), net(x, t, torch.zeros_like(text))
    assert (given - without).abs().max() > 1e-3
    for scale in (0.0, 1.0, 2.5):
        wanted = without + scale * (given - without)
        assert torch.allclose(small.Guided(net, scale)(x, t, text), wanted, atol=1e-5)


def test_symbols():
    small = recipe("small_flow")
    letters = small.Symbols(["abc", "ca"], 4)
    assert letters(["ca", "b"]).tolist() == [[3, 1, 0, 0], [2, 0, 0, 0]] and len(letters) == 3
    words = small.Symbols(["red car", "car"], 3, str.split)
    assert words(["red car", "car"]).tolist() == [[2, 1, 0], [1, 0, 0]]


def test_a_base_is_trained_once_and_has_a_card(tmp_path):
    small = recipe("small_flow")

    def net():
        return small.PatchFlow((1, 4, 4), (2, 2), symbols=2, longest=1, width=16, blocks=1)

    def draw(n, generator):
        return torch.randn(n, 1, 4, 4, generator=generator), {"text": torch.ones(n, 1, dtype=torch.long)}

    file = tmp_path / "new" / "toy.safetensors"
    made = small.train_base(net(), draw, 3, file, "noise, in the public domain.")
    card = file.with_suffix(".md").read_text(encoding="utf-8")
    assert "# toy" in card and "3 steps" in card and "Data: noise, in the public domain." in card
    again = small.train_base(net(), lambda n, generator: pytest.fail("trained again"), 3, file, "")
    x, t, text = torch.randn(2, 1, 4, 4), torch.rand(2), torch.ones(2, 1, dtype=torch.long)
    assert torch.equal(made.model(x, t, text), again.model(x, t, text)) and len(list(file.parent.iterdir())) == 2


def test_a_recogniser_learns_and_is_kept(tmp_path):
    small = recipe("small_flow")

    def draw(n, generator):
        which = torch.randint(2, (n,), generator=generator)
        return which[:, None, None, None] + 0.1 * torch.randn(n, 1, 8, 8, generator=generator), which

    def make(seed):
        return small.Recogniser(["dark", "bright"], 1, (8, 8), 3, seed)

    file = tmp_path / "r.safetensors"
    made = small.train_recogniser(make(1), draw, 30, 1, file)
    x, which = draw(50, torch.Generator().manual_seed(5))
    texts = [("dark", "bright")[i] for i in which]
    assert made.knows(x, texts).mean() == 1 and made.knows(x, texts[::-1]).mean() < 1
    right, wrong = made(x, texts), made(x, [("bright", "dark")[i] for i in which])
    assert torch.allclose(right.exp() + wrong.exp(), torch.ones(50), atol=1e-5) and (right > wrong).all()
    again = small.train_recogniser(make(2), lambda n, generator: pytest.fail("trained again"), 30, 1, file)
    assert torch.equal(again(x, texts), right)


# -------------------------------------------------------------------------------------------------------------- the study


class Field(nn.Module):
    """The exact velocity of N(0, ½² I) images, plus a quadratic of the time that starts at zero."""

    def __init__(self):
        super().__init__()
        self.more = nn.Linear(3, 16)
        nn.init.zeros_(self.more.weight), nn.init.zeros_(self.more.bias)

    def forward(self, x, t, text):
        a, b, v = t[:, None, None, None], 1 - t[:, None, None, None], 0.25
        return x * (a * v - b) / (a * a * v + b * b) + self.more(torch.stack([t**0, t, t * t], 1)).reshape(x.shape)


def toy(rate=None):
    study, small = recipe("study"), recipe("small_flow")
    torch.manual_seed(0)
    base = Process(Linear(), Field(), "velocity", (1, 4, 4))
    decode = (lambda x: x.reshape(len(x), 1, 16)) if rate else lambda x: x
    texts = {"trained": ["a", "b"], "other": ["c"]}
    picture = (lambda sound: sound.reshape(-1, 1, 4, 4)) if rate else lambda x: x
    judges = {"half": lambda x, texts: x.flatten(1)[:, ::2].mean(1)}
    return study.Study(
        "toy", base, texts, small.Symbols("abc", 1), decode, lambda x, texts: x.flatten(1).mean(1), judges, picture, rate
    )


def options(tmp_path, *more):
    study = recipe("study")
    parser = study.arguments("A toy.", tmp_path / "base", base_steps=1, strength=10.0, out=tmp_path / "run")
    quick = ["--seeds", "0", "1", "--rounds", "60", "--steps", "8", "--batch", "32", "--samples", "64"]
    return parser.parse_args([*quick, "--learning-rate", "0.02", *more])


def test_a_study_raises_reward_and_judge_and_leaves_run_folders(tmp_path, capsys):
    """The tilt of N(0, ¼ I) by 10·mean moves every pixel by 10/16 · ¼; the page has sound."""
    study = recipe("study")
    study.run(toy(rate=8_000), options(tmp_path, "--results", str(tmp_path / "r.json")), [])
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 2 and {(r["seed"], r["texts"], r["sampler"]) for r in rows} == {
        (seed, texts, sampler) for seed in (0, 1) for texts in ("trained", "other") for sampler in ("sde", "ode")
    }
    for row in rows:
        assert row["reward_change"] == pytest.approx(row["reward"] - row["reward_base"], abs=1e-9)
        assert row["reward_change"] == pytest.approx(10 / 16 / 4, abs=0.08) and row["half"] > row["half_base"]
        assert row["diversity"] == pytest.approx(row["diversity_base"], rel=0.15)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["seed"] for r in said] == [0] * 4 + [1] * 4
    for seed in (0, 1):
        folder = tmp_path / "run" / f"seed{seed}"
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert page.count("<audio controls") == 2 * study.HEARD and "half" in page
        assert {p.name for p in folder.iterdir()} >= {"config.json", "metrics.json", "model.safetensors"}


@pytest.mark.slow
def test_an_interrupted_study_goes_on_exactly(tmp_path, monkeypatch, capsys):
    study = recipe("study")
    study.run(toy(), options(tmp_path, "--out", str(tmp_path / "whole")), [])
    real, calls = study.StudyJob.perform, []

    def interrupted(job, work):
        calls.append(job.seed)
        if len(calls) == 2:
            told = work.round

            def stopping(row, *more):
                told(row, *more)
                if row["iteration"] == 39:  # after the checkpoint of round 25
                    raise KeyboardInterrupt

            work.round = stopping
        return real(job, work)

    monkeypatch.setattr(study.StudyJob, "perform", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.run(toy(), options(tmp_path), [])
    study.run(toy(), options(tmp_path, "--resume"), [])
    assert calls == [0, 1, 1], "seed 0 was done and is not run again"

    def rows(name):
        read = [json.loads((tmp_path / name / f"seed{seed}" / "metrics.json").read_text())["rows"] for seed in (0, 1)]
        samples = [row for seed in read for row in seed if row["kind"] == "samples"]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in samples]

    assert len(rows("whole")) == 2 * 2 * 2 and rows("run") == rows("whole")
    with pytest.raises(TiltflowError, match="already holds a run"):
        study.run(toy(), options(tmp_path), [])


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--rounds", "0", "rounds must be"), ("--steps", "0", "steps must be"), ("--samples", "0", "samples must be"),
        ("--strength", "nan", "strength must be"), ("--seeds", "99999999999999999999", "seed must be"),
        ("--learning-rate", "-1", "learning_rate must be"), ("--results", __file__, "not the result of a benchmark"),
    ],
)  # fmt: skip
def test_options_of_a_study_are_refused_before_anything_is_made(tmp_path, option, value, said):
    study = recipe("study")
    parser = study.arguments("A toy.", tmp_path / "base", base_steps=1, strength=10.0, out=tmp_path / "run")
    with pytest.raises(TiltflowError, match=said):
        study.parsed(parser, [option, value])
    assert not list(tmp_path.iterdir())


def test_nothing_changes_where_nothing_was_trained(tmp_path):
    """The base as its own fine-tuned model: every paired change is exactly zero."""
    study, args = recipe("study"), options(tmp_path)
    job = toy()
    chain = memoryless_chain(job.base, uniform_grid(8), 0.01 * torch.ones(8))
    cost, row = RewardCost(lambda x, text: x.flatten(1).mean(1)), METHODS["adjoint_matching"]
    tuned = TiltedModel(job.base, job.base, chain, cost, row, FinetuneSettings(), None, [])
    for sampler in ("sde", "ode"):
        row = study.row_of(*study.before_and_after(job, tuned, 0, ["a", "b"], args, sampler))
        assert row["reward_change"] == row["half_change"] == row["kl"] == 0 and row["reward_error"] > 0


# ------------------------------------------------------------------------------------------------------------------ words


def test_words_are_inside_and_the_halves_are_apart():
    words, study = recipe("words"), recipe("study")
    x, condition = words.draw(False, 40, torch.Generator().manual_seed(0))
    assert x.shape == (40, 1, 24, 70) and -1 <= float(x.min()) < -0.5 and float(x.max()) == 1
    for edge in (x[:, :, 0], x[:, :, -1], x[..., 0], x[..., -1]):
        assert (edge > 0).float().mean() > 0.95, "a stroke at most, not a cut word"
    spelt = {tuple(row) for row in words.SPELL(words.WORDS).tolist()}
    assert all(tuple(row) in spelt for row in condition["text"].tolist()) and len(spelt) == len(words.WORDS)
    first, second = study.halves(words.WORDS)
    assert not set(first) & set(second) and sorted(first + second) == sorted(words.WORDS)


# ------------------------------------------------------------------------------------------------------------------ emoji


def test_emoji_are_shifted_and_scaled_on_paper():
    """A red disc of full opacity: its share of the image is that of its scale, the paper is pale, its name its number."""
    emoji = recipe("emoji")
    pictures = torch.zeros(2, 4, 96, 96)
    pictures[1, 0] = pictures[1, 3] = 1.0  # the second is a red square
    x, which = emoji.Emoji(["nothing", "red"], pictures).draw(200, torch.Generator().manual_seed(0), faded=False)
    assert x.shape == (200, 3, 24, 24) and x.min() >= -1 and x.max() <= 1
    red = (x[:, 0] > 0.9) & (x[:, 1] < -0.9)
    share = red[which == 1].float().mean((1, 2))
    assert 0.65 < float(share.min()) < 0.8 and float(share.max()) > 0.9 and not red[which == 0].any()
    paper = x[which == 0]
    assert paper.min() >= 2 * 0.65 - 1 - 1e-5 and torch.allclose(paper.amax((2, 3)), paper.amin((2, 3)), atol=1e-6)


def test_emoji_fade():
    """A black left half: it is the paper's colour times 1 − opacity, whose logarithm is uniform."""
    emoji = recipe("emoji")
    pictures = torch.zeros(1, 4, 96, 96)
    pictures[:, 3, :, :48] = 1.0
    x = emoji.Emoji(["half"], pictures).draw(500, torch.Generator().manual_seed(0))[0] / 2 + 0.5
    opacity = 1 - x[:, :, 12, 8] / x[:, :, 12, 22]
    assert torch.allclose(opacity[:, :1], opacity, atol=1e-4)
    u = (opacity[:, 0].log() / torch.tensor(emoji.FAINTEST).log()).sort().values
    assert (u - torch.linspace(0, 1, 500)).abs().max() < 0.07


def test_a_font_without_colours_is_refused(tmp_path):
    emoji, words = recipe("emoji"), recipe("words")
    with pytest.raises(TiltflowError, match="no coloured pictograph"):
        emoji.load_emoji(Path(words.fonts()[0].path))
    with pytest.raises(TiltflowError, match="fonts-noto-color-emoji"):
        emoji.load_emoji(tmp_path / "none.ttf")


# ----------------------------------------------------------------------------------------------------------------- speech


@pytest.fixture
def sounds(tmp_path, monkeypatch):
    """Recordings of two words: 100 ms of silence, then a tone of 200 Hz, of half a second and of two seconds."""
    pytest.importorskip("transformers")
    wavfile = pytest.importorskip("scipy.io.wavfile")
    speech = recipe("speech")
    for name, seconds in (("short", 0.5), ("long", 2.0)):
        t = np.arange(int(8_000 * seconds)) / 8_000
        tone = np.concatenate([np.zeros(800), np.sin(2 * np.pi * 200 * t)])
        wavfile.write(tmp_path / f"{name}.wav", 8_000, (20_000 * tone).astype(np.int16))
    monkeypatch.setattr(speech, "RECORDINGS", [["yes", "short"], ["no", "long"]])
    return tmp_path


def test_recordings_are_trimmed_and_played_at_nine_speeds(sounds):
    """What is too long is left out; the slowest is 8 semitones below the fastest."""
    speech = recipe("speech")
    found = speech.load_speech(sounds)
    assert found.words == ["yes"] and len(found.clips[0]) == 9

    def pitch(clip):
        return float(torch.fft.rfft(clip, 80_000).abs().argmax()) / 10

    assert pitch(found.clips[0][4]) == pytest.approx(200, rel=0.01)
    assert pitch(found.clips[0][0]) / pitch(found.clips[0][8]) == pytest.approx(2 ** (8 / 12), rel=0.01)
    x, which = found.draw(20, torch.Generator().manual_seed(0))
    assert x.shape == (20, 8_000) and float(x.abs().amax(1).min()) > 0.35 and x.abs().max() < 0.65 and not which.any()
    with pytest.raises(TiltflowError, match="asterisk-core-sounds-en-wav"):
        speech.load_speech(sounds / "none")


def test_sound_and_spectrograms():
    """A tone is a line; the distance of a sound to itself is 0 and has a gradient to the spectrogram elsewhere."""
    pytest.importorskip("transformers")
    speech = recipe("speech")
    t = torch.arange(8_000) / 8_000
    low, high = (torch.sin(2 * torch.pi * f * t)[None] * 0.5 for f in (300, 1_200))
    a, b = speech.mel(low), speech.mel(high)
    assert a.shape == (1, 1, 64, 50) and a[0, 0, :, 25].argmax() < b[0, 0, :, 25].argmax() - 10
    assert speech.picture(low[None]).shape == (1, 1, 64, 50)
    assert speech.spectral_distance(low, low) == 0 and speech.spectral_distance(low, high) > 1
    x = a.clone().requires_grad_(True)
    made = speech.Vocoder(width=16, blocks=1)(x)
    assert made.shape == (1, 1, 8_000)
    speech.spectral_distance(made[:, 0], low).backward()
    assert bool(torch.isfinite(x.grad).all()) and float(x.grad.abs().max()) > 0


def test_the_other_pitch_hears_tones():
    pytest.importorskip("transformers")
    pytest.importorskip("swift_f0", reason="pip install --no-deps -r recipes/requirements-speech.txt")
    judge = recipe("speech").OtherPitch()
    t = torch.arange(8_000) / 8_000

    def tone(f):
        return sum(torch.sin(2 * torch.pi * k * f * t) / k for k in range(1, 6))

    found = judge(torch.stack([tone(160), tone(320), 0 * t])[:, None], [""] * 3)
    assert found[0] == pytest.approx(0, abs=0.03) and found[1] == pytest.approx(-1, abs=0.03) and found[2] == -1


def test_recordings_have_the_words_and_nothing_twice():
    speech = recipe("speech") if importlib.util.find_spec("transformers") else pytest.skip("transformers")
    words = [word for word, _ in speech.RECORDINGS]
    assert len(words) == len(set(words)) == 84 and max(map(len, words)) <= speech.LONGEST
