"""Plots as PNG bytes, drawn with matplotlib's object interface: no pyplot, no global state, no display.

Backgrounds are transparent and axes mid-grey, so one picture reads on a light and on a dark page. Values that
are not finite are left out of a curve, and the plot says how many were.
"""

from __future__ import annotations

import importlib
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from tiltflow.core.errors import TiltflowError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEFORE, REFERENCE, AFTER, INK = "#8b929c", "#d9822b", "#2b7fd4", "#80868f"
COLORS = {"before": BEFORE, "base": BEFORE, "reference": REFERENCE, "after": AFTER, "samples": AFTER}
"""Of sets of samples, by name."""
_DPI = 170
Limits = tuple[float, float, float, float]  # left, right, bottom, top


def require(module: str) -> Any:
    """Import ``module`` of the report extra. Raises `TiltflowError` that names the extra if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        message = f'a report needs {name}, which is not installed: pip install "tiltflow[report]"'
        raise TiltflowError(message) from error


def figure(width: float = 4.6, height: float = 2.8) -> tuple[Figure, Axes]:
    """An empty figure (inches) with one sober pair of axes."""
    fig = require("matplotlib.figure").Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(fig)
    fig.patch.set_alpha(0.0)
    return fig, panel(fig)


def panel(fig: Figure, count: int = 1, place: int = 1, xlabel: str = "", ylabel: str = "") -> Axes:
    """The sober axes at ``place`` of ``count`` side by side."""
    axes = fig.add_subplot(1, count, place)
    axes.patch.set_alpha(0.0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    axes.tick_params(colors=INK, which="both", labelsize=9)
    axes.grid(True, color=INK, alpha=0.18, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    return axes


def png(fig: Figure) -> bytes:
    """Render a figure to PNG bytes."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def image_grid(
    images: Tensor, columns: int = 8, value_range: tuple[float, float] = (-1.0, 1.0), width: int = 900
) -> bytes:
    """Images (N, 1 | 3, H, W) tiled row by row, pixels enlarged until the grid is about ``width`` wide.

    ``value_range`` is mapped to black and white; pixels that are not finite are magenta.

    Raises:
        TiltflowError: for another shape or an empty value range.
    """
    low, high = value_range
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise TiltflowError(f"image_grid needs (N, 1 or 3, H, W) with N > 0, got {tuple(images.shape)}.")
    if not low < high:
        raise TiltflowError(f"value_range={value_range} is empty; give (darkest, brightest).")
    pixels = images.detach().float().cpu().numpy()
    broken = ~np.isfinite(pixels).all(axis=1)
    pixels = np.nan_to_num((pixels - low) / (high - low)).clip(0.0, 1.0).repeat(3 // pixels.shape[1], axis=1)
    pixels = np.moveaxis(pixels, 1, -1)
    pixels[broken] = (1.0, 0.0, 1.0)
    count, h, w, _ = pixels.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    canvas = np.zeros((rows * (h + 1) - 1, columns * (w + 1) - 1, 4))  # transparent, one pixel between images
    for index, image in enumerate(pixels):
        top, left = (index // columns) * (h + 1), (index % columns) * (w + 1)
        canvas[top : top + h, left : left + w, :3] = image
        canvas[top : top + h, left : left + w, 3] = 1.0
    scale = max(1, round(width / canvas.shape[1]))
    canvas = canvas.repeat(scale, axis=0).repeat(scale, axis=1)
    buffer = io.BytesIO()
    require("matplotlib.image").imsave(buffer, (canvas * 255).round().astype(np.uint8), format="png")
    return buffer.getvalue()


def scatter2d(points: Tensor, limits: Limits | None = None, color: str = AFTER) -> bytes:
    """Points (N, 2) in equal axes; shared ``limits`` make several plots comparable."""
    if points.dim() != 2 or points.shape[1] != 2 or not len(points):
        raise TiltflowError(f"scatter2d needs (N, 2) with N > 0, got {tuple(points.shape)}.")
    xy = points.detach().double().cpu().numpy()
    finite = np.isfinite(xy).all(axis=1)
    fig, axes = figure(3.6, 3.6)
    alpha = float(np.clip(60.0 / len(xy) ** 0.75, 0.08, 0.8))
    axes.scatter(xy[finite, 0], xy[finite, 1], s=5, alpha=alpha, color=color, linewidths=0)
    axes.set_aspect("equal")
    if limits is not None:
        axes.set_xlim(*limits[:2])
        axes.set_ylim(*limits[2:])
    _say_missing(axes, len(xy) - int(finite.sum()), len(xy))
    return png(fig)


def panels2d(panels: Mapping[str, Tensor]) -> bytes:
    """Several 2-D samples side by side on the same axes, each under its name."""
    limits = limits2d(*panels.values())
    width = 2.3 * len(panels)
    fig = require("matplotlib.figure").Figure(figsize=(width, 2.6), dpi=_DPI, layout="constrained")
    for axes, (name, points) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        axes.scatter(*points.double().T.tolist(), s=1.5, alpha=0.4, linewidths=0, color=AFTER, rasterized=True)
        axes.set_title(name, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal")
        if limits is not None:
            axes.set_xlim(*limits[:2])
            axes.set_ylim(*limits[2:])
    return png(fig)


def limits2d(*samples: Tensor) -> Limits | None:
    """Limits that hold the 0.1…99.9 % range of all point sets, with a margin; None if nothing is finite."""
    xy = np.concatenate([s.detach().double().cpu().numpy() for s in samples])
    xy = xy[np.isfinite(xy).all(axis=1)]
    if not len(xy):
        return None
    low, high = np.quantile(xy, [0.001, 0.999], axis=0)
    margin = 0.08 * np.maximum(high - low, 1e-6).max()
    return float(low[0] - margin), float(high[0] + margin), float(low[1] - margin), float(high[1] + margin)


def curve(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    xlabel: str,
    ylabel: str,
    levels: Mapping[str, float | None] | None = None,
    log: bool = False,
) -> bytes:
    """Lines over ``x``, each beside its running mean when long; ``levels`` are labelled horizontal lines.

    Args:
        x: abscissae (n,).
        series: label -> ordinates (n,).
        levels: label -> height; None and non-finite ones are left out.
        log: logarithmic ordinate if the values span more than a decade; those not positive are left out.
    """
    fig, axes = figure()
    abscissa, missing, total, span = np.asarray(x, dtype=float), 0, 0, 1.0
    for color, (label, values) in zip(
        itertools.cycle((AFTER, REFERENCE, BEFORE)), series.items(), strict=False
    ):
        y = np.array(values, dtype=float)
        keep = np.isfinite(y) & ((y > 0) | (not log))
        missing, total = missing + int((~keep).sum()), total + len(y)
        span = max(span, y[keep].max() / y[keep].min()) if log and keep.any() else span
        smooth = len(y) >= 60
        if smooth:
            axes.plot(abscissa[keep], y[keep], color=color, linewidth=1.0, alpha=0.35)
            y[keep] = running_mean(y[keep], len(y) // 30)
        marker = "o" if keep.sum() < 3 else None
        axes.plot(abscissa[keep], y[keep], color=color, linewidth=1.8, marker=marker, label=label)
    _draw_levels(axes, levels or {})
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    if span > 10:
        axes.set_yscale("log")
    if len(series) + len(levels or {}) > 1:
        _legend(axes)
    _say_missing(axes, missing, total)
    return png(fig)


def reward_against_kl(
    kl: Sequence[float], reward: Sequence[float], levels: Mapping[str, float | None] | None = None
) -> bytes:
    """The path of a run through (KL to the base, mean reward): faint early, full late, its end marked."""
    fig, axes = figure()
    points = np.stack([np.asarray(kl, dtype=float), np.asarray(reward, dtype=float)], axis=1)
    finite = np.isfinite(points).all(axis=1)
    shown = points[finite]
    if len(shown):
        x, y = shown.T
        to_rgba = require("matplotlib.colors").to_rgba
        colors = [to_rgba(AFTER, alpha) for alpha in np.linspace(0.1, 0.9, len(shown))]
        axes.plot(x, y, color=AFTER, linewidth=0.8, alpha=0.3)
        axes.scatter(x, y, color=colors, s=14, linewidths=0)
        axes.scatter(x[-1:], y[-1:], color=AFTER, s=55, zorder=3, label="end")
    _draw_levels(axes, levels or {})
    axes.set_xlabel("KL to the base (nats)", color=INK)
    axes.set_ylabel("mean reward", color=INK)
    _legend(axes)
    _say_missing(axes, len(points) - len(shown), len(points))
    return png(fig)


def running_mean(y: np.ndarray, half_width: int) -> np.ndarray:
    """Mean over the window [i − half_width, i + half_width], cut at the ends; shape (n,) as ``y``.

    >>> running_mean(np.array([0.0, 3.0, 6.0]), 1).tolist()
    [1.5, 3.0, 4.5]
    """
    total = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(len(y))
    first, last = np.maximum(index - half_width, 0), np.minimum(index + half_width + 1, len(y))
    return (total[last] - total[first]) / (last - first)


def _draw_levels(axes: Axes, levels: Mapping[str, float | None]) -> None:
    for label, height in levels.items():
        if height is not None and math.isfinite(height):
            color = COLORS.get(label, INK)
            axes.axhline(height, color=color, linewidth=1.2, linestyle=(0, (4, 3)), label=label)


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    fig = axes.get_figure(root=True)
    if handles and fig is not None:
        fig.legend(
            handles,
            labels,
            loc="outside upper left",
            ncols=len(labels),
            frameon=False,
            labelcolor=INK,
            fontsize=9,
        )


def _say_missing(axes: Axes, missing: int, total: int) -> None:
    if missing or not total:
        text = f"{missing} of {total} values cannot be drawn" if total else "no values"
        axes.set_title(text, color="#d0453e", fontsize=9, loc="left")


def pareto(rows: Sequence[Mapping[str, Any]], gain: str, costs: Sequence[str]) -> bytes:
    """One panel per cost: ``gain`` of each method (seeds joined, biased methods hollow) with the base and the exact tilt."""
    fig, first = figure(5.2 * len(costs), 4.2)
    fig.delaxes(first)
    names = list(dict.fromkeys(row["method"] for row in rows))
    colours = require("matplotlib").colormaps["tab20"]
    for i, cost in enumerate(costs, 1):
        axes = panel(fig, len(costs), i, cost, gain)
        for j, name in enumerate(names):
            mine = [row for row in rows if row["method"] == name and row.get(cost) is not None]
            if not mine:
                continue
            colour, marker = colours(j % 20), "oD^"[j // 20 % 3]
            face = "none" if mine[0]["biased"] else colour
            axes.plot([r[cost] for r in mine], [r[gain] for r in mine], color=colour, lw=0.7, marker=marker, ms=6,
                      markerfacecolor=face, label=name)  # fmt: skip
        known = [row for row in rows if f"{cost}_reference" in row]
        if known:
            axes.plot(known[0][f"{cost}_base"], known[0][f"{gain}_base"], "s", color=INK, ms=8, label="base")
            axes.plot(known[0][f"{cost}_reference"], known[0][f"{gain}_reference"], "*", color=REFERENCE, ms=14,
                      label="exact tilt")  # fmt: skip
        else:
            axes.axhline(rows[0][f"{gain}_reference"], color=REFERENCE, lw=1, ls="--")
            axes.axhline(rows[0][f"{gain}_base"], color=INK, lw=1, ls="--")
        if cost == "kl":
            axes.set_xscale("symlog", linthresh=0.1)
            axes.set_xlim(left=0)
    axes.legend(fontsize=6, frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return png(fig)


def against_kl(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> bytes:
    """One panel per score: what runs of several strengths reached at which KL, from the base on, each with its λ."""
    fig, first = figure(4.4 * len(names), 3.8)
    fig.delaxes(first)
    for i, name in enumerate(names, 1):
        axes = panel(fig, len(names), i, "KL to the base (nats)", name)
        axes.plot([r["kl"] for r in rows], [r[f"{name}_reached"] for r in rows], "o-", color=AFTER, lw=1)
        for row in rows:
            at = (row["kl"], row[f"{name}_reached"])
            axes.annotate(f"λ = {row['strength']:g}", at, (4, 4), textcoords="offset points", color=INK, fontsize=8)
        if rows[0].get(f"{name}_base") is not None:
            axes.plot(0, rows[0][f"{name}_base"], "s", color=BEFORE, ms=8)
    return png(fig)


def histogram(series: Mapping[str, Tensor], xlabel: str, bins: int = 80) -> bytes:
    """Densities of several sets of numbers, (n,) each, on common bins over their 0.5 … 99.5 % range."""
    fig, axes = figure()
    values = {label: v.detach().double().cpu().numpy().ravel() for label, v in series.items()}
    finite = {label: v[np.isfinite(v)] for label, v in values.items()}
    others = itertools.cycle(("#3fa66b", "#9a62c7"))
    shown = [v for v in finite.values() if len(v)]
    if shown:
        low = min(float(np.quantile(v, 0.005)) for v in shown)
        high = max(float(np.quantile(v, 0.995)) for v in shown)
        narrowest = max(1.0, abs(low)) * 1e-6
        edges = np.linspace(low, high if high > low + narrowest else low + max(1.0, abs(low)), bins + 1)
        for label, v in finite.items():
            density = np.histogram(v, edges)[0] / (max(len(v), 1) * np.diff(edges))
            color = COLORS.get(label.lower()) or next(others)
            axes.stairs(density, edges, color=color, linewidth=1.5, label=label)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel("density", color=INK)
    _legend(axes)
    total = sum(len(v) for v in values.values())
    _say_missing(axes, total - sum(len(v) for v in finite.values()), total)
    return png(fig)
