"""Populations in all coordinates by a plain Markov chain: ``python benchmarks/conformer_populations.py butane``

Nothing of the package but its molecules: numpy and RDKit's own MMFF94. A step is a Hamiltonian trajectory of all atoms and a
turn of all atoms beyond one bond by any angle, each accepted by Metropolis. Independent chains from embeddings of their own;
the standard error of a population is that of the chains' means.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers, rdMolTransforms

from tiltflow.bench.result import publish

KT = 8.31446261815324 * 300 / 4184
"""kcal/mol at 300 K."""
LEAPS, STEP, BURN = 10, 0.018, 0.1
MOLECULES: dict[str, tuple[str, dict[str, tuple[int, int, int, int]]]] = {
    "butane": ("CCCC", {"gauche": (0, 1, 2, 3)}),
    "dichloroethane": ("ClCCCl", {"gauche": (0, 1, 2, 3)}),
    "pentane": ("CCCCC", {"g1": (0, 1, 2, 3), "g2": (1, 2, 3, 4)}),
    "glycol": ("OCCO", {"gauche": (0, 1, 2, 3)}),
    "ethanolamine": ("NCCO", {"gauche": (0, 1, 2, 3)}),
}
"""SMILES, and dihedrals by name: a state is which of them are within 120° of 0."""


class Chain:
    """One walker."""

    def __init__(self, smiles: str, seed: int) -> None:
        self.mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        rdDistGeom.EmbedMolecule(self.mol, randomSeed=seed)
        properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(self.mol)
        self.field = rdForceFieldHelpers.MMFFGetMoleculeForceField(self.mol, properties, nonBondedThresh=1e9)
        self.field.Minimize()
        self.x = np.array(self.field.Positions()).ravel()
        self.rng = np.random.default_rng(seed)
        self.e = self.field.CalcEnergy(self.x.tolist())
        single = [b for b in self.mol.GetBonds() if min(b.GetBeginAtom().GetDegree(), b.GetEndAtom().GetDegree()) > 1]
        self.bonds = [self._beyond(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in single if not b.IsInRing()]

    def _beyond(self, b: int, c: int) -> tuple[int, int, list[int]]:
        seen, stack = {b, c}, [c]
        while stack:
            for near in self.mol.GetAtomWithIdx(stack.pop()).GetNeighbors():
                if near.GetIdx() not in seen:
                    seen.add(near.GetIdx())
                    stack.append(near.GetIdx())
        return b, c, sorted(seen - {b, c})

    def gradient(self, x: np.ndarray) -> np.ndarray:
        """∇E/kT; RDKit's CalcGrad uses the distances of the CalcEnergy before it."""
        flat = x.tolist()
        self.field.CalcEnergy(flat)
        return np.array(self.field.CalcGrad(flat)) / KT

    def step(self) -> None:
        """A trajectory and a turn."""
        p = self.rng.normal(size=self.x.size)
        before = p @ p / 2
        h = STEP * self.rng.uniform(0.7, 1.3)
        x = self.x
        p = p - h / 2 * self.gradient(x)
        for k in range(LEAPS):
            x = x + h * p
            p = p - (h if k < LEAPS - 1 else h / 2) * self.gradient(x)
        self.accept(x, p @ p / 2 - before)
        b, c, beyond = self.bonds[self.rng.integers(len(self.bonds))]
        y = self.x.reshape(-1, 3).copy()
        axis = (y[c] - y[b]) / np.linalg.norm(y[c] - y[b])
        turn, arm = self.rng.uniform(-np.pi, np.pi), y[beyond] - y[c]
        turned = arm * np.cos(turn) + np.cross(axis, arm) * np.sin(turn) + np.outer(arm @ axis, axis) * (1 - np.cos(turn))
        y[beyond] = y[c] + turned
        self.accept(y.ravel(), 0.0)

    def accept(self, x: np.ndarray, change: float) -> None:
        """Metropolis."""
        e = self.field.CalcEnergy(x.tolist())
        if np.log(self.rng.uniform()) < -((e - self.e) / KT + change):
            self.x, self.e = x, e

    def state(self, dihedrals: list[tuple[int, int, int, int]]) -> int:
        """Bit k: dihedral k is within 120° of 0."""
        self.mol.GetConformer().SetPositions(self.x.reshape(-1, 3))
        angles = [rdMolTransforms.GetDihedralDeg(self.mol.GetConformer(), *d) for d in dihedrals]
        return sum(2**k for k, angle in enumerate(angles) if abs(angle) < 120)


def main() -> None:
    """Run and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("molecules", nargs="+", choices=sorted(MOLECULES))
    parser.add_argument("--chains", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    asked, started, rows = parser.parse_args(), time.perf_counter(), []
    torch.set_num_threads(1)
    for name in asked.molecules:
        smiles, dihedrals = MOLECULES[name]
        means = []
        for k in range(asked.chains):
            chain, counts = Chain(smiles, asked.seed + k), np.zeros(2 ** len(dihedrals))
            for i in range(asked.steps):
                chain.step()
                if i >= BURN * asked.steps:
                    counts[chain.state(list(dihedrals.values()))] += 1
            means.append(counts / counts.sum())
        mean, error = np.mean(means, 0), np.std(means, 0, ddof=1) / np.sqrt(asked.chains)
        states = {"+".join(d for k, d in enumerate(dihedrals) if s >> k & 1) or "none": s for s in range(len(mean))}
        found = {state: [float(mean[s]), float(error[s])] for state, s in states.items()}
        rows.append({"molecule": name, "smiles": smiles, "kelvin": 300.0, "populations": found})
    publish(rows, asked.seed, asked.out, started)


if __name__ == "__main__":
    main()
