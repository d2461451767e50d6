r"""Sampling a finished run: fine-tuned with σ² = 2η and χ = 0, it may be drawn with any schedule and step count.

The theorem (Domingo-Enrich et al. 2025, arXiv:2409.08861): the memoryless optimum is the velocity whose own generative
family, ODE and SDE of any σ(t), has the tilted marginals. With χ ≠ 0 only the training schedule ends at the tilt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tiltflow.core.chain import euler_maruyama, memoryless_chain, residual_variance, uniform_grid
from tiltflow.core.errors import TiltflowError
from tiltflow.core.noise import Constant, Memoryless
from tiltflow.core.ode import ode
from tiltflow.core.process import Process
from tiltflow.core.simulate import sample
from tiltflow.tilting.job import UNSEEN, load_tuned


def draw_process(
    process: Process,
    n: int,
    noise: str,
    steps: int,
    method: str,
    generator: torch.Generator,
    chi: float = 0.0,
    **condition: Any,
) -> Tensor:
    """n samples (n, *event) of a process.

    Args:
        process: base or fine-tuned; n: rows; condition rows (n, …) are passed on.
        noise: "ode"; "memoryless" (the moment-matched chain); or a constant σ ≥ 0 as text (Euler–Maruyama).
        steps: uniform steps; method: of the ODE.
        chi: χ of the training schedule.

    Raises:
        TiltflowError: an unknown schedule, or any but "memoryless" for χ ≠ 0.
    """
    if chi != 0.0 and noise != "memoryless":
        raise TiltflowError(
            f"this run was fine-tuned with chi = {chi:g}: only its own memoryless schedule ends at the tilt. Use noise "
            "'memoryless', or fine-tune with chi = 0 to sample with any schedule."
        )
    x0 = process.source(n, generator, torch.get_default_dtype(), generator.device)
    if noise == "ode":
        return ode(process, x0, steps, method, **condition)
    t = uniform_grid(steps)
    if noise == "memoryless" and chi != 0.0:
        chain = euler_maruyama(process, t, Memoryless(process.interpolant, offset=1 / steps, chi=chi))
    elif noise == "memoryless":
        rows = {name: v[:512] for name, v in condition.items()}
        x1 = ode(process, x0[:512], steps, "heun", **rows)
        v = residual_variance(process, t, x1, generator, **rows)
        chain = memoryless_chain(process, t, v, noiseless_last=len(process.event_shape) > 1)
    else:
        try:
            sigma = float(noise)
        except ValueError as error:
            raise TiltflowError(f"unknown noise {noise!r}: use ode, memoryless or a number such as 0.5.") from error
        if not 0 <= sigma < float("inf"):
            raise TiltflowError(f"the noise must be finite and at least 0, got {noise}.")
        chain = euler_maruyama(process, t, Constant(sigma))
    return sample(chain, None, x0, generator, **condition).x


def draw_from_run(
    run: Path, out: Path, n: int, noise: str, steps: int, method: str, seed: int, device: str
) -> dict[str, Any]:
    """Draw n samples of a run folder into a safetensors file ("samples"); returns a row about them.

    Raises:
        TiltflowError: not a run folder, the file exists, or a schedule the run does not allow.
    """
    if out.exists():
        raise TiltflowError(f"{out} exists; give another file with --out.")
    config, process = load_tuned(run, device)
    if config.settings.sigma is not None and noise != str(config.settings.sigma):
        raise TiltflowError(
            f"this run was fine-tuned with constant noise {config.settings.sigma:g}, which is biased: it may be sampled "
            f"with --noise {config.settings.sigma} only."
        )
    generator = torch.Generator(device).manual_seed(seed)
    spec = config.load_reward()
    condition: dict[str, Any] = {}
    if spec.unseen is not None:
        condition = {k: v[torch.arange(n) % UNSEEN].to(device) for k, v in spec.unseen(UNSEEN, generator)[0].items()}
    x = draw_process(process, n, noise, steps, method, generator, config.settings.chi, **condition)
    save_file({"samples": x.cpu().contiguous(), **{k: v.cpu().contiguous() for k, v in condition.items()}}, out)
    reward = float(spec.reward(x, **condition).detach().mean())
    return {"run": str(run), "out": str(out), "shape": list(x.shape), "noise": noise, "steps": steps, "reward": reward}
