"""New samples of a finished run, in a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiltflow.core.errors import TiltflowError
from tiltflow.run.open import open_run
from tiltflow.train.store import write_tensors

SAMPLE_SEED = 20_000
"""Added to the seed: the samples that a run was judged on are others."""


def draw_from_run(
    run: Path,
    out: Path,
    n: int,
    asked: dict[str, Any],
    seed: int = 0,
    device: str = "cpu",
    trust: bool = False,
    named: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Draw n new samples of a run folder into a safetensors file; returns a row about them.

    Args:
        run: The run folder.
        out: The file to write.
        n: How many samples.
        asked: How to draw them, as the model's ``sample`` takes it.
        seed: Of the draws.
        device: Where to draw.
        trust: Whether code that the run's config names may be imported.
        named: Code by its name in place of what the config names: base, reward, conditions, problem.

    Raises:
        TiltflowError: no finished run, or a way of drawing that its model does not have.
    """
    job = open_run(run, trust)
    if not hasattr(job, "draw"):
        raise TiltflowError(f"{run} is a run of {job.name!r}, which is not drawn from here.")
    unknown = [name for name in named or {} if not hasattr(job, name)]
    if unknown:
        raise TiltflowError(f"{run} is a run of {job.name!r}, which has no {unknown[0]}: leave it out.")
    job = replace(job, **named or {})
    tensors, row = job.draw(run, n, asked, SAMPLE_SEED + seed, device)
    write_tensors(out, tensors)
    return {"run": str(run), "out": str(out), "shape": list(next(iter(tensors.values())).shape), **row}
