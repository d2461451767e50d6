"""Several processes at once, as a launcher would start them, but forked from one that has imported all they need."""

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


CONTEXT = multiprocessing.get_context("forkserver")  # not from this process, which may have used a device
CONTEXT.set_forkserver_preload(["torch", "tiltflow.train.fit", "test_distributed"])


def _one(work, rank, size, port, seconds, dtype, pipe):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), TIMEOUT: str(seconds)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
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
    """What ``work(rank)``, a function of a module, returned or raised in each of them, or in the first ``survivors``."""
    port, dtype = free_port(), torch.get_default_dtype()
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(size)]
    every = [(work, rank, size, port, seconds, dtype, pipe) for rank, (_, pipe) in enumerate(pipes)]
    started = [CONTEXT.Process(target=_one, args=one, daemon=True) for one in every]
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
