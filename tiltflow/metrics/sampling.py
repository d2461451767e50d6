r"""Is a sampler right? One-dimensional Wasserstein distances, histograms of angles, and the weights of modes.

On the line optimal transport is monotone, W_p^p = ∫_0^1 |F⁻¹(u) − G⁻¹(u)|^p du with F, G the distribution functions, so
sets of any two sizes are compared exactly. Read each number beside its floor: the same one between two reference sets of
the same sizes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError


def _finite(name: str, values: Tensor) -> Tensor:
    if values.dim() != 1 or len(values) == 0:
        raise TiltflowError(f"{name} must be a non-empty vector, got shape {tuple(values.shape)}.")
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise TiltflowError(f"{bad} of {len(values)} {name} are not finite; drop those samples, and report their number.")
    return double(values.detach())


def wasserstein_1d(a: Tensor, b: Tensor, p: int = 2) -> float:
    r"""Exact W_p = (∫_0^1 |F⁻¹(u) − G⁻¹(u)|^p du)^{1/p} of two samples on the line, a (n,) and b (m,), in their unit.

    Raises TiltflowError for an empty set, a value that is not finite, or p < 1.

    >>> wasserstein_1d(torch.tensor([0.0, 1.0]), torch.tensor([3.0]), 1)
    2.5
    """
    if p < 1:
        raise TiltflowError(f"W_p needs p ≥ 1, got {p}.")
    a, b = _finite("values", a).sort().values, _finite("values", b).sort().values
    ends_a, ends_b = (torch.arange(1, len(v) + 1, device=v.device) * len(w) for v, w in ((a, b), (b, a)))
    ends = torch.cat([ends_a, ends_b]).unique()  # where either quantile function jumps, in units of 1/(n m)
    widths = torch.diff(ends, prepend=torch.zeros_like(ends[:1])).double() / (len(a) * len(b))
    gap = a[torch.searchsorted(ends_a, ends)] - b[torch.searchsorted(ends_b, ends)]
    return float((widths * gap.abs() ** p).sum() ** (1 / p))


def energy_w2(e1: Tensor, e2: Tensor) -> float:
    """Exact 2-Wasserstein distance (with its square root) of the energies of two sample sets, e1 (n,) and e2 (m,).

    Raises TiltflowError that names how many energies are not finite.
    """
    return wasserstein_1d(_finite("energies", e1), _finite("energies", e2), 2)


def torsion_kl(phi1: Tensor, phi2: Tensor, bins: int = 64) -> float:
    """KL(p1 ‖ p2) in nats between histograms of angles in radians, phi (n,) or (n, d), on ``bins`` cells per angle.

    Each histogram counts one more sample, spread evenly over its bins^d cells, so that an empty cell of p2 costs much but
    not infinitely much. Angles are taken modulo 2π. Raises TiltflowError for different d, empty sets or values that are not
    finite.
    """
    histograms = []
    for name, phi in (("phi1", phi1), ("phi2", phi2)):
        angles = _finite(name, phi.reshape(-1)).view(len(phi), -1)
        cell = ((angles + math.pi).remainder(2 * math.pi) * (bins / (2 * math.pi))).long().clamp_max(bins - 1)
        place = bins ** torch.arange(angles.shape[1], device=phi.device)
        counts = torch.bincount((cell * place).sum(1), minlength=bins ** angles.shape[1]).double()
        histograms.append((counts + 1 / len(counts)) / (len(phi) + 1))
    p, q = histograms
    if p.shape != q.shape:
        raise TiltflowError(f"torsion_kl needs angles of one kind, got shapes {tuple(phi1.shape)} and {tuple(phi2.shape)}.")
    return float((p * (p / q).log()).sum())


def _to_centres(x: Tensor, centres: Tensor) -> Tensor:
    if x.shape[1:] != centres.shape[1:] or len(x) == 0 or len(centres) == 0:
        raise TiltflowError(f"samples {tuple(x.shape)} and centres {tuple(centres.shape)} must be points of one shape.")
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(double(x.flatten(1)), double(centres.flatten(1)), compute_mode=exact)


def mode_weights(x: Tensor, centres: Tensor) -> Tensor:
    """Share (M,) of the samples x (n, *event) nearest (Euclidean) to each of the centres (M, *event)."""
    return torch.bincount(_to_centres(x, centres).argmin(1), minlength=len(centres)).double() / len(x)


def mode_coverage(x: Tensor, centres: Tensor, radius: float) -> int:
    """How many of the centres (M, *event) have a sample of x (n, *event) within ``radius``."""
    return int((_to_centres(x, centres).min(0).values <= radius).sum())
