"""The page of a conformer run: all molecules, then of each its shapes in 3-D, clusters, energies, torsions and path weights.

It works offline: the viewer (3Dmol.js, N. Rego and D. Koes, Bioinformatics 31, 2015) is in the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from rdkit import Chem
from rdkit.Chem import rdMolTransforms
from torch import Tensor

from tiltflow.molecules.audit import label
from tiltflow.molecules.clusters import Clusters
from tiltflow.molecules.ensemble import RELIABLE, Ensemble
from tiltflow.molecules.molecule import with_positions
from tiltflow.molecules.read import Reject
from tiltflow.report import plots
from tiltflow.report.html import inlined, render_template, write_page

DETAILED, SHAPES, TORSIONS, REJECTS = 20, 10, 12, 200
"""Most molecules with a section of their own; clusters, torsions of each; rejects. The files hold them all."""


@dataclass(frozen=True)
class ConformersRecord:
    """What the page shows: clustered ensembles, rejects, the command, its settings and the version."""

    found: Sequence[tuple[Ensemble, Clusters]]
    rejects: Sequence[Reject]
    command: str
    config: Mapping[str, Any]
    version: str
    notes: Sequence[str] = ()
    verdict: Sequence[Any] = ()
    history: Sequence[Mapping[str, Any]] = ()

    @property
    def title(self) -> str:
        """Of the page."""
        conformers = sum(len(e) for e, _ in self.found)
        return f"{conformers} conformers of {len(self.found)} molecule{'' if len(self.found) == 1 else 's'}"


def write_conformers_report(folder: Path, record: ConformersRecord) -> Path:
    """Write ``folder/report.html``, atomically, and return its path. Raises as ``write_report`` does."""
    return write_page(folder, lambda: render_conformers(record))


def render_conformers(record: ConformersRecord) -> str:
    """The page as a string."""
    detailed = [(e, c) for e, c in record.found if len(e)][:DETAILED]
    return render_template(
        "molecules/conformers.html.j2",
        record,
        molecules=[_line(e, c) for e, c in record.found],
        sections=[_section(e, c) for e, c in detailed],
        shapes=[shape for e, c in detailed for shape in _shapes(e, c)],
        unreliable=sum(not e.reliable for e, _ in record.found if e.log_weights is not None),
        least=RELIABLE,
        rejects=record.rejects[:REJECTS],
        figures=(),
        viewer=resources.files("tiltflow.molecules").joinpath("3Dmol-min.js").read_text(encoding="utf-8"),
    )


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


def _line(e: Ensemble, c: Clusters) -> dict[str, Any]:
    finite = e.energy.tolist()
    return {
        "name": e.molecule.name,
        "smiles": e.molecule.smiles,
        "conformers": len(e),
        "discarded": e.discarded,
        "ess": e.ess,
        "reliable": e.reliable,
        "weighted": e.log_weights is not None,
        "clusters": len(c.sizes),
        "span": max(finite) - min(finite) if finite else None,
        "unit": e.unit,
    }


def _section(e: Ensemble, c: Clusters) -> dict[str, Any]:
    lowest = float(e.energy.min())
    rows = [
        {
            "number": k + 1,
            "size": c.sizes[k],
            "population": None if c.populations is None else c.populations[k],
            "conformer": c.lowest[k] + 1,
            "energy": float(e.energy[c.lowest[k]]) - lowest,
        }
        for k in range(len(c.sizes))
    ]
    weights = e.weights.numpy() if e.reliable else None
    untold = "there are none" if e.log_weights is None else "they cannot be told"
    counted = "Counted by path weight." if e.reliable else f"Counted without weights: {untold}."
    figures = [("Energies", f"Above the lowest. {counted}", _energies(e.energy.double() - lowest, e.unit, weights))]
    bonds = torsions(e.molecule.mol)
    if bonds:
        shown = f"The first {TORSIONS} of {len(bonds)} torsions. " if len(bonds) > TORSIONS else ""
        figures.append(("Torsions", shown + counted, _torsions(e, bonds[:TORSIONS], weights)))
    if e.log_weights is not None:
        sizes = (e.weights * len(e)).sort(descending=True).values.clamp(min=1e-6).tolist()
        rank = [(i + 1) / len(e) for i in range(len(e))]
        picture = plots.curve(rank, {"weight": sizes}, "share of conformers", "path weight (mean 1)", {"ideal": 1.0}, True)
        figures.append(("Sorted path weights", "Flat at 1 if the sampler is exact.", picture))
    return {**_line(e, c), "temperature": e.temperature, "rows": rows, "figures": inlined(figures)}


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
