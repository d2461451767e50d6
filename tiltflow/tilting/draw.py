r"""Samples of a fine-tuned process: by the chain it was trained on, by the ODE, or by any noise schedule and step count.

The theorem (Domingo-Enrich et al. 2025, arXiv:2409.08861): the memoryless optimum is the velocity whose own generative
family, ODE and SDE of any σ(t), has the tilted marginals. With χ ≠ 0 only the training schedule ends at the tilt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tiltflow.core.chain import InterpolantChain, euler_maruyama, memoryless_chain, residual_variance, uniform_grid
from tiltflow.core.control import Control
from tiltflow.core.errors import TiltflowError
from tiltflow.core.noise import Constant, Memoryless
from tiltflow.core.ode import ode
from tiltflow.core.process import Process
from tiltflow.core.simulate import Samples, sample
from tiltflow.tilting.chain import ends_noiselessly
from tiltflow.tilting.settings import FinetuneSettings

CHAIN, ODE, MEMORYLESS = "chain", "ode", "memoryless"
"""Names of noise; others are numbers, constant σ."""
VARIANCE_ROWS = 512


def draw_paths(
    chain: InterpolantChain,
    control: Control | None,
    n: int,
    generator: torch.Generator,
    tell: Callable[[int], None] = lambda done: None,
    batch: int = 1000,
    **condition: Any,
) -> Samples:
    """n samples in batches, with their path log-ratios; ``condition`` holds one row for all samples, or n."""
    parts = []
    for start in range(0, n, batch):
        size = min(batch, n - start)
        rows = {
            name: v.expand(size, *v.shape[1:]) if len(v) == 1 else v[start : start + size] for name, v in condition.items()
        }
        parts.append(sample(chain, control, chain.source(size, generator), generator, **rows))
        tell(start + size)
    kernel = [p.log_kernel_ratio for p in parts if p.log_kernel_ratio is not None]
    merged = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("x", "log_ratio", "kl", "running")}
    return Samples(**merged, log_kernel_ratio=torch.cat(kernel) if kernel else None)


@torch.no_grad()
def draw_process(
    process: Process,
    n: int,
    noise: str,
    steps: int,
    method: str,
    generator: torch.Generator,
    trained: FinetuneSettings,
    **condition: Any,
) -> Tensor:
    """n samples (n, *event) of a process.

    Args:
        process: Base or fine-tuned.
        n: Rows; condition rows (n, …) are passed on.
        noise: "ode"; "memoryless" (the moment-matched chain); or a constant σ ≥ 0 as text (Euler–Maruyama).
        steps: Uniform steps.
        method: Of the ODE.
        generator: Of the draws.
        trained: How it was trained: with χ ≠ 0 or constant noise only that schedule is right.

    Raises:
        TiltflowError: an unknown schedule, or one that it was not trained for.
    """
    if trained.chi != 0.0 and noise != MEMORYLESS:
        raise TiltflowError(
            f"this model was fine-tuned with chi = {trained.chi:g}: only its own memoryless schedule ends at the tilt. Use "
            "noise 'memoryless', or fine-tune with chi = 0 to sample with any schedule."
        )
    if trained.sigma is not None and noise != str(trained.sigma):
        raise TiltflowError(
            f"this model was fine-tuned with constant noise {trained.sigma:g}, which is biased: sample it with noise "
            f"{trained.sigma}."
        )
    x0 = process.source(n, generator, torch.get_default_dtype(), generator.device)
    if noise == ODE:
        return ode(process, x0, steps, method, **condition)
    return sample(_chain(process, x0, noise, steps, generator, trained, condition), None, x0, generator, **condition).x


def _chain(
    process: Process,
    x0: Tensor,
    noise: str,
    steps: int,
    generator: torch.Generator,
    trained: FinetuneSettings,
    condition: dict[str, Any],
) -> InterpolantChain:
    t = uniform_grid(steps)
    if noise == MEMORYLESS and trained.chi != 0.0:
        return euler_maruyama(process, t, Memoryless(process.interpolant, offset=1 / steps, chi=trained.chi))
    if noise == MEMORYLESS:
        rows = {name: v[:VARIANCE_ROWS] for name, v in condition.items()}
        x1 = ode(process, x0[:VARIANCE_ROWS], steps, "heun", **rows)
        v = residual_variance(process, t, x1, generator, **rows)
        return memoryless_chain(process, t, v, ends_noiselessly(process, trained))
    try:
        sigma = float(noise)
    except ValueError as error:
        raise TiltflowError(f"unknown noise {noise!r}: use chain, ode, memoryless or a number such as 0.5.") from error
    if not 0 <= sigma < float("inf"):
        raise TiltflowError(f"the noise must be finite and at least 0, got {noise}.")
    return euler_maruyama(process, t, Constant(sigma))
