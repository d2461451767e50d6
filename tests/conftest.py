"""Everything is checked in double precision unless a test says otherwise."""

from collections.abc import Iterator

import pytest
import torch

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010804000000b51c0c020000000b4944415478da6364f80f00010501012718e3660000000049454e44ae426082"
)
"""A PNG."""


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def painting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plots of a page are drawn but not painted, which takes most of the time of a short run; test_report paints."""
    monkeypatch.setattr("tiltflow.report.plots.png", lambda fig: PIXEL)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
