"""Low-rank updates: exact at the start, exact when merged, and only they train."""

import pytest
import torch
from torch import nn

from tiltflow.core.errors import TiltflowError
from tiltflow.nn.lora import add_low_rank, merge_low_rank


def test_low_rank_updates_start_at_the_module_and_merge_exactly(generator):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 5))
    x = torch.randn(9, 5, generator=generator)
    before, names = net(x), set(net.state_dict())
    add_low_rank(net, 2, generator)
    assert torch.equal(net(x), before)
    trained = [p for p in net.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * 2 * (5 + 7)
    with torch.no_grad():
        for p in trained:
            p.normal_(generator=generator)
    moved = net(x)
    assert (moved - before).abs().max() > 0.1
    merge_low_rank(net)
    assert set(net.state_dict()) == names
    assert torch.allclose(net(x), moved)


def test_misuse(generator):
    with pytest.raises(TiltflowError, match="at least 1"):
        add_low_rank(nn.Linear(2, 2), 0, generator)
    with pytest.raises(TiltflowError, match=r"no nn\.Linear"):
        add_low_rank(nn.SiLU(), 2, generator)
