r"""The probability-flow ODE dx/dt = v(x, t), from t = 0 to 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiltflow.core.chain import uniform_grid
from tiltflow.core.errors import TiltflowError
from tiltflow.core.process import Process


@torch.no_grad()
def ode(
    process: Process,
    x0: Tensor,
    steps: int | Tensor = 40,
    method: str = "euler",
    tolerance: float = 1e-5,
    **condition: Any,
) -> Tensor:
    """Solve dx/dt = v(x, t) from t = 0 to 1.

    Args:
        process: base or fine-tuned; x0: (B, *event) source samples.
        steps: number of uniform steps, or a (K+1,) grid.
        method: "euler", "heun" (the last step is Euler's: some velocities are 0/0 at t = 1), or the name of an adaptive
            solver of torchdiffeq such as "dopri5" (stops at t = 1 − 1e-4 and finishes with one Euler step).
        tolerance: absolute and relative tolerance of the adaptive solvers.

    Raises:
        TiltflowError: unknown method, or torchdiffeq is missing.
    """
    t = uniform_grid(steps) if isinstance(steps, int) else steps

    def velocity(time: Tensor, x: Tensor, inside: bool = False) -> Tensor:
        field = process.velocity_inside if inside else process.velocity
        return field(x, time.to(x.dtype).expand(len(x)), **condition)

    if method not in ("euler", "heun"):
        x0 = _adaptive(velocity, x0, method, tolerance)
        t = torch.tensor([1 - 1e-4, 1.0], dtype=torch.float64)
        method = "euler"
    path, x, t = process.interpolant, x0, t.cpu()
    inside, widths, node = ((path.alpha(t) > 0) & (path.beta(t) > 0)).tolist(), t.diff().tolist(), t.to(x0)
    for k, h in enumerate(widths):
        v = velocity(node[k], x, inside[k])
        if method == "heun" and k < len(widths) - 1:
            v = 0.5 * (v + velocity(node[k + 1], x + h * v, inside[k + 1]))
        x = x + h * v
    return x


def _adaptive(velocity: Any, x0: Tensor, method: str, tolerance: float) -> Tensor:
    try:
        from torchdiffeq import odeint
        from torchdiffeq._impl.odeint import SOLVERS
    except ImportError as error:
        raise TiltflowError(
            f"method {method!r} needs torchdiffeq: pip install 'tiltflow[ode]' (or use 'euler' or 'heun')."
        ) from error
    if method not in SOLVERS:
        raise TiltflowError(f"unknown ODE method {method!r}: use 'euler', 'heun' or one of {sorted(SOLVERS)}.")
    span = torch.tensor([0.0, 1 - 1e-4], dtype=x0.dtype, device=x0.device)
    return odeint(velocity, x0, span, method=method, rtol=tolerance, atol=tolerance)[-1]
