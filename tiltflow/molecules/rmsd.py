r"""RMSD of heavy atoms up to rotation, translation and symmetry, and what share of a set of conformers another one covers.

With A the automorphisms of the graph without hydrogens,

    rmsd(x, y)² = min over π ∈ A, R ∈ SO(3) of 1/N Σ_i ‖x_i − R y_π(i)‖²   (both centred).

At fixed π this is (‖x‖² + ‖y‖² − 2λ)/N with λ = s₁ + s₂ ± s₃ from the singular values of H = Σ_i x_i y_π(i)ᵀ and the sign of
det H. λ is the largest root of the quartic whose roots are s₁+s₂+s₃, s₁−s₂−s₃, −s₁+s₂−s₃ and −s₁−s₂+s₃,

    λ⁴ − 2‖H‖²λ² − 8 det(H) λ + ‖H‖⁴ − 4‖cof H‖² = 0

(Horn 1987; Theobald 2005), found by Newton's method from (‖x‖² + ‖y‖²)/2 ≥ λ, from where it falls to λ without overshooting.

Automorphisms are RDKit's own: elements, charges and bond orders count, hydrogens and chirality do not, and the ends of a
conjugated terminal group (nitro, carboxyl, sulphonyl, amidine) are alike, as in RDKit's GetBestRMS.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from rdkit import Chem
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.molecules.molecule import Molecule

MOST_SYMMETRIES = 10_000
PAIRS = 1 << 15  # at a time, so that what belongs to them stays in the cache
NEWTON = 60
SAME_ENERGY, SAME_RMSD = 0.02, 0.1
"""kcal/mol and Å within which two minima are one."""
_END = "O,N;D1"
_ENDS = Chem.MolFromSmarts(f"[{_END};$([{_END}]-[*]=[{_END}]),$([{_END}]=[*]-[{_END}])]~[*]")


class Coverage(NamedTuple):
    """How well generated conformers cover references, and the reverse.

    ``recall`` (T,): shares of the references with a generated conformer within each threshold; ``precision`` (T,): the same
    with the roles exchanged. ``recall_amr``, ``precision_amr``: mean smallest RMSD, in Å.
    """

    recall: Tensor
    precision: Tensor
    recall_amr: float
    precision_amr: float


def heavy_atoms(molecule: Molecule) -> Tensor:
    """(H,), int64: where the atoms other than hydrogen are. Raises TiltflowError if there are none."""
    heavy = (molecule.atomic_numbers != 1).nonzero()[:, 0]
    if not len(heavy):
        raise TiltflowError(f"molecule {molecule.name!r} ({molecule.smiles}) has no atom other than hydrogen to compare.")
    return heavy


def symmetries(molecule: Molecule) -> Tensor:
    """(S, H), int64: the automorphisms of the graph without hydrogens, as orders of its H atoms; the identity is one.

    Raises:
        TiltflowError: more than 10,000 of them; nothing but hydrogen.
    """
    heavy_atoms(molecule)
    graph = Chem.RWMol(Chem.RemoveAllHs(molecule.mol))
    for end, centre in graph.GetSubstructMatches(_ENDS, maxMatches=graph.GetNumAtoms() + 1):
        graph.GetAtomWithIdx(end).SetFormalCharge(0)
        graph.GetBondBetweenAtoms(end, centre).SetBondType(Chem.BondType.ONEANDAHALF)  # alike, and like no other
    found = graph.GetSubstructMatches(graph, uniquify=False, maxMatches=MOST_SYMMETRIES + 1)
    if len(found) > MOST_SYMMETRIES:
        raise TiltflowError(
            f"molecule {molecule.name!r} ({molecule.smiles}) has more than {MOST_SYMMETRIES:,} symmetries of its heavy "
            "atoms; the least RMSD over all of them would take too long."
        )
    return torch.tensor(found)


def rmsd_matrix(molecule: Molecule, a: Tensor, b: Tensor) -> Tensor:
    """Least heavy-atom RMSD of every pair: (n, m), float64, in Å.

    Args:
        a, b: (n, N, 3) and (m, N, 3), in Å, all N atoms in the order of ``molecule``.

    Raises:
        TiltflowError: shapes that do not fit the molecule, coordinates that are not finite, too many symmetries.
    """
    heavy, orders = heavy_atoms(molecule), symmetries(molecule)
    x, y = (_centred(molecule, v, name)[:, heavy] for name, v in (("a", a), ("b", b)))
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    out = x.new_empty(len(x), len(y))
    for rows, result in zip(x.split(max(1, PAIRS // len(y))), out.split(max(1, PAIRS // len(y)))):
        _least(rows, y, orders, result)
    return out


def _centred(molecule: Molecule, x: Tensor, name: str) -> Tensor:
    atoms = molecule.mol.GetNumAtoms()
    if x.ndim != 3 or x.shape[1:] != (atoms, 3) or not len(x):
        raise TiltflowError(f"{name} has shape {tuple(x.shape)}; conformers of {molecule.name!r} are (n > 0, {atoms}, 3).")
    bad = int((~torch.isfinite(x).flatten(1).all(1)).sum())
    if bad:
        raise TiltflowError(f"{bad} of {len(x)} conformers {name} of {molecule.name!r} are not finite; drop and count them.")
    return x.detach().double().cpu()


def _least(x: Tensor, y: Tensor, orders: Tensor, out: Tensor) -> None:
    """Fill out (n, m) with the RMSD of centred x (n, H, 3) and y (m, H, 3)."""
    scale = 0.5 * (x.square().sum((1, 2))[:, None] + y.square().sum((1, 2))).clamp_min(1e-300)
    best = torch.full_like(scale, -torch.inf)
    for order in orders:
        torch.maximum(best, _overlap(x, y[:, order], scale), out=best)
    torch.sqrt((2 * scale * (1 - best) / x.shape[1]).clamp_min_(0), out=out)


def _overlap(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """λ / scale, (n, m)."""
    h = [[x[:, :, i] @ y[:, :, j].T / scale for j in range(3)] for i in range(3)]
    cofactors = [_cross(h[1], h[2]), _cross(h[2], h[0]), _cross(h[0], h[1])]
    norm, cof = (sum(v * v for row in m for v in row) for m in (h, cofactors))
    det = sum(u * v for u, v in zip(h[0], cofactors[0]))
    c2, c1, c0 = -2 * norm, -8 * det, norm * norm - 4 * cof
    root = torch.ones_like(scale)
    for _ in range(NEWTON):
        square = root * root
        value = (square + c2) * square + c1 * root + c0
        slope = (4 * square + 2 * c2) * root + c1
        step = torch.where(slope > 0, value / slope, 0.0).clamp_min_(0)
        root -= step
        if float(step.max()) < 1e-13:
            break
    return root


def _cross(u: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    return [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]]


def coverage(matrix: Tensor, thresholds: Tensor) -> Coverage:
    """Coverage and average minimum RMSD (Ganea et al. 2021, arXiv:2106.07802) of references (rows) and generated (columns).

    Args:
        matrix: (R, K), RMSD in Å. thresholds: (T,), in Å; at most this far is covered.

    Raises:
        TiltflowError: a matrix that is empty or not finite.
    """
    if matrix.ndim != 2 or not matrix.numel() or not bool(torch.isfinite(matrix).all()):
        raise TiltflowError(f"coverage needs finite RMSDs (references > 0, generated > 0), got shape {tuple(matrix.shape)}.")
    recall, precision = matrix.amin(1), matrix.amin(0)
    covered, correct = ((nearest[:, None] <= thresholds).double().mean(0) for nearest in (recall, precision))
    return Coverage(covered, correct, float(recall.mean()), float(precision.mean()))


def distinct(molecule: Molecule, x: Tensor, energy: Tensor) -> list[list[int]]:
    """Rows of minima x (n, N, 3) in groups of the same geometry, by their energies (n,) in kcal/mol and heavy-atom RMSD."""
    groups: list[list[int]] = []
    some = bool((molecule.atomic_numbers != 1).any())
    for i in energy.argsort().tolist():
        for group in reversed(groups):
            first = group[0]
            if float(energy[i] - energy[first]) > SAME_ENERGY:
                continue
            if not some or float(rmsd_matrix(molecule, x[[first]], x[[i]])) < SAME_RMSD:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups
