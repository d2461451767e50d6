r"""Stored reference samples, and the identity that says which energy they belong to.

For x ~ e^{−E} / Z in d dimensions, integration by parts gives the virial identity

    E[x·∇E(x)] = d,

d = m(N − 1) for particles with their centre of mass at zero. It needs no log Z, costs one gradient per sample, and rejects
a wrong temperature, a pair counted twice, or a chain that is not in equilibrium.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError
from tiltflow.energies.evaluator import Energy, Evaluator

SHIPPED = {"dw4": (4, 2), "lj13": (13, 3), "lj55": (55, 3)}


class Virial(NamedTuple):
    """Mean of x·∇E over the samples, and its standard error."""

    mean: float
    standard_error: float


def load_reference(name: str) -> Tensor:
    """Reference samples (N, *event) of "dw4", "lj13" or "lj55", float32, centre of mass at zero (see REFERENCES.md).

    Raises:
        TiltflowError: no such name; a file that is missing or of another shape.
    """
    if name not in SHIPPED:
        raise TiltflowError(f"no reference samples are called {name!r}; there are {', '.join(SHIPPED)}.")
    path = Path(str(files("tiltflow.energies") / "assets" / f"{name}_reference.safetensors"))
    if not path.is_file():
        raise TiltflowError(f"the reference samples of {name} are missing ({path.name}): reinstall tiltflow.")
    samples = load_file(path).get("samples")
    if samples is None or samples.shape[1:] != SHIPPED[name]:
        raise TiltflowError(f"{path} must hold one tensor `samples` of shape (N, {', '.join(map(str, SHIPPED[name]))}).")
    return samples


def virial(energy: Energy, samples: Tensor) -> Virial:
    """Mean and standard error of x·∇E over ``samples`` (N, *event): N ≥ 2 independent draws, centred if particles are.

    Raises:
        TiltflowError: fewer than two samples; samples at which the energy is not finite.
    """
    if len(samples) < 2:
        raise TiltflowError(f"a mean with its error needs at least 2 samples, got {len(samples)}.")
    evaluator = Evaluator(energy, batch=1000)
    x = samples.double() if samples.device.type == "cpu" else samples
    _, grad = evaluator.value_and_grad(x)
    if evaluator.rejected:
        raise TiltflowError(
            f"the energy or its gradient is not finite at {evaluator.rejected} of {len(x)} samples: they cannot be "
            "samples of it."
        )
    terms = double(x * grad).flatten(1).sum(1)
    return Virial(float(terms.mean()), float(terms.std()) / len(x) ** 0.5)
