r"""Discretise first: Gaussian chains x_{k+1} ~ N(mean(k, x_k), s_k² I) on a grid 0 = t_0 < … < t_K = 1.

Everything after this module (simulation, path weights, adjoints, the matching loss) sees a process only as such a chain.
Over an interpolant, the mean of every scheme here is linear in the denoised sample, mean = A_k x + B_k X̂_1(x):

* :func:`memoryless_chain`: the exact posterior step of the noising kernel q(x_s|x_t) = N((α_s/α_t) x_t,
  [β_s² − (α_s/α_t)²β_t²] I), moment matched with the residual variance v_s of X_1 given X_s. With ρ = α_s/α_t:

      A = ρβ_t²/β_s²,  B = α_t(1 − ρ²β_t²/β_s²),  s² = β_t²(β_s² − ρ²β_t²)/β_s² + B² v_s

* :func:`euler_maruyama`: dX = [v + ½σ²∇log p_t] dt + σ dB for any σ(t), in the score form, finite at t = 0:

      A = 1 + h(β̇/β − σ²/2β²),  B = h(W/β + σ²α/2β²),  s² = σ²h
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from tiltflow.core.device import beside, double
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Euclidean, Geometry
from tiltflow.core.noise import NoiseSchedule
from tiltflow.core.process import Process

Index = int | Tensor


def uniform_grid(steps: int) -> Tensor:
    """K + 1 equally spaced times on [0, 1] (float64)."""
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


def power_grid(steps: int, start: float = 1.0, end: float = 1.0) -> Tensor:
    """Times finer near t = 0 for ``start`` > 1 and near t = 1 for ``end`` > 1: t = τ^a / (τ^a + (1−τ)^b), uniform τ."""
    tau = uniform_grid(steps)
    return tau**start / (tau**start + (1 - tau) ** end)


class Chain(Protocol):
    """A base process as a Gaussian chain; ``std`` (K, …) broadcasts against one sample."""

    @property
    def t(self) -> Tensor: ...

    @property
    def std(self) -> Tensor: ...

    @property
    def geometry(self) -> Geometry: ...

    @property
    def controlled(self) -> Tensor:
        """The steps with noise, hence with a control: LongTensor (n,)."""
        ...

    @property
    def memoryless(self) -> bool:
        """Whether the value V(x_0, 0) of the start is the same for all starts."""
        ...

    def base_mean(self, k: Index, x: Tensor, **condition: Any) -> Tensor:
        """E[x_{k+1} | x_k = x] of the base; k an int, or a LongTensor (B,) with one step per sample."""
        ...

    def source(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws of x_0."""
        ...


def noisy_steps(std: Tensor) -> Tensor:
    """The steps of ``std`` (K, …) that have noise in every coordinate, LongTensor (n,)."""
    return torch.tensor([k for k, s in enumerate(std) if bool((s > 0).all())], dtype=torch.long)


def one_start(chain: Chain) -> bool:
    """Whether the chain always starts at the same point, judged by two draws."""
    first, second = chain.source(2, torch.Generator().manual_seed(0))
    return torch.equal(first, second)


def at(values: Tensor, k: Index, x: Tensor) -> Tensor:
    """Entry k of per-step ``values`` (K, …), broadcastable against ``x`` (B, *event); k an int or a LongTensor (B,).

    On an accelerator ``values`` are sent once, so they should be a chain's own tensor, not one made at every step.
    """
    values = beside(values, x)
    if not isinstance(k, Tensor):
        return values[k].to(x)
    v = values[k.to(values.device)].to(x)
    return v.reshape(v.shape + (1,) * (x.ndim - v.ndim))


def times(chain: Chain, k: Index, x: Tensor) -> Tensor:
    """t_k as a (B,) tensor of the dtype of x."""
    grid = beside(chain.t, x)
    t = grid[k.to(grid.device) if isinstance(k, Tensor) else k].to(x)
    return t if isinstance(k, Tensor) else t.expand(x.shape[0])


def cast(chain: Chain, x: Tensor) -> Chain:
    """The chain; over an interpolant, with coefficients in the dtype of ``x``, once for a whole walk; see :func:`at`."""
    if not isinstance(chain, InterpolantChain) or chain.t.device != x.device:
        return chain
    return replace(chain, t=chain.t.to(x), a=chain.a.to(x), b=chain.b.to(x), std=chain.std.to(x))


