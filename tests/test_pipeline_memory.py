"""What pipelines hold at a time, and what they compute twice: rows of the network and the decoder, prompts, encoders."""

from functools import partial

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny_pipelines as tiny

from tiltflow.pipelines import outcome
from tiltflow.pipelines.chain import pipeline_chain
from tiltflow.pipelines.encode import HOST, encode_prompts, encoders_on
from tiltflow.pipelines.families import StableDiffusion, StableDiffusion3, family_of
from tiltflow.pipelines.model import compared
from tiltflow.pipelines.settings import PipelineSettings
from tiltflow.pipelines.train import finetune_pipeline

PROMPTS = ["a", "b"]
ROWS = {
    "flux": {"text": (6, 16), "pooled": (16,)},
    "stable_audio": {"text": (8, 16), "duration": (1, 32)},
    "audioldm2": {"text": (6, 32), "mask": (6,), "generated": (3, 16)},
}
"""Prompts of pipelines without tokenizers."""


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


def brightness(x, texts):
    return x.flatten(1).mean(1)


def rows_of(name):
    draw = torch.Generator().manual_seed(5)
    rows = {key: torch.randn(3, *shape, generator=draw) for key, shape in ROWS.get(name, {}).items()}
    return {key: torch.ones_like(v) if key == "mask" else v for key, v in rows.items()} or None


def tilt(name="stable_diffusion", reward=brightness, method="adjoint_matching_plain", pipe=None, **changes):
    quick = {"rounds": 1, "batch": 4, "steps": 2, "rank": 2, "per_prompt": 2} | changes
    settings = PipelineSettings.of(method, **quick)
    pipe = tiny.build(name) if pipe is None else pipe
    return finetune_pipeline(pipe, reward, PROMPTS, 1.0, method, settings, rows=rows_of(name))


def counted(monkeypatch, name):
    """Rows that the network and the decoder of a family are given, call by call."""
    family, seen = family_of(tiny.build(name)), {"predict": [], "decode": []}
    for step, place in (("predict", 2), ("decode", 1)):
        monkeypatch.setattr(family, step, partial(counting, getattr(family, step), seen[step], place))
    return seen


def counting(function, seen, place, *args):
    seen.append(len(args[place]))
    return function(*args)


SLOW = pytest.mark.slow
UNETS = ("stable_diffusion", "stable_diffusion_xl", "audioldm2")
FAMILIES = [pytest.param(name, marks=SLOW if name in UNETS else ()) for name in tiny.BUILDERS]


@pytest.mark.parametrize("name", FAMILIES)
def test_micro_batches_compute_nothing_twice(name, monkeypatch):
    """Per path a row a step on the path, one for the adjoint and one in the loss; a latent is decoded for r and for ∇r."""
    seen = counted(monkeypatch, name)
    model = tilt(name, micro_batch=2)
    assert sum(seen["predict"]) == 4 * (2 + 2 + len(model.chain.controlled)) and set(seen["predict"]) == {2}
    assert sum(seen["decode"]) == 2 + 4 + 4 and set(seen["decode"]) == {2}  # two to try the reward


@pytest.mark.parametrize("method", ["adjoint_matching_basic", pytest.param("discrete_adjoint", marks=SLOW)])
def test_micro_batches_compute_no_more_than_whole_batches(method, monkeypatch):
    seen, counts = counted(monkeypatch, "stable_diffusion_3"), []
    for micro_batch in (None, 2):
        tilt("stable_diffusion_3", method=method, micro_batch=micro_batch)
        counts.append([sum(rows) for rows in seen.values()])
        assert max(seen["predict"]) == (micro_batch or 4)
        for rows in seen.values():
            rows.clear()
    assert counts[0] == counts[1]


# -------------------------------------------------------------------------------------------------------------- same company


def nothing(x, texts):
    """A reward without a gradient that pulls: the loss is that of u alone."""
    return 0 * brightness(x, texts)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("adjoint_matching_plain", {"micro_batch": 3}),
        ("adjoint_matching_plain", {"micro_batch": 2, "minibatch": 3}),
        ("adjoint_matching_plain", {"batch": 5, "micro_batch": 3}),  # neither three nor two divide five
        pytest.param("adjoint_matching_plain", {}, marks=SLOW),
        pytest.param("adjoint_matching_plain", {"micro_batch": 8}, marks=SLOW),
        pytest.param("adjoint_matching_plain", {"micro_batch": 2, "accumulate": 1}, marks=SLOW),
        pytest.param("adjoint_matching_plain", {"guidance": 3.0, "guidance_in": ("control",)}, marks=SLOW),
        pytest.param("flow_grpo", {"micro_batch": 2, "gradient_steps": 1}, marks=SLOW),
        pytest.param("log_variance", {"micro_batch": 2}, marks=SLOW),
    ],
    ids=str,
)
def test_an_untrained_adapter_is_no_control_to_the_last_bit(method, changes, monkeypatch):
    """Path, loss and judge in bfloat16, of a network that treats a row by its batch, as large ones do in its last bits."""
    old = StableDiffusion3.predict

    def by_company(self, pipe, network, x, timestep, rows):
        out, place = old(self, pipe, network, x, timestep, rows), torch.arange(len(x)).reshape(-1, 1, 1, 1)
        return out + (0.1 * len(x) + 0.01 * place + x.float().mean()).to(out.dtype)

    monkeypatch.setattr(StableDiffusion3, "predict", by_company)
    pipe = tiny.build("stable_diffusion_3").to(torch.bfloat16)
    model = tilt("stable_diffusion_3", nothing, method, pipe, steps=3, **changes)
    assert model.history[0]["loss"] == model.history[0]["kl"] == 0
    assert float(model.paths(3).kl.max()) == float(model.judge({}, 3).kl.max()) == 0


