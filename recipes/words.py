r"""Words that can be read: a small text-to-image flow, fine-tuned with one recogniser and judged by another.

The base is trained here, from scratch: words of four or five letters in matplotlib's DejaVu Sans Mono, upright or
oblique, light or bold, shifted, and faded until nobody reads them, as images of 24 × 70 pixels.
The reward is EasyOCR's log p(word | image) per letter; the judge is legere's recogniser, another network trained on other
pages, which training never sees. It confuses single letters even of clean pages, so it is asked which of the 234 words it
holds likeliest (``held_out``, .95 on rendered words; a word spelt exactly as it reads it counts in ``exact``).
Fine-tuning draws words of one half of the vocabulary; both halves are judged.

    pip install --no-deps -r recipes/requirements-words.txt     # and EasyOCR's weights as safetensors: docs/pipelines.md
    python recipes/words.py --seeds 0 1 2 --out runs/words --results benchmarks/results/words.json
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from small_flow import PatchFlow, Symbols, shown, train_base
from study import Study, arguments, halves, parsed, run, start
from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError
from tiltflow.core.process import Process
from tiltflow.rewards.ocr import easyocr_recogniser

HEIGHT, WIDTH, LONGEST = 24, 70, 5
FAINTEST = 0.04
"""Contrast; its logarithm is uniform."""
DATA = "words of recipes/words.txt, rendered in DejaVu Sans Mono (Bitstream Vera licence)."
WORDS = Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split()
SPELL = Symbols(WORDS, LONGEST)


# ----------------------------------------------------------------------------------------------------------- the data


@cache
def fonts() -> list[ImageFont.FreeTypeFont]:
    """DejaVu Sans Mono of matplotlib, upright and oblique, light and bold: 14 pixels a letter."""
    styles = [
        font_manager.FontProperties(family="DejaVu Sans Mono", weight=weight, style=style)
        for weight in ("normal", "bold")
        for style in ("normal", "oblique")
    ]
    return [ImageFont.truetype(font_manager.findfont(style), 23) for style in styles]


def render(word: str, draw: np.random.Generator, faded: bool) -> np.ndarray:
    """(24, 70) in [−1, 1], −1 is ink: font, place and ink at random, the whole word inside, near the left."""
    font = fonts()[draw.integers(4)]
    ink = round(255 * (1 - FAINTEST ** draw.random())) if faded else int(draw.integers(0, 100))
    x, y = draw.integers(-1, 2, 2)
    picture = Image.new("L", (WIDTH, HEIGHT), 255)
    ImageDraw.Draw(picture).text((1 + int(x), 19 + int(y)), word, ink, font, anchor="ls")
    return np.asarray(picture, dtype=np.float32) / 127.5 - 1


def word_flow() -> PatchFlow:
    """The network, with its first weights."""
    torch.manual_seed(0)
    return PatchFlow((1, HEIGHT, WIDTH), (HEIGHT, 14), len(SPELL), LONGEST, width=256, blocks=4)


def draw(faded: bool, n: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Images of random words."""
    chance = np.random.default_rng(int(torch.randint(1 << 31, (1,), generator=generator)))
    words = [WORDS[i] for i in chance.integers(0, len(WORDS), n)]
    return torch.from_numpy(np.stack([render(w, chance, faded) for w in words]))[:, None], {"text": SPELL(words)}


def word_base(file: Path, steps: int) -> Process:
    """The base: it learns to spell in dark ink first, then how ink fades."""
    net = word_flow()
    train_base(net, partial(draw, False), steps, file.with_name(file.stem + "-dark.safetensors"), DATA)
    return train_base(net, partial(draw, True), steps * 3 // 10, file, DATA)


# ----------------------------------------------------------------------------------------------------- reward and judge


class Judge:
    """legere's recogniser: what it reads, letter by letter, or as the likeliest word of the vocabulary."""

    def __init__(self) -> None:
        try:
            from legere import load_model
            from legere.charset import encode_text
            from legere.model import ctc_greedy_decode
        except ImportError as error:
            raise TiltflowError(f"{error}: pip install --no-deps -r recipes/requirements-words.txt") from error
        self.model, self.decode = load_model(), ctc_greedy_decode
        self.targets = torch.tensor([number for word in WORDS for number in encode_text(word)])
        self.lengths = torch.tensor([len(word) for word in WORDS])

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Of images (n, 1, 24, 70) in [0, 1], brought to its height of 32."""
        x = nn.functional.interpolate(images, (32, 4 * round(WIDTH * 32 / HEIGHT / 4)), mode="bilinear", align_corners=False)
        return self.model(2 * x.clamp(0, 1) - 1)

    def spells(self, images: Tensor, words: list[str]) -> Tensor:
        """1 where it reads the word letter by letter, (n,)."""
        read = self.decode(self.logits(images))
        return torch.tensor([float(text.strip() == word) for text, word in zip(read, words, strict=True)])

    @torch.no_grad()
    def knows(self, images: Tensor, words: list[str]) -> Tensor:
        """1 where the word is the likeliest of the vocabulary, (n,)."""
        columns = self.logits(images).log_softmax(2).transpose(0, 1)
        steps = torch.full((len(WORDS),), len(columns))
        known = []
        for i, word in enumerate(words):
            row = columns[:, i : i + 1].expand(-1, len(WORDS), -1)
            loss = nn.functional.ctc_loss(row, self.targets, steps, self.lengths, reduction="none")
            known.append(float(WORDS[int(loss.argmin())] == word))
        return torch.tensor(known)


def main(argv: list[str] | None = None) -> None:
    parser = arguments(
        "Fine-tune a small text-to-image flow so that its words can be read.",
        Path("runs/words-base.safetensors"), base_steps=4_500, rounds=30, samples=160, strength=40.0,
        learning_rate=2e-3, max_cost_gradient=100.0, out=Path("runs/words"),
    )  # fmt: skip
    parser.add_argument("--reader", type=Path, default=Path("english.safetensors"), help="EasyOCR's weights")
    args = parsed(parser, argv)
    reward, judge = easyocr_recogniser(args.reader), Judge()  # what is missing is said first
    study = Study(
        "words", word_base(args.base, args.base_steps),
        dict(zip(("trained words", "other words"), halves(WORDS), strict=True)), SPELL, shown, reward,
        {"held_out": judge.knows, "exact": judge.spells},
    )  # fmt: skip
    run(study, args, argv)


if __name__ == "__main__":
    start(main)
