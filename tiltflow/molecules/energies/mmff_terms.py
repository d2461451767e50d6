r"""The terms of MMFF94, kcal/mol (T. A. Halgren, J. Comput. Chem. 17, 490–519 and 520–552, 1996), of squared distances.

Every term is a function of distances, and of them squared it is smooth even where an angle is 0 or 180°. So each function
takes the squared distances q of its atoms, (M, B) each in Å², conformers last, and constants (M, 1), and gives its energies
E (M, B) and ∂E/∂q of each q. Bonds to the central atom j come before distances between its neighbours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Slopes = tuple[Tensor, ...]

FORCE = 143.9325
"""kcal/mol of one md Å."""
DEGREE = math.pi / 180
CUBIC_STRETCH = -2.0
"""1/Å."""
CUBIC_BEND = -0.4 * DEGREE
"""1/degree."""
COULOMB, BUFFER = 332.0716, 0.05
"""kcal Å/mol of two elementary charges; Å."""
LEAST = 1e-16
"""Å², Å⁴ and squared sines below this are taken for it: all of them are divided by."""


def stretch(q: Tensor, k: Tensor, r0: Tensor) -> tuple[Tensor, Slopes]:
    """k/2 Δr² (1 + c Δr + 7/12 c² Δr²), k in md/Å."""
    r = q.clamp_min(LEAST).sqrt()
    d = r - r0
    cd, kd = CUBIC_STRETCH * d, FORCE / 2 * k * d
    return kd * d * (1 + cd + 7 / 12 * cd**2), (kd * (1 + 3 / 2 * cd + 7 / 6 * cd**2) / r,)


def bend(
    ij: Tensor, kj: Tensor, ik: Tensor,
    k: Tensor, theta0: Tensor, linear: Tensor, k_ij: Tensor, k_kj: Tensor, r_ij: Tensor, r_kj: Tensor,
) -> tuple[Tensor, Slopes]:  # fmt: skip
    """k/2 Δθ² (1 + c Δθ), in degrees, or k (1 + cos θ) about a linear atom; and (k_ij Δr_ij + k_kj Δr_kj) Δθ."""
    ij, kj = ij.clamp_min(LEAST), kj.clamp_min(LEAST)
    ri, rk = ij.sqrt(), kj.sqrt()
    half = 0.5 / (ri * rk)
    cos = ((ij + kj - ik) * half).clamp(-1, 1)
    d = cos.acos() / DEGREE - theta0
    couple = FORCE * DEGREE * (k_ij * (ri - r_ij) + k_kj * (rk - r_kj))
    along = FORCE * DEGREE / 2 * d
    bent = DEGREE * k * along * d
    by_theta = DEGREE * k * along * (2 + 3 * CUBIC_BEND * d) + couple
    energy = torch.where(linear, FORCE * k * (1 + cos), bent * (1 + CUBIC_BEND * d) + couple * d)
    by_cos = torch.where(linear, FORCE * k, -by_theta / DEGREE * (1 - cos**2).clamp_min(LEAST).rsqrt())
    across, turn = by_cos * half, by_cos * cos / 2
    return energy, (across + (k_ij * along * ri - turn) / ij, across + (k_kj * along * rk - turn) / kj, -across)


def out_of_plane(
    ij: Tensor, kj: Tensor, lj: Tensor, ik: Tensor, il: Tensor, kl: Tensor, k: Tensor
) -> tuple[Tensor, Slopes]:
    """k/2 χ², in degrees, of the angle between j–l and the plane i–j–k.

    sin² χ = det G / (area² |jl|²), G the Gram matrix of the bonds, whose adjugate is (ga gab gac, gab gb gbc, gac gbc gc).
    """
    lj = lj.clamp_min(LEAST)
    ac, bc, ab = (ij + lj - il) / 2, (kj + lj - kl) / 2, (ij + kj - ik) / 2
    ga, gb, gc = kj * lj - bc**2, ij * lj - ac**2, (ij * kj - ab**2).clamp_min(LEAST)
    gab, gac, gbc = ac * bc - lj * ab, ab * bc - kj * ac, ab * ac - ij * bc
    over = 1 / (gc * lj)
    square = ((ij * ga + ab * gab + ac * gac) * over).clamp(LEAST, 1 - LEAST)
    sine = square.sqrt()
    chi = sine.asin()
    by_square = FORCE / 2 * k * chi / (sine * (1 - square).clamp_min(LEAST).sqrt())
    t, u = by_square * over, by_square * square / gc
    by_ab = t * gab + u * ab
    slopes = (
        t * (ga + gac) + by_ab - u * kj,
        t * (gb + gbc) + by_ab - u * ij,
        t * (gc + gac + gbc) - by_square * square / lj,
        -by_ab,
        -t * gac,
        -t * gbc,
    )
    return FORCE / 2 * k * chi**2, slopes


def torsion(
    ij: Tensor, jk: Tensor, kl: Tensor, ik: Tensor, jl: Tensor, il: Tensor, v1: Tensor, v2: Tensor, v3: Tensor
) -> tuple[Tensor, Slopes]:
    """(V₁ (1 + cos φ) + V₂ (1 − cos 2φ) + V₃ (1 + cos 3φ)) / 2, cos φ of the normals m = a × b and n = b × c."""
    ab, bc, ac = (ik - ij - jk) / 2, (jl - jk - kl) / 2, (il + jk - ik - jl) / 2
    mm, nn = (ij * jk - ab**2).clamp_min(LEAST), (jk * kl - bc**2).clamp_min(LEAST)
    over = (mm * nn).rsqrt()
    cos = ((ab * bc - ac * jk) * over).clamp(-1, 1)
    square = cos**2
    energy = (v1 * (1 + cos) + 2 * v2 * (1 - square) + v3 * (1 + (4 * square - 3) * cos)) / 2
    slope = (v1 - 4 * v2 * cos + v3 * (12 * square - 3)) / 4
    t, turn = slope * over, slope * cos
    u, w = turn / mm, turn / nn
    by_ab, by_bc, by_ac = t * bc + u * ab, t * ab + w * bc, -t * jk
    slopes = (
        -u * jk - by_ab,
        -2 * t * ac - u * ij - w * kl - by_ab - by_bc + by_ac,
        -w * jk - by_bc,
        by_ab - by_ac,
        by_bc - by_ac,
        by_ac,
    )
    return energy, slopes


def contact(q: Tensor, radius: Tensor, well: Tensor, charges: Tensor) -> tuple[Tensor, Slopes]:
    """Buffered 14-7 van der Waals energy and buffered Coulomb energy of a pair; charges: their product, scaled."""
    r = q.clamp_min(LEAST).sqrt()
    p = r / radius
    p2 = p * p
    p6 = p2 * p2 * p2
    near, far = 1 / (p + 0.07), 1 / (p * p6 + 0.12)
    ratio = 1.07 * near
    square = ratio * ratio
    front = well * square * square * square * ratio
    ending = 1.12 * far - 2
    apart = 1 / (r + BUFFER)
    coulomb = COULOMB * charges * apart
    by_p = -7 * front * (near * ending + 1.12 * p6 * (far * far))
    return front * ending + coulomb, ((by_p / radius - coulomb * apart) / (2 * r),)
