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


class Allocator:
    """CUDA's memory of ``total`` bytes, as torch reports it: blocks stay reserved when they are freed, until emptied."""

    def __init__(self, total, weights, cached):
        self.total, self.allocated, self.reserved = total, weights, weights + cached
        self.reset_peak_memory_stats()

    def use(self, size, lost):
        """Allocate and free, where ``lost`` bytes of what is reserved for it cannot be used."""
        self.reserved = max(self.reserved, self.allocated + size + lost)
        self.peak_allocated = max(self.peak_allocated, self.allocated + size)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def empty_cache(self):
        self.reserved = self.allocated

    def reset_peak_memory_stats(self, device=None):
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def memory_allocated(self, device):
        return self.allocated

    def memory_reserved(self, device):
        return self.reserved

    def max_memory_allocated(self, device):
        return self.peak_allocated

    def max_memory_reserved(self, device):
        return self.peak_reserved

    def mem_get_info(self, device):
        return self.total - self.reserved, self.total


@pytest.mark.parametrize("cached", [0, 60])
def test_on_cuda_what_is_cached_is_free_and_what_is_lost_is_needed(monkeypatch, cached):
    """100 bytes, 20 of weights: a row that takes 10, of which 2 are lost to fragments, fits ⌊.8 · 80/10⌋ times."""
    device, gpu = torch.device("cuda"), Allocator(100, 20, cached)
    for name in vars(Allocator):
        if not name.startswith("_") and name != "use":
            monkeypatch.setattr(torch.cuda, name, getattr(gpu, name))
    assert memory.fitting_rows(lambda: gpu.use(8, 2), 16, device) == 6
    assert memory.free_bytes(device) == 80


def test_devices_that_cannot_be_measured():
    with pytest.raises(TiltflowError, match="cannot be measured on meta"):
        memory.peak_bytes(lambda: None, torch.device("meta"))
