"""Work on a Ray cluster of this machine: workers that die or dawdle change no result and no count."""

import os
import signal
import time

import pytest
import torch
from torch import Tensor

from tiltflow import TiltflowError
from tiltflow.energies import Evaluator
from tiltflow.energies.cluster import Cluster, ClusterEnergy
from tiltflow.sampling.job import SamplerJob


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(TiltflowError, match=r"pip install 'tiltflow\[ray\]'"):
        Cluster("local")
    with pytest.raises(TiltflowError, match="Ray is not there"):
        SamplerJob(problem="gmm40", ray="local").check()


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray")
    made = Cluster("local", workers=2)
    yield made
    made.close()


def once(path):
    """Whether nobody was here before."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def dies(i, path):
    if i == 3 and once(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return i * i


def always_dies(i, path):
    os.kill(os.getpid(), signal.SIGKILL)


def dawdles(i, path):
    time.sleep(0.1)
    if i == 1 and once(path):
        time.sleep(300)
    return i * i


def refuses(i, path):
    raise TiltflowError("not this one.")


@pytest.mark.slow
@pytest.mark.parametrize("work", [dies, dawdles])
def test_every_job_is_done_once(cluster, work, tmp_path):
    told, started = [], time.monotonic()
    path = tmp_path / "seen"
    assert cluster.map(work, [(i, path) for i in range(8)], lambda i, v: told.append((i, v))) == [i * i for i in range(8)]
    assert sorted(told) == [(i, i * i) for i in range(8)] and path.exists() and time.monotonic() - started < 100


@pytest.mark.slow
def test_what_cannot_be_done_is_said(cluster, tmp_path):
    with pytest.raises(TiltflowError, match=r"^not this one\.$"):
        cluster.map(refuses, [(0, tmp_path)])
    with pytest.raises(TiltflowError, match="4 workers died at job 0"):
        cluster.map(always_dies, [(0, tmp_path)])


class Quartic:
    """Σ x⁴, whose worker dies once."""

    def __init__(self, path):
        self.path = path

    def __call__(self, x: Tensor) -> Tensor:
        if self.path is not None and once(self.path):
            os.kill(os.getpid(), signal.SIGKILL)
        return (x**4).sum(1)


@pytest.mark.slow
def test_an_energy_on_a_cluster(cluster, tmp_path):
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    here, there = Evaluator(Quartic(None)), Evaluator(ClusterEnergy(Quartic(tmp_path / "seen"), cluster))
    for a, b in zip(here.value_and_grad(x), there.value_and_grad(x)):
        assert torch.equal(a, b)
    assert (tmp_path / "seen").exists() and here.report() == there.report()
    assert torch.equal(there.value(x[:0]), x[:0, 0]) and torch.equal(there.value(x[:1]), here.value(x[:1]))


ENERGY = """
import os, signal
from tiltflow.molecules.energies.mmff import MMFF94
def energy(molecule):
    try:
        os.close(os.open("SEEN", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return MMFF94(molecule)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_conformers_on_a_cluster(tmp_path):
    """A worker dies at the first energy: samples, energies and counts are those of processes of this machine."""
    pytest.importorskip("ray")
    pytest.importorskip("rdkit")
    from tiltflow.molecules.read import read_molecules
    from tiltflow.molecules.run import make_all
    from tiltflow.molecules.settings import ConformerSettings, TorsionalSettings
    from tiltflow.run.job import silent

    torch.set_default_dtype(torch.float32)  # that of the workers
    (tmp_path / "mine.py").write_text(ENERGY.replace("SEEN", str(tmp_path / "seen")))
    (tmp_path / "three.smi").write_text("CCCC butane\nCCO ethanol\nCC(C)CO isobutanol\n")
    sampler = TorsionalSettings(rounds=2, gradient_steps=2, batch=16, steps=4, draw_steps=4)
    settings = ConformerSettings(n=6, energy=f"{tmp_path / 'mine.py'}:energy", sampler=sampler)
    read = read_molecules(str(tmp_path / "three.smi"), None, 50)
    found = []
    for name, ray in (("there", "local"), ("here", None)):
        folder = tmp_path / name
        folder.mkdir()
        found.append(make_all(read, settings, 0, False, folder, silent, ray))
        assert (tmp_path / "seen").exists()
    for (there, _), (here, _) in zip(*(made.found for made in found), strict=True):
        assert torch.equal(there.positions, here.positions) and torch.equal(there.energy, here.energy)
        assert there.provenance == here.provenance  # the number of energies among it
