"""Conditions by the number of their prompt: drawn, and sent to where the network is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError


@dataclass(frozen=True)
class DrawnConditions:
    """Draws numbers of conditions, ``(n, generator) -> {name: (n,)}``; −1 stands for the one that was dropped.

    Args:
        count: how many there are. per_prompt: consecutive rows that share one: a group, as group-relative rewards want.
        dropout: probability of −1, for every kind of condition (text, video, …) on its own; the number is the same in all.

    Raises:
        TiltflowError: counts below 1, probabilities outside of [0, 1].
    """

    count: int
    per_prompt: int = 1
    dropout: Mapping[str, float] = field(default_factory=lambda: {"prompt": 0.0})

    def __post_init__(self) -> None:
        if self.count < 1 or self.per_prompt < 1:
            raise TiltflowError(f"count and per_prompt must be at least 1, got {self.count} and {self.per_prompt}.")
        for name, p in self.dropout.items():
            if not 0 <= p <= 1:
                raise TiltflowError(f"the dropout of {name} must be between 0 and 1, got {p}.")

    def __call__(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Without repetition until all had their turn."""
        device = generator.device
        groups = -(-n // self.per_prompt)
        turns = [torch.randperm(self.count, generator=generator, device=device) for _ in range(-(-groups // self.count))]
        rows = torch.cat(turns)[:groups].repeat_interleave(self.per_prompt)[:n]
        return {
            name: torch.where(torch.rand(n, generator=generator, device=device) < p, -1, rows)
            for name, p in self.dropout.items()
        }


@dataclass(eq=False)
class Sent:
    """Rows of numbered prompts beside the network: sent once for a batch and a type, not at every step of its paths.

    Args:
        rows: of all prompts, on the host.
    """

    rows: Mapping[str, Tensor]
    batch: Tensor | None = field(default=None, init=False)
    sent: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = field(default_factory=dict, init=False)

    def __call__(self, prompt: Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Those of the prompts with these numbers, (n,); what is no integer in ``dtype``."""
        if prompt is not self.batch:
            self.batch, self.sent = prompt, {}
        if (device, dtype) not in self.sent:
            numbers = prompt.cpu()
            found = {name: value[numbers] for name, value in self.rows.items()}
            typed = {name: dtype if v.is_floating_point() else v.dtype for name, v in found.items()}
            self.sent[device, dtype] = {name: v.to(device, typed[name]) for name, v in found.items()}
        return self.sent[device, dtype]
