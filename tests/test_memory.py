"""Rows that fit, by measurement."""

import pytest
import torch

from tiltflow.core.errors import TiltflowError
from tiltflow.pipelines import memory

CPU = torch.device("cpu")
MIB = 2**20


def allocate(mebibytes):
    return torch.zeros(mebibytes * MIB // 4, dtype=torch.float32).add_(1)


@pytest.mark.parametrize("mebibytes", [100, 300])
def test_the_peak_is_that_of_what_was_run(mebibytes):
    """Also if more was used before: within 10 % of 100 and 300 MB, after 500."""
    allocate(500)
    assert memory.peak_bytes(lambda: allocate(mebibytes), CPU) == pytest.approx(mebibytes * MIB, rel=0.1)


@pytest.mark.parametrize(("free", "rows"), [(50, 1), (1_000, 8), (10_000, 16)])
def test_rows_are_what_is_free_over_what_one_needs(monkeypatch, free, rows):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free * MIB)
    assert memory.fitting_rows(lambda: allocate(95), 16, CPU) == rows


def test_devices_that_cannot_be_measured():
    with pytest.raises(TiltflowError, match="cannot be measured on meta"):
        memory.peak_bytes(lambda: None, torch.device("meta"))
