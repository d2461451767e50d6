"""Two processes that train together, on gloo."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.multiprocessing import spawn

from tiltflow.train.distributed import any_of, average_gradients, join, wait, world
from tiltflow.train.store import load_state


def together(rank, folder, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    assert join() == (rank, 2) == world()
    x = torch.tensor([1.0 + rank, 3.0], requires_grad=True)
    unused = torch.zeros(1, requires_grad=True)
    (x**2).sum().backward()
    average_gradients([x, unused])
    flags = [any_of(rank == 1, x.device), any_of(False, x.device)]
    wait()
    (folder / f"{rank}.json").write_text(json.dumps([x.grad.tolist(), unused.grad.tolist(), flags]))
    torch.distributed.destroy_process_group()


def test_gradients_are_averaged_and_all_stop_together(tmp_path):
    spawn(together, (tmp_path, 29_500 + os.getpid() % 1_000), nprocs=2)
    for rank in (0, 1):  # means of 2, 4 and of 6, 6
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [[3.0, 6.0], [0.0], [True, False]]


def test_one_process_is_alone():
    x = torch.ones(2, requires_grad=True)
    x.sum().backward()
    average_gradients([x])
    wait()
    assert join() == (0, 1) and x.grad.tolist() == [1.0, 1.0] and any_of(True, x.device) and not any_of(False, x.device)


LAUNCHERS = {
    1: ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no"],
    2: ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(30_500 + os.getpid() % 1_000)],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("processes", LAUNCHERS)
def test_a_pipeline_trains_under_a_launcher(tmp_path, processes):
    """The same command. Two processes end with one adapter, made of paths of their own; the run folder is the first's."""
    pytest.importorskip("accelerate")
    import tiny_pipelines as tiny

    torch.set_default_dtype(torch.float32)
    tiny.build("stable_diffusion").save_pretrained(tmp_path / "pipe")
    (tmp_path / "mine.py").write_text("def bright(x, texts):\n    return x.flatten(1).mean(1)\n")
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    command = ["finetune-pipeline", "pipe", "--reward", "mine.py:bright", "--prompts", "prompts.txt", "--out", "run",
               "--rounds", "3", "--batch", "4", "--steps", "4", "--rank", "2", "--samples", "4", "--json"]  # fmt: skip
    call = [sys.executable, "-m", *LAUNCHERS[processes], "-m", "tiltflow", *command]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode in (0, 3), done.stderr
    document = json.loads(done.stdout.strip().splitlines()[-1])
    assert document["rows"][0]["rounds"] == 3 and (tmp_path / "run" / "adapter").is_dir()
    files = sorted((tmp_path / "run").glob("checkpoint*"))
    assert len(files) == processes
    if processes == 2:
        first, second = map(load_state, files)
        for a, b in zip(first["weights"], second["weights"], strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(first["buffer"]["x"], second["buffer"]["x"])
