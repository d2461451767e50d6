"""New samples of a finished run, in a safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tiltflow.core.errors import TiltflowError
from tiltflow.run.open import open_run

SAMPLE_SEED = 20_000
"""Added to the seed: the samples that a run was judged on are others."""


def draw_from_run(
    run: Path, out: Path, n: int, asked: dict[str, Any], seed: int = 0, device: str = "cpu"
) -> dict[str, Any]:
    """Draw n new samples of a run folder into a safetensors file; returns a row about them.

    Args:
        run: The run folder.
        out: The file to write.
        n: How many samples.
        asked: How to draw them, as the model's ``sample`` takes it.
        seed: Of the draws.
        device: Where to draw.

    Raises:
        TiltflowError: no finished run, or a way of drawing that its model does not have.
    """
    job = open_run(run)
    if not hasattr(job, "draw"):
        raise TiltflowError(f"{run} is a run of {job.name!r}, which is not drawn from here.")
    tensors, row = job.draw(run, n, asked, SAMPLE_SEED + seed, device)
    save_file({name: v.detach().cpu().contiguous() for name, v in tensors.items()}, out)
    return {"run": str(run), "out": str(out), "shape": list(next(iter(tensors.values())).shape), **row}
