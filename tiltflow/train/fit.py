r"""The one training loop: collect → buffer → gradient steps, for every trained method.

Adam with gradient clipping, a cosine or constant learning rate that depends on the iteration only, and an exponential
moving average of the weights. All that changes is in one checkpoint (weights, average, running statistics, optimiser,
random generator, buffer, auxiliary states, history), so a resumed run equals an uninterrupted one bit for bit on the same
machine. Of several processes (:mod:`tiltflow.train.distributed`) each collects and checkpoints for itself;
gradients are averaged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiltflow.core.errors import TiltflowError
from tiltflow.train.buffer import Buffer, Material
from tiltflow.train.distributed import any_of, average_gradients
from tiltflow.train.method import Method, State
from tiltflow.train.store import load_state, save_state

History = list[dict[str, Any]]


@dataclass(frozen=True)
class FitSettings:
    """How to train.

    Args:
        iterations: rounds of collect and update.
        learning_rate, betas: Adam's.
        final_learning_rate: fraction of the learning rate left at the end (cosine; 1 is constant).
        warmup: iterations of linear warm-up.
        gradient_clip: bound on the gradient norm.
        ema: decay of the averaged weights, which are the result (0: none).
        updates, minibatch: gradient steps per round, rows per step (None: the whole buffer).
        accumulate: rows that the loss sees at a time; the gradient is that of all rows (None: all at once).
        checkpoint_every: iterations between checkpoints.
    """

    iterations: int
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    final_learning_rate: float = 0.01
    warmup: int = 0
    gradient_clip: float = 1.0
    ema: float = 0.99
    updates: int = 1
    minibatch: int | None = None
    accumulate: int | None = None
    checkpoint_every: int = 50

    def rate(self, iteration: int) -> float:
        """Learning rate at an iteration."""
        low = self.final_learning_rate
        cosine = 0.5 * (1 + math.cos(math.pi * iteration / max(self.iterations, 1)))
        ramp = min(1.0, (iteration + 1) / (self.warmup + 1))
        return self.learning_rate * ramp * (low + (1 - low) * cosine)


def fit(
    method: Method,
    state: State,
    settings: FitSettings,
    buffer: Buffer | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    callback: Callable[[dict[str, Any]], bool | None] | None = None,
) -> History:
    """Train ``state.control`` in place; at the end its weights are the averaged ones.

    Args:
        method, state, settings: what, on what, how. ``buffer``: None keeps the last round only.
        checkpoint: file to save to every ``checkpoint_every`` iterations and at the end; ``resume`` starts from it.
        callback: called with each iteration's metrics (progress bars, early printing); True makes it the last one.

    Returns:
        One dict per iteration: iteration, loss, grad_norm, seconds, processor_seconds, the method's metrics and curves.

    Raises:
        TiltflowError: a non-finite loss (the last checkpoint stays), or nothing to resume.
    """
    buffer = buffer if buffer is not None else Buffer()
    module = state.control.module
    others = [p for item in method.auxiliary.values() if isinstance(item, nn.Module) for p in item.parameters()]
    weights = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam([*weights, *others], lr=settings.learning_rate, betas=settings.betas, fused=True)
    average = [p.detach().clone() for p in weights]
    history: History = []
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if resume:
        if checkpoint is None or not checkpoint.is_file():
            raise TiltflowError(f"nothing to resume: no checkpoint at {checkpoint}.")
        saved = load_state(checkpoint)
        if [p.shape for p in weights] != [w.shape for w in saved["weights"]]:
            raise TiltflowError(f"{checkpoint} holds the weights of another network; resume with the one that was trained.")
        for p, w in zip([*weights, *module.buffers()], [*saved["weights"], *saved["running"]], strict=True):
            p.data.copy_(w)
        average = [a.to(p.device) for a, p in zip(saved["average"], weights, strict=True)]
        optimiser.load_state_dict(saved["optimiser"])
        state.generator.set_state(saved["generator"])
        state.iteration = saved["iteration"]
        buffer.load_state_dict(saved["buffer"])
        for name, item in method.auxiliary.items():
            item.load_state_dict(saved["auxiliary"][name])
        history = saved["history"]

    def save() -> None:
        if checkpoint is not None:
            save_state(
                checkpoint,
                {
                    "iteration": state.iteration,
                    "weights": [p.detach() for p in weights],
                    "running": list(module.buffers()),
                    "average": average,
                    "optimiser": optimiser.state_dict(),
                    "generator": state.generator.get_state(),
                    "buffer": buffer.state_dict(),
                    "auxiliary": {name: item.state_dict() for name, item in method.auxiliary.items()},
                    "history": history,
                },
            )

    while state.iteration < settings.iterations:
        started, busy = time.perf_counter(), time.process_time()
        collected = method.collect(state)
        buffer.add(collected.material)
        for group in optimiser.param_groups:
            group["lr"] = settings.rate(state.iteration)
        loss_sum = norm_sum = 0.0
        for batch in buffer.batches(settings.minibatch, settings.updates, state.generator):
            optimiser.zero_grad(set_to_none=True)
            value = 0.0
            for part, share in _parts(batch, settings.accumulate):
                loss = share * method.loss(state.control, part, state.generator)
                loss.backward()
                value += loss.item()
            average_gradients([*weights, *others])
            norm = float(torch.nn.utils.clip_grad_norm_([*weights, *others], settings.gradient_clip))
            if not math.isfinite(value) or not math.isfinite(norm):
                raise TiltflowError(
                    f"loss {value} and gradient norm {norm} at iteration {state.iteration}: training diverged. "
                    "Lower the learning rate or the strength, or clip the reward's gradient (max_grad_norm)."
                )
            optimiser.step()
            loss_sum, norm_sum = loss_sum + value, norm_sum + norm
        with torch.no_grad():
            for a, p in zip(average, weights, strict=True):
                decay = min(settings.ema, (1 + state.iteration) / (10 + state.iteration))
                a.lerp_(p, 1 - decay)
        row = {
            "iteration": state.iteration,
            "loss": loss_sum / settings.updates,
            "grad_norm": norm_sum / settings.updates,
            **collected.metrics,
            **collected.curves,
            "seconds": time.perf_counter() - started,
            "processor_seconds": time.process_time() - busy,
        }
        history.append(row)
        state.iteration += 1
        enough = any_of(callback is not None and callback(row) is True, weights[0].device)
        if enough or state.iteration % settings.checkpoint_every == 0 or state.iteration == settings.iterations:
            save()
        if enough:
            break
    with torch.no_grad():
        for a, p in zip(average, weights, strict=True):
            p.copy_(a)
    return history


def _parts(batch: Material, size: int | None) -> Iterator[tuple[Material, float]]:
    """The rows, ``size`` at a time, each with its share of all."""
    n = len(next(iter(batch.values())))
    for i in range(0, n, size or n):
        part = {name: v[i : i + (size or n)] for name, v in batch.items()}
        yield part, len(next(iter(part.values()))) / n
