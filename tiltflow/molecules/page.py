"""The page of a conformer run: all molecules, then of each its shapes in 3-D, clusters, energies, torsions and path weights.

It works offline: the viewer (3Dmol.js, N. Rego and D. Koes, Bioinformatics 31, 2015) is in the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources

import numpy as np
from rdkit import Chem
from rdkit.Chem import rdMolTransforms
from torch import Tensor

from tiltflow.molecules.audit import label
from tiltflow.molecules.clusters import Clusters
from tiltflow.molecules.ensemble import Ensemble
from tiltflow.molecules.molecule import with_positions
from tiltflow.molecules.read import Reject
from tiltflow.report import Block, Figure, Figures, Markup, Table, plots
from tiltflow.report.figures import weight_figures
from tiltflow.report.page import fill

DETAILED, SHAPES, TORSIONS, REJECTS = 20, 10, 12, 200
"""Most molecules with a section of their own; clusters, torsions of each; rejects. The files hold them all."""


def conformer_blocks(found: Sequence[tuple[Ensemble, Clusters]], rejects: Sequence[Reject]) -> list[Block]:
    """The blocks of the page of a run: all molecules, those with a section of their own, and what was rejected."""
    detailed = [(e, c) for e, c in found if len(e)][:DETAILED]
    blocks = [_molecules(found, len(detailed)), *_viewer([shape for e, c in detailed for shape in _shapes(e, c)])]
    for e, c in detailed:
        blocks += _section(e, c, alone=len(detailed) == 1)
    more = f"{REJECTS} of {len(rejects)}; all are in rejects.csv." if len(rejects) > REJECTS else ""
    rows = [(r.line, r.name, r.input, r.reason) for r in rejects[:REJECTS]]
    return [*blocks, Table("Rejected", ("line", "name", "input", "reason"), rows, more)]


def torsions(mol: Chem.Mol) -> list[tuple[int, int, int, int]]:
    """Atoms (a, i, j, b) about every single bond i–j outside rings that has heavy neighbours at both ends, neither linear.

    Of several neighbours a, and b, the first.
    """
    found = []
    for bond in mol.GetBonds():
        ends = bond.GetBeginAtom(), bond.GetEndAtom()
        around = [
            [n.GetIdx() for n in end.GetNeighbors() if n.GetAtomicNum() > 1 and n.GetIdx() != other.GetIdx()]
            for end, other in (ends, ends[::-1])
        ]
        linear = any(end.GetHybridization() == Chem.HybridizationType.SP for end in ends)
        if bond.GetBondType() == Chem.BondType.SINGLE and not bond.IsInRing() and not linear and all(around):
            found.append((min(around[0]), ends[0].GetIdx(), ends[1].GetIdx(), min(around[1])))
    return found


def _weights(e: Ensemble) -> str:
    return "none: chosen to cover" if e.log_weights is None else "reliable" if e.reliable else "cannot tell"


def _molecules(found: Sequence[tuple[Ensemble, Clusters]], detailed: int) -> Table:
    columns = (
        "name", "SMILES", "conformers", "left out", "ESS, of 1", "weights", "clusters", "energies span", "unit", "notes",
    )  # fmt: skip
    rows = [
        (e.molecule.name, e.molecule.smiles, len(e), e.discarded,
         None if e.log_weights is None else e.ess, _weights(e), len(c.sizes),
         float(e.energy.max() - e.energy.min()) if len(e) else None, e.unit, e.provenance.get("notes", ""))
        for e, c in found
    ]  # fmt: skip
    caption = (
        "A weight is the normalised path weight of a sample at the stated temperature. It does not tell of shapes that the "
        "sampler never visits."
    )
    if len(found) > detailed:
        caption += f" Sections: {detailed} of {len(found)} molecules. All are in conformers.csv and conformers.sdf."
    return Table("Molecules", columns, rows, caption)


def _viewer(shapes: Sequence[Mapping[str, str]]) -> list[Block]:
    if not shapes:
        return []
    library = resources.files("tiltflow.molecules").joinpath("3Dmol-min.js").read_text(encoding="utf-8")
    return [Markup("In 3-D", fill("molecules/viewer.html.j2", shapes=shapes, library=library))]


def _section(e: Ensemble, c: Clusters, alone: bool) -> list[Block]:
    """Plots of one molecule, and its clusters."""
    lowest = float(e.energy.min())
    populations, free = e.population_texts(c), e.free_energies(c)
    rows = [
        (k, c.sizes[k - 1], populations[k - 1], None if free is None else f"{free[k - 1][0]:.2f} ± {free[k - 1][1]:.2f}",
         c.lowest[k - 1] + 1, float(e.energy[c.lowest[k - 1]]) - lowest)
        for k in range(1, len(c.sizes) + 1)
    ]  # fmt: skip
    weights = e.weights.numpy() if e.reliable else None
    untold = "there are none" if e.log_weights is None else "they cannot be told"
    counted = "Counted by path weight." if e.reliable else f"Counted without weights: {untold}."
    energies = _energies(e.energy.double() - lowest, e.unit, weights)
    figures = [Figure("Energies", f"Above the lowest. {counted}", energies)]
    bonds = torsions(e.molecule.mol)
    if bonds:
        shown = f"The first {TORSIONS} of {len(bonds)} torsions. " if len(bonds) > TORSIONS else ""
        figures.append(Figure("Torsions", shown + counted, _torsions(e, bonds[:TORSIONS], weights)))
    figures += weight_figures(None if e.log_weights is None else e.weights, "conformers")
    weighted = "no weights" if e.log_weights is None else f"weights: {_weights(e)}"
    sampled = f"coordinates: {e.provenance.get('coordinates', 'not stated')}"
    stuck = f" · not sampled: {e.unsampled}" if e.unsampled else ""
    notes = filter(None, [e.provenance.get("notes")])
    said = " · ".join([e.molecule.smiles, f"{e.temperature:g} K", weighted, sampled + stuck, *notes])
    columns = (
        "cluster", "conformers", "population", f"free energy above the first ({e.unit})",
        "lowest conformer", f"its energy above the lowest ({e.unit})",
    )  # fmt: skip
    return [Figures(e.molecule.name, figures, said), Table("Clusters", columns, rows, folded=not alone)]


def _shapes(e: Ensemble, c: Clusters) -> list[dict[str, str]]:
    """The lowest conformer of each cluster, for the viewer."""
    lowest = c.lowest[:SHAPES]
    mol = with_positions(e.molecule.mol, e.positions[lowest])
    blocks = [Chem.MolToMolBlock(mol, confId=k) for k in range(len(lowest))]
    return [{"name": f"{e.molecule.name}, cluster {k}", "block": block} for k, block in enumerate(blocks, 1)]


def _energies(values: Tensor, unit: str, weights: np.ndarray | None) -> bytes:
    fig, axes = plots.figure()
    density, edges = np.histogram(values.numpy(), bins=30, weights=weights)
    axes.stairs(density / max(density.sum(), 1e-300), edges, color=plots.AFTER, linewidth=1.5)
    axes.set_xlabel(f"E − lowest E ({unit})", color=plots.INK)
    axes.set_ylabel("share", color=plots.INK)
    return plots.png(fig)


def _torsions(e: Ensemble, bonds: Sequence[tuple[int, int, int, int]], weights: np.ndarray | None) -> bytes:
    conformers = with_positions(e.molecule.mol, e.positions).GetConformers()
    angles = [[rdMolTransforms.GetDihedralDeg(x, *bond) for x in conformers] for bond in bonds]
    columns = min(3, len(bonds))
    rows = -(-len(bonds) // columns)
    fig, first = plots.figure(1.9 * columns + 0.4, 1.4 * rows + 0.3)
    fig.delaxes(first)
    for k, (bond, values) in enumerate(zip(bonds, angles)):
        axes = fig.add_subplot(rows, columns, k + 1)
        axes.patch.set_alpha(0.0)
        density, edges = np.histogram(values, bins=36, range=(-180, 180), weights=weights)
        axes.stairs(density, edges, color=plots.AFTER, fill=True, alpha=0.8)
        axes.set_title("-".join(label(e.molecule.mol.GetAtomWithIdx(a)) for a in bond), fontsize=7, color=plots.INK)
        axes.set_xticks([-180, 0, 180], ["−180°", "0°", "180°"], fontsize=7)
        axes.set_yticks([])
        axes.tick_params(colors=plots.INK)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(plots.INK)
    return plots.png(fig)
