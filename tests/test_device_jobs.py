"""Pipelines of every family, and molecules, on a pretend accelerator."""


import pretend
import pytest
import torch
from commands import tiltflow
from test_device import agree, device, single_precision  # noqa: F401 - fixtures

import tiltflow as tf

PIPELINE = {"rounds": 2, "batch": 2, "steps": 4, "rank": 2, "learning_rate": 0.02, "clip": None, "per_prompt": 2}


def loudness(x, texts):
    return x.flatten(1).square().mean(1)


def tilted(place, name, **changes):
    import tiny_pipelines as tiny
    from test_diffusers import embeddings

    from tiltflow.pipelines.encode import encode_prompts
    from tiltflow.pipelines.families import family_of

    pipe = tiny.build(name).to(place)
    with torch.no_grad():
        if name.startswith("stable_diffusion"):
            rows = encode_prompts(pipe, ["a", "b"])
        else:
            rows = family_of(pipe).encode(pipe, {k: v.to(place) for k, v in embeddings(name, 2).items()})
    settings = tf.PipelineSettings.of("adjoint_matching", **PIPELINE | changes)
    return tf.finetune_pipeline(pipe, loudness, ["a", "b"], 10.0, settings=settings, rows=rows)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("stable_diffusion_3", {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("stable_diffusion", {}),
                ("stable_diffusion", {"offload": True, "guidance": 2.0}),
                ("stable_diffusion", {"rank": None}),
                ("stable_diffusion_xl", {}),
                ("flux", {}),
                ("stable_audio", {}),
                ("audioldm2", {}),
            )
        ),
    ],
)
def test_every_family(name, changes, tmp_path):
    """Without micro-batches: their recomputation inside a backward pass ends the process here, which no real device does."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    with pretend.accelerator("cuda" if name == "flux" else "mps"):  # Flux's own code asks for MPS by name
        here = tilted("pretend", name, **changes)
        x = here.sample(2)
        assert x.device == pretend.DEVICE
        if name == "stable_diffusion":
            there = tilted("cpu", name, **changes)
            agree(here.history, there.history)
            assert torch.allclose(x.cpu(), there.sample(2), atol=1e-3)
        assert here.verdict({"loudness": loudness}, 4).lines
        if changes.get("rank", 0) is not None:  # safetensors reads the memory of a whole pipeline itself
            here.save(tmp_path / "saved")


@pytest.mark.slow
def test_molecules(device, tmp_path):  # noqa: F811
    """MMFF94 on the CPU beside networks that are not: conformers, one sampler for several, and what it draws."""
    pytest.importorskip("rdkit")
    quick = (
        "--rounds", "2", "--batch", "16", "--gradient-steps", "2", "--minibatch", "8", "--steps", "3", "--draw-steps", "3",
        "--hidden", "8", "--layers", "1",
    )  # fmt: skip
    (tmp_path / "two.smi").write_text("CCCO one\nCCOC two\n")
    there = ("--device", "pretend")
    for more in (quick, (*quick, "--resume")):
        done = tiltflow("train-conformers", tmp_path / "two.smi", *more, *there, "--out", tmp_path / "model")
        assert done.returncode == 0, done.stderr
    model = tmp_path / "model" / "model.safetensors"
    alone = tiltflow("conformers", "CCCO", "-n", "8", *quick, *there, "--out", tmp_path / "alone")
    drawn = tiltflow("conformers", tmp_path / "two.smi", "-n", "8", "--model", model, *there, "--out", tmp_path / "drawn")
    assert alone.returncode in (0, 3) and drawn.returncode in (0, 3), alone.stderr + drawn.stderr
    assert [len(e) for e in tf.load(tmp_path / "drawn")] == [8, 8]


def test_cartesian_coordinates(device):  # noqa: F811
    pytest.importorskip("rdkit")
    from tiltflow.molecules.cartesian import train_cartesian
    from tiltflow.molecules.energies import open_energy
    from tiltflow.molecules.molecule import molecule
    from tiltflow.molecules.settings import CartesianSettings

    few = {"batch": 4, "gradient_steps": 2, "minibatch": 2, "steps": 3, "draw_steps": 3, "hidden": 8, "layers": 1}
    settings = CartesianSettings(rounds=1, fine_rounds=1, pretrain=4, pretrain_rounds=1, **few)
    one = molecule("CCO")
    here, there = (train_cartesian(open_energy("mmff94", one), 700.0, one, settings, device=d) for d in ("pretend", "cpu"))
    agree(here.history, there.history)
    assert here.draw(3, torch.Generator("pretend")).x.device == pretend.DEVICE
