"""Which conformers are kept."""

import itertools

import pytest
import torch

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.select import cover


def points(seed):
    """(m, m) distances on a line: 60 near 0, 30 near 10, 10 near 20, in random order; and the places."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([0.2 * torch.randn(n, generator=generator) + at for n, at in ((60, 0), (30, 10), (10, 20))])
    x = x[torch.randperm(100, generator=generator)]
    return (x[:, None] - x).abs(), x


@pytest.mark.parametrize("seed", range(3))
def test_the_most_useful_come_first(seed):
    """One of each cluster, the largest first; then the clusters are covered more finely, and none comes twice."""
    rmsd, x = points(seed)
    chosen = cover(rmsd, 40, 2.0)
    assert x[chosen[:3]].round(decimals=-1).tolist() == [0, 10, 20]
    assert len(set(chosen.tolist())) == 40
    assert rmsd[:, chosen].amin(1).max() < 0.5 * rmsd[:, :40].amin(1).max()  # the first 40 leave larger gaps
    assert torch.equal(chosen[:10], cover(rmsd, 10, 2.0))


@pytest.mark.parametrize("seed", range(5))
def test_coverage_is_near_the_best(seed):
    """At least 1 − 1/e of what the best three of twelve cover, of all 220 triples."""
    x = torch.rand(12, 2, generator=torch.Generator().manual_seed(seed))
    near = torch.cdist(x, x) <= 0.3
    best = max(int(near[:, list(rows)].any(1).sum()) for rows in itertools.combinations(range(12), 3))
    greedy = int(near[:, cover(torch.cdist(x, x), 3, 0.3)].any(1).sum())
    assert (1 - 1 / torch.e) * best <= greedy <= best


def test_twins_and_misuse():
    """Five times the same: any will do. Impossible numbers are refused."""
    assert sorted(cover(torch.zeros(5, 5), 5, 1.0).tolist()) == [0, 1, 2, 3, 4]
    for n, radius in ((0, 1.0), (6, 1.0), (2, 0.0)):
        with pytest.raises(TiltflowError, match=f"choose {n} of 5 conformers"):
            cover(torch.zeros(5, 5), n, radius)
