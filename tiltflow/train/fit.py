r"""The one training loop: collect → buffer → gradient steps, for every trained method.

Adam with gradient clipping, a learning rate that falls in a cosine, and an exponential moving average of the weights. It
ends after its rounds, or where more would not help (:mod:`tiltflow.train.criterion`). All that changes is in one checkpoint
(:mod:`tiltflow.train.checkpoint`), so a resumed run equals an uninterrupted one bit for bit on the same machine. Several
processes (:mod:`tiltflow.train.distributed`) share the rows, and train what one would.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError
from tiltflow.train.buffer import Buffer
from tiltflow.train.checkpoint import Checkpoint, Progress, load_checkpoint, pool_counts, save_checkpoint
from tiltflow.train.criterion import resumed, until
from tiltflow.train.distributed import agree, align, any_of, draws, mean, sum_gradients
from tiltflow.train.interrupt import Interruption
from tiltflow.train.method import Method, State
from tiltflow.train.settings import Training

History = list[dict[str, Any]]
Callback = Callable[[dict[str, Any]], bool | None]
FUSED = ("cpu", "cuda", "mps", "xpu")
"""Devices whose Adam is one kernel."""


def fit(
    method: Method,
    state: State,
    settings: Training,
    checkpoint: Checkpoint | Path | None = None,
    resume: bool = False,
    callback: Callback | None = None,
) -> History:
    """Train ``state.control`` in place; at the end its weights are the averaged ones.

    Args:
        method: What to train by.
        state: What to train: the control, the generator and the round.
        settings: How to train.
        checkpoint: File to save to before the first round, every ``checkpoint_every`` rounds, and at the end. With it,
            Ctrl-C and SIGTERM end the training after a round that is saved.
        resume: Start from that file.
        callback: Called with each round's metrics (progress bars, early printing); True makes it the last one.

    Returns:
        One dict per round: iteration, loss, grad_norm, seconds, processor_seconds, the method's metrics and curves.

    Raises:
        TiltflowError: a non-finite loss (the last checkpoint stays), nothing to resume, processes that do not start alike.
        LostProcess: another process died or hangs (the last checkpoint stays).
        KeyboardInterrupt: the training was interrupted.
    """
    module = state.control.module
    for item in method.auxiliary.values():
        if isinstance(item, nn.Module):
            item.to(state.generator.device)
    others = [p for item in method.auxiliary.values() if isinstance(item, nn.Module) for p in item.parameters()]
    weights = [p for p in module.parameters() if p.requires_grad]
    fused = weights[0].device.type in FUSED
    optimiser = torch.optim.Adam([*weights, *others], lr=settings.learning_rate, betas=settings.betas, fused=fused)
    average = [p.detach().clone() for p in weights]
    now = Progress(method, state, weights, average, optimiser, Buffer(settings.buffer_rounds), [])
    kept = Checkpoint(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    kept = None if kept is None else kept.starting_from([*module.parameters(), *module.buffers()])
    if resume:
        load_checkpoint(kept, now)
    agree(state.iteration, [*module.parameters(), *module.buffers()], state.generator)
    end = resumed(now.history, settings.rounds)
    if kept is not None and not resume:
        save_checkpoint(kept, now)
    with Interruption(kept is not None) as interruption:
        while state.iteration < min(settings.rounds, end or settings.rounds):
            try:
                now.history.append(row := _round(now, others, settings, end))
            except (Exception, SystemExit) as error:
                error.add_note(f"in round {state.iteration}")
                raise
            state.iteration += 1
            if settings.open_ended:
                end = end or until(now.history, settings.tolerance, settings.minutes)
                row |= {"until": end, "at_most": settings.rounds}
            last = state.iteration == min(settings.rounds, end or settings.rounds)
            enough = any_of(callback is not None and callback(row) is True)
            interrupted = any_of(interruption.signal is not None)
            due = state.iteration % settings.checkpoint_every == 0 or last
            if kept is not None and (enough or interrupted or due):
                save_checkpoint(kept, now)
            if interrupted:
                raise KeyboardInterrupt(interruption.signal)
            if enough:
                break
    pool_counts(now)
    with torch.no_grad():
        for a, p in zip(average, weights, strict=True):
            p.copy_(a)
    return now.history


def _require_finite(losses: list[float], norm: float, iteration: int) -> None:
    """Raise TiltflowError for a loss, or the norm of its gradient, that is not finite."""
    if not math.isfinite(sum(losses)) or not math.isfinite(norm):
        raise TiltflowError(
            f"loss {sum(losses)} and gradient norm {norm} in round {iteration}: training diverged. "
            "Lower the learning rate or the strength, or bound the cost's gradient (max_cost_gradient)."
        )


def _round(now: Progress, others: list[nn.Parameter], settings: Training, end: int | None) -> dict[str, Any]:
    """One round: collect, take the gradient steps, move the average. Returns its metrics."""
    started, busy = time.perf_counter(), time.process_time()
    method, state, optimiser = now.method, now.state, now.optimiser
    align(state.generator)
    with draws():
        collected = method.collect(state)
    align(state.generator)
    now.buffer.add(collected.material)
    for group in optimiser.param_groups:
        group["lr"] = settings.rate(state.iteration, end)
    sums: list[Tensor] = []
    norms: list[Tensor] = []
    for batch in now.buffer.batches(settings.minibatch, settings.gradient_steps, state.generator, settings.accumulate):
        optimiser.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        for rows, part in batch:
            with draws(part):
                loss = part.share * method.loss(state.control, rows, state.generator)
            loss.backward()
            losses.append(loss.detach())
        sums.append(sum_gradients([*now.weights, *others], torch.stack(losses)))
        bound = math.inf if settings.gradient_clip is None else settings.gradient_clip
        norms.append(torch.nn.utils.clip_grad_norm_([*now.weights, *others], bound))
        if norms[-1].device.type == "cpu":  # elsewhere the host would wait, and looks once a round
            _require_finite(sums[-1].tolist(), float(norms[-1]), state.iteration)
        optimiser.step()
    parts = torch.stack(sums).tolist()
    value, norm = (sum(v) / settings.gradient_steps for v in (map(sum, parts), torch.stack(norms).tolist()))
    _require_finite([value], norm, state.iteration)
    with torch.no_grad():
        decay = min(settings.ema, (1 + state.iteration) / (10 + state.iteration))
        for a, p in zip(now.average, now.weights, strict=True):
            a.lerp_(p, 1 - decay)
    row: dict[str, Any] = {
        "loss": value,
        "grad_norm": norm,
        **collected.metrics,
        **collected.curves,
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - busy,
    }
    return {"iteration": state.iteration, **mean(row)}
