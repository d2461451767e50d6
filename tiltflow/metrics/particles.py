r"""Distances between sets of particle configurations, up to what the energy does not see.

Energies of identical particles are invariant under translations, permutations and the orthogonal group O(m), reflections
included, so two configurations are compared by

    d²(x, y) = min over R ∈ O(m), permutations π of Σ_i ‖x_i − R y_π(i)‖²   (both centred),

and two sets by the optimal assignment of their members, W2 = (min_σ 1/n Σ_k d²(x_k, y_σ(k)))^{1/2}. At fixed π the best R is
closed-form, d² = ‖x‖² + ‖y‖² − 2‖H‖_* with H = Σ_i x_i y_π(i)ᵀ and ‖·‖_* the sum of singular values (Kabsch 1976; R ∈ O(m),
so no determinant is mended).

At most four particles in the plane: all permutations are tried, and d² is exact. Otherwise π and R are optimised in turn,
from principal axes matched in every order and sign (48 starts in 3-D: all for the pairs that may be matched, the likeliest
for the others). Every d² is that of some alignment, hence W2 is an UPPER BOUND. For random pairs of LJ13 the 48 starts leave
the root mean square d at 1.82; 300 random ones reach 1.77.
"""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import torch
from torch import Tensor

from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError
from tiltflow.metrics.sampling import wasserstein_1d

EXACT_PARTICLES = 4
ROUNDS = 3  # of assignment and rotation, from each start
CANDIDATES = 16  # pairs that get every start, for each configuration of either set
CHUNK = 4_000_000  # distances held at a time


def _centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() != 3 or x.shape[1:] != y.shape[1:] or len(x) == 0 or len(y) == 0:
        raise TiltflowError(f"needs non-empty sets (n, N, m) of one N and m, got {tuple(x.shape)} and {tuple(y.shape)}.")
    for name, v in (("x", x), ("y", y)):
        bad = int((~torch.isfinite(v).flatten(1).all(1)).sum())
        if bad:
            raise TiltflowError(f"{bad} of {len(v)} configurations of {name} are not finite; drop and count them.")
    x, y = double(x.detach()), double(y.detach())
    return x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)


def _planar(x: Tensor, y: Tensor) -> Tensor:
    """Exact d² (n, n') in the plane: with z = x¹ + ix² the best rotation's overlap is |Σ_k z̄_k w_π(k)|; w̄ is reflected."""
    best = x.new_zeros(len(x), len(y))  # of the squared overlap
    for order in itertools.permutations(range(x.shape[1])):
        a, b = x.unbind(-1), y[:, list(order)].unbind(-1)
        dot, cross = [a[i] @ b[i].T for i in (0, 1)], [a[i] @ b[1 - i].T for i in (0, 1)]
        for sign in (1, -1):
            overlap = (dot[0] + sign * dot[1]).square_().add_((cross[0] - sign * cross[1]).square_())
            torch.maximum(best, overlap, out=best)
    return _squares(x, y) - 2 * best.sqrt()


def _squares(x: Tensor, y: Tensor) -> Tensor:
    return x.square().sum((1, 2))[:, None] + y.square().sum((1, 2))


@cache
def _axes(m: int) -> Tensor:
    """The 2^m m! rotations and reflections that permute the axes and flip their signs: (A, m, m)."""
    orders = torch.eye(m, dtype=torch.float64)[torch.tensor(list(itertools.permutations(range(m))))]
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=m)), dtype=torch.float64)
    return (orders[:, None] * signs[None, :, :, None]).flatten(0, 1)


def _principal(x: Tensor) -> Tensor:
    """Each configuration in the frame of its principal axes."""
    return x @ torch.linalg.eigh(x.transpose(1, 2) @ x).eigenvectors


def _refined(x: Tensor, y: Tensor, rotation: Tensor, rounds: int) -> Tensor:
    """An upper bound of d² for each pair (P,), from the starts ``rotation`` (P, m, m): x ≈ y R."""
    from scipy.optimize import linear_sum_assignment

    for _ in range(rounds):
        overlap = (x @ (y @ rotation).transpose(1, 2)).numpy()
        order = torch.from_numpy(np.stack([linear_sum_assignment(row, maximize=True)[1] for row in overlap]))
        moved = y.gather(1, order[..., None].expand_as(y))
        u, s, v = torch.linalg.svd(moved.transpose(1, 2) @ x)
        rotation = u @ v
    return x.square().sum((1, 2)) + y.square().sum((1, 2)) - 2 * s.sum(1)


