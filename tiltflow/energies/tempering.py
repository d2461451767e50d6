"""A plan of parallel tempering, which a problem carries."""

from __future__ import annotations

from typing import Annotated

from tiltflow.core.settings import Count, Range, Whole, settings


@settings
class Tempering:
    """A geometric ladder of temperatures, and the chains and moves on it.

    Args:
        top: The highest temperature.
        replicas: Temperatures, from 1 to the top; they grow with √d, so that neighbours overlap.
        chains: Independent chains.
        steps: Moves of each chain that are kept.
        burn_in: Moves before them that are not.
        relax: Steps of descent at the start: particles on top of each other would never be moved.
    """

    top: Annotated[float, Range(1, above=True)] = 10.0
    replicas: Annotated[int, Range(2, 10_000)] = 8
    chains: Count = 50
    steps: Count = 4_000
    burn_in: Whole = 2_000
    relax: Whole = 500

    @property
    def ladder(self) -> list[float]:
        """The temperatures."""
        return [self.top ** (i / (self.replicas - 1)) for i in range(self.replicas)]
