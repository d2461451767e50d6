"""recipes/galaxies.py: the port against the mathematics it claims, its reward against closed forms, its errors."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tiltflow.core.errors import TiltflowError

RECIPE = Path(__file__).parents[1] / "recipes" / "galaxies.py"


def _load_recipe():
    spec = importlib.util.spec_from_file_location("galaxies_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


galaxies = _load_recipe()
installed = pytest.mark.skipif(
    importlib.util.find_spec("galaxygrad") is None,
    reason="needs a third-party model that tiltflow may not ship: pip install --no-deps galaxygrad==0.0.20",
)


def tiny_arrays(size=8, patch=4, channels=3, width=5, blocks=2, seed=0):
    """Random weights in the order and shapes of an Equinox file of this architecture."""
    rng = np.random.default_rng(seed)
    patches = (size // patch) ** 2

    def w(*shape):
        return rng.normal(size=shape, scale=0.5)

    def mlp(n):
        return [w(width, n), w(width), w(n, width), w(n)]

    arrays = [w(channels, 2, patch, patch), w(channels, 1, 1), w(1, channels, patch, patch), w(1, 1, 1)]
    for _ in range(blocks):
        arrays += mlp(patches) + mlp(channels)
        arrays += [w(channels, patches), w(channels, patches), w(patches, channels), w(patches, channels)]
    return [*arrays, w(channels, patches), w(channels, patches), np.array(10.0)]


def write(path, arrays):
    with path.open("wb") as file:
        for array in arrays:
            np.save(file, array)
    return path


def reference_score(arrays, x, s):
    """The network for one image (1, size, size) at diffusion time s, in NumPy, from the stored arrays alone."""

    def norm(h, scale, shift):
        return (h - h.mean()) / np.sqrt(h.var() + 1e-5) * scale + shift

    def mlp(rows, w0, b0, w1, b1):
        return np.maximum(rows @ w0.T + b0, 0) @ w1.T + b1

    *arrays, horizon = arrays
    kernel, bias, out_kernel, out_bias = arrays[:4]
    channels, _, patch, _ = kernel.shape
    side = x.shape[-1] // patch
    seen = np.concatenate([x, np.full_like(x, s / horizon)])
    cut = seen.reshape(2, side, patch, side, patch)
    h = (np.einsum("cipq,iapbq->cab", kernel, cut) + bias).reshape(channels, -1)
    for i in range(4, len(arrays) - 2, 12):
        p, c, n = arrays[i : i + 4], arrays[i + 4 : i + 8], arrays[i + 8 : i + 12]
        h = h + mlp(norm(h, *n[:2]), *p)
        h = h + mlp(norm(h.T, *n[2:]), *c).T
    h = norm(h, *arrays[-2:]).reshape(channels, side, side)
    flipped = out_kernel[0, :, ::-1, ::-1]  # a transposed correlation
    return np.einsum("cpq,cab->apbq", flipped, h).reshape(1, *x.shape[1:]) + out_bias


def ellipse(a, b, angle, amplitude=1.0, satellite=0.0, size=32):
    """A Gaussian galaxy (1, 1, size, size) in the model's variable; ``satellite``: flux of a detached blob."""
    grid = torch.arange(size) - (size - 1) / 2
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    image = amplitude * torch.exp(-(u**2) / (2 * a**2) - v**2 / (2 * b**2))
    image = image + satellite * torch.exp(-((x - 9) ** 2 + y**2) / 2)
    return torch.log1p(image)[None, None] / galaxies.LOG_SCALE


def test_port_equals_the_stored_arrays_evaluated_in_numpy(tmp_path, generator):
    arrays = tiny_arrays()
    base = galaxies.load_galaxies(write(tmp_path / "w.eqx", arrays))
    x = torch.randn(3, 1, 8, 8, generator=generator)
    t = torch.tensor([0.1, 0.5, 0.95])
    expected = np.stack([reference_score(arrays, xi, 10 * (1 - ti) ** 2) for xi, ti in zip(x.numpy(), t.numpy())])
    assert np.abs(base.score(x, t).numpy() - expected).max() < 1e-12
    wrong = [*arrays]
    wrong[2] = wrong[2][:, :, ::-1, ::-1]  # the flip of the last kernel must matter
    other = galaxies.load_galaxies(write(tmp_path / "wrong.eqx", wrong))
    assert np.abs(other.score(x, t).numpy() - expected).max() > 1e-2


