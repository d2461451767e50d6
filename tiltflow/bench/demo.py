"""The picture of the Adjoint Matching paper: constant noise remembers X_0 and biases the tilt, memoryless noise does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tiltflow.bench.tilt import METHOD, TiltSettings, chain_of, mode_weights, train
from tiltflow.core.chain import InterpolantChain, euler_maruyama, uniform_grid
from tiltflow.core.control import FineTuned
from tiltflow.core.noise import Constant, Memoryless, NoiseSchedule, memoryless_residual
from tiltflow.core.simulate import sample
from tiltflow.metrics.distance import mean_w2, total_variation
from tiltflow.problems.tilt import mixture2d
from tiltflow.report import plots
from tiltflow.run.folder import RunFolder, document
from tiltflow.train.store import write_bytes

STEPS, SAMPLES, SHOWN = 60, 20_000, 1_500
PICTURE = "memoryless.png"


def memoryless_demo(
    out: Path,
    seed: int,
    rounds: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    overwrite: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Fine-tune `mixture2d` with three noise schedules; the document that metrics.json holds, beside memoryless.png."""
    config = {"command": "demo memoryless", "seed": seed, "rounds": rounds}
    with RunFolder(out, config, overwrite=overwrite, writes=(PICTURE,)) as folder:
        problem = mixture2d()
        schedules: dict[str, NoiseSchedule] = {
            "σ = 0.2": Constant(0.2),
            "σ = 1": Constant(1.0),
            "memoryless": Memoryless(problem.interpolant),
        }
        generator = torch.Generator().manual_seed(seed)
        truth = problem.target.sample(SAMPLES, generator)
        floor = mean_w2(truth, problem.target.sample(SAMPLES, generator), 1_000, 5, generator)
        panels = {"base": problem.base.sample(SHOWN, generator), "exact tilt": truth[:SHOWN]}
        rows: list[dict[str, Any]] = []
        for name, schedule in schedules.items():
            chain: InterpolantChain
            if name == "memoryless":
                chain = chain_of(problem, STEPS, generator)
            else:
                chain = euler_maruyama(problem.process(), uniform_grid(STEPS), schedule)

            def advance(row: dict[str, Any], name: str = name) -> None:
                progress(name, row["iteration"] + 1, rounds)

            settings = TiltSettings(steps=STEPS, budget=rounds)
            method = METHOD if chain.memoryless else "adjoint_matching"  # no end-point rows elsewhere
            control = FineTuned(train(problem, seed, settings, advance, chain, method))
            x = sample(chain, control, chain.source(SAMPLES, generator), generator).x
            panels[name] = x[:SHOWN]
            rows.append(
                {
                    "noise": name,
                    "residual_correlation": memoryless_residual(problem.interpolant, schedule),
                    "mode_tv": total_variation(mode_weights(problem, x), problem.target.weights),
                    "w2": mean_w2(x, truth, 1_000, 5, generator),
                    "w2_floor": floor,
                }
            )
        result = document(command, seed, "cpu", rows, None)
        folder.write_json("metrics.json", result)
        write_bytes(folder.path / PICTURE, plots.panels2d(panels))
    return result
