"""Distances against closed forms."""

import pytest
import torch

from tiltflow.core.errors import TiltflowError
from tiltflow.metrics.distance import mean_w2, pairwise_mean, total_variation, w2


def test_w2_of_a_translation_and_of_gaussians(generator):
    x = torch.randn(300, 2, generator=generator)
    shift = torch.tensor([3.0, 4.0])
    assert w2(x, x + shift) == pytest.approx(5.0)  # with its square root: the mean squared distance is 25
    assert w2(x, x[torch.randperm(300, generator=generator)]) == pytest.approx(0.0, abs=1e-9)
    y = 2 + 3 * torch.randn(2000, 1, generator=generator)
    z = torch.randn(2000, 1, generator=generator)
    exact = ((2.0) ** 2 + (3 - 1.0) ** 2) ** 0.5
    assert mean_w2(y, z, 1000, 3, generator) == pytest.approx(exact, rel=0.05)


def test_w2_equals_brute_force(generator):
    import itertools

    x, y = torch.randn(2, 6, 3, generator=generator)
    squared = torch.cdist(x, y).square()
    best = min(sum(float(squared[i, p[i]]) for i in range(6)) for p in itertools.permutations(range(6)))
    assert w2(x, y) == pytest.approx((best / 6) ** 0.5)


def test_pairwise_mean_and_its_error(generator):
    x = torch.randn(2000, 1, generator=generator)
    mean, error = pairwise_mean(x)
    assert abs(mean - 2 / torch.pi**0.5) < 4 * error  # E|a − b| of N(0, 1)
    copies = x[torch.zeros(50, dtype=torch.long)]
    both = torch.cat([x[:50], copies])
    identity = torch.cat([torch.arange(50), torch.full((50,), 10_000)])
    assert pairwise_mean(both, identity)[0] > pairwise_mean(both)[0]  # pairs of copies do not count


def test_total_variation():
    assert total_variation(torch.tensor([0.5, 0.5]), torch.tensor([0.2, 0.8])) == pytest.approx(0.3)


def test_unequal_sets_are_refused():
    with pytest.raises(TiltflowError, match="equal shape"):
        w2(torch.zeros(3, 2), torch.zeros(4, 2))
