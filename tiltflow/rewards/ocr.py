r"""Text that can be read: log p(text | image) of a line recogniser, by connectionist temporal classification.

    r(x, text) = log Σ_{alignments of text} Π_t p(symbol_t | x) / length of text        (Graves et al. 2006)

The recogniser is the usual CRNN (Shi et al. 2015, arXiv:1507.05717): convolutions that keep the width, two bidirectional
LSTMs along it, one distribution over symbols and blank per column. :func:`easyocr_recogniser` has EasyOCR's English weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError

ENGLISH = (
    "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)
"""EasyOCR's English symbols, in the order of its classes; class 0 is the blank."""
HEIGHT = 64


class CRNN(nn.Module):
    """Grey images (n, 1, 64, W) in [−1, 1] → logits (n, T, 1 + symbols), T about W/4."""

    def __init__(self, symbols: int, width: int = 256, hidden: int = 256) -> None:
        super().__init__()
        a, b, c = width // 8, width // 4, width // 2
        self.features = nn.Sequential(
            nn.Conv2d(1, a, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(a, b, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(b, c, 3, 1, 1), nn.ReLU(), nn.Conv2d(c, c, 3, 1, 1), nn.ReLU(), nn.MaxPool2d((2, 1)),
            nn.Conv2d(c, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d((2, 1)),
            nn.Conv2d(width, width, 2), nn.ReLU(),
        )  # fmt: skip
        self.along = nn.ModuleList(
            [nn.LSTM(n, hidden, bidirectional=True, batch_first=True) for n in (width, hidden)]
        )
        self.join = nn.ModuleList([nn.Linear(2 * hidden, hidden) for _ in range(2)])
        self.head = nn.Linear(hidden, symbols + 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every column."""
        x = self.features(x).mean(2).transpose(1, 2)
        for lstm, join in zip(self.along, self.join):
            x = join(lstm(x)[0])
        return self.head(x)


class Legibility:
    """``(images (n, 1 or 3, H, W) in [0, 1], texts) -> (n,)``: log p(text | image) per letter, and what is read.

    Args:
        recogniser: as :class:`CRNN`; symbols: of its classes from 1 on.
    """

    def __init__(self, recogniser: nn.Module, symbols: str) -> None:
        self.recogniser, self.symbols = recogniser.eval().requires_grad_(False), symbols
        self.number = {symbol: i for i, symbol in enumerate(symbols, 1)}

    def logits(self, images: Tensor) -> Tensor:
        """Of the recogniser, for images resized to its height."""
        grey = images.float().mean(1, keepdim=True)
        width = max(1, round(grey.shape[3] * HEIGHT / grey.shape[2]))
        return self.recogniser(2 * F.interpolate(grey, (HEIGHT, width), mode="bicubic", align_corners=False).clamp(0, 1) - 1)

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Per letter; −30 at least, so that an impossible text has a value. Raises TiltflowError for unknown symbols."""
        unknown = sorted({letter for text in texts for letter in text if letter not in self.number})
        if unknown or not all(texts) or len(texts) != len(images):
            raise TiltflowError(
                f"{len(images)} images need as many texts, not empty and of known symbols; unknown: {unknown}."
            )
        log_p = self.logits(images).log_softmax(2).transpose(0, 1)
        targets = torch.tensor([self.number[letter] for text in texts for letter in text], device=log_p.device)
        lengths = torch.tensor([len(text) for text in texts])
        steps = torch.full((len(texts),), log_p.shape[0])
        loss = F.ctc_loss(log_p, targets, steps, lengths, blank=0, reduction="none", zero_infinity=False)
        return (-loss / lengths.to(loss)).clamp_min(-30.0)

    @torch.no_grad()
    def read(self, images: Tensor) -> list[str]:
        """The likeliest symbol of every column, repetitions and blanks left out."""
        best = self.logits(images).argmax(2)
        changed = F.pad(best[:, 1:] != best[:, :-1], (1, 0), value=True)
        return ["".join(self.symbols[i - 1] for i in row[keep].tolist() if i) for row, keep in zip(best, changed)]


def easyocr_recogniser(file: str | Path) -> Legibility:
    """EasyOCR's English recogniser (Apache-2.0), from its weights as safetensors (docs/pipelines.md: how to get them).

    Raises:
        TiltflowError: no such file, or weights of something else.
    """
    names = {"FeatureExtraction.ConvNet": "features", "Prediction": "head"}
    names |= {f"SequenceModeling.{i}.rnn": f"along.{i}" for i in (0, 1)}
    names |= {f"SequenceModeling.{i}.linear": f"join.{i}" for i in (0, 1)}
    network = CRNN(len(ENGLISH))
    try:
        state = {}
        for key, value in load_file(file).items():
            plain = key.removeprefix("module.")
            old = next(name for name in names if plain.startswith(name + "."))
            state[names[old] + plain.removeprefix(old)] = value
        network.load_state_dict(state)
    except (OSError, SafetensorError, StopIteration, RuntimeError) as error:
        raise TiltflowError(f"{file} holds no weights of EasyOCR's English recogniser: {error}") from error
    return Legibility(network, ENGLISH)