def test_path_is_the_published_diffusion_on_a_squared_clock(tmp_path):
    interpolant = galaxies.load_galaxies(write(tmp_path / "w.eqx", tiny_arrays())).interpolant
    t = torch.linspace(0, 1, 21)
    s = 10 * (1 - t) ** 2
    assert torch.allclose(interpolant.alpha(t), torch.exp(-s / 2), atol=1e-14)
    assert torch.allclose(interpolant.beta(t), (1 - torch.exp(-s)).sqrt(), atol=1e-14)
    assert not torch.allclose(interpolant.alpha(t), torch.exp(-5 * (1 - t)), atol=1e-2)  # the clock matters


def test_files_that_are_not_this_model_are_refused(tmp_path):
    good = tiny_arrays()
    transposed = [a.T if i == 8 else a for i, a in enumerate(good)]
    for name, arrays in {"short": good[:-5], "shape": transposed, "empty": [], "long": [*good, *good]}.items():
        with pytest.raises(TiltflowError, match="expected MLP-Mixer"):
            galaxies.load_galaxies(write(tmp_path / f"{name}.eqx", arrays))
    cut = write(tmp_path / "cut.eqx", good)
    cut.write_bytes(cut.read_bytes()[:-4])
    with pytest.raises(TiltflowError, match="cannot be read"):
        galaxies.load_galaxies(cut)
    with (tmp_path / "object.eqx").open("wb") as file:
        np.save(file, np.array([{"code": "would be unpickled"}], dtype=object), allow_pickle=True)
    with pytest.raises(TiltflowError, match="cannot be read"):
        galaxies.load_galaxies(tmp_path / "object.eqx")


def test_missing_package_names_the_install_line(monkeypatch):
    monkeypatch.setattr(galaxies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TiltflowError, match=r"pip install --no-deps galaxygrad==0\.0\.20"):
        galaxies.load_galaxies()


@pytest.mark.parametrize("angle", [0.0, 0.6, math.pi / 2, 2.5])
def test_reward_of_a_gaussian_galaxy(angle):
    chi1, chi2 = galaxies.shape_moments(ellipse(4.0, 1.5, angle))
    a2, b2 = (1 / (1 / s**2 + 1 / galaxies.APERTURE**2) for s in (4.0, 1.5))  # seen through the aperture
    expected = (a2 - b2) / (a2 + b2 + 2 * galaxies.PSF**2)
    got = galaxies.ellipticity(ellipse(4.0, 1.5, angle)).item()
    assert got == pytest.approx(expected, rel=0.1)  # the sky cut takes the faint wings
    turned = math.atan2(chi2.item(), chi1.item()) - 2 * angle
    assert math.cos(turned) == pytest.approx(1.0, abs=1e-3)
    assert galaxies.ellipticity(ellipse(3.0, 3.0, angle)).item() < 0.01


def test_reward_ignores_noise_and_unresolved_pairs(generator):
    image = ellipse(4.0, 1.5, 0.4)
    noisy = image + 0.1 * torch.randn(image.shape, generator=generator)  # 1 % of the peak
    assert abs(galaxies.ellipticity(noisy) - galaxies.ellipticity(image)).item() < 0.02
    pair = torch.zeros(1, 1, 32, 32)
    pair[..., 15, 15:17] = 6.9
    assert galaxies.ellipticity(pair).item() < 0.15


