r"""Is an energy fit to sample from? Answered from a few configurations, before any training.

A table in the vocabulary of :mod:`tiltflow.verdict.check_reward`. The questions any scalar function must answer are those of
:mod:`tiltflow.verdict.probe`; an energy must also be in kT, and have the symmetries of its state space:

* particles with their centre of mass at zero: E(x + c) = E(x); for the symmetric networks E(Rx) = E(x), R a rotation,
  and E(Πx) = E(x), Π a permutation of the particles;
* the torus: E(x + 2πn) = E(x);
* at equilibrium: E[x·∇E] = number of degrees of freedom, which is exact, and fails in any other unit than kT.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tiltflow.core.device import double
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Centred, Euclidean, Geometry, Torus
from tiltflow.energies.evaluator import Energy, ForceProvider, differentiable
from tiltflow.energies.reference import virial
from tiltflow.verdict.line import Line
from tiltflow.verdict.probe import PROBES, QUESTIONS, Probe
from tiltflow.verdict.questions import Answer, Question, Report, answered, unmet, untried

INVARIANCE = 1e-3
SPREAD = 10.0
KT = "1 kT at 300 K is 2.494 kJ/mol, .596 kcal/mol, .02585 eV"
WORDS = (("the reward", "the energy"), ("∇r", "∇E"), ("r(x_i)", "E(x_i)"), ("of r", "of E"))


class EnergyReport(Report):
    """The ``lines`` of the check."""


def check_energy(
    energy: Energy,
    x: Tensor,
    *,
    geometry: Geometry | None = None,
    generator: torch.Generator,
    rotation: bool | None = None,
    permutation: bool | None = None,
    equilibrium: bool = False,
) -> EnergyReport:
    """Try ``energy`` on configurations x.

    Args:
        energy: E in kT, (B, *event) → (B,), or a ForceProvider.
        x: (N, *event), N ≥ 32, float32 or float64, where a sampler will go: samples of the target if there are any.
        geometry: the state space (default: Euclidean).
        generator: random directions, shifts, rotations and orders.
        rotation, permutation: of particles (``Centred``): must the energy be invariant? None: warn if it is not; False: do
            not ask.
        equilibrium: x are samples of e^{−E}, so the virial identity must hold (not on a torus).

    Returns:
        One line per question. What the energy raises becomes a failing line that names it, and what then cannot be asked
        a line "cannot tell". After "finite value" only rows with a finite energy are asked about.

    Raises:
        TiltflowError: x too few or not finite; symmetries asked of states that are no particles; equilibrium on a torus.
    """
    space = Euclidean() if geometry is None else geometry
    _refuse(x, space, rotation, permutation, equilibrium)
    scalar = partial(differentiable, energy) if isinstance(energy, ForceProvider) else energy
    p = Probe(scalar, space.wrap(x.detach()), {}, generator)
    questions = _questions(space, rotation, permutation)
    if equilibrium:
        d = space.dimension(x.shape[1:])
        within = f"{d} within 3 standard errors"
        questions.append(Question("virial", within, ("finite gradient",), partial(_virial, energy, d)))
    lines: dict[str, Line] = {}
    for name, threshold, needs, ask in questions:
        missing = unmet(needs, lines)
        if missing:
            lines[name] = untried(name, threshold, missing)
            continue
        line = answered(name, threshold, partial(ask, p))
        lines[name] = line._replace(explanation=_about_energy(line.explanation))
        if name == "finite value" and line.status == "warn":
            p = Probe(scalar, p.x[torch.isfinite(p.values)], {}, generator)
    return EnergyReport(list(lines.values()))


def _refuse(x: Tensor, space: Geometry, rotation: bool | None, permutation: bool | None, equilibrium: bool) -> None:
    if x.ndim < 2 or len(x) < PROBES or not x.is_floating_point() or not bool(torch.isfinite(x).all()):
        raise TiltflowError(
            f"x must be at least {PROBES} configurations (N, *event), floating point and finite; got {x.dtype} of shape "
            f"{tuple(x.shape)}."
        )
    if (rotation or permutation) and not isinstance(space, Centred):
        raise TiltflowError("only particles can be rotated and permuted: pass geometry=Centred() and x of shape (N, n, m).")
    if equilibrium and isinstance(space, Torus):
        raise TiltflowError("the virial identity does not hold on a torus, where x jumps: leave out equilibrium=True.")
    space.dimension(x.shape[1:])


def _about_energy(text: str) -> str:
    for reward, energy in WORDS:
        text = text.replace(reward, energy)
    return text


def _finite(p: Probe) -> Answer:
    """+∞ is a wall, and a rejected row; NaN and −∞ are mistakes."""
    e = p.values
    bad, walls = int((torch.isnan(e) | (e == -torch.inf)).sum()), int((e == torch.inf).sum())
    text = f"of {len(e)} energies {bad} are NaN or −infinite, {walls} are +infinite"
    if bad or 2 * walls > len(e) or len(e) - walls < PROBES:
        return bad + walls, "fail", text
    return bad + walls, "warn" if walls else "pass", text + (": an Evaluator rejects those rows" if walls else "")


def _quantiles(values: Tensor, *shares: float) -> list[float]:
    ordered = values.sort().values  # torch.quantile has a limit of 16 million
    return [float(ordered[round(share * (len(ordered) - 1))]) for share in shares]


def _robust_spread(p: Probe) -> float:
    """Standard deviation of a normal law with E's quartiles: it survives a few colliding particles."""
    low, high = _quantiles(p.values, 0.25, 0.75)
    return (high - low) / 1.349


