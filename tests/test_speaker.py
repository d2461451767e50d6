"""Likeness of speakers: mel spectra against transformers', the d-vector against one written out, and real weights."""

import numpy as np
import pytest
import torch
from test_audio_rewards import tone
from test_ocr import converted

from tiltflow.core.errors import TiltflowError
from tiltflow.rewards.speaker import QUIET, Speaker, VoiceEncoder, mel_spectra, resemblyzer_speaker


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


class Hearing(torch.nn.Module):
    """Norm one, and another for every energy at every time: band means that count later frames more, and a constant."""

    def forward(self, spectra):
        later = torch.linspace(0, 1, spectra.shape[1])[:, None]
        return torch.nn.functional.normalize(torch.cat([(spectra * later).mean(1), torch.ones(len(spectra), 1)], 1), dim=1)


def noise(n, samples, seed=0):
    return 0.2 * torch.randn(n, 1, samples, generator=torch.Generator().manual_seed(seed))


def test_mel_spectra_are_those_of_transformers():
    audio = pytest.importorskip("transformers.audio_utils")
    x = noise(1, 4_000)[0] + tone(300, seconds=0.25)[0]
    filters = audio.mel_filter_bank(201, 40, 0.0, 8_000.0, 16_000, norm="slaney", mel_scale="slaney")
    wanted = audio.spectrogram(
        x[0].double().numpy(), np.hanning(401)[:-1], 400, 160, power=2.0, pad_mode="constant", mel_filters=filters
    ).T
    found = mel_spectra(x)[0].numpy()
    assert found.shape == wanted.shape == (26, 40)
    assert np.abs(found - wanted).max() < 1e-4 * wanted.max()


def test_the_vector_is_that_of_the_recurrence_written_out():
    """Three layers of input, forget, cell and output gates; then linear, positive, norm one."""
    torch.manual_seed(3)
    encoder = VoiceEncoder()
    spectra, state = torch.rand(2, 7, 40), encoder.state_dict()
    rows = spectra
    for layer in range(3):
        w, u, b, c = (state[f"lstm.{n}_l{layer}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        h, cell, out = torch.zeros(2, 256), torch.zeros(2, 256), []
        for x in rows.unbind(1):
            i, f, g, o = (x @ w.T + b + h @ u.T + c).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            h = o.sigmoid() * cell.tanh()
            out.append(h)
        rows = torch.stack(out, 1)
    e = (h @ state["linear.weight"].T + state["linear.bias"]).clamp_min(0)
    assert torch.allclose(encoder(spectra), e / e.norm(dim=1, keepdim=True), atol=1e-5)


def test_windows_overlap_by_half_and_silence_fills_up():
    """Four windows of 160 frames in 350, the last filled up; a short sound is one window, its end silence."""
    encoder = Hearing()
    score = Speaker(encoder, noise(1, 8_000), 16_000)
    sound = noise(1, 350 * 160 - 160)
    spectra = mel_spectra(sound[:, 0])
    assert spectra.shape[1] == 350
    spectra = torch.cat([spectra, torch.zeros(1, 50, 40)], 1)
    parts = torch.cat([encoder(spectra[:, i : i + 160]) for i in (0, 80, 160, 240)]).sum(0)
    assert torch.allclose(score.embed(sound)[0], parts / parts.norm(), atol=1e-5)
    spectra = mel_spectra(noise(1, 4_000)[:, 0])
    filled = torch.cat([spectra, torch.zeros(1, 160 - 26, 40)], 1)
    early = torch.cat([torch.zeros(1, 160 - 26, 40), spectra], 1)
    found = score.embed(noise(1, 4_000))
    assert torch.allclose(found, encoder(filled), atol=1e-5) and not torch.allclose(found, encoder(early), atol=1e-3)


def test_likeness_is_one_to_oneself_and_quiet_sound_is_raised():
    encoder, sound = Hearing(), noise(2, 8_000)
    score = Speaker(encoder, sound[:1], 16_000)
    found = score(sound, ["", ""])
    assert found[0] == pytest.approx(1, abs=1e-5) and 0 <= float(found[1]) <= 1
    quiet = 0.1 * QUIET / sound.square().mean().sqrt()
    assert torch.allclose(score.embed(quiet * sound), score.embed(0.5 * quiet * sound), atol=1e-4)
    assert not torch.allclose(score.embed(sound), score.embed(3 * sound), atol=1e-4)  # loud sound is left as it is
    mean = score.embed(sound).sum(0)
    assert torch.allclose(Speaker(encoder, sound, 16_000).target, mean / mean.norm(), atol=1e-5)


def test_misuse(tmp_path):
    with pytest.raises(TiltflowError, match="no weights file none"):
        resemblyzer_speaker("none", noise(1, 100), 16_000)
    with pytest.raises(TiltflowError, match="rate is positive"):
        resemblyzer_speaker("none", noise(1, 100), 0)


def test_real_weights_tell_sounds_apart_and_the_gradient_is_right(tmp_path):
    file = converted("resemblyzer", "pretrained.pt", tmp_path)
    score = resemblyzer_speaker(file, tone(120, seconds=1.6), 16_000)
    same, other = score(torch.cat([tone(125, seconds=1.6), tone(400, seconds=1.6)]), ["", ""])
    assert float(same) > float(other) + 0.05
    x = (tone(200, seconds=0.3) + noise(1, 4_800)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(score(x, [""]).sum(), x)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        up, down = (float(score(x + s * 1e-2 * direction, [""])) for s in (1, -1))
    assert (up - down) / 2e-2 == pytest.approx(float(gradient.norm()), rel=0.1)
