"""Bases and rewards by name: shipped ones, files, finished runs, and ``module:function``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import VP, Cosine, Interpolant, Linear
from tiltflow.core.process import Predicts, Process
from tiltflow.digits.names import digits_base, digits_reward
from tiltflow.digits.settings import BASE, REWARDS
from tiltflow.rewards.spec import RewardSpec
from tiltflow.run.names import Trusted, import_callable, import_function
from tiltflow.run.open import load

INTERPOLANTS: dict[str, Callable[[], Interpolant]] = {"linear": Linear, "cosine": Cosine, "vp": VP}
BASES = (BASE,)


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
        name: "digits"; a file that ``tiltflow pretrain`` wrote; the folder of a finished run of ``tiltflow finetune``; or
            ``module:function`` returning a :class:`Process`, or a module / callable (x, t) whose output ``predicts`` names.
        predicts: Output of a foreign model.
        interpolant: Path of a foreign model: linear, cosine or vp.
        shape: Of one sample of a foreign model.
        label: Class of a class-conditional digits base.
        guidance: Scale of classifier-free guidance to that class.

    Raises:
        TiltflowError: unknown name, missing file, or a foreign model without ``predicts`` and ``shape``.
    """
    if name == BASE or name.endswith(".safetensors"):
        return digits_base(name, label, guidance)
    if label is not None:
        raise TiltflowError(f"--label is for the digits bases; {name!r} takes its own conditions.")
    if Path(name).is_dir():
        return load(name, trust=isinstance(name, Trusted)).process
    if ":" not in name:
        raise TiltflowError(
            f"unknown base {name!r}: use {BASE!r}, a .safetensors file of `tiltflow pretrain`, the folder of a finished "
            "run, or module:function."
        )
    made = import_function(name)
    made = made() if callable(made) and not isinstance(made, Process | nn.Module) else made
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


def load_reward(name: str, judges: tuple[str, ...] = (), conditions: str | None = None) -> RewardSpec:
    """A reward by name: "thickness", "digit-0" … "digit-9", "inpainting", or ``module:function``.

    Args:
        name: The reward, (x, **condition) → (B,).
        judges: Held-out scores, each ``module:function``.
        conditions: ``module:function`` that draws conditions for base and reward, (n, generator) → {name: (n, …)}.

    Raises:
        TiltflowError: an unknown name, something that is not callable, conditions for a reward that brings its own.
    """
    held_out = {judge: import_callable(judge, "the judge") for judge in judges}
    if name in REWARDS:
        found = digits_reward(name)
        if conditions is not None and found.conditions is not None:
            raise TiltflowError(f"the reward {name!r} draws its own conditions: leave --conditions out.")
        found = found._replace(judges=found.judges | held_out)
    elif ":" in name:
        found = RewardSpec(import_callable(name, "the reward"), held_out)
    else:
        raise TiltflowError(f"unknown reward {name!r}: use one of {', '.join(REWARDS)}, or module:function returning (B,).")
    return found if conditions is None else with_conditions(found, import_callable(conditions, "the provider of conditions"))


def with_conditions(spec: RewardSpec, draw: Callable[..., dict[str, Tensor]]) -> RewardSpec:
    """The reward with conditions that base, reward and judges all see."""

    def unseen(n: int, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return draw(n, generator), {}

    return spec._replace(conditions=draw, unseen=unseen)