def _spread(p: Probe) -> Answer:
    """Of the order of √(d/2), as in a harmonic system at equilibrium."""
    expected, spread = math.sqrt(p.x[0].numel() / 2), _robust_spread(p)
    low, middle, high = _quantiles(p.values, 0.05, 0.5, 0.95)
    text = (
        f"spread of E (from its quartiles), as a harmonic system at equilibrium has √(d/2) = {expected:.3g}; 5, 50 and 95 % "
        f"quantiles {low:.4g}, {middle:.4g}, {high:.4g}"
    )
    if spread <= 1e-6 * max(abs(low), abs(high)):
        return spread, "fail", text + ": E is constant, there is nothing to sample"
    if not expected / SPREAD <= spread <= expected * SPREAD:
        return spread, "warn", text + f": is it in kT ({KT}), and is x where the target is?"
    return spread, "pass", text


def _gradient_norm(p: Probe) -> Answer:
    """Not zero where the configurations are."""
    norm = p.gradients.norm(dim=1)
    dead = float((norm == 0).double().mean())
    low, high = _quantiles(norm, 0.05, 0.95)
    text = f"median ‖∇E‖ in kT per unit of x; 5 and 95 % quantiles {low:.4g}, {high:.4g}"
    hint = f"; exactly 0 at {dead:.0%}: nothing to follow there" if dead > 0.1 else ""
    return float(norm.median()), "fail" if dead == 1 else "warn" if dead > 0.1 else "pass", text + hint


Move = Callable[[Tensor, torch.Generator], Tensor]


def _translate(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + torch.randn((len(x), 1, x.shape[2]), generator=generator, device=generator.device).to(x)


def _rotate(x: Tensor, generator: torch.Generator) -> Tensor:
    m = x.shape[2]
    q = torch.linalg.qr(torch.randn((len(x), m, m), generator=generator, device=generator.device).to(x))[0]
    turn = torch.where(torch.linalg.det(q) < 0, -1.0, 1.0).to(x)  # proper: a molecule need not equal its mirror image
    q = torch.cat([q[..., :1] * turn[:, None, None], q[..., 1:]], -1)
    return x @ q


def _permute(x: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.rand(x.shape[:2], generator=generator, device=generator.device).argsort(1).to(x.device)
    return x.gather(1, order[..., None].expand_as(x))


def _turn_angles(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 2 * math.pi * torch.randint(-1, 2, x.shape, generator=generator, device=generator.device).to(x)


def _invariance(move: Move, what: str, advice: str, demanded: bool, p: Probe) -> Answer:
    """Largest |E(moved) − E| over the spread of E and |E|."""
    before = double(p.value(p.few))
    after = double(p.value(move(p.few, p.generator)))
    gap = float(((after - before).abs() / (_robust_spread(p) + before.abs())).nan_to_num(torch.inf).max())
    text = f"largest relative change of E when {what}"
    if gap <= INVARIANCE:
        return gap, "pass", text
    return gap, "fail" if demanded else "warn", f"{text}: {advice}"


def _virial(energy: Energy, d: int, p: Probe) -> Answer:
    mean, error = virial(energy, p.x)
    text = f"{mean:.4g} ± {error:.2g} where e^{{−E}} has {d}: mean of x·∇E over the samples"
    if abs(mean - d) > 3 * error:
        return mean, "fail", f"{text}; E is not in kT ({KT}), or x are not samples of it"
    return mean, "pass" if error <= 0.1 * d else "cannot tell", text + ("" if error <= 0.1 * d else "; give more samples")


def _questions(space: Geometry, rotation: bool | None, permutation: bool | None) -> list[Question]:
    asked: list[Question] = []
    for name, threshold, needs, ask in QUESTIONS:
        if name == "finite value":
            asked.append(Question(name, "0 bad", needs, _finite))
        elif name == "range":
            asked.append(Question("spread", f"√(d/2), within a factor of {SPREAD:g}", needs, _spread))
        elif name == "gradient norm":
            asked.append(Question(name, threshold, needs, _gradient_norm))
        elif name != "varies":
            asked.append(Question(name, threshold, needs, ask))

    def invariance(name: str, move: Move, what: str, advice: str, demanded: bool = True) -> None:
        ask = partial(_invariance, move, what, advice, demanded)
        asked.append(Question(name, f"≤ {INVARIANCE:g}", ("batch independent",), ask))

    if isinstance(space, Centred):
        invariance("translation", _translate, "all particles shift together", "take the mean off inside the energy")
        symmetric = "no symmetric network can learn it; pass {}=False if that is meant"
        if rotation is not False:
            advice = symmetric.format("rotation")
            invariance("rotation", _rotate, "all particles rotate together", advice, bool(rotation))
        if permutation is not False:
            advice = symmetric.format("permutation")
            invariance("permutation", _permute, "the particles change places", advice, bool(permutation))
    if isinstance(space, Torus):
        invariance("periodicity", _turn_angles, "angles turn by 2π", "write it in sines and cosines, or wrap its input")
    return asked
