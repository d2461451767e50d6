"""Several processes at once, as a launcher would start them, but forked from this one."""

import multiprocessing
import os
import socket

import torch

from tiltflow.train.distributed import TIMEOUT, join


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _one(work, rank, size, port, seconds, pipe):
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), TIMEOUT: str(seconds),
    }  # fmt: skip
    torch.set_num_threads(1)
    join()
    try:
        pipe.send(work(rank))
    except Exception as error:
        pipe.send(error)
    os._exit(0)


def ranks(work, size=2, seconds=60):
    """What ``work(rank)`` returned or raised in each of them; None of one that was killed or is still at it."""
    context, port = multiprocessing.get_context("fork"), free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    started = [
        context.Process(target=_one, args=(work, rank, size, port, seconds, pipes[rank][1]), daemon=True) for rank in range(size)
    ]
    for process in started:
        process.start()
    found = []
    for (end, _), process in zip(pipes, started):
        for _ in range(1200):
            if end.poll(0.05) or not process.is_alive() or any(isinstance(v, Exception) for v in found):
                break
        try:
            found.append(end.recv() if end.poll(0.5) else None)
        except EOFError:
            found.append(None)
    for process in started:
        process.kill()
    return found