def _likeliest(x: Tensor, y: Tensor, axes: Tensor) -> Tensor:
    """For each pair the start (P,) at which particles of either are nearest, on the whole, to particles of the other."""
    x, y, axes = x.float(), y.float(), axes.float()
    overlap = x[:, None] @ (y[:, None] @ axes).transpose(2, 3)  # (P, A, N, N)
    square = x.square().sum(2)[:, None, :, None] + y.square().sum(2)[:, None, None, :] - 2 * overlap
    return (square.amin(3).sum(2) + square.amin(2).sum(2)).argmin(1)


def _bounds(x: Tensor, y: Tensor) -> Tensor:
    """Upper bounds of d² (n, n'): one refined start for every pair, all of them for the pairs that may be matched."""
    x, y, axes = _principal(x), _principal(y), _axes(x.shape[2])
    pairs = torch.cartesian_prod(torch.arange(len(x)), torch.arange(len(y)))
    size = max(1, CHUNK // (len(axes) * x.shape[1] ** 2))
    rough = []
    for chunk in pairs.split(size):
        a, b = x[chunk[:, 0]], y[chunk[:, 1]]
        rough.append(_refined(a, b, axes[_likeliest(a, b, axes)], 1))
    cost = torch.cat(rough).view(len(x), len(y))
    near = torch.zeros_like(cost, dtype=torch.bool)
    for dim in (0, 1):
        near.scatter_(dim, cost.topk(min(CANDIDATES, cost.shape[dim]), dim, largest=False).indices, True)
    for chunk in near.nonzero().split(size):
        i, j = chunk.T
        for start in axes:
            fine = _refined(x[i], y[j], start.expand(len(i), -1, -1), ROUNDS)
            cost[i, j] = torch.minimum(cost[i, j], fine)
    return cost


def particle_w2(x: Tensor, y: Tensor) -> float:
    r"""W2 = (min_σ 1/n Σ_k d²(x_k, y_σ(k)))^½ of two equal-size sets x, y (n, N, m), in the unit of x.

    d² is minimised over translations, O(m) (reflections included: right only for an energy that has this symmetry) and
    permutations. Exact for N ≤ 4 in the plane, otherwise an upper bound; see the module. Read it beside two reference sets
    of the same n. On one core n = 2000 of DW4 takes about 4 s, n = 500 of LJ13 about 50 s; the work grows as n².

    Raises TiltflowError if the shapes differ or a configuration is not finite, or if SciPy is missing.
    """
    if x.shape != y.shape:
        raise TiltflowError(f"particle_w2 needs two sets of equal shape, got {tuple(x.shape)} and {tuple(y.shape)}.")
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise TiltflowError("particle_w2 needs SciPy: pip install 'tiltflow[report]'.") from error
    x, y = _centred(x, y)
    exact = x.shape[2] == 2 and x.shape[1] <= EXACT_PARTICLES
    cost = (_planar(x, y) if exact else _bounds(x, y)).clamp_min(0).numpy()
    rows, columns = linear_sum_assignment(cost)
    return float(cost[rows, columns].mean() ** 0.5)


def interatomic_distances(x: Tensor) -> Tensor:
    """All distances of pairs of particles, x (n, N, m) -> (n·N(N − 1)/2,)."""
    if x.dim() != 3:
        raise TiltflowError(f"configurations have shape (n, N, m), got {tuple(x.shape)}.")
    i, j = torch.triu_indices(x.shape[1], x.shape[1], 1, device=x.device)
    return (x[:, i] - x[:, j]).norm(dim=-1).flatten()


def distance_wasserstein(x: Tensor, y: Tensor, p: int = 2) -> float:
    """W_p of the interatomic distances of two sets x (n, N, m) and y (n', N, m): see :func:`wasserstein_1d`."""
    return wasserstein_1d(interatomic_distances(x), interatomic_distances(y), p)
