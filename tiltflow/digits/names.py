"""The digits by name: the base, and its rewards with their held-out judges."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tiltflow.core.process import Process
from tiltflow.digits import rewards as digits
from tiltflow.digits.nets import Labelled, ObservationAdapter
from tiltflow.digits.settings import BASE
from tiltflow.digits.weights import load_base, load_digits_base
from tiltflow.rewards.spec import RewardSpec


def digits_base(name: str, label: int | None = None, guidance: float = 1.0) -> Process:
    """The shipped base ("digits") or a file of ``tiltflow pretrain``; with a class, guided to it."""
    process = load_digits_base() if name == BASE else load_base(Path(name))
    if label is None:
        return process
    assert isinstance(process.model, nn.Module)
    return Process(process.interpolant, Labelled(process.model, label, guidance), process.predicts, process.event_shape)


def digits_reward(name: str) -> RewardSpec:
    """One of :data:`REWARDS` with its held-out judge."""
    if name == "thickness":
        return RewardSpec(digits.stroke_thickness, {"thickness": digits.thickness_judge})
    if name == "inpainting":
        return _inpainting()
    digit = int(name.removeprefix("digit-"))

    def log_probability(x: Tensor) -> Tensor:
        return digits.digit_log_probability(x, digit)

    def probability(x: Tensor) -> Tensor:
        return digits.digit_judge(x, digit)

    return RewardSpec(log_probability, {"probability": probability})


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
