"""MMFF94 in torch is RDKit's, term by term, in energy and gradient; on any device and in float32."""

import pytest
import torch

pytest.importorskip("rdkit")
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from tiltflow.molecules.energies import mmff, mmff_terms
from tiltflow.molecules.energies.mmff import MMFF94
from tiltflow.molecules.molecule import molecule, positions_of

MOLECULES = (
    "CC#CC", "C=C=C", "CN=[N+]=[N-]", "C[N+]#[C-]", "N#[N+]c1ccccc1", "CN=C=O", "S=C=S", "O=C=O",  # linear
    "[O-]S1([O-])CCCC1", "CS(=O)(=O)N", "CSSC", "c1cscc1", "CP(=O)(O)O", "C[N+](=O)[O-]", "BrCCI", "FC(F)(F)Cl",
    "C[Si](C)(C)C", "CC(=O)[O-]", "[NH3+]CC(=O)[O-]", "C[n+]1ccccc1", "c1cc[nH]c1", "O", "[Na+]", "NN",
    "C1CC1C2CO2", "C1CCC1", "C1C2CC12", "O=C1C=CC1", "C1=CC1", "CC(=O)Nc1ccc(cc1)C(C)C(=O)[O-]",
)  # fmt: skip


def compared(smiles):
    """The largest difference in energy and in gradient over two distorted conformers."""
    of = molecule(smiles)
    mol = Chem.Mol(of.mol)
    rdDistGeom.EmbedMultipleConfs(mol, 2, randomSeed=7)
    parameters = rdForceFieldHelpers.MMFFGetMoleculeProperties(mol)
    field = rdForceFieldHelpers.MMFFGetMoleculeForceField(mol, parameters, nonBondedThresh=1e9)
    x = positions_of(mol)
    x = x + 0.1 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    rows = [row.ravel().tolist() for row in x.numpy()]
    exact = torch.tensor([(field.CalcEnergy(row), *field.CalcGrad(row)) for row in rows], dtype=torch.float64)
    energy, forces = MMFF94(of).energy_and_forces(x)
    return max((energy - exact[:, 0]).abs()), (forces.flatten(1) + exact[:, 1:]).abs().max()


@pytest.mark.parametrize("smiles", MOLECULES)
def test_it_is_rdkit_s(smiles):
    energy, gradient = compared(smiles)
    assert energy < 1e-6 and gradient < 1e-5


@pytest.mark.parametrize(
    ("where", "name", "value", "smiles"),
    [
        (mmff_terms, "FORCE", 143.9324, "CC"),
        (mmff_terms, "CUBIC_STRETCH", -2.01, "CC"),
        (mmff_terms, "CUBIC_BEND", -0.006, "CC"),
        (mmff_terms, "COULOMB", 332.0637, "NCCO"),
        (mmff_terms, "BUFFER", 0.0, "NCCO"),
        (mmff, "FEWER", 0.76, "NCCO"),
        (mmff, "LINEAR", set(), "CC#CC"),
    ],
)
def test_another_constant_is_seen(where, name, value, smiles, monkeypatch):
    monkeypatch.setattr(where, name, value)
    assert compared(smiles)[0] > 1e-6


def test_rows_of_any_number_and_kind(monkeypatch):
    """Parts of a batch, of a term, one row, none; float32."""
    of = molecule("CC(=O)NC")
    mol = Chem.Mol(of.mol)
    rdDistGeom.EmbedMultipleConfs(mol, 5, randomSeed=7)
    x, energy = positions_of(mol), MMFF94(of)
    whole = energy.energy_and_forces(x)
    monkeypatch.setattr(mmff, "ROWS", 2)
    monkeypatch.setattr(mmff, "CHUNK", 200)
    for n in (0, 1, 5):
        torch.testing.assert_close(energy.energy_and_forces(x[:n]), (whole[0][:n], whole[1][:n]))
    value, forces = energy.energy_and_forces(x.float())
    assert value.dtype == forces.dtype == torch.float32
    torch.testing.assert_close(value.double(), whole[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(forces.double(), whole[1], rtol=0, atol=1e-2)
