"""The torsional sampler against quadrature, molecules with at most three torsions.

``python benchmarks/torsional_quadrature.py --out benchmarks/results/torsional-quadrature-0.json``

For each molecule, at 300 K with MMFF94 and the settings of ``tiltflow conformers``: one template, 10,000 draws. ``tv`` is
the largest total variation of a torsion's weighted histogram (18 bins) from the exact one on a grid, ``tv_raw`` of the draws
without weights, ``log_z_error`` in kT, and ``energy_error`` of the weighted mean energy in kcal/mol.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.bench.result import publish
from tiltflow.core.weights import evidence, normalised
from tiltflow.molecules.energies import kt_per, open_energy
from tiltflow.molecules.molecule import molecule
from tiltflow.molecules.templates import templates
from tiltflow.molecules.torsional import train_torsional
from tiltflow.molecules.torsions import rotatable_torsions

MOLECULES = {
    "aspirin": "CC(=O)Oc1ccccc1C(=O)O",
    "paracetamol": "CC(=O)Nc1ccc(O)cc1",
    "nicotine": "CN1CCC[C@H]1c1cccnc1",
    "diazepam": "CN1C(=O)CN=C(c2ccccc2)c2cc(Cl)ccc21",
    "2-phenylethanol": "OCCc1ccccc1",
    "butan-1-ol": "CCCCO",
    "N-benzylacetamide": "CC(=O)NCc1ccccc1",
    "pentane": "CCCCC",
}
KELVIN, DRAWS, BINS = 300.0, 10_000, 18
POINTS = {1: 720, 2: 90, 3: 54}
"""Of the grid, per torsion; multiples of the bins."""


def histogram(angles: Tensor, weights: Tensor) -> Tensor:
    bins = ((angles.double() + math.pi) / (2 * math.pi) * BINS).long().clamp(0, BINS - 1)
    return torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, weights.double())


def worst(angles: Tensor, weights: Tensor, grid: Tensor, exact: Tensor) -> float:
    apart = [histogram(angles[:, k], weights) - histogram(grid[:, k], exact) for k in range(grid.shape[1])]
    return max(float(one.abs().sum()) / 2 for one in apart)


def measure(name: str, smiles: str, seed: int) -> dict[str, Any]:
    mol, started = molecule(smiles, name), time.perf_counter()
    torsions, energy = rotatable_torsions(mol), open_energy("mmff94", mol)
    dim, rigid = len(torsions.atoms), templates(mol, torsions, 1, seed).positions
    trained = train_torsional(energy, KELVIN, rigid, torsions, seed=seed)
    (drawn,) = trained.draw([DRAWS], torch.Generator().manual_seed(seed))
    seconds, calls = time.perf_counter() - started, trained.energy_calls
    step = 2 * math.pi / POINTS[dim]
    line = (torch.arange(POINTS[dim], dtype=torch.float64) + 0.5) * step - math.pi
    grid = torch.cartesian_prod(*[line] * dim).reshape(-1, dim)
    e = torch.cat([trained.energies[0].energy(part) for part in grid.split(4096)])
    exact, log_z = torch.softmax(-e, 0), float(torch.logsumexp(-e, 0)) + dim * math.log(step)
    found, weights = evidence(drawn.log_weights), normalised(drawn.log_weights).double()
    equal = torch.full_like(weights, 1 / len(weights))
    return {
        "molecule": name, "smiles": mol.smiles, "rotatable_bonds": mol.rotatable_bonds, "torsions": dim, "seed": seed,
        "tv": worst(drawn.x, weights, grid, exact), "tv_raw": worst(drawn.x, equal, grid, exact),
        "log_z_error": found.log_z - log_z, "log_z_std": found.log_z_error, "ess": found.ess,
        "energy_error": float((weights * drawn.energy).sum() - (exact * e).sum()) / kt_per("kcal/mol", KELVIN),
        "energy_calls": calls, "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--molecules", nargs="+", choices=list(MOLECULES), default=list(MOLECULES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the JSON document")
    arguments, started = parser.parse_args(), time.perf_counter()
    rows = [measure(name, MOLECULES[name], arguments.seed) for name in arguments.molecules]
    publish(rows, arguments.seed, arguments.out, started)


if __name__ == "__main__":
    main()
