"""The plots of a page: how training went, and the laws of a sampler's energies, distances and path weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.metrics.particles import interatomic_distances
from tiltflow.report import plots
from tiltflow.report.page import Block, Figure, Figures, Table

LAST = 10
"""Rounds whose adjoint norms are averaged."""
PAIRS = 10_000_000
"""Most distances of particles in a histogram."""
LEAST = 1e-6
"""Path weights below it, in units of their mean, are drawn there."""
Levels = Mapping[str, Mapping[str, float | None]]


class Curve(NamedTuple):
    """A number of every round: its key in the history, name, unit, ordinate and caption; ``against`` is the abscissa."""

    key: str
    name: str
    unit: str
    log: bool
    caption: str
    against: str = "iteration"


TILTING = (
    Curve("reward", "Reward", "mean reward", False, "Mean over the samples each iteration drew."),
    Curve("reward", "Reward against KL", "", False, "What each nat of distance from the base bought.", "kl"),
    Curve("judge", "Held-out judge", "mean judge score", False, "Training never saw it: it should rise too."),
    Curve("kl", "KL to the base", "KL (nats)", False, "E[∫ ½‖u‖² dt] over the sampled paths."),
    Curve("elbo", "Bound on log Z", "E[log w] (nats)", False, "Short of log Z by KL(sampler's paths ‖ tilt)."),
    Curve("reward_weighted", "Reward under path weights", "mean reward", False, "Of exact samples: the gap to close."),
    Curve("path_ess", "Path weights", "ESS fraction", False, "Effective sample size of each round's path weights, of 1."),
    Curve("diversity", "Diversity", "diversity", False, "How different samples are from each other."),
    Curve("loss", "Loss", "matching loss", True, "Its floor is the variance of the adjoint, not zero."),
    Curve("grad_norm", "Gradient norm", "gradient norm", True, "Before clipping."),
)
SAMPLING = (
    Curve("energy", "Energy", "median E (kT)", False, "Of the end points of each round; dashed: of the reference."),
    Curve("ess", "Path weights", "ESS fraction", False, "Effective sample size of each round's path weights, of 1."),
    Curve("log_z", "log Z", "log Z", False, "From each round's path weights; dashed: exact."),
    Curve("reward", "Objective", "−E[g]", False, "g = E + log p_base of the end points."),
    Curve("kl", "KL to the base", "KL (nats)", False, "E[∫ ½‖u‖² dt] over the sampled paths."),
    Curve("temperature", "Temperature", "T", False, "Of the target of each round."),
    Curve("loss", "Loss", "matching loss", True, "Its floor is the variance of the target, not zero."),
    Curve("grad_norm", "Gradient norm", "gradient norm", True, "Before clipping."),
)


def training_blocks(
    history: Sequence[Mapping[str, Any]], curves: Sequence[Curve], levels: Levels | None = None, t: Sequence[float] = ()
) -> list[Block]:
    """What a page shows of the training: the plots of `history_figures`, and the adjoint norms as a table."""
    norms = adjoint_norms(history)
    rows = list(zip(t, norms)) if norms else []
    table = Table("Adjoint norms", ("t", "mean ‖ã(t)‖"), rows, folded=True)
    return [Figures("How it got there", history_figures(history, curves, levels, t)), table]


def history_figures(
    history: Sequence[Mapping[str, Any]], curves: Sequence[Curve], levels: Levels | None = None, t: Sequence[float] = ()
) -> list[Figure]:
    """A plot of every curve whose keys some row of the history has, and of the adjoint norms if rows have them.

    Args:
        history: one mapping per round; rows without "iteration" are counted from 0.
        curves: what to plot; `TILTING` or `SAMPLING`.
        levels: of a key, label → height of a horizontal line, or None.
        t: the times (K,) of the lists of "adjoint_norm" in the history; without times they are not plotted.

    Raises:
        TiltflowError: if there are not as many times as norms.
    """
    figures = []
    for curve in curves:
        counted = [{"iteration": i, **row} for i, row in enumerate(history)]
        rows = [row for row in counted if row.get(curve.key) is not None and row.get(curve.against) is not None]
        if rows:
            x, y = ([float(row[key]) for row in rows] for key in (curve.against, curve.key))
            level = (levels or {}).get(curve.key)
            if curve.against == "kl":
                picture = plots.reward_against_kl(x, y, level)
            else:
                picture = plots.curve(x, {curve.key: y}, curve.against, curve.unit, level, curve.log)
            figures.append(Figure(curve.name, curve.caption, picture))
    norms = adjoint_norms(history)
    if norms and len(t):
        if len(t) != len(norms):
            raise TiltflowError(f"there are {len(t)} times and {len(norms)} adjoint norms; give one norm per time.")
        caption = "Solved backwards from t = 1; an explosion towards t = 0 drowns the target in noise."
        picture = plots.curve(t, {"mean": norms}, "t (0 noise, 1 data)", "mean ‖ã(t)‖", log=True)
        figures.append(Figure("Adjoint norm over t", caption, picture))
    return figures


def adjoint_norms(history: Sequence[Mapping[str, Any]]) -> list[float]:
    """The mean norm ‖ã(t)‖ at each time over the last rounds that tell it; empty if none does."""
    norms = [row["adjoint_norm"] for row in history if row.get("adjoint_norm") is not None][-LAST:]
    return torch.tensor(norms, dtype=torch.float64).mean(0).tolist() if norms else []


def energy_figures(energies: Mapping[str, Tensor | None]) -> list[Figure]:
    """The law of the energies of each set, (n,) in kT."""
    given = {name: energy for name, energy in energies.items() if energy is not None}
    picture = plots.histogram(given, "E (kT)")
    return [Figure("Energies", "The most sensitive single number of a configuration.", picture)]


def distance_figures(sets: Mapping[str, Tensor | None]) -> list[Figure]:
    """The law of all distances of particles in each set, (n, N, m)."""
    pairs = {}
    for name, x in sets.items():
        if x is not None:
            pairs[name] = interatomic_distances(x[: max(1, 2 * PAIRS // x.shape[1] ** 2)])
    return [Figure("Distances of particles", "Of all pairs.", plots.histogram(pairs, "distance"))]


def weight_figures(weights: Tensor | None, of: str = "samples") -> list[Figure]:
    """The path weights (n,), in units of their mean, largest first; nothing if there are none."""
    if weights is None or not len(weights):
        return []
    n = len(weights)
    shown = (weights / weights.mean()).sort(descending=True).values[:: max(1, n // 1000)].clamp(min=LEAST).tolist()
    rank = [(i + 1) / len(shown) for i in range(len(shown))]
    picture = plots.curve(rank, {"weight": shown}, f"share of the {of}", "path weight (mean 1)", {"ideal": 1.0}, True)
    caption = f"Flat at 1 if the paths are the target's; weights below {LEAST:g} are drawn there."
    return [Figure("Sorted path weights", caption, picture)]
