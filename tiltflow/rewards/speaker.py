r"""How like a speaker something sounds, ``(audio (n, channels, samples), texts) -> (n,)``: cos(e(audio), e(speaker)).

e is the d-vector of an LSTM over mel spectra (Wan, Wang, Papir, Moreno 2018, arXiv:1710.10467). It has no negative entries,
so the cosine is in [0, 1]; that of a long sound is the sum over windows of 1.6 s, each of norm one, brought to norm one.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError
from tiltflow.rewards.audio import RATE, mono
from tiltflow.train.store import load_weights

FRAME, HOP, BANDS = 400, 160, 40
WINDOW = 160
"""Frames that the network hears at once; windows overlap by half."""
QUIET = 10 ** (-30 / 20)
"""Root mean square that quieter sounds are raised to."""
SIZE = 256


@cache
def mel_filters() -> Tensor:
    """Triangles of area one between 40 + 2 frequencies equally far apart on Slaney's mel scale, (bins, bands).

    The scale is linear to 1,000 Hz, where it is 15, and logarithmic above: 27 mel for a factor of 6.4.
    """
    octave = math.log(6.4) / 27
    m = torch.linspace(0, 15 + math.log(RATE / 2_000) / octave, BANDS + 2, dtype=torch.float64)
    corner = torch.where(m < 15, 200 * m / 3, 1_000 * torch.exp(octave * (m - 15)))
    low, centre, high = corner[:-2], corner[1:-1], corner[2:]
    f = torch.linspace(0, RATE / 2, FRAME // 2 + 1, dtype=torch.float64)[:, None]
    triangle = torch.minimum((f - low) / (centre - low), (high - f) / (high - centre)).clamp_min(0)
    return (triangle * 2 / (high - low)).float()


def mel_spectra(x: Tensor) -> Tensor:
    """Of sound (n, samples) at 16 kHz: energies (n, frames, 40), a frame every 10 ms."""
    window = torch.hann_window(FRAME, device=x.device)
    bins = torch.stft(x, FRAME, HOP, window=window, center=True, pad_mode="constant", return_complex=True)
    return (bins.real**2 + bins.imag**2).mT @ mel_filters().to(x.device)


class VoiceEncoder(nn.Module):
    """Mel spectra (m, frames, 40) → d-vectors (m, 256) of norm one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(BANDS, SIZE, 3, batch_first=True), nn.Linear(SIZE, SIZE)
        for name in ("similarity_weight", "similarity_bias"):  # of the loss it was trained with
            self.register_buffer(name, torch.zeros(1))

    def forward(self, spectra: Tensor) -> Tensor:
        """From the state after the last frame."""
        return F.normalize(F.relu(self.linear(self.lstm(spectra)[1][0][-1])), dim=1)


class Speaker:
    """Likeness to a speaker.

    Args:
        network: as :class:`VoiceEncoder`. speaker: recordings of the speaker, (m, channels, samples); the mean of their
            d-vectors is aimed at. rate: of them and of the audio, in Hz.
    """

    def __init__(self, network: nn.Module, speaker: Tensor, rate: int) -> None:
        self.network, self.rate = network.eval().requires_grad_(False), rate
        with torch.no_grad():
            self.target = F.normalize(self.embed(speaker).sum(0), dim=0)

    def embed(self, audio: Tensor) -> Tensor:
        """d-vectors (n, 256). Quiet sound is raised to −30 dB, short sound filled up with silence."""
        x = mono(audio, self.rate)
        x = x * (QUIET / x.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)).clamp_min(1.0)
        spectra = mel_spectra(x)
        missing = max(WINDOW - spectra.shape[1], -(spectra.shape[1] - WINDOW) % (WINDOW // 2))
        windows = F.pad(spectra, (0, 0, 0, missing)).unfold(1, WINDOW, WINDOW // 2).mT
        found = self.network(windows.flatten(0, 1)).unflatten(0, windows.shape[:2])
        return F.normalize(found.sum(1), dim=1)

    def __call__(self, audio: Tensor, texts: list[str]) -> Tensor:
        """Between 0 and 1."""
        return self.embed(audio) @ self.target.to(audio.device)


def resemblyzer_speaker(file: str | Path, speaker: Tensor, rate: int) -> Speaker:
    """With the weights of Resemblyzer (Apache-2.0), as safetensors (docs/pipelines.md: how to get them).

    Raises:
        TiltflowError: no such file, weights of something else, recordings of another shape, or no such rate.
    """
    if rate <= 0:
        raise TiltflowError(f"a sampling rate is positive, got {rate}.")
    network = VoiceEncoder()
    load_weights(Path(file), network)
    return Speaker(network, speaker, rate)
