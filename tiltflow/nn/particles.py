r"""A network for N identical particles in R^m whose field turns, swaps and shifts with them and has no mean.

An E(m)-equivariant graph network (Satorras, Hoogeboom & Welling 2021, arXiv:2102.09844) on all pairs, with messages that are
symmetric, m_ij = m_ji. With y = x and h_i = e(t), an embedding of the time, at first, d_ij = |y_i − y_j|, n = √(N − 1) and
u_ij = (y_i − y_j) / √(d_ij² + s²), each layer is

    m_ij = silu(W₂ silu(W h_i + W h_j + R ρ(d_ij)))         c_ij = silu(C m_ij)
    f_i ← f_i + Σ_j u_ij (a · c_ij) / n                     y_i ← y_i + s Σ_j u_ij (b · c_ij) / n
    h_i ← h_i + V₂ silu(V h_i + V₁ Σ_j m_ij / n)

(biases not shown) and the field is f_i + g(t)(x_i − x̄). It sees x through distances and moves along differences: equivariant
under rotations, reflections and permutations, invariant under shifts. c_ij is symmetric and u_ij antisymmetric, so the mean
of f is zero: it stays in the centred subspace (Köhler, Klein & Noé 2020, arXiv:2006.02425). Unlike in the original, the
working coordinates y and the field f have coefficients of their own: a large drift need not distort the geometry.

Cost. Symmetric messages need N(N − 1)/2 pairs instead of N(N − 1) edges; W h is per particle, not per pair. Tensors are
(pairs, batch, hidden), so that reading particles and summing over pairs move long contiguous rows. On a CPU the batch goes
through in blocks that about fit the cache, since memory for whole tensors of pairs would be fetched anew each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from tiltflow.core.errors import TiltflowError
from tiltflow.nn.features import time_features

BLOCK = 2**19
"""Most numbers in one (pairs, batch, hidden) tensor on a CPU; 2 MB in single precision."""


def _silu(z: Tensor) -> Tensor:
    """silu, in place when no gradient will ask for z."""
    return silu(z, inplace=not torch.is_grad_enabled())


def zeroed(layer: nn.Linear) -> nn.Linear:
    """The layer, its parameters set to 0."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class Radial(nn.Module):
    r"""ρ(d): Gaussians in ℓ = log √((d² + s²)/(1 + d²/L²)) and, given the noise scale h(t), in q = d²/(d² + h²).

    ℓ runs from log s at d = 0 to log L, so that the repulsive core and the far field each get their share and nothing leaves
    the range; q is small where the noise still hides the distance.
    """

    def __init__(self, basis: int, lengths: tuple[float, float], noisy: bool) -> None:
        super().__init__()
        self.square, self.inverse = lengths[0] ** 2, lengths[1] ** -2
        ranges = [(basis, math.log(lengths[0]), math.log(lengths[1]))] + [(basis // 2, 0.0, 1.0)] * noisy
        slope, centre = [], []
        for size, low, high in ranges:
            sharpness = math.sqrt(0.5) * (size - 1) / (high - low)  # the standard deviation is the spacing
            centre.append(torch.linspace(low, high, size) * sharpness)
            slope.append(torch.full((1, size), sharpness))
        self.register_buffer("slope", torch.block_diag(*slope), persistent=False)
        self.register_buffer("centre", torch.cat(centre), persistent=False)
        self.slope: Tensor
        self.centre: Tensor

    def forward(self, squared: Tensor, variance: Tensor | None) -> Tensor:
        """Features (P, B, features) of d² (P, B) and h² (B,)."""
        scalars = [0.5 * ((squared + self.square) / (1 + self.inverse * squared)).log()]
        if variance is not None:
            scalars.append(squared / (squared + variance))
        z = torch.stack(scalars, -1) @ self.slope - self.centre
        return (-z * z).exp()


class Layer(nn.Module):
    """One layer; the last one moves neither the working coordinates nor h, since nothing would read them."""

    def __init__(self, features: int, hidden: int, last: bool) -> None:
        super().__init__()
        self.node = nn.Linear(hidden, hidden, bias=False)
        self.radial = nn.Linear(features, hidden, bias=False)
        self.message = nn.Linear(hidden, hidden)
        self.coordinate = nn.Linear(hidden, hidden)
        self.push = zeroed(nn.Linear(hidden, 1, bias=False))
        self.last = last
        if not last:
            self.move = zeroed(nn.Linear(hidden, 1, bias=False))
            self.own = nn.Linear(hidden, hidden, bias=False)
            self.received = nn.Linear(hidden, hidden)
            self.update = nn.Linear(hidden, hidden)


class ParticleNet(nn.Module):
    """(x (B, N, m), t (B,)) → an equivariant, mean-free field (B, N, m); starts at exactly zero. See the module's equations.

    Args:
        particles, space: N and m.
        hidden, layers: width of h and of the messages, number of layers.
        lengths: (s, L), the shortest and the longest distance worth telling apart, in the units of x. Take s inside the
            repulsive core and L at the size of the cluster.
        basis: Gaussians in the logarithm of the distance; with ``noise``, half as many again in d relative to it.
        noise: h(t), (B,) → (B,), standard deviation per coordinate of the noise left at t, in the units of x; s/1000 is the
            floor. Without it distances are compared to fixed lengths only.
        frequencies: sines and cosines of t.

    Raises:
        TiltflowError: an impossible size, or lengths that are not 0 < s < L.
    """

    def __init__(
        self,
        particles: int,
        space: int,
        hidden: int = 64,
        layers: int = 3,
        lengths: tuple[float, float] = (0.5, 5.0),
        basis: int = 16,
        noise: Callable[[Tensor], Tensor] | None = None,
        frequencies: int = 4,
    ) -> None:
        super().__init__()
        if particles < 2 or space < 1 or hidden < 1 or layers < 1 or basis < 4:
            raise TiltflowError(
                f"ParticleNet needs at least 2 particles, 1 dimension, width 1, 1 layer and a basis of 4; got particles "
                f"{particles}, space {space}, hidden {hidden}, layers {layers}, basis {basis}."
            )
        if not 0 < lengths[0] < lengths[1] < math.inf:
            raise TiltflowError(f"lengths are (shortest, longest) with 0 < shortest < longest, got {lengths}.")
        self.particles, self.space, self.noise, self.frequencies = particles, space, noise, frequencies
        self.shortest, self.scale = lengths[0], (particles - 1) ** -0.5
        self.radial = Radial(basis, lengths, noise is not None)
        times = 1 + 2 * frequencies + (noise is not None)
        self.time = nn.Sequential(nn.Linear(times, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        features = len(self.radial.centre)
        self.layers = nn.ModuleList(Layer(features, hidden, last=k == layers - 1) for k in range(layers))
        self.gate = zeroed(nn.Linear(hidden, 1))
        first, second = torch.triu_indices(particles, particles, 1)
        self.register_buffer("first", first.clone(), persistent=False)
        self.register_buffer("second", second.clone(), persistent=False)
        eye = torch.eye(particles)
        self.register_buffer("signs", eye[:, first] - eye[:, second], persistent=False)
        self.first: Tensor
        self.second: Tensor
        self.signs: Tensor
        self.block = max(1, BLOCK // (hidden * len(first)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The field (B, N, m).

        Raises:
            TiltflowError: x is not (B, N, m).
        """
        if x.shape[1:] != (self.particles, self.space):
            raise TiltflowError(f"x has shape {tuple(x.shape)}; this network takes (B, {self.particles}, {self.space}).")
        if x.device.type != "cpu" or len(x) <= self.block or torch.compiler.is_compiling():
            return self._field(x, t)
        blocks = math.ceil(len(x) / self.block)
        return torch.cat([self._field(*part) for part in zip(x.tensor_split(blocks), t.tensor_split(blocks))])

    def _field(self, x: Tensor, t: Tensor) -> Tensor:
        """The field of one block."""
        features, variance = time_features(t, self.frequencies), None
        if self.noise is not None:
            variance = self.noise(t) ** 2 + (1e-3 * self.shortest) ** 2
            features = torch.cat([features, 0.5 * variance.log()[:, None]], 1)
        time = self.time(features)
        x = x.transpose(0, 1)
        y, h, force = x, time[None], None
        for layer in self.layers:
            assert isinstance(layer, Layer)
            difference = (self.signs.T @ y.flatten(1)).view(-1, *y.shape[1:])
            squared = (difference * difference).sum(-1)
            unit = difference * (squared + self.shortest**2).rsqrt()[..., None]
            z = layer.radial(self.radial(squared, variance))
            a = layer.node(h)
            if len(a) == 1:  # the first layer: every particle carries the time and nothing else
                z = z.add_(a, alpha=2)
            else:
                z = z.add_(a.index_select(0, self.first)).add_(a.index_select(0, self.second))
            m = _silu(layer.message(_silu(z)))
            c = _silu(layer.coordinate(m))
            push = unit * layer.push(c)
            force = push if force is None else force + push
            if not layer.last:
                y = y + (self.shortest * self.scale) * self._along(unit * layer.move(c))
                received = layer.received(self.scale * self._sum(m))
                h = h + layer.update(_silu(received + layer.own(h)))
        assert force is not None
        field = self.scale * self._along(force) + self.gate(silu(time)) * (x - x.mean(0))
        return field.transpose(0, 1)

    def _along(self, pairs: Tensor) -> Tensor:
        """Σ_j of an antisymmetric function of pairs: (P, B, m) → (N, B, m)."""
        return (self.signs @ pairs.flatten(1)).view(-1, *pairs.shape[1:])

    def _sum(self, pairs: Tensor) -> Tensor:
        """Σ_j of a symmetric function of pairs: (P, B, ·) → (N, B, ·)."""
        total = pairs.new_zeros(self.particles, *pairs.shape[1:])
        return total.index_add(0, self.first, pairs).index_add(0, self.second, pairs)
