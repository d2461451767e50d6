r"""Control problems with a known answer, behind one interface: chain(steps), cost, control(x, t), value(x, t).

* :func:`linear_quadratic`: the Riccati solution of :class:`tiltflow.problems.tilt.LinearQuadratic`.
* :func:`double_well`: dX = (−∇Ψ + u) dt + dB, Ψ = Σ κ_i (x_i² − 1)², g = Σ ν_i (x_i² − 1)². It separates: V = Σ V_i(x_i, t),
  and e^{−V_i} = φ solves the linear equation ∂_t φ + ½φ'' − Ψ_i' φ' = 0, φ(·, 1) = e^{−g_i}, on a line.

Problems of Nüsken & Richter 2021, arXiv:2005.05409 with the settings of Domingo-Enrich et al. 2024, arXiv:2312.02027, except
that linear-quadratic paths start at random, not at one drawn point.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiltflow.core.chain import Chain, DriftChain, Index, at, uniform_grid
from tiltflow.core.control import Control
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.noise import Constant
from tiltflow.core.simulate import event_sum, walk
from tiltflow.problems.tilt import LinearQuadratic

Exact = Callable[[Tensor, float], Tensor]


class ControlProblem(Protocol):
    """A diffusion with known V(x, t) (B,) and u*(x, t) (B, d): its cost g and f, and its Euler–Maruyama chain."""

    @property
    def cost(self) -> RewardCost: ...
    def chain(self, steps: int) -> DriftChain: ...
    def control(self, x: Tensor, t: float) -> Tensor: ...
    def value(self, x: Tensor, t: float) -> Tensor: ...


@dataclass(frozen=True)
class LinearQuadraticProblem:
    """A :class:`LinearQuadratic` with its starts, N(0, start_std² I)."""

    exact: LinearQuadratic
    start_std: float

    @property
    def cost(self) -> RewardCost:
        """g = xᵀQx, f = xᵀPx."""
        p, q = self.exact.state_cost, self.exact.terminal
        return RewardCost(lambda x: -((x @ q.to(x)) * x).sum(1), running=lambda x, t: ((x @ p.to(x)) * x).sum(1))

    def chain(self, steps: int) -> DriftChain:
        """Drift Ax, noise σ, on [0, T]."""
        a, std = self.exact.drift, self.start_std
        return DriftChain.build(
            lambda x, t: x @ a.to(x).T,
            lambda n, generator: std * torch.randn(n, len(a), generator=generator, device=generator.device),
            self.exact.horizon * uniform_grid(steps),
            Constant(self.exact.sigma),
        )

    def control(self, x: Tensor, t: float) -> Tensor:
        """u*(x, t) = −2σF_t x."""
        return self.exact.control(x, t)

    def value(self, x: Tensor, t: float) -> Tensor:
        """V(x, t) = xᵀF_t x + c_t."""
        return self.exact.value(x, t)


def linear_quadratic(dim: int = 20, hard: bool = False) -> LinearQuadraticProblem:
    """A = .2 I, P = .2 I, Q = .1 I; hard: A = I, P = I, Q = .5 I; σ = 1, starts N(0, .25 I)."""
    a, p, q = (1.0, 1.0, 0.5) if hard else (0.2, 0.2, 0.1)
    eye = torch.eye(dim, dtype=torch.float64)
    return LinearQuadraticProblem(LinearQuadratic(a * eye, p * eye, q * eye, sigma=1.0), 0.5)


class GridValue(NamedTuple):
    """V and its slope ∂V/∂x (M+1, N) on the points x (N,) and M+1 times on [0, 1], both uniform."""

    x: Tensor
    value: Tensor
    slope: Tensor

    def at(self, table: Tensor, x: Tensor, t: float) -> Tensor:
        """Bilinear interpolation of a table at points x (B,) and t in [0, 1]; linear beyond the grid in x."""
        time = t * (len(table) - 1)
        row = min(int(time), len(table) - 2)
        values = torch.lerp(table[row], table[row + 1], time - row)
        place = (x.double().cpu() - self.x[0]) / (self.x[1] - self.x[0])
        i = place.floor().long().clamp(0, len(self.x) - 2)
        return torch.lerp(values[i], values[i + 1], place - i).to(x)


def solve_backward(
    potential: Callable[[Tensor], Tensor],
    terminal: Callable[[Tensor], Tensor],
    bound: float = 2.5,
    points: int = 2501,
    steps: int = 1000,
) -> GridValue:
    r"""V = −log E[e^{−g(X_1)} | X_t = x] on a line for dX = −Ψ'(X) dt + dB, by Crank–Nicolson (SciPy's banded solver).

    The generator ½e^{2Ψ}(e^{−2Ψ}φ')' is discretised as a jump process with rates e^{2Ψ_i − 2Ψ_{i±½}}/2Δx², reflected at
    ±bound, so that a constant stays one.

    Raises:
        TiltflowError: SciPy is missing.
    """
    try:
        from scipy.linalg import solve_banded
    except ImportError as error:
        raise TiltflowError("the double well's exact control needs SciPy: pip install 'tiltflow[report]'.") from error
    x = torch.linspace(-bound, bound, points, dtype=torch.float64)
    dx = float(x[1] - x[0])
    psi, middle = potential(x), potential(0.5 * (x[1:] + x[:-1]))
    up, down = ((2 * (p - middle)).exp() / (2 * dx**2) for p in (psi[:-1], psi[1:]))  # rates i → i+1 and i+1 → i
    half = 0.5 / steps
    bands = torch.zeros(3, points, dtype=torch.float64)
    bands[0, 1:], bands[2, :-1], bands[1] = -half * up, -half * down, 1 + half * (F.pad(up, (0, 1)) + F.pad(down, (1, 0)))
    phi = (-terminal(x)).exp()
    rows = [phi]
    for _ in range(steps):
        rise = phi.diff()
        phi = phi + half * (F.pad(up * rise, (0, 1)) - F.pad(down * rise, (1, 0)))
        phi = torch.from_numpy(solve_banded((1, 1), bands.numpy(), phi.numpy()))
        rows.append(phi)
    value = -torch.stack(rows[::-1]).clamp_min(1e-300).log()
    (slope,) = torch.gradient(value, spacing=dx, dim=1)
    return GridValue(x, value, slope)


def quartic(height: float, x: Tensor) -> Tensor:
    """height · (x² − 1)²."""
    return height * (x**2 - 1) ** 2


@dataclass(frozen=True)
class DoubleWell:
    """Barriers κ (d,) and end costs ν (d,); all paths start at 0.

    Raises:
        TiltflowError: κ and ν are not vectors of one length, or κ is not positive.
    """

    kappa: Tensor
    nu: Tensor

    def __post_init__(self) -> None:
        if self.kappa.ndim != 1 or self.kappa.shape != self.nu.shape or not bool((self.kappa > 0).all()):
            raise TiltflowError(f"kappa (positive) and nu must be vectors of one length; got {self.kappa} and {self.nu}.")

    @property
    def cost(self) -> RewardCost:
        """g = Σ ν_i (x_i² − 1)², f = 0."""
        return RewardCost(lambda x: -(self.nu.to(x) * (x**2 - 1) ** 2).sum(1))

    def chain(self, steps: int) -> DriftChain:
        """Drift −4κ_i x_i (x_i² − 1), unit noise; more than about 10 max κ steps, or the chain is unstable."""

        return DriftChain.build(
            lambda x, t: -4 * self.kappa.to(x) * x * (x**2 - 1),
            lambda n, generator: torch.zeros(n, len(self.kappa), device=generator.device),
            uniform_grid(steps),
            Constant(1.0),
        )

    @cached_property
    def _tables(self) -> list[GridValue]:
        pairs = list(zip(self.kappa.tolist(), self.nu.tolist(), strict=True))
        solved = {(k, n): solve_backward(partial(quartic, k), partial(quartic, n)) for k, n in set(pairs)}
        return [solved[pair] for pair in pairs]

    def control(self, x: Tensor, t: float) -> Tensor:
        """u*_i = −∂V_i/∂x_i."""
        return torch.stack([-g.at(g.slope, x[:, i], t) for i, g in enumerate(self._tables)], 1)

    def value(self, x: Tensor, t: float) -> Tensor:
        """Σ V_i(x_i, t)."""
        return torch.stack([g.at(g.value, x[:, i], t) for i, g in enumerate(self._tables)], 1).sum(1)


def double_well(dim: int = 10) -> DoubleWell:
    """κ = 5, ν = 3 in the first three dimensions, 1 in the others."""
    first = torch.arange(dim) < 3
    return DoubleWell(torch.where(first, 5.0, 1.0).double(), torch.where(first, 3.0, 1.0).double())


@dataclass(frozen=True)
class ExactControl:
    """A known u*(x, t) as a :class:`Control` without weights: mean_u = mean_base + s_k √h u*(x, t_k)."""

    exact: Exact
    module: nn.Module = field(default_factory=nn.Module)

    def scaled(self, chain: Chain, k: Index, x: Tensor) -> Tensor:
        """u_k = √h u*(x, t_k)."""
        if isinstance(k, Tensor):
            parts = [(k == j, self.scaled(chain, int(j), x[k == j])) for j in k.unique()]
            return sum((torch.zeros_like(x).masked_scatter(m[:, None], u) for m, u in parts), torch.zeros_like(x))
        return math.sqrt(float(chain.t[k + 1] - chain.t[k])) * self.exact(x, float(chain.t[k]))

    def mean(self, chain: Any, k: Index, x: Tensor, base_mean: Tensor | None = None, **condition: Any) -> Tensor:
        """mean_base + s_k u_k."""
        base = chain.base_mean(k, x, **condition) if base_mean is None else base_mean
        return base + at(chain.std, k, x) * self.scaled(chain, k, x)

    def ratios(self, chain: Any) -> Tensor | None:
        """The base\'s step variance."""
        return None


class ControlError(NamedTuple):
    """Squared control errors with standard errors, both in units of E_{P*}∫‖u*‖²: on optimal and on own paths."""

    optimal: float
    optimal_error: float
    own: float
    own_error: float


@torch.no_grad()
def control_error(chain: Chain, control: Control | None, exact: Exact, n: int, generator: torch.Generator) -> ControlError:
    """E∫‖u − u*‖² dt on paths of P* (simulated with ``exact``) and on the control's own, relative to E_{P*}∫‖u*‖² dt.

    chain: on which both act, noisy at every step; control: None is u = 0, with error 1 on optimal paths; exact: u*(x, t);
    n: paths of each kind. The two differ where own paths never visit what the control has wrong.
    """
    target = ExactControl(exact)

    def errors(policy: Control | None) -> tuple[Tensor, Tensor]:
        x0 = chain.source(n, generator)
        wrong, size = x0.new_zeros(n), x0.new_zeros(n)
        for s in walk(chain, policy, x0, generator):
            std, u = at(chain.std, s.k, s.x), target.scaled(chain, s.k, s.x)
            base = chain.base_mean(s.k, s.x)
            mean = base if control is None else control.mean(chain, s.k, s.x, base_mean=base)
            wrong = wrong + event_sum(((mean - base) / std - u) ** 2)
            size = size + event_sum(u**2)
        return wrong.double(), size.double()

    optimal, size = errors(target)
    own, _ = errors(control)
    scale = float(size.mean())
    here, there, unit = float(optimal.mean()) / scale, float(own.mean()) / scale, scale * math.sqrt(n)
    here_error = float((optimal - here * size).std()) / unit  # of a ratio of means over the same paths
    return ControlError(here, here_error, there, math.hypot(float(own.std()), there * float(size.std())) / unit)
