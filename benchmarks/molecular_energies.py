"""What does a molecular energy cost, and does it resist? ``python benchmarks/molecular_energies.py --out FILE.json``

For each energy installed here, on two molecules: milliseconds of processor time per conformer, energy and forces, in batches
of 16, the fastest of three after one to warm up; seconds to open it. And, of 64 conformers whose torsions were turned at
random until two atoms at least four bonds apart came within 1 Å: the share that is rejected, and by how many kT (300 K) the
lowest of the others lies above the relaxed conformer that was turned. A sampler would find a clash that lies below.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rdkit import Chem
from rdkit.Chem.rdDistGeom import EmbedMultipleConfs
from rdkit.Chem.rdForceFieldHelpers import MMFFOptimizeMoleculeConfs
from rdkit.Chem.rdMolTransforms import SetDihedralRad
from torch import Tensor

from tiltflow.bench.result import publish
from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.energies import MolecularEnergy, Reduced, open_energy
from tiltflow.molecules.molecule import Molecule, molecule
from tiltflow.molecules.settings import ENERGIES

MOLECULES = {"hydroxyethylhexanamide": "CCCCCC(=O)NCCO", "ibuprofen": "CC(C)Cc1ccc(cc1)C(C)C(=O)O"}
TORSION = Chem.MolFromSmarts("[!#1]~[!$(*#*)&!D1]-&!@[!$(*#*)&!D1]~[!#1]")
BATCH, REPEATS, CLASHES, KELVIN = 16, 3, 64, 300.0


def relaxed(of: Molecule, seed: int) -> Tensor:
    """BATCH conformers by RDKit, (B, N, 3) in Å."""
    mol = Chem.Mol(of.mol)
    EmbedMultipleConfs(mol, BATCH, randomSeed=seed)
    MMFFOptimizeMoleculeConfs(mol)
    return torch.stack([torch.from_numpy(c.GetPositions()) for c in mol.GetConformers()])


def clashes(of: Molecule, x: Tensor, seed: int) -> Tensor:
    """CLASHES conformers (CLASHES, N, 3) that differ from x, (N, 3), by their torsions only, with a contact below 1 Å."""
    generator = torch.Generator().manual_seed(seed)
    mol = Chem.Mol(of.mol)
    mol.RemoveAllConformers()
    mol.AddConformer(Chem.Conformer(len(x)))
    conformer = mol.GetConformer()
    conformer.SetPositions(x.numpy())
    distant = torch.from_numpy(Chem.GetDistanceMatrix(mol)) >= 4
    torsions, rows = mol.GetSubstructMatches(TORSION), []
    while len(rows) < CLASHES:
        for torsion in torsions:
            SetDihedralRad(conformer, *torsion, float(6.283185 * torch.rand((), generator=generator)))
        turned = torch.from_numpy(conformer.GetPositions())
        if bool((torch.cdist(turned, turned)[distant] < 1).any()):
            rows.append(turned)
    return torch.stack(rows)


def measured(energy: MolecularEnergy, of: Molecule, seed: int) -> dict[str, float | None]:
    x = relaxed(of, seed)
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.process_time()
        energy.energy_and_forces(x)
        seconds.append(time.process_time() - started)
    reduced = Reduced(energy, KELVIN)
    clashing = reduced.energy_and_forces(clashes(of, x[0], seed))[0] - reduced.energy_and_forces(x[:1])[0]
    kept = clashing[clashing.isfinite()]
    return {
        "atoms": x.shape[1],
        "ms_per_conformer": 1e3 * min(seconds[1:]) / len(x),
        "clashes_rejected": 1 - len(kept) / len(clashing),
        "lowest_clash_kt": float(kept.min()) if len(kept) else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started, rows = time.perf_counter(), []
    for name in ENERGIES:
        for title, smiles in MOLECULES.items():
            of, opening = molecule(smiles, title), time.perf_counter()
            try:
                energy = open_energy(name, of)
            except TiltflowError as error:
                rows.append({"energy": name, "molecule": title, "error": str(error)})
                continue
            row = {"energy": name, "molecule": title, "seconds_to_open": time.perf_counter() - opening}
            rows.append(row | measured(energy, of, arguments.seed))
    publish(rows, arguments.seed, arguments.out, started)


if __name__ == "__main__":
    main()
