"""Free energies of molecules by path weights from two samplers, and their ensembles judged by another energy.

``make energy-xtb; .venv-energy-xtb/bin/python benchmarks/conformer_ensembles.py --rescore gfn2 --out FILE.json``

The forty molecules' first with at most ``--torsions``: samplers trained at 300 K and at 450 K, both weighted for MMFF94 at
300 K. Their drifts differ, their log Z must not: ``difference`` is of log Z, in kT, ``sigma`` its standard error from the
two ESS. ``rescored_ess`` is what is left when the ensemble of the first is weighted for the other energy, and
``rescored_shift`` the root mean square change, in kT, of E' − E over its weighted samples: how far the two energies differ.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch

from tiltflow.bench.conformers import DATA
from tiltflow.bench.result import publish
from tiltflow.molecules.energies import kt_per, open_energy
from tiltflow.molecules.generate import generate, rescored
from tiltflow.molecules.geom import list_molecules, read_reference
from tiltflow.molecules.molecule import Molecule
from tiltflow.molecules.settings import ConformerSettings
from tiltflow.molecules.torsions import rotatable_torsions

KELVIN, OTHER, DRAWS = 300.0, 450.0, 500


def measure(molecule: Molecule, seed: int, rescore: str | None) -> dict[str, Any]:
    started = time.perf_counter()
    one, two = (generate(molecule, ConformerSettings(sampling_temperature=hot, n=DRAWS), seed) for hot in (KELVIN, OTHER))
    assert one.log_weights is not None and two.log_weights is not None
    log_z = [float(torch.logsumexp(e.log_weights, 0)) for e in (one, two)]
    sigma = math.sqrt(sum((1 / e.ess - 1) / DRAWS for e in (one, two)))
    row = {
        "molecule": molecule.name, "smiles": molecule.smiles, "torsions": len(rotatable_torsions(molecule).atoms),
        "templates": int(one.provenance["templates"]), "seed": seed, "ess": one.ess, "ess_other": two.ess,
        "difference": log_z[1] - log_z[0], "sigma": sigma,
        "energy_calls": sum(int(e.provenance["energy_evaluations"]) for e in (one, two)),
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    if rescore is not None:
        started = time.perf_counter()
        old, new = (open_energy(name, molecule) for name in ("mmff94", rescore))
        again = rescored(one, old, new)
        gap = again.energy * kt_per(new.unit, KELVIN) - one.energy * kt_per(old.unit, KELVIN)
        centred = gap - (one.weights * gap).sum()
        row |= {
            "rescored_with": rescore, "rescored_ess": again.ess, "rescored_reliable": again.reliable,
            "rescored_shift": float((one.weights * centred**2).sum().sqrt()),
            "rescored_seconds": time.perf_counter() - started,
        }  # fmt: skip
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torsions", type=int, default=4, help="most torsions of a molecule")
    parser.add_argument("--molecules", type=int, default=6, help="how many")
    parser.add_argument("--rescore", help="another energy, e.g. gfn2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the JSON document")
    arguments, started = parser.parse_args(), time.perf_counter()
    every = (read_reference(DATA, line).molecule for line in list_molecules(DATA))
    chosen = [m for m in every if 1 <= len(rotatable_torsions(m).atoms) <= arguments.torsions][: arguments.molecules]
    rows = [measure(m, arguments.seed, arguments.rescore) for m in chosen]
    publish(rows, arguments.seed, arguments.out, started)


if __name__ == "__main__":
    main()