@pytest.mark.parametrize(
    ("batch", "most", "rows"),
    [(32, 13, 8), (32, 32, 32), (32, 5, 4), (30, 7, 6), (34, 8, 8), (7, 3, 3), (4, 8, 8), (8, 1, 1)],
)
def test_parts_are_equal_where_some_above_half_are(batch, most, rows):
    assert PipelineSettings(batch=batch, micro_batch=most).rows == rows


# -------------------------------------------------------------------------------------------------------- what is held where


class Elsewhere(torch.Tensor):
    """A tensor that knows whether it was fetched to the host."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_rows_of_prompts_are_kept_on_the_host(monkeypatch):
    """Those that are encoded, and those that are given."""
    pipe, old = tiny.build("stable_diffusion"), StableDiffusion.encode

    def encode(self, pipe, prompts):
        return {name: v.as_subclass(Elsewhere) for name, v in old(self, pipe, prompts).items()}

    monkeypatch.setattr(StableDiffusion, "encode", encode)
    assert type(encode_prompts(pipe, PROMPTS)["text"]) is torch.Tensor
    given = family_of(pipe).encode(pipe, {"prompt": PROMPTS})
    assert type(given["text"]) is Elsewhere and type(pipeline_chain(pipe, given, 2).rows["text"]) is torch.Tensor


class Encoder(torch.nn.Module):
    """Says it is on a device, and where it is moved."""

    def __init__(self, moves, device="meta"):
        super().__init__()
        self.moves, self.device = moves, torch.device(device)

    def to(self, device):
        self.device = torch.device(device)
        self.moves.append(self.device.type)
        return self


@pytest.mark.parametrize("fails", [False, True])
def test_encoders_are_on_the_host_while_a_network_is_trained(fails):
    """And back afterwards, whatever happens; while samples are judged too. What places itself is left where it is."""
    pipe, moves, own = tiny.build("stable_diffusion_3"), [], []
    rows = encode_prompts(pipe, PROMPTS)
    pipe.text_encoder, pipe.text_encoder_2 = Encoder(moves), Encoder(own)
    pipe.text_encoder_2.hf_quantizer = None

    def callback(row, tilted):
        assert moves == ["cpu"]
        if fails:
            raise KeyboardInterrupt

    quick = PipelineSettings(rounds=1, batch=2, steps=2, rank=2)
    train = partial(finetune_pipeline, pipe, brightness, PROMPTS, 1.0, settings=quick, rows=rows, callback=callback)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            train()
        assert moves == ["cpu", "meta"]
        return
    model = train()
    assert moves == ["cpu", "meta"]
    model.before_and_after({"here": lambda x, texts: brightness(x, texts) + len(moves)}, 2)
    assert moves == ["cpu", "meta"] * 2 and own == []


def test_prompts_are_encoded_where_the_network_is(monkeypatch):
    """Also while encoders are away; they go back there."""
    pipe, moves, places = tiny.build("stable_diffusion"), [], []
    pipe.text_encoder = Encoder(moves)

    def encode(self, pipe, prompts):
        places.append(pipe.text_encoder.device.type)
        return {"text": torch.zeros(len(prompts["prompt"]) + 1, 8, 16)}

    monkeypatch.setattr(StableDiffusion, "encode", encode)
    assert encode_prompts(pipe, ["a"] * 9)["text"].shape == (10, 8, 16)
    assert places == ["cpu", "cpu"] and moves == ["cpu", "meta"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stable_diffusion_xl", {"text_encoder", "text_encoder_2"}),
        ("audioldm2", {"text_encoder_2", "language_model", "projection_model"}),
        ("stable_audio", {"text_encoder", "projection_model"}),
    ],
)  # fmt: skip
def test_what_only_prompts_need(name, expected, monkeypatch):
    pipe, moved = tiny.build(name), set()
    for key, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            monkeypatch.setattr(part, "to", lambda device, key=key: moved.add(key))
    with encoders_on(pipe, HOST):
        assert moved == expected


def test_judges_report_and_decoder_see_micro_batches(monkeypatch, tmp_path):
    """Five samples, two at a time, each once; so do the pictures of the page."""
    model, asked = tilt("stable_diffusion_3", nothing, micro_batch=2), []

    def judge(x, texts):
        asked.append(len(texts))
        return brightness(x, texts)

    seen = counted(monkeypatch, "stable_diffusion_3")
    before, after = model.before_and_after({"judge": judge}, 5)
    assert asked == seen["decode"] == [2, 2, 1] * 2
    assert torch.allclose(after.scores["judge"], brightness(model.decode(after.x), None).double(), atol=1e-6)
    seen["decode"].clear()
    for part in ("gallery", "training_blocks"):
        monkeypatch.setattr(outcome, part, lambda *args, **more: [])
    outcome.blocks(model, compared(before, after), 0.0, {"before": before.x, "after": after.x}, tmp_path)
    assert seen["decode"] == [2, 2, 1] * 2
