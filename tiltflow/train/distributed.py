r"""Several processes that train one model as one process would.

All have the same weights and the same generator. A batch is that of all: row i of a round, of the buffer, of a mini-batch
belongs to process i mod size. A draw of n rows is made for the rows of all, of which each keeps its own; what is drawn
once (a permutation, a step) is the same everywhere; what a method computes over the rows of a round goes through
:func:`everyone`; gradients and losses are summed. So a training depends on the number of processes in its rounding only, and
its checkpoint is that of one process.

Nothing here starts processes: `accelerate launch` or `torchrun` does. Without a process group every function is that of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.overrides import TorchFunctionMode

from tiltflow.core.errors import LostProcess, TiltflowError

TIMEOUT, PATIENCE = "TILTFLOW_TIMEOUT", 600.0
"""Environment variable: seconds that processes wait for one that does not come. Its default."""
GRACE = 5.0
"""Seconds that those who lost one wait for each other's word."""
WAITS = "waits"
MET, LEFT = "tiltflow/met/{}", "tiltflow/left/{}"
"""Keys of a rank: how often it came to a meeting of all; why it left."""
DRAWS = (torch.randn, torch.rand, torch.randint)


class World(NamedTuple):
    """This process's number, and how many there are."""

    rank: int
    size: int


def join() -> World:
    """Join the processes that a launcher started, by its environment variables; alone without them.

    They wait for each other for ``TILTFLOW_TIMEOUT`` seconds, 600 by default.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # what "cuda" means here
            backend = "cpu:gloo,cuda:nccl"
        distributed.init_process_group(backend, timeout=timedelta(seconds=patience()))
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _told_to_end)
    return world()


def patience() -> float:
    """Seconds that processes wait for one that does not come."""
    return float(os.environ.get(TIMEOUT, PATIENCE))


def together() -> None:
    """Until all processes are here."""
    any_of(False)


def leave() -> None:
    """The training is over, in all processes: each is alone again."""
    if world().size > 1:
        together()
        distributed.destroy_process_group()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def world() -> World:
    """As it is now."""
    if distributed.is_available() and distributed.is_initialized():
        return World(distributed.get_rank(), distributed.get_world_size())
    return World(0, 1)


def share_of(batch: int) -> int:
    """The rows of a batch that this process draws. Raises TiltflowError if they are not equally many in all."""
    size = world().size
    if batch % size:
        raise TiltflowError(f"a batch of {batch} cannot be shared by {size} processes: give a multiple of {size}.")
    return batch // size


# Rows


def own(x: Tensor) -> Tensor:
    """This process's rows of those of all."""
    rank, size = world()
    return x if size == 1 else x[rank::size].contiguous()


def everyone(x: Tensor) -> Tensor:
    """The rows of all processes, each of which brings equally many, without a graph."""
    if world().size == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world().size)]
    _meet(lambda: distributed.all_gather(parts, x.detach().contiguous()), x.device)
    return torch.stack(parts, 1).flatten(0, 1)


def brought(x: Tensor) -> Tensor:
    """The same in the first process only, in the host's memory; elsewhere the process's own rows."""
    rank, size = world()
    if size == 1:
        return x
    mine = x.detach().cpu().contiguous()
    parts = [torch.empty_like(mine) for _ in range(size)] if rank == 0 else None
    _meet(lambda: distributed.gather(mine, parts))
    return mine if parts is None else torch.stack(parts, 1).flatten(0, 1)


class Part(NamedTuple):
    """Rows of a mini-batch: which of this process's rows, where they stand among ``of`` rows of all, and their share."""

    rows: Tensor | slice
    places: Tensor
    of: int
    share: float


