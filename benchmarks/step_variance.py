"""What is the moment-matched step variance worth? ``python benchmarks/step_variance.py --out FILE.json``

A two-mode mixture sampled over a Brownian base with its exact drift, so that only the discretisation is wrong: effective
sample size and ELBO (log Z = 0) of 20,000 paths, with the base's step variance and with the matched one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from tiltflow import Follmer
from tiltflow.bench.result import publish
from tiltflow.core.brownian import BrownianChain, geometric_chain
from tiltflow.core.control import DriftControl, StepVariance
from tiltflow.core.geometry import Euclidean
from tiltflow.core.simulate import sample
from tiltflow.core.weights import evidence
from tiltflow.methods.step_variance import update_step_variance
from tiltflow.problems.tilt import GaussianMixture

SCALE, FINEST, PATHS = 2.0, 0.1, 20_000
TARGET = GaussianMixture.isotropic([0.7, 0.3], [[1.0, 0.5], [-1.0, -0.5]], 0.6)


class Exact(nn.Module):
    """The exact drift as a DriftControl's network: b = (E*[X_1|x] − x)/R_t, times √(R_t + σ_min²)."""

    def __init__(self, chain: BrownianChain) -> None:
        super().__init__()
        self.variance, self.path = chain.end_variance, Follmer(chain.end_variance, SCALE / FINEST)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        left = (self.variance * (1 - self.path.alpha(t)))[:, None]
        return (TARGET.x1(x, t.clamp_min(1e-9), self.path) - x) / left * (left + FINEST**2).sqrt()


def rows(seed: int) -> list[dict[str, float | int | str]]:
    """One row per number of steps and step variance."""
    out: list[dict[str, float | int | str]] = []
    for steps in (5, 10, 20, 40, 80):
        generator = torch.Generator().manual_seed(seed)
        chain = geometric_chain(Euclidean(), (2,), steps, SCALE, FINEST)
        for name in ("base", "matched"):
            net: nn.Module = Exact(chain)
            if name == "matched":
                net = StepVariance(net, steps)
            control = DriftControl(net, FINEST)
            for _ in range(60 if name == "matched" else 0):
                x1 = TARGET.sample(2_000, generator)
                update_step_variance(control, chain, x1, torch.ones(len(x1)), generator)
            drawn = sample(chain, control, chain.source(PATHS, generator), generator)
            log_p1 = chain.geometry.log_normal(drawn.x, chain.end_variance)
            found = evidence(drawn.log_ratio + TARGET.log_prob(drawn.x) - log_p1)
            out.append({"steps": steps, "step_variance": name, "seed": seed, **found._asdict()})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    started = time.perf_counter()
    publish(rows(arguments.seed), arguments.seed, arguments.out, started)


if __name__ == "__main__":
    main()
