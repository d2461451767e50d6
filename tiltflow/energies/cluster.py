"""Work for many processors on a Ray cluster: energies by rows, and whatever else depends on its arguments only.

A worker that dies is replaced and its work done again; when all that is left has taken far longer than anything before, it
is started a second time elsewhere, and who is first counts. Results come in the order of the work, and are counted by who
asked, so neither changes a result or a count. Ray is imported where it is used.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.energies.evaluator import Energy, value_and_forces

LOCAL = "local"
RETRIES = 3
LATE, SOONEST = 2.0, 5.0
"""Longer than so many times the longest work so far, and so many seconds, is late."""


class Cluster:
    """A Ray cluster; of one process all are the same.

    Args:
        address: where it is, as Ray takes it: ``ray://host:10001``, ``host:6379``, ``auto``; ``local``: one of this machine.
        workers: of a local one (None: one per processor).

    Raises:
        TiltflowError: Ray is missing, or no cluster is there.
    """

    def __init__(self, address: str, workers: int | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise TiltflowError(f"Ray is not there ({error}); install it with `pip install 'tiltflow[ray]'`.") from error
        self._ray = ray
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "ignore_reinit_error": True}
        seen = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)  # what is importable here is there too
        local = {"num_cpus": workers, "include_dashboard": False, "runtime_env": {"env_vars": {"PYTHONPATH": seen}}}
        try:
            ray.init(**quiet, **(local if address == LOCAL else {"address": address}))
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise TiltflowError(f"no Ray cluster at {address!r} ({error}); start one, or use {LOCAL}.") from error

    def map(
        self, work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], done: Callable[[int, Any], None] | None = None
    ) -> list[Any]:
        """``work(*job)`` of every job, in their order; ``done(i, result)`` is called as they come.

        Raises:
            TiltflowError: a worker died at the same job over and over; and whatever the work raises.
        """
        task = self._ray.remote(num_cpus=1, max_retries=RETRIES)(_timed)
        running = {task.remote(work, job): i for i, job in enumerate(jobs)}
        found: dict[int, Any] = {}
        again: set[int] = set()
        longest, heard = 0.0, time.monotonic()
        while len(found) < len(jobs):
            for ref in self._ray.wait([*running], timeout=1.0)[0]:
                i = running.pop(ref)
                seconds, found[i] = self._get(ref, i)
                longest, heard = max(longest, seconds), time.monotonic()
                for copy in [other for other, j in running.items() if j == i]:
                    del running[copy]
                    self._ray.cancel(copy, force=True)
                if done is not None:
                    done(i, found[i])
            late = {*running.values()} - again
            waited = time.monotonic() - heard > max(LATE * longest, SOONEST)
            if found and late and waited and len(running) < self._ray.cluster_resources().get("CPU", 1):
                running |= {task.remote(work, jobs[i]): i for i in late}
                again |= late
        return [found[i] for i in range(len(jobs))]

    def _get(self, ref: Any, i: int) -> Any:
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.WorkerCrashedError as error:
            raise TiltflowError(f"{RETRIES + 1} workers died at job {i}: is there enough memory?") from error

    def close(self) -> None:
        """Leave the cluster; a local one ends."""
        self._ray.shutdown()


def _timed(work: Callable[..., Any], job: tuple[Any, ...]) -> tuple[float, Any]:
    torch.set_num_threads(1)
    started = time.monotonic()
    result = work(*job)
    return time.monotonic() - started, result


class ClusterEnergy:
    """An energy whose rows are evaluated on a cluster, ``rows`` of them at a time: a ForceProvider.

    Args:
        energy: E in kT, of which each row depends on its own x only; it is sent to the workers.
        cluster: who works.
        rows: of a piece of work.
    """

    def __init__(self, energy: Energy, cluster: Cluster, rows: int = 16) -> None:
        self.energy, self.cluster, self.rows = energy, cluster, rows

    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E (B,) and −∇E (B, *event)."""
        parts = self.cluster.map(value_and_forces, [(self.energy, part.clone()) for part in x.split(self.rows)])
        return torch.cat([e for e, _ in parts]), torch.cat([f for _, f in parts])
