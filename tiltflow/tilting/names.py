"""Names the command line understands: shipped bases, rewards and energies, weight files and ``module:function``."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import VP, Cosine, Interpolant, Linear
from tiltflow.core.process import Predicts, Process
from tiltflow.digits.names import REWARDS, digits_base, digits_reward
from tiltflow.rewards.spec import RewardSpec
from tiltflow.run.names import import_function

INTERPOLANTS: dict[str, Callable[[], Interpolant]] = {"linear": Linear, "cosine": Cosine, "vp": VP}






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
        return digits_base(name, label, guidance)
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




def load_reward(name: str, judge: str | None = None) -> RewardSpec:
    """A reward by name: "thickness", "digit-0" … "digit-9", "inpainting", or ``module:function``.

    ``judge`` is an optional ``module:function`` of held-out scores (x) → (B,).
    """
    judges = {judge: import_function(judge)} if judge else {}
    if name in REWARDS:
        found = digits_reward(name)
        return found._replace(judges=found.judges | judges)
    if ":" not in name:
        raise TiltflowError(
            f"unknown reward {name!r}: use thickness, digit-0 … digit-9, inpainting, or module:function returning (B,)."
        )
    reward = import_function(name)
    if not callable(reward):
        raise TiltflowError(f"reward {name!r} is a {type(reward).__name__}, not callable; it must map (x) to (B,).")
    return RewardSpec(reward, judges)








