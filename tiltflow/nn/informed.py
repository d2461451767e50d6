r"""A network that is told the forces: field(x, t) = net(x, t) + g(t) force(x).

As t → 1 the optimal drift towards exp(−E) tends to a multiple of −∇E. A gate of the time hands the network that part, and it
learns the rest; path integral samplers do so too (Zhang & Chen 2022, arXiv:2111.15141).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError
from tiltflow.core.process import expand
from tiltflow.nn.features import time_features


class Informed(nn.Module):
    """net(x, t) + g(t) force(x), with g(t) = w · features(t) a learned scalar that starts at zero.

    It keeps every symmetry that ``net`` and ``force`` share; both are differentiated when x requires a gradient.

    Args:
        net: module (x (B, *event), t (B,)) → (B, *event).
        force: (B, *event) → (B, *event), cheap and bounded: the forces of noise are huge. Clip whole vectors
            (or the force of each pair), not their entries: that would break rotations and the zero mean.
        frequencies: sines and cosines of t that g is a combination of.
    """

    def __init__(self, net: nn.Module, force: Callable[[Tensor], Tensor], frequencies: int = 4) -> None:
        super().__init__()
        self.net, self.force, self.frequencies = net, force, frequencies
        self.gate = nn.Linear(1 + 2 * frequencies, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The field (B, *event).

        Raises:
            TiltflowError: ``force`` does not return the shape of x.
        """
        force = self.force(x)
        if force.shape != x.shape:
            raise TiltflowError(f"force returned {tuple(force.shape)} for x of shape {tuple(x.shape)}; it must be the same.")
        return self.net(x, t) + expand(self.gate(time_features(t, self.frequencies))[:, 0], x) * force
