"""Is the MMFF94 of tiltflow RDKit's, and what does it cost? ``python benchmarks/mmff94.py --out FILE.json``

Of molecules of SPICE drawn at random, two embeddings each with atoms moved by .1 Å: the largest difference in energy
(kcal/mol) and in a component of the gradient (kcal/mol/Å). Then, of three molecules, microseconds of processor time per
conformer, energy and gradient, of both, one thread each, alternating, the fastest of five.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rdkit import Chem, RDLogger
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers
from torch import Tensor

from tiltflow.bench.result import publish
from tiltflow.molecules.energies.mmff import MMFF94
from tiltflow.molecules.molecule import Molecule, molecule, positions_of

SPICE = Path(__file__).parent / "data" / "spice_train_smiles.tsv.gz"
TIMED = {"butane": "CCCC", "aspirin": "CC(=O)Oc1ccccc1C(=O)O", "propranolol": "CC(C)NC[C@H](O)COc1cccc2ccccc12"}
CONFORMERS, REPEATS = 512, 5


def field(of: Molecule, n: int, seed: int) -> tuple[rdForceFieldHelpers.ForceField, Tensor] | None:
    """RDKit's force field and n conformers (n, N, 3), atoms moved at random; None if it has none."""
    mol = Chem.Mol(of.mol)
    parameters = rdForceFieldHelpers.MMFFGetMoleculeProperties(mol)
    if parameters is None or not len(rdDistGeom.EmbedMultipleConfs(mol, n, randomSeed=seed)):
        return None
    made = rdForceFieldHelpers.MMFFGetMoleculeForceField(mol, parameters, nonBondedThresh=1e9)
    x = positions_of(mol)
    return made, x + 0.1 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))


def differences(of: Molecule, seed: int) -> tuple[float, float] | None:
    """The largest in energy and in gradient."""
    found = field(of, 2, seed)
    if found is None:
        return None
    rdkit, x = found
    energy, forces = MMFF94(of).energy_and_forces(x)
    rows = [row.ravel().tolist() for row in x.numpy()]
    exact = torch.tensor([(rdkit.CalcEnergy(row), *rdkit.CalcGrad(row)) for row in rows], dtype=torch.float64)
    return float((energy - exact[:, 0]).abs().max()), float((forces.flatten(1) + exact[:, 1:]).abs().max())


def agreement(count: int, seed: int) -> dict[str, float | int]:
    """Over so many molecules."""
    with gzip.open(SPICE, "rt") as lines:
        smiles = [row["SMILES"] for row in csv.DictReader(lines, delimiter="\t")]
    random.Random(seed).shuffle(smiles)
    rows: list[tuple[float, float]] = []
    for text in smiles:
        if len(rows) == count:
            break
        found = differences(molecule(text), seed)
        rows += [] if found is None else [found]
    energy, gradient = (max(column) for column in zip(*rows))
    return {"molecules": len(rows), "energy": energy, "gradient": gradient}


def cost(of: Molecule, seed: int) -> dict[str, float]:
    """Microseconds per conformer."""
    found = field(of, 8, seed)
    assert found is not None
    rdkit, x = found[0], found[1].repeat(CONFORMERS // 8, 1, 1)[:CONFORMERS]
    energy, single = MMFF94(of), x.float()
    rows = [row.ravel().tolist() for row in x[:64].numpy()]

    def microseconds(work: Callable[[], object], conformers: int) -> float:
        start = time.process_time()
        work()
        return (time.process_time() - start) / conformers * 1e6

    runs: dict[str, tuple[Callable[[], object], int]] = {
        "rdkit": (lambda: [(rdkit.CalcEnergy(row), rdkit.CalcGrad(row)) for row in rows], len(rows)),
        "float64": (lambda: energy.energy_and_forces(x), len(x)),
        "float32": (lambda: energy.energy_and_forces(single), len(x)),
    }
    times = [{name: microseconds(*run) for name, run in runs.items()} for _ in range(REPEATS)]
    return {name: min(t[name] for t in times) for name in runs}


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--molecules", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(1)
    RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]
    found = agreement(asked.molecules, asked.seed)
    rows = [{"molecule": name, **cost(molecule(smiles, name), asked.seed)} for name, smiles in TIMED.items()]
    publish(rows, asked.seed, asked.out, started, agreement=found)


if __name__ == "__main__":
    main()
