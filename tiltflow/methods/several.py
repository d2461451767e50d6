r"""Adjoint Sampling of several targets at once: one control that is told which, one buffer across them.

Target i has its own number of angles D_i ≤ D and its own energy; all share the noise. A round visits some of the targets,
each as :class:`~tiltflow.methods.adjoint_sampling.AdjointSampling` alone would: end points, energies, path weights tempered
within the target. The rows are padded to D, and what is padded has neither state nor loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tiltflow.core.control import Control
from tiltflow.core.device import beside
from tiltflow.methods.adjoint_sampling import AdjointSampling
from tiltflow.train.buffer import Material, conditions_of
from tiltflow.train.loss import matching_terms, reduce_terms
from tiltflow.train.method import Method, Round, State


@dataclass(frozen=True)
class SeveralAdjointSampling(Method):
    """Rounds over several targets; the control takes ``system``, (B,) int64, as a condition.

    Args:
        samplers: one per target, on states (D_i,), with equal noise and batch.
        visited: targets per round, drawn without replacement.
    """

    samplers: Sequence[AdjointSampling]
    visited: int

    @property
    def auxiliary(self) -> dict[str, Any]:
        return {f"energy-{i}": one.cost.energy for i, one in enumerate(self.samplers)}

    @cached_property
    def _sizes(self) -> Tensor:
        """D_i, (targets,)."""
        return torch.tensor([one.chain.event_shape[0] for one in self.samplers])

    @cached_property
    def _widest(self) -> AdjointSampling:
        return self.samplers[int(self._sizes.argmax())]

    def collect(self, state: State) -> Round:
        """End points of ``visited`` targets, padded."""
        device = state.generator.device
        order = torch.randperm(len(self.samplers), generator=state.generator, device=device)[: self.visited].tolist()
        batches = {i: torch.full((self.samplers[i].batch,), i, device=device) for i in order}
        rounds = [self.samplers[i].collect(state, system=system) for i, system in batches.items()]
        width = int(self._sizes.max())
        rows = [
            {name: pad(v, (0, width - v.shape[1])) if v.ndim == 2 else v for name, v in one.material.items()}
            for one in rounds
        ]
        metrics = {name: sum(one.metrics[name] for one in rounds) / len(rounds) for name in ("energy", "ess", "kl")}
        metrics["energy_calls"] = float(sum(one.cost.energy.calls for one in self.samplers))
        return Round({name: torch.cat([r[name] for r in rows]) for name in rows[0]}, metrics, {})

    def loss(self, control: Control, material: Material, generator: torch.Generator) -> Tensor:
        """The matching loss of rows of any targets; each term is divided by its own D_i."""
        x, k, drift = self._widest.project(material, generator)
        sizes = beside(self._sizes, x)[material["condition.system"]]
        real = torch.arange(x.shape[1], device=x.device) < sizes[:, None]
        x, drift = x * real, drift * real
        terms = matching_terms(control, self._widest.chain, x, k, -drift, x, **conditions_of(material))
        return reduce_terms(terms / sizes, material["weight"])
