"""Copies and waits per round: ``python benchmarks/device_copies.py --out benchmarks/results/device-copies.json``

A round of training on the pretend device of the tests, which counts copies between host and device, and how often the host
waits for the device. ``copies`` and ``waits`` are those of one round; ``each_step`` is how many of both one more step of the
simulation costs, from runs of two lengths: what a step loop asks of the host. The claim: nothing, but for the rows of
prompts that a pipeline's loss is sent, part by part.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tiltflow.bench.result import publish
from tiltflow.energies import ENERGY_PROBLEMS
from tiltflow.sampling.settings import SamplerSettings
from tiltflow.sampling.train import train_sampler
from tiltflow.tilting.settings import FinetuneSettings
from tiltflow.tilting.train import finetune

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SHORT, LONG, ROUNDS = 4, 8, 2
Watch = Callable[[dict[str, Any]], bool]


def fine_tuning(method: str) -> Callable[[int, Watch], None]:
    """A small network on vectors."""
    import models

    def train(steps: int, watch: Watch) -> None:
        base = models.process()
        base.model.to("pretend")
        settings = FinetuneSettings.of(method, rounds=ROUNDS, batch=16, steps=steps, variance_samples=16)
        finetune(base, models.right, method=method, settings=settings, device="pretend", callback=watch)

    return train


def sampling(method: str) -> Callable[[int, Watch], None]:
    """A sampler of particles."""

    def train(steps: int, watch: Watch) -> None:
        few = {"gradient_steps": 1, "minibatch": 16, "buffer_rounds": 1, "hidden": 8}
        settings = SamplerSettings.of(method, {}, rounds=ROUNDS, batch=16, steps=steps, **few)
        train_sampler(ENERGY_PROBLEMS["dw4"](), method, settings, device="pretend", callback=watch)

    return train


def pipeline(steps: int, watch: Watch) -> None:
    """A tiny Stable Diffusion."""
    import tiny_pipelines as tiny

    from tiltflow.pipelines.settings import PipelineSettings
    from tiltflow.pipelines.train import finetune_pipeline

    def brightness(images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        return images.flatten(1).mean(1)

    settings = PipelineSettings(rounds=ROUNDS, batch=2, steps=steps, rank=2)
    pipe = tiny.build("stable_diffusion").to("pretend")
    finetune_pipeline(pipe, brightness, ["a", "b"], 10.0, settings=settings, callback=lambda row, model: watch(row))


def counted(train: Callable[[int, Watch], None], steps: int) -> tuple[int, int]:
    """Copies and waits of the last round."""
    import pretend

    with pretend.accelerator() as device:

        def watch(row: dict[str, Any]) -> bool:
            if row["iteration"] < ROUNDS - 1:
                device.clear()
            return False

        train(steps, watch)
        return sum(device.copies.values()), sum(device.waits.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Copies and waits per round of training on a pretend device.")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started, rows = time.perf_counter(), []
    jobs = {("finetune", m): fine_tuning(m) for m in ("adjoint_matching", "reinforce", "discrete_adjoint")}
    jobs |= {("train-sampler", m): sampling(m) for m in ("weighted_adjoint_sampling", "pis", "dds")}
    jobs |= {("finetune-pipeline", "adjoint_matching"): pipeline}
    for (job, method), train in jobs.items():
        copies, waits = counted(train, SHORT)
        more = sum(counted(train, LONG)) - copies - waits
        each = more / (LONG - SHORT)
        rows.append({"job": job, "method": method, "copies": copies, "waits": waits, "each_step": each})
    publish(rows, 0, args.out, started)


if __name__ == "__main__":
    main()