@dataclass(frozen=True)
class InterpolantChain:
    """mean = A_k x + B_k X̂_1(x) over a base :class:`Process`; coefficients (K,) or (K, *event), float64.

    ``memoryless`` records that the chain's reversal is the data-independent noising kernel, which re-noising and the
    kernel path weights need. A last ``std`` of 0 is a noiseless, uncontrolled last step X̂_1.
    """

    base: Process
    t: Tensor
    a: Tensor
    b: Tensor
    std: Tensor
    memoryless: bool
    geometry: ClassVar[Geometry] = Euclidean()

    @cached_property
    def controlled(self) -> Tensor:
        """The steps with noise, (n,)."""
        return noisy_steps(self.std)

    @cached_property
    def _of_velocity(self) -> tuple[Tensor, Tensor]:
        """(A + Ba, Bb), for X̂_1 = ax + bv: the mean in terms of x and the velocity."""
        a, b = (c.reshape(-1, *(1,) * (self.a.ndim - 1)) for c in self.base.interpolant.from_velocity(self.t[:-1]))
        return self.a + self.b * a, self.b * b

    @cached_property
    def _inside(self) -> list[bool]:
        """Whether α > 0 at the start of each step."""
        return (self.base.interpolant.alpha(self.t[:-1]) > 0).tolist()

    def mean(self, k: Index, x: Tensor, x1: Tensor) -> Tensor:
        """A_k x + B_k x1."""
        return torch.addcmul(at(self.a, k, x) * x, at(self.b, k, x), x1)

    def mean_of(self, process: Process, k: Index, x: Tensor, **condition: Any) -> Tensor:
        """A_k x + B_k X̂_1(x) of the base, or of a process along the base's interpolant."""
        t = times(self, k, x)
        if process.predicts != "velocity":
            inside = all(self._inside) if isinstance(k, Tensor) else self._inside[k]
            return self.mean(k, x, (process.x1_inside if inside else process.x1)(x, t, **condition))
        a, b = (at(c, k, x) for c in self._of_velocity)
        return torch.addcmul(a * x, b, process.velocity(x, t, **condition))

    def base_mean(self, k: Index, x: Tensor, **condition: Any) -> Tensor:
        """E[x_{k+1} | x_k = x] of the base."""
        return self.mean_of(self.base, k, x, **condition)

    def source(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws of x_0 in the default dtype of torch."""
        return self.base.source(n, generator, dtype=torch.get_default_dtype(), device=generator.device)

    @cached_property
    def noising_kernel(self) -> tuple[Tensor, Tensor]:
        """ρ and the standard deviation, each (K,), of q(x_k | x_{k+1}) = N(ρ_k x_{k+1}, std_k² I).

        Raises:
            TiltflowError: the chain is not memoryless.
        """
        if not self.memoryless:
            raise TiltflowError(
                "the noising kernel is independent of the data only for a memoryless chain with chi = 0; "
                "build the chain with memoryless_chain(...)."
            )
        alpha, beta2 = self.base.interpolant.alpha(self.t), self.base.interpolant.beta(self.t) ** 2
        rho = alpha[:-1] / alpha[1:]
        return rho, (beta2[:-1] - rho**2 * beta2[1:]).clamp_min(0).sqrt()


def check_grid(t: Tensor) -> Tensor:
    """The grid in float64, or a TiltflowError if it does not rise from 0 to 1."""
    t = torch.as_tensor(t, dtype=torch.float64)
    if t.ndim != 1 or len(t) < 2 or t[0] != 0 or t[-1] != 1 or not bool((t.diff() > 0).all()):
        raise TiltflowError(f"a time grid must rise strictly from 0 to 1; got {t.tolist()[:5]}… ({len(t)} entries).")
    return t


def posterior_step(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and the variance, each (K,), of a step of the posterior, x_{k+1} | x_k, X_1 ~ N(A x_k + B X_1, variance I).

    From α and β at the nodes, (K+1,).
    """
    rho, beta2 = alpha[:-1] / alpha[1:], beta**2
    shrink = torch.where(beta2[:-1] > 0, beta2[1:] / beta2[:-1].clamp_min(1e-300), 0.0)  # β_t²/β_s²; x_0 = 0 if β_0 = 0
    return rho * shrink, alpha[1:] * (1 - rho**2 * shrink), beta2[1:] * (1 - rho**2 * shrink)


def memoryless_chain(
    base: Process, t: Tensor, residual_variance: Tensor, noiseless_last: bool = False
) -> InterpolantChain:
    """The moment-matched memoryless chain (χ = 0) on the grid ``t``.

    Args:
        base: process with an interpolant.
        t: (K+1,) grid from 0 to 1.
        residual_variance: v_s at t_0 … t_{K−1}: (K,), or (K, *event) per coordinate; see :func:`residual_variance`.
        noiseless_last: return X̂_1 itself at the end. That step is then the base's (no control, no weight).

    Raises:
        TiltflowError: a grid that does not rise from 0 to 1, or v_s of another shape or not positive.
    """
    t = check_grid(t)
    v = torch.as_tensor(residual_variance, dtype=torch.float64)
    if v.shape not in {(len(t) - 1,), (len(t) - 1, *base.event_shape)} or not bool((v > 0).all()):
        raise TiltflowError(
            f"residual_variance must be positive, of shape ({len(t) - 1},) or ({len(t) - 1}, *event_shape); "
            f"got shape {tuple(v.shape)}, minimum {float(v.min()):.3g}."
        )
    pad = (1,) * (v.ndim - 1)
    a, b, bridge = (c.reshape(-1, *pad) for c in posterior_step(base.interpolant.alpha(t), base.interpolant.beta(t)))
    std = (bridge + b**2 * v).sqrt()
    if noiseless_last:
        std = torch.cat([std[:-1], torch.zeros_like(std[-1:])])
    return InterpolantChain(base, t, a, b, std, memoryless=True)


def euler_maruyama(base: Process, t: Tensor, sigma: NoiseSchedule) -> InterpolantChain:
    """The generative SDE with noise σ(t), one Euler–Maruyama step per grid interval, in the score form."""
    t = check_grid(t)
    path, h = base.interpolant, t.diff()
    # an interpolant whose noise vanishes at t = 0 (Föllmer) has finite limits there
    s = t[:-1].clamp_min(1e-9) if float(path.beta(t[:1])) == 0.0 else t[:-1]
    beta, s2 = path.beta(s), sigma(s) ** 2
    if not bool(torch.isfinite(s2).all()):
        raise TiltflowError(
            "the noise schedule is infinite on this grid (memoryless noise at t = 0): use Memoryless(..., offset=1/K), "
            "or the memoryless chain, which needs no offset."
        )
    a = 1 + h * (path.d_beta(s) / beta - s2 / (2 * beta**2))
    b = h * (path.wronskian(s) / beta + s2 * path.alpha(s) / (2 * beta**2))
    return InterpolantChain(base, t, a, b, (s2 * h).sqrt(), memoryless=False)


@dataclass(frozen=True)
class DriftChain:
    """Euler–Maruyama for dX = b(X, t) dt + σ(t) dB with any drift: control problems that have no interpolant.

    ``drift(x, t, **condition)`` with t (B,); ``initial(n, generator)`` draws x_0.
    """

    drift: Callable[..., Tensor]
    initial: Callable[[int, torch.Generator], Tensor]
    t: Tensor
    std: Tensor
    geometry: ClassVar[Geometry] = Euclidean()

    @classmethod
    def build(
        cls, drift: Callable[..., Tensor], initial: Callable[..., Tensor], t: Tensor, sigma: NoiseSchedule
    ) -> DriftChain:
        """On the grid ``t`` (K+1,), which may start and end anywhere."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return cls(drift, initial, t, sigma(t[:-1]) * t.diff().sqrt())

    @cached_property
    def controlled(self) -> Tensor:
        """The steps with noise, (n,)."""
        return noisy_steps(self.std)

    @cached_property
    def memoryless(self) -> bool:
        """Whether all paths start at one point; nothing more is known of a general drift."""
        return one_start(self)

    @cached_property
    def _h(self) -> Tensor:
        return self.t.diff()

    def base_mean(self, k: Index, x: Tensor, **condition: Any) -> Tensor:
        """x + h b(x, t_k)."""
        return x + at(self._h, k, x) * self.drift(x, times(self, k, x), **condition)

    def source(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws of x_0."""
        return self.initial(n, generator)


@torch.no_grad()
def residual_variance(
    base: Process,
    t: Tensor,
    x1: Tensor,
    generator: torch.Generator,
    per_coordinate: bool = False,
    batch: int = 1000,
    tell: Callable[[int], None] = lambda done: None,
    **condition: Any,
) -> Tensor:
    """v_s = E[(X_1 − X̂_1(X_s))²], averaged over coordinates or for each, at t_0 … t_{K−1}.

    Args:
        base: the process; t: (K+1,) grid; x1: (N, *event) end samples of the base (or its data); generator: noise.
        per_coordinate: (K, *event) instead of (K,).
        batch: rows per network call; conditions have N rows and are cut alongside.
        tell: told how many times are done.

    On the linear path this is (1−s)² E‖X_1 − X_0 − v‖²/d.
    """
    out = []
    for s in torch.as_tensor(t, dtype=torch.float64)[:-1]:
        alpha, beta = float(base.interpolant.alpha(s)), float(base.interpolant.beta(s))
        total = torch.zeros(base.event_shape, dtype=torch.float64)
        for i in range(0, len(x1), batch):
            x = x1[i : i + batch]
            rows = {name: value[i : i + batch] for name, value in condition.items()}
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            error = x - base.x1(alpha * x + beta * noise, s.to(x).expand(len(x)), **rows)
            total += double(error).square().sum(0)
        out.append(total / len(x1))
        tell(len(out))
    v = torch.stack(out).clamp_min(1e-12)
    return v if per_coordinate else v.reshape(len(v), -1).mean(1)
