"""What becomes of ordinary SMILES: how many lines are molecules that MMFF94 takes and RDKit embeds, and why others are not.

    python benchmarks/conformer_input.py --lines 300 --enumerate-stereo 16

Lines are drawn at random from the list of SPICE's training molecules. Nothing is sampled.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.energies import open_energy
from tiltflow.molecules.molecule import Molecule
from tiltflow.molecules.read import read_molecules
from tiltflow.molecules.run import _reason
from tiltflow.molecules.split import read_training_smiles
from tiltflow.molecules.templates import embed

TABLE = Path(__file__).parent / "data" / "spice_train_smiles.tsv.gz"


def outcome(molecule: Molecule) -> str:
    """ "runs", or why not."""
    try:
        open_energy("mmff94", molecule)
        embed(molecule, 1, seed=0)
    except TiltflowError as error:
        return _reason(error, molecule)
    return "runs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=300)
    parser.add_argument("--enumerate-stereo", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    smiles = read_training_smiles(TABLE)
    chosen = np.random.default_rng(given.seed).choice(len(smiles), given.lines, replace=False)
    as_written, enumerated, others = Counter[str](), Counter[str](), []
    for line in (smiles[i] for i in chosen):
        for most, count in ((0, as_written), (given.enumerate_stereo, enumerated)):
            read = read_molecules(line, None, 200, most)
            found = [outcome(m) for m in read.molecules] or [r.reason for r in read.rejects]
            said = "runs" if "runs" in found else found[0]
            count[said.partition(":")[0]] += 1
            if said == "runs":
                break
        else:
            others.append({"smiles": line, "reason": said})
        if most == 0:
            enumerated["runs"] += 1
    print(json.dumps({**vars(given), "as_written": as_written, "enumerated": enumerated, "others": others}, indent=1))


if __name__ == "__main__":
    main()
