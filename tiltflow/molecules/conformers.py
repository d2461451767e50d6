"""Conformers of one molecule in one call.

    import tiltflow
    ensemble = tiltflow.conformers("CC(=O)Oc1ccccc1C(=O)O", n=100, temperature=300)
    ensemble.to_sdf("aspirin.sdf")
    ensemble.positions, ensemble.energy, ensemble.weights      # (n, N, 3) Å, (n,) kcal/mol, (n,)
"""

from __future__ import annotations

from typing import Any

from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import Count, check_value, hints
from tiltflow.molecules.ensemble import Ensemble
from tiltflow.molecules.settings import ConformerSettings, MoleculeSeed, require_rdkit


def conformers(
    molecule: Any,
    n: int = 100,
    temperature: float | str = 300.0,
    *,
    seed: int = 0,
    device: str = "cpu",
    cover: bool = False,
    max_atoms: int = 200,
    **settings: Any,
) -> Ensemble:
    """Boltzmann-weighted conformers of one molecule, from an energy alone; conformers with a fault are left out.

    Args:
        molecule: A SMILES, an RDKit molecule, or a :class:`~tiltflow.molecules.molecule.Molecule`.
        n: How many.
        temperature: Of the ensemble, in K; or a text such as "300K".
        seed: Of the embeddings, the training and the draws.
        device: Of the networks; energies of other packages stay on the CPU.
        cover: Choose conformers that cover the minima instead, without weights.
        max_atoms: Most atoms, with hydrogens.
        settings: Other fields of :class:`~tiltflow.molecules.settings.ConformerSettings`: energy, rescore, model, ….

    Raises:
        TiltflowError: RDKit is missing, a setting out of range, a molecule that is refused or not taken by the energy.
    """
    unknown = [name for name in settings if name not in hints(ConformerSettings)]
    if unknown:
        raise TiltflowError(f"there is no setting {unknown[0]!r}; there are {', '.join(hints(ConformerSettings))}.")
    wanted = ConformerSettings(n=n, temperature=temperature, **settings)
    check_value("seed", seed, MoleculeSeed)
    check_value("max_atoms", max_atoms, Count)
    if cover:
        wanted.require_cover()
    require_rdkit()
    from tiltflow.molecules.read import one_molecule
    from tiltflow.molecules.run import make, sound
    from tiltflow.run.device import check_device

    return sound(make(one_molecule(molecule, max_atoms), wanted, seed, cover, device=check_device(device)))[0]
