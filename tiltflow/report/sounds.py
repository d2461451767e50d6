"""Sound for reports: WAV files in memory, and spectrograms as images."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from tiltflow.report.plots import require

WINDOW = 512
DECIBELS = 80
"""Of a spectrogram, below its loudest spot."""


def wav(sound: Tensor, rate: int) -> bytes:
    """Sound (channels, samples) as a WAV file of 16 bits, as loud as it can be."""
    loud = (sound / sound.abs().max().clamp_min(1e-6)).clamp(-1, 1)
    file = io.BytesIO()
    require("scipy.io.wavfile").write(file, rate, (loud.T * 32767).short().cpu().numpy())
    return file.getvalue()


def spectrograms(sounds: Tensor) -> Tensor:
    """Sounds (n, channels, samples) as images (n, 1, frequencies, frames) in [0, 1], low frequencies below."""
    window = min(WINDOW, sounds.shape[2])
    spectrum = torch.stft(sounds.mean(1), window, window=torch.hann_window(window), return_complex=True).abs()
    decibels = 20 * (spectrum / spectrum.max().clamp_min(1e-9)).clamp_min(1e-9).log10()
    return (decibels.flip(1) / DECIBELS + 1).clamp(0, 1)[:, None]