def part_of(picked: Tensor | None, start: int, stop: int, total: int) -> Part:
    """What this process has of rows start to stop of a mini-batch: ``picked`` (total,) numbers, or None: all rows.

    One that has none of them takes part with a row that does not count.
    """
    rank, size = world()
    if size == 1:
        places = torch.arange(stop - start)
        return Part(slice(start, stop) if picked is None else picked[start:stop], places, len(places), len(places) / total)
    numbers = torch.arange(start, stop) if picked is None else picked[start:stop].cpu()
    places = (numbers % size == rank).nonzero()[:, 0]
    if not len(places):
        return Part(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), len(numbers), 0.0)
    return Part(numbers[places] // size, places, len(numbers), len(places) / total)


class _Draws(TorchFunctionMode):
    """Draws of rows are made for all processes, of which this one gets its own."""

    def __init__(self, part: Part | None) -> None:
        super().__init__()
        self.part = part

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func not in DRAWS or named.get("generator") is None:
            return func(*args, **named)
        listed = isinstance(args[-1], (tuple, list))
        before, shape = (args[:-1], args[-1]) if listed else ((), args)
        if not len(shape) or not self._of_rows(shape[0]):
            return func(*args, **named)
        whole = func(*before, (self._all(shape[0]), *shape[1:]), **named)
        return self._mine(whole, shape[0])

    def _of_rows(self, n: int) -> bool:
        return n > 0 and (self.part is None or n % len(self.part.places) == 0)

    def _all(self, n: int) -> int:
        return n * world().size if self.part is None else n // len(self.part.places) * self.part.of

    def _mine(self, whole: Tensor, n: int) -> Tensor:
        if self.part is None:
            return own(whole)
        places = self.part.places.to(whole.device)
        times = n // len(places)  # rows that are there several times, one block after the other
        return whole.reshape(times, self.part.of, *whole.shape[1:])[:, places].flatten(0, 1)


def draws(part: Part | None = None) -> AbstractContextManager[Any]:
    """Within it, ``torch.randn``, ``rand`` and ``randint`` draw for all processes: for a round, or for a part."""
    return nullcontext() if world().size == 1 else _Draws(part)


def once() -> AbstractContextManager[Any]:
    """Within it, draws are as they stand: the same in all processes."""
    return nullcontext() if world().size == 1 else torch._C.DisableTorchFunction()


def shared(conditions: Callable[[int, torch.Generator], dict[str, Tensor]] | None) -> Any:
    """What draws conditions, for all processes, of which each gets its own."""
    if conditions is None or world().size == 1:
        return conditions

    def drawn(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        with once():
            rows = conditions(n * world().size, generator)
        return {name: own(v) for name, v in rows.items()}

    return drawn


# Numbers


def total(values: Sequence[float]) -> list[float]:
    """Sums over the processes."""
    if world().size == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    _meet(lambda: distributed.all_reduce(sums))
    return sums.tolist()


def mean(row: Mapping[str, float | list[float]]) -> dict[str, Any]:
    """Every number, and every number of a list, as its mean over the processes."""
    size = world().size
    if size == 1:
        return dict(row)
    values = iter([v / size for v in total([float(v) for one in row.values() for v in _listed(one)])])
    return {name: [next(values) for _ in one] if isinstance(one, list) else next(values) for name, one in row.items()}


def _listed(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [value]


def any_of(flag: bool) -> bool:
    """Whether it is true in any process."""
    return total([float(flag)])[0] > 0


def least(value: int) -> int:
    """The smallest of all processes."""
    if world().size == 1:
        return value
    found = torch.tensor(value)
    _meet(lambda: distributed.all_reduce(found, distributed.ReduceOp.MIN))
    return int(found)


def sum_gradients(parameters: Iterable[Tensor], values: Tensor) -> Tensor:
    """Gradients, and values (n,) beside them, replaced by their sums over the processes; returns those of the values."""
    if world().size == 1:
        return values
    trained = list(parameters)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = torch.cat([*(g.flatten() for g in grads), values.to(grads[0])])
    _meet(lambda: distributed.all_reduce(flat), flat.device)
    *sums, found = flat.split([*(p.numel() for p in trained), len(values)])
    for p, part in zip(trained, sums, strict=True):
        p.grad = part.view_as(p).to(p)
    return found


# Agreement, and the lack of it


def align(generator: torch.Generator) -> None:
    """Give the generator the state that it has in the first process."""
    if world().size > 1:
        state = generator.get_state()
        _meet(lambda: distributed.broadcast(state, 0))
        generator.set_state(state)


def fingerprint(*tensors: Tensor) -> int:
    """A number of 48 bits that other tensors have not."""
    found = hashlib.sha256()
    for x in tensors:
        found.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(found.digest()[:6], "big")


def agree(iteration: int, weights: Iterable[Tensor], generator: torch.Generator) -> None:
    """Raise TiltflowError in all processes, naming one that does not start as the first does, unless all start alike."""
    if world().size == 1:
        return
    facts = [iteration, fingerprint(*weights), fingerprint(generator.get_state())]
    said = everyone(torch.tensor([facts])).tolist()
    for rank, other in enumerate(said):
        for what, first, here in zip(("round", "weights (hash)", "random state (hash)"), said[0], other):
            if first != here:
                raise TiltflowError(
                    f"rank {rank} does not start as rank 0 does: {what} {here} instead of {first}; start all ranks with "
                    "one command, on the same files and run folder."
                )


def last_words(error: BaseException) -> None:
    """Tell the other processes why this one ends, so that they do not wait for it."""
    if world().size > 1 and not isinstance(error, LostProcess):
        with contextlib.suppress(RuntimeError):
            _store().set(LEFT.format(world().rank), str(error) or type(error).__name__)


def _store() -> Any:
    return distributed.distributed_c10d._get_default_store()


def _meet(work: Callable[[], Any], device: torch.device | None = None) -> None:
    """Do what all processes must do together.

    Raises:
        LostProcess: one of them does not come; it is named.
    """
    started = time.monotonic()
    try:
        _store().add(MET.format(world().rank), 1)
        if device is not None and device.type != "cpu":
            distributed.all_reduce(torch.zeros(1))  # NCCL would wait where nothing can be told
        work()
    except RuntimeError as error:
        raise _lost(time.monotonic() - started) from error


def _told_to_end(signum: int, frame: FrameType | None) -> None:
    """A launcher ends all processes when one has failed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _lost(None)


def _lost(waited: float | None) -> LostProcess:
    """Who is missing: those who do not say that they miss somebody too, first of all those who are behind."""
    advice = "start all ranks again with --resume to go on from the last checkpoint."
    rank, size = world()
    silent = [q for q in range(size) if q != rank]
    words: dict[int, str] = {}
    try:
        store = _store()
        store.set(LEFT.format(rank), WAITS)
        end = time.monotonic() + GRACE
        while silent and time.monotonic() < end:
            words |= {q: store.get(LEFT.format(q)).decode() for q in silent if store.check([LEFT.format(q)])}
            silent = [q for q in silent if q not in words]
            time.sleep(0.05)
        met = [store.add(MET.format(q), 0) for q in range(size)]
        silent = [q for q in silent if met[q] < met[rank]] or silent
    except RuntimeError:
        return LostProcess(f"rank 0, which all others meet through, has ended; {advice}")
    ended = [f"rank {q} has ended ({said.rstrip('.')})" for q, said in words.items() if said != WAITS]
    if ended:
        return LostProcess(f"{', '.join(ended)}; {advice}")
    if not silent:
        return LostProcess(f"rank {rank} was told to end; {advice}")
    named = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
    hangs = waited is not None and waited > 0.9 * patience()
    return LostProcess(f"{named} {f'did not answer for {waited:.0f} s' if hangs else 'died'}; {advice}")
