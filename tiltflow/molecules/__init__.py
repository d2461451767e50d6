"""Molecules: SMILES in, weighted conformers out. Needs RDKit: ``pip install tiltflow[conformers]``."""
