"""Tensors between the host and an accelerator: what is needed again is sent once, and float64 is computed on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_SENT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def beside(values: Tensor, x: Tensor) -> Tensor:
    """``values`` on the device of x: themselves there, else a copy in the dtype of x, made once while they live."""
    if values.device == x.device:
        return values
    copies = _SENT.setdefault(values, {})
    if (key := (x.dtype if values.is_floating_point() else values.dtype, x.device)) not in copies:
        copies[key] = values.to(x.device, key[0])
    return copies[key]


def double(x: Tensor) -> Tensor:
    """x in float64 on the CPU: accelerators are slow at it, or, as MPS, cannot. For log weights and what is judged."""
    return x.to("cpu", torch.float64)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PyTorch's own generator of the CPU, seeded for a while: layers draw their initial weights from it, and only there."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def companion(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """A generator of the device: itself if it is there, else one that it seeds."""
    if generator.device.type == device.type:
        return generator
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return torch.Generator(device).manual_seed(int(seed))
