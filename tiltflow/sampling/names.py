"""Energies by name: shipped problems and ``module:function``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Centred, Euclidean, Geometry, Torus
from tiltflow.energies import ENERGY_PROBLEMS, EnergyProblem, ForceProvider
from tiltflow.energies.evaluator import differentiable
from tiltflow.run.names import import_function

SPACES: dict[str, Callable[[], Geometry]] = {"vectors": Euclidean, "particles": Centred, "torus": Torus}


def load_problem(
    name: str,
    shape: tuple[int, ...] | None = None,
    space: str = "vectors",
    scale: float | None = None,
    finest: float | None = None,
) -> EnergyProblem:
    """An energy to sample from, by name.

    Args:
        name: a key of ``ENERGY_PROBLEMS``; or ``module:function`` that is or returns an :class:`EnergyProblem`, or that is
            or returns an energy in kT: a callable (B, *event) → (B,), or a ForceProvider. What takes no argument is called.
        shape: Of a plain energy: the shape of one x.
        space: Of a plain energy: a key of :data:`SPACES`.
        scale: See :class:`EnergyProblem`; of a whole problem it replaces the problem's own.
        finest: The same.

    Raises:
        TiltflowError: an unknown name, a plain energy without shape, scale and finest, or a shape for a whole problem.
    """
    if name in ENERGY_PROBLEMS:
        made: Any = ENERGY_PROBLEMS[name]()
    elif ":" not in name:
        raise TiltflowError(f"unknown problem {name!r}: use one of {', '.join(ENERGY_PROBLEMS)}, or module:function.")
    else:
        made = import_function(name)
        made = made() if _takes_nothing(made) else made
    if isinstance(made, EnergyProblem):
        if shape is not None or space != "vectors":
            raise TiltflowError(f"{name!r} says itself what it lives on: leave out --shape, --particles and --torus.")
        lengths: dict[str, Any] = {k: v for k, v in (("scale", scale), ("finest", finest)) if v is not None}
        return replace(made, energy=_differentiable(made.energy), **lengths)
    given = {"--shape": shape, "--scale": scale, "--finest": finest}
    missing = [option for option, value in given.items() if value is None]
    if missing:
        raise TiltflowError(
            f"{name!r} gives a {type(made).__name__}, not a tiltflow.EnergyProblem: give {' and '.join(missing)} as well "
            "(shape of one x, e.g. --shape 2; spread of the target; its finest detail), and --particles or --torus if it is "
            "no plain vector."
        )
    if not callable(made) and not isinstance(made, ForceProvider):
        raise TiltflowError(f"{name!r} is a {type(made).__name__}; an energy maps (B, *event) to (B,).")
    assert shape is not None and scale is not None and finest is not None
    return EnergyProblem(
        name=name, energy=_differentiable(made), event_shape=shape, geometry=SPACES[space](), scale=scale, finest=finest
    )


def _takes_nothing(made: Any) -> bool:
    """Whether it can be called without arguments: a factory, a class."""
    if isinstance(made, (EnergyProblem, nn.Module)) or not callable(made):
        return False
    try:
        inspect.signature(made).bind()
    except TypeError:
        return False
    return True


def _differentiable(energy: Any) -> Callable[[Tensor], Tensor]:
    if callable(energy):
        return energy

    def energy_of_forces(x: Tensor) -> Tensor:
        return differentiable(energy, x)

    return energy_of_forces