def test_reward_gradient_is_that_of_finite_differences(generator):
    x = ellipse(3.0, 2.0, 0.7, amplitude=0.8).requires_grad_(True)
    (gradient,) = torch.autograd.grad(galaxies.ellipticity(x).sum(), x)
    direction = torch.randn(x.shape, generator=generator)
    h = 1e-6
    with torch.no_grad():
        slope = (galaxies.ellipticity(x + h * direction) - galaxies.ellipticity(x - h * direction)) / (2 * h)
    assert torch.allclose((gradient * direction).sum(), slope, rtol=1e-5)


def test_judge_agrees_on_galaxies_and_sees_through_a_satellite():
    judge, outside = galaxies.isophotes(ellipse(4.0, 1.5, 0.6))
    assert judge.item() == pytest.approx((16 - 2.25) / (16 + 2.25), abs=0.05)
    assert outside.item() == 0
    round_, gamed = ellipse(2.0, 2.0, 0.0), ellipse(2.0, 2.0, 0.0, satellite=0.5)
    assert galaxies.ellipticity(gamed) - galaxies.ellipticity(round_) > 0.2  # the reward can be gamed like this
    judge, outside = galaxies.isophotes(gamed)
    assert judge.item() < 0.05  # the judge cannot
    assert outside.item() > 0.02  # and the alarm rings


def test_alignment_tells_one_direction_from_all():
    anywhere = torch.cat([ellipse(4.0, 1.5, math.pi * i / 8) for i in range(8)])
    assert galaxies.describe(anywhere)["alignment"] < 0.02
    assert galaxies.describe(anywhere[:1].repeat(8, 1, 1, 1))["alignment"] > 0.99
    assert galaxies.describe(anywhere)["diversity"] > 1 > galaxies.describe(anywhere[:1].repeat(8, 1, 1, 1))["diversity"]


def test_recipe_runs_end_to_end_on_a_random_model(tmp_path, capsys):
    arrays = tiny_arrays(size=16)
    arrays[0][:, 1] *= 20  # the second channel is the time: a base that hardly sees it is refused at the door
    weights = write(tmp_path / "w.eqx", arrays)
    out = tmp_path / "run"
    galaxies.main(
        f"--weights {weights} --seeds 0 1 --rounds 2 --steps 8 --batch 4 --samples 24 --strength 1 "
        f"--out {out} --results {tmp_path / 'rows.json'}".split()
    )
    document = json.loads((out / "metrics.json").read_text())
    assert document == json.loads((tmp_path / "rows.json").read_text())
    assert [(row["seed"], row["sampler"]) for row in document["rows"]] == [(0, "sde"), (0, "ode"), (1, "sde"), (1, "ode")]
    first = document["rows"][0]
    assert first["kl"] > 0 and 0 < first["ess"] <= 1 and first["diversity"] > 0 and first["base_diversity"] > 0
    assert (out / "seed1.png").stat().st_size > 0 and (out / "seed0.safetensors").is_file()
    assert "KL to the base" in capsys.readouterr().out
    with pytest.raises(TiltflowError, match="already holds a run"):
        galaxies.main(f"--weights {weights} --out {out}".split())


@installed
def test_installed_model_gives_the_numbers_of_the_original():
    """Against the JAX original at x_ij = 3 exp(−(i−15.5)²/20 − (j−15.5)²/60), s = 1 and s = 0.1 (see docs/galaxies.md)."""
    base = galaxies.load_galaxies()
    assert base.event_shape == (1, 32, 32)
    assert sum(p.numel() for p in base.model.parameters()) == 605_761
    grid = torch.arange(32) - 15.5
    x = 3 * torch.exp(-(grid[:, None] ** 2) / 20 - grid[None, :] ** 2 / 60)[None, None]
    stored = {1.0: [0.174324, -0.006668, -0.083319, 0.090994], 0.1: [1.933455, -0.003892, -0.443324, 0.481610]}
    for s, expected in stored.items():
        out = base.score(x, torch.tensor([1 - (s / 10) ** 0.5]))[0, 0]
        got = [out[16, 16], out[3, 28], out[20, 9], out.std()]
        assert torch.allclose(torch.stack(got), torch.tensor(expected), rtol=1e-4, atol=2e-5)
