"""The shipped torsional model, on molecules that it was not trained on."""

import pytest
import torch

pytest.importorskip("rdkit")

from tiltflow.core.weights import evidence
from tiltflow.molecules.amortised import SHIPPED, load_amortised
from tiltflow.molecules.energies import open_energy
from tiltflow.molecules.molecule import molecule
from tiltflow.molecules.split import unseen
from tiltflow.molecules.templates import templates
from tiltflow.molecules.torsions import rotatable_torsions

PROCAINE = "CCN(CC)CCOC(=O)c1ccc(N)cc1"


def elbo(model, mol):
    """E log w at the temperature of training, from 64 draws in 12 steps."""
    torsions, energy = rotatable_torsions(mol, model.settings.conjugated), open_energy("mmff94", mol)
    rigid = templates(mol, torsions, 1, 0, embeddings=8).positions
    sampler = model.of(mol, energy, torsions, rigid, model.settings.temperature, 12)
    (drawn,) = sampler.draw([64], torch.Generator().manual_seed(0))
    return evidence(drawn.log_weights).elbo


def scaled(model, factor):
    """The model with its field times a factor: 0 is the untrained one."""
    with torch.no_grad():
        for layer in model.control.module.net.layers:
            layer.push.weight.mul_(factor)
    return model


def test_it_avoids_clashes_of_a_molecule_it_never_saw():
    """The bound on log Z is hundreds of kT above that of the untrained network, and of the field turned round."""
    torch.set_default_dtype(torch.float32)
    path = SHIPPED
    model = load_amortised(path)
    procaine = molecule(PROCAINE)
    unseen([procaine], model.smiles)
    learned, untrained, against = (elbo(scaled(load_amortised(path), factor), procaine) for factor in (1, 0, -1))
    assert learned > untrained + 200 and learned > against + 200
