"""Several processes with the same weights and noise of their own: gradients are averaged, and all stop together.

Nothing here starts processes: `accelerate launch` or `torchrun` does. Without a process group every function is that of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, distributed


class World(NamedTuple):
    """This process's number, and how many there are."""

    rank: int
    size: int


def join() -> World:
    """Join the processes that a launcher started, by its environment variables; alone without them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # what "cuda" means here
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return world()


def world() -> World:
    """As it is now."""
    if distributed.is_available() and distributed.is_initialized():
        return World(distributed.get_rank(), distributed.get_world_size())
    return World(0, 1)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Gradients replaced by their mean over the processes: that of one batch as many times larger."""
    size = world().size
    if size > 1:
        for p in parameters:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            distributed.all_reduce(grad)
            p.grad = grad / size


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether it is true in any process."""
    if world().size == 1:
        return flag
    votes = torch.tensor(float(flag), device=device)
    distributed.all_reduce(votes)
    return bool(votes > 0)


def wait() -> None:
    """Until all processes are here."""
    if world().size > 1:
        distributed.barrier()
