"""Prompts by their numbers: drawn, and sent to where the network is.

Number i ≥ 0 is prompt i. Number ~i = −1 − i is prompt i without its text: the network is given the row without a prompt, the
reward still the text of prompt i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError


@dataclass(frozen=True)
class DrawnConditions:
    """Draws numbers, ``(n, generator) -> {"prompt": (n,)}``; those that the fitted control is given as ``fitted`` if others.

    Args:
        count: how many prompts there are. per_prompt: consecutive rows that share one: a group, as group-relative rewards
            want.
        dropout: probability of a row to lose its text, in the fitted control only; or, with ``in_paths``, wherever the
            network is asked.

    Raises:
        TiltflowError: counts below 1, a probability outside of [0, 1].
    """

    count: int
    per_prompt: int = 1
    dropout: float = 0.0
    in_paths: bool = False

    def __post_init__(self) -> None:
        if self.count < 1 or self.per_prompt < 1:
            raise TiltflowError(f"count and per_prompt must be at least 1, got {self.count} and {self.per_prompt}.")
        if not 0 <= self.dropout <= 1:
            raise TiltflowError(f"dropout must be between 0 and 1, got {self.dropout}.")

    def __call__(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Without repetition until all had their turn."""
        device = generator.device
        groups = -(-n // self.per_prompt)
        turns = [torch.randperm(self.count, generator=generator, device=device) for _ in range(-(-groups // self.count))]
        rows = torch.cat(turns)[:groups].repeat_interleave(self.per_prompt)[:n]
        if not self.dropout:
            return {"prompt": rows}
        left = torch.where(torch.rand(n, generator=generator, device=device) < self.dropout, ~rows, rows)
        return {"prompt": left} if self.in_paths else {"prompt": rows, "fitted": left}


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
            numbers = prompt.cpu().clamp(min=-1)
            found = {name: value[numbers] for name, value in self.rows.items()}
            typed = {name: dtype if v.is_floating_point() else v.dtype for name, v in found.items()}
            self.sent[device, dtype] = {name: v.to(device, typed[name]) for name, v in found.items()}
        return self.sent[device, dtype]


def texts_of(prompts: Sequence[str], numbers: Tensor) -> list[str]:
    """The texts of numbers, whether the network is given them or not."""
    return [prompts[i if i >= 0 else ~i] for i in numbers.tolist()]
