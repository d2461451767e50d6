"""Samples of any event shape as pictures: images and clips as they are, numbers as histograms, all else in two coordinates.

Samples that are no images are projected to the two principal axes of the last set, so that every set is seen in the same
coordinates; particles are first replaced by their sorted distances, which rotations and permutations leave alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.metrics.particles import interatomic_distances
from tiltflow.report import plots
from tiltflow.report.page import Gallery, Picture

SAME_NOISE = "Before and after start from the same noise: the sample at the same place has the same seed."
IMAGES, COLUMNS = 64, 8
"""Most images of a set, in this many columns; also most clips of a set and frames of a clip."""
SHOWN, ELEMENTS = 5_000, 20_000_000
"""Most samples of a set that are projected, and most numbers in them."""
AXES = 1_000
"""Samples that the principal axes are of."""
LARGEST = 1e30
"""Numbers beyond it count as infinite: they cannot be drawn."""


def gallery(
    sets: Mapping[str, Tensor | None],
    *,
    value_range: tuple[float, float] = (-1.0, 1.0),
    particles: bool = False,
    sounds: Mapping[str, Sequence[bytes]] | None = None,
    caption: str = "",
) -> Gallery:
    """Sets of samples side by side, and a caption that says what is shown and what is left out.

    Args:
        sets: name → samples (N, *event), one event shape for all, or None. Images (1 or 3, H, W) and clips (1 or 3, T, H, W)
            are shown as they are, in grids in which broken pixels are magenta; of others, samples that are not finite are
            left out and counted.
        value_range: intensities mapped to black and white.
        particles: samples are (N, n, m), n particles in m-D, compared by their distances.
        sounds: name → WAV files, heard beside the picture of that name.
        caption: said first.

    Raises:
        TiltflowError: for sets of different event shapes, or an empty value range; never for an event shape.
    """
    given = {name: (x if x.is_floating_point() else x.double()).detach().cpu() for name, x in sets.items() if x is not None}
    shapes = {tuple(x.shape[1:]) for x in given.values()}
    if len(shapes) > 1:
        raise TiltflowError(f"samples side by side need one event shape, got {sorted(shapes)}.")
    event = next(iter(shapes), ())
    particles = particles and len(event) == 2 and event[0] > 1
    seen = len(event) in (3, 4) and event[0] in (1, 3) and min(event) > 0 and max(event[-2:]) > 1
    numbers = event[0] ** 2 if particles else max(torch.Size(event).numel(), 1)
    most = (COLUMNS if len(event) == 4 else IMAGES) if seen else min(SHOWN, max(2, ELEMENTS // numbers))
    said: list[str] = []
    kept: dict[str, Tensor] = {}
    for name, x in given.items():
        good = drawable(x)
        if not good.all():
            left = "drawn magenta" if seen else "left out"
            said.append(f"{int(good.logical_not().sum())} of {len(x)} samples of {name} are not finite and {left}.")
        shown = x if seen else x[good]
        if len(shown) > most:
            said.append(f"{name}: the first {most} of {len(shown)}.")
        if shown.numel():
            kept[name] = shown[:most]
        elif good.all():
            said.append(f"{name} is empty.")
    pictures, text = dict[str, bytes](), "There is nothing to show."
    if kept:
        pictures, text = _images(kept, value_range) if seen else _points(kept, particles)
    heard = sounds or {}
    named = [Picture(name, png, heard.get(name, ())) for name, png in pictures.items()]
    return Gallery("Samples", named, " ".join(filter(None, [caption, text, *said])))


def _images(sets: Mapping[str, Tensor], value_range: tuple[float, float]) -> tuple[dict[str, bytes], str]:
    """A grid of each set of images, or of clips: one a row, its frames from left to right."""
    length = next(iter(sets.values())).shape[2]
    if all(x.dim() == 4 for x in sets.values()):
        return {name: plots.image_grid(x, COLUMNS, value_range) for name, x in sets.items()}, ""
    columns = min(length, COLUMNS)
    frames = torch.linspace(0, length - 1, columns).round().long()
    rows = {name: x[:, :, frames].transpose(1, 2).flatten(0, 1) for name, x in sets.items()}
    text = f"One clip a row, {columns} of its {length} frames from left to right."
    return {name: plots.image_grid(x, columns, value_range) for name, x in rows.items()}, text


def _points(sets: Mapping[str, Tensor], particles: bool) -> tuple[dict[str, bytes], str]:
    """A scatter of each set in the same two coordinates, or one histogram of all sets if there is only one."""
    points, text = project(list(sets.values()), particles)
    named = dict(zip(sets, points, strict=True))
    if points[0].shape[1] == 1:
        return {", ".join(named): plots.histogram(named, "value")}, text
    limits = plots.limits2d(*points)
    return {name: plots.scatter2d(x, limits, plots.COLORS.get(name.lower(), plots.AFTER)) for name, x in named.items()}, text


def drawable(x: Tensor) -> Tensor:
    """Which samples (n, *event) are finite and not beyond `LARGEST`: (n,), boolean."""
    return (torch.isfinite(x) & ~(x.abs() > LARGEST)).flatten(1).all(1) if x.dim() > 1 else drawable(x[:, None])


def project(samples: Sequence[Tensor], particles: bool) -> tuple[list[Tensor], str]:
    """Sets of samples (n, *event) in the same two coordinates (n, 2), or (n, 1) if they have only one; and what they are."""
    rows = [x.detach().double() for x in samples]
    what = ""
    if particles:
        n, m = rows[0].shape[1:]
        rows = [interatomic_distances(x).reshape(len(x), -1).sort(1).values for x in rows]
        what = f" of the sorted distances of {n} particles in {m}-D"
    rows = [x.reshape(len(x), -1) for x in rows]
    dimension = rows[0].shape[1]
    if dimension == 1:
        return rows, f"The only coordinate{what}."
    if dimension == 2:
        return rows, "The two coordinates."
    last = rows[-1] if len(rows[-1]) > 2 else torch.cat(rows)
    centre = last.mean(0)
    axes = principal_axes(last[:AXES] - centre)
    return [(x - centre) @ axes for x in rows], f"The first two principal axes{what or f' of {dimension} coordinates'}."


def principal_axes(x: Tensor) -> Tensor:
    """The two unit vectors (d, 2) along which centred rows x (n, d) vary most; zero where there is no variation."""
    if x.shape[1] <= len(x):
        return torch.linalg.eigh(x.T @ x).eigenvectors[:, -2:].flip(1)
    axes = x.T @ torch.linalg.eigh(x @ x.T).eigenvectors[:, -2:].flip(1)  # xᵀu of the smaller matrix: d may be huge
    axes = axes / axes.norm(dim=0).clamp_min(1e-30)
    return torch.nn.functional.pad(axes, (0, 2 - axes.shape[1]))
