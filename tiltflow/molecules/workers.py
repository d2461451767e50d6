"""Processes that are kept, and do one piece of work after the other; one that hangs or dies costs its own piece only.

    def done(i, problem): ...                    # problem: None, or why piece i was not finished
    apart(work, [(1, 2), (3, 4)], workers=2, seconds=60.0, done=done)

A limit inside the process would not do: what hangs is compiled code, which hears of nothing but the end of its process.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from tiltflow.core.errors import TiltflowError

Done = Callable[[int, str | None], None]


def apart(work: Callable[..., None], jobs: Sequence[tuple[Any, ...]], workers: int, seconds: float, done: Done) -> None:
    """``work(*job)`` of every job, ``workers`` at a time; ``done`` is told of each as it ends, in this process.

    Args:
        work: a function that a fresh process can import.
        jobs: its arguments.
        workers: how many processes.
        seconds: that a job may take; the start of a process is not counted.
        done: of (job, problem): None, or that it took too long, or how its process died.

    Raises:
        TiltflowError: a process could not start. And whatever ``work`` raises.
    """
    left = iter(enumerate(jobs))
    running = [worker for _ in range(workers) if (worker := _next(work, left, None)) is not None]
    try:
        while running:
            until = min(worker.until(seconds) for worker in running)
            heard = wait([worker.pipe for worker in running], max(0.0, min(until - time.monotonic(), 3600.0)))
            for worker in list(running):
                problem = worker.problem(worker.pipe in heard, seconds)
                if problem is None:
                    continue
                if problem:
                    worker.end()
                running.remove(worker)
                if (following := _next(work, left, None if problem else worker)) is not None:
                    running.append(following)
                elif not problem:
                    worker.end()
                done(worker.job, problem or None)
    finally:
        for worker in running:
            worker.end()


@dataclass
class _Worker:
    """A process at a job since ``started``; None: it is not up yet."""

    process: Any
    pipe: Connection
    job: int
    started: float | None

    def until(self, seconds: float) -> float:
        return float("inf") if self.started is None else self.started + seconds

    def problem(self, heard: bool, seconds: float) -> str | None:
        """None: it goes on; "": it has finished; else why it has not. Raises what the work raised."""
        if not heard:
            late = time.monotonic() >= self.until(seconds)
            return f"it took more than {seconds:g} s; --time-limit sets how long a molecule may take" if late else None
        try:
            said = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            if self.started is None:
                raise TiltflowError(
                    f"a process could not start ({_cause(self.process.exitcode)}); a script must do its work below "
                    "`if __name__ == '__main__':`."
                ) from None
            return f"its process died ({_cause(self.process.exitcode)}); is there enough memory?"
        if isinstance(said, BaseException):
            raise said
        if said == "up":
            self.started = time.monotonic()
            return None
        return ""

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _next(work: Callable[..., None], left: Any, free: _Worker | None) -> _Worker | None:
    """A worker at the next job, the free one or a new one; None if no job is left."""
    following = next(left, None)
    if following is None:
        return None
    i, job = following
    if free is None:
        context = get_context("spawn")
        pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process, pipe, i, None)
    else:
        worker = _Worker(free.process, free.pipe, i, time.monotonic())
    worker.pipe.send(job)
    return worker


def _serve(pipe: Connection, work: Callable[..., None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    pipe.send("up")
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            work(*job)
            pipe.send("done")
        except BaseException as error:
            pipe.send(error)


def _cause(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
