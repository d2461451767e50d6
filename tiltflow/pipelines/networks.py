"""The network that a pipeline trains: one component, or two that share the times between them (Wan 2.2), as one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

NETWORKS = ("transformer", "unet", "dit")
"""What pipelines call it."""


class Networks(nn.Module):
    """Several as one, by the names of the components; they are called by the pipeline, each at its times."""

    def __init__(self, parts: dict[str, Any]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    @property
    def first(self) -> Any:
        """The one that starts."""
        return next(self.children())

    @property
    def config(self) -> Any:
        """Of the first."""
        return self.first.config

    @property
    def device(self) -> torch.device:
        """Of the first."""
        return self.first.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first."""
        return self.first.dtype

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether one of them forgets what it computes."""
        return any(getattr(part, "is_gradient_checkpointing", False) for part in self.children())


def names_of(pipe: Any, first: str) -> tuple[str, ...]:
    """The component, and the second one if there is one."""
    second = f"{first}_2"
    return (first, second) if isinstance(getattr(pipe, second, None), nn.Module) else (first,)


def whole(pipe: Any, first: str, plain: bool = False) -> Any:
    """The network of a pipeline; ``plain``: out of what ``torch.compile`` has made of it."""
    parts = {name: getattr(pipe, name) for name in names_of(pipe, first)}
    if plain:
        parts = {name: getattr(part, "_orig_mod", part) for name, part in parts.items()}
    return parts[first] if len(parts) == 1 else Networks(parts)


def parts_of(network: nn.Module) -> list[nn.Module]:
    """The components that a network is of."""
    return [*network.children()] if isinstance(network, Networks) else [network]
