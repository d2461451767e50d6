"""Several processes at once, as a launcher would start them, but forked from this one."""

import multiprocessing
import os
import pickle
import socket

import torch

from tiltflow.train.distributed import TIMEOUT, join


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _one(work, rank, size, port, seconds, pipe):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), TIMEOUT: str(seconds)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    join()
    try:
        said = work(rank)
    except BaseException as error:
        said = error
    try:
        answer = pickle.dumps(said)
    except (pickle.PicklingError, TypeError, AttributeError):
        answer = pickle.dumps(AssertionError(f"{type(said).__name__}: {said}"))
    pipe.send_bytes(answer)
    os._exit(0)


def ranks(work, size=2, seconds=60, survivors=None):
    """What ``work(rank)`` returned or raised in each of them, or in the first ``survivors``."""
    context, port = multiprocessing.get_context("fork"), free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    every = [(work, rank, size, port, seconds, pipe) for rank, (_, pipe) in enumerate(pipes)]
    started = [context.Process(target=_one, args=one, daemon=True) for one in every]
    for process in started:
        process.start()
    try:
        found = []
        for end, _ in pipes[:survivors]:
            assert end.poll(120), "no answer"
            found.append(pickle.loads(end.recv_bytes()))
    finally:
        for process in started:
            process.kill()
    return found
