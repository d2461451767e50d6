"""Names the command line understands: shipped bases, rewards and energies, weight files and ``module:function``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tiltflow import assets
from tiltflow.cost import Reward
from tiltflow.energies import ENERGY_PROBLEMS, EnergyProblem, ForceProvider
from tiltflow.energies.evaluator import differentiable
from tiltflow.errors import TiltflowError
from tiltflow.geometry import Centred, Euclidean, Geometry, Torus
from tiltflow.interpolant import VP, Cosine, Interpolant, Linear
from tiltflow.methods.adjoint_matching import Conditions
from tiltflow.nn.digits import Labelled, ObservationAdapter
from tiltflow.process import Predicts, Process
from tiltflow.rewards import digits

INTERPOLANTS: dict[str, Callable[[], Interpolant]] = {"linear": Linear, "cosine": Cosine, "vp": VP}


class RewardSpec(NamedTuple):
    """A reward with its held-out judges and, if it is conditional, where its conditions come from.

    ``conditions`` and ``unseen`` draw rows for training and for the evaluation; ``judge_rows`` of the unseen draw hold what
    only the judges may see. ``adapt`` makes the network to train, which sees the condition, from a copy of the base's.
    """

    reward: Reward
    judges: dict[str, Callable[..., Tensor]]
    conditions: Conditions | None = None
    unseen: Callable[[int, torch.Generator], tuple[dict[str, Tensor], dict[str, Tensor]]] | None = None
    adapt: Callable[[nn.Module], nn.Module] | None = None


def import_function(name: str) -> Any:
    """The object called ``module:function`` (the current folder is searched too) or ``path/to/file.py:function``."""
    module_name, _, attribute = name.partition(":")
    try:
        if module_name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(module_name)
    except (ImportError, FileNotFoundError) as error:
        raise TiltflowError(f"cannot import {module_name!r} of {name!r}: {error}.") from error
    if not hasattr(module, attribute):
        raise TiltflowError(f"{module_name!r} has no {attribute!r}; write module:function with a name that it defines.")
    return getattr(module, attribute)


def load_base(
    name: str,
    predicts: Predicts | None = None,
    interpolant: str = "linear",
    shape: tuple[int, ...] | None = None,
    label: int | None = None,
    guidance: float = 1.0,
) -> Process:
    """A base process by name.

    Args:
        name: "digits"; a file that ``tiltflow pretrain`` wrote; or ``module:function`` returning a :class:`Process`, or a
            module / callable (x, t) whose output ``predicts`` names.
        predicts, interpolant, shape: for foreign models only.
        label, guidance: class of a class-conditional digits base, and the scale of classifier-free guidance.

    Raises:
        TiltflowError: unknown name, missing file, or a foreign model without ``predicts`` and ``shape``.
    """
    if name == "digits" or name.endswith(".safetensors"):
        process = assets.load_digits_base() if name == "digits" else assets.load_base(Path(name))
        if label is None:
            return process
        assert isinstance(process.model, nn.Module)
        return Process(process.interpolant, Labelled(process.model, label, guidance), process.predicts, process.event_shape)
    if label is not None:
        raise TiltflowError(f"--label is for the digits bases; {name!r} takes its own conditions.")
    if ":" not in name:
        raise TiltflowError(
            f"unknown base {name!r}: use 'digits', a .safetensors file of `tiltflow pretrain`, or module:function."
        )
    made = import_function(name)
    made = made() if not isinstance(made, (Process, nn.Module)) else made
    if isinstance(made, Process):
        return made
    if predicts is None or shape is None:
        raise TiltflowError(
            f"{name!r} gives a {type(made).__name__}, not a tiltflow.Process: say what it outputs with --predicts "
            "velocity|eps|x1|score and the shape of one sample with --shape, e.g. --shape 1,28,28."
        )
    if interpolant not in INTERPOLANTS:
        raise TiltflowError(f"unknown interpolant {interpolant!r}: use one of {', '.join(INTERPOLANTS)}.")
    return Process(INTERPOLANTS[interpolant](), made, predicts, shape)


def _inpainting() -> RewardSpec:
    def conditions(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"observation": digits.draw_observations(n, generator, "train").observation}

    def unseen(n: int, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        drawn = digits.draw_observations(n, generator, "held_out")
        return {"observation": drawn.observation}, {"label": drawn.label}

    def adapt(net: nn.Module) -> nn.Module:
        size = conditions(1, torch.Generator())["observation"][0].numel()
        return ObservationAdapter(net, (1, 28, 28), size)

    return RewardSpec(
        digits.inpainting_log_likelihood, {"agreement": digits.agreement_judge}, conditions, unseen, adapt
    )


def load_reward(name: str, judge: str | None = None) -> RewardSpec:
    """A reward by name: "thickness", "digit-0" … "digit-9", "inpainting", or ``module:function``.

    ``judge`` is an optional ``module:function`` of held-out scores (x) → (B,).
    """
    judges = {judge: import_function(judge)} if judge else {}
    if name == "thickness":
        return RewardSpec(digits.stroke_thickness, {"thickness": digits.thickness_judge, **judges})
    if name == "inpainting":
        return _inpainting()
    if name.startswith("digit-") and name[6:] in set("0123456789"):
        digit = int(name[6:])

        def log_probability(x: Tensor) -> Tensor:
            return digits.digit_log_probability(x, digit)

        def probability(x: Tensor) -> Tensor:
            return digits.digit_judge(x, digit)

        return RewardSpec(log_probability, {"probability": probability, **judges})
    if ":" not in name:
        raise TiltflowError(
            f"unknown reward {name!r}: use thickness, digit-0 … digit-9, inpainting, or module:function returning (B,)."
        )
    reward = import_function(name)
    if not callable(reward):
        raise TiltflowError(f"reward {name!r} is a {type(reward).__name__}, not callable; it must map (x) to (B,).")
    return RewardSpec(reward, judges)


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
        shape, space: of a plain energy: the shape of one x, and a key of :data:`SPACES`.
        scale, finest: of a plain energy, see :class:`EnergyProblem`.

    Raises:
        TiltflowError: an unknown name, a plain energy without shape, scale and finest, or these for a whole problem.
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
        return replace(made, energy=_differentiable(made.energy))
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
