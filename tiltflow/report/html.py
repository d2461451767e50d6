"""One self-contained HTML page for a run: verdict first, then the samples, then the numbers.

The page loads nothing: pictures are inlined, styles are its own, and a content-security policy forbids the
rest. Every string is escaped. Numbers appear rounded, with the full value in the markup (``<data value=…>``).
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.report import plots
from tiltflow.report.record import RunRecord, is_images
from tiltflow.verdict.line import STATUSES, Status

SEVERITY: tuple[Status, ...] = ("fail", "cannot tell", "warn", "pass")
CURVES = (  # history key, heading, ordinate, logarithmic, caption
    ("reward", "Reward", "mean reward", False, "Mean over the samples each iteration drew."),
    ("judge", "Held-out judge", "mean judge score", False, "Training never saw it: it should rise too."),
    ("kl", "KL to the base", "KL (nats)", False, "E[∫ ½‖u‖² dt] over the sampled paths."),
    ("diversity", "Diversity", "diversity", False, "How different samples are from each other."),
    ("loss", "Loss", "matching loss", True, "Its floor is the variance of the adjoint, not zero."),
    ("grad_norm", "Gradient norm", "gradient norm", True, "Before clipping."),
)


def write_report(folder: Path, record: RunRecord) -> Path:
    """Write ``folder/report.html`` for a fine-tuning run, atomically, and return its path.

    Raises:
        TiltflowError: if the folder is missing, or matplotlib or jinja2 is not installed.
    """
    return write_page(folder, lambda: render(record))


def write_page(folder: Path, make: Callable[[], str]) -> Path:
    """Write the page to ``folder/report.html``: all of it or nothing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise TiltflowError(f"no folder {str(folder)!r} to put the report in; create it first.")
    target = folder / "report.html"
    partial = folder / f".report.{os.getpid()}.tmp"
    try:
        partial.write_text(make(), encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def render(record: RunRecord) -> str:
    """The page as a string."""
    return render_template(
        "run.html.j2", record, galleries=_galleries(record), figures=_figures(record)
    )


def _template(name: str) -> str:
    """The text of ``package/name``, or of this package's ``name``."""
    package, _, file = name.rpartition("/")
    return resources.files(f"tiltflow.{package or 'report'}").joinpath(file).read_text(encoding="utf-8")


def render_template(template: str, record: Any, **facts: Any) -> str:
    """A page of this folder's templates; ``record`` has the fields that every page shows."""
    jinja2 = plots.require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["exact"] = lambda value: (
        value if isinstance(value, (str, int)) else repr(float(value))
    )
    return environment.get_template(template).render(
        run=record,
        worst_first=sorted(record.verdict, key=lambda line: SEVERITY.index(line.status)),
        tally=[(status, sum(line.status == status for line in record.verdict)) for status in STATUSES],
        columns=list(dict.fromkeys(key for row in record.history for key in row)),
        **facts,
    )


def number(value: Any) -> str:
    """A number for the eye: four significant digits; None is a dash, NaN and infinities are named.

    >>> [number(v) for v in (0.123456, 12345.6, 3, None, float("nan"), float("-inf"), 1.5e-7, -2.0)]
    ['0.1235', '12346', '3', '–', 'NaN', '−∞', '1.5e-07', '−2']
    """
    if value is None:
        return "–"
    if isinstance(value, (bool, str)):
        return str(value)
    value = float(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.4g}"
    return "−" + text[1:] if text.startswith("-") else text


def _galleries(record: RunRecord) -> list[dict[str, Any]]:
    sets: list[tuple[str, Tensor | None, str]] = [
        ("Before", record.before, plots.BEFORE),
        ("After", record.after, plots.AFTER),
        ("Reference", record.reference, plots.REFERENCE),
    ]
    given = [(name, samples, color) for name, samples, color in sets if samples is not None]
    if is_images(record.before):
        pictures = [plots.image_grid(samples, value_range=record.value_range) for _, samples, _ in given]
    else:
        limits = plots.limits2d(*(samples for _, samples, _ in given))
        pictures = [plots.scatter2d(samples, limits, color) for _, samples, color in given]
    heard = dict(zip(("Before", "After"), record.sounds, strict=True))
    return [
        {"name": name, "src": data_uri(data), "sounds": [data_uri(file, "audio/wav") for file in heard.get(name, ())]}
        for (name, _, _), data in zip(given, pictures, strict=True)
    ]


def _figures(record: RunRecord) -> list[dict[str, str]]:
    levels: Mapping[str, float | None] = {}
    for row in record.summary:
        if row.name.lower() in ("reward", "mean reward"):
            levels = {"before": row.before, "reference": row.reference}
    figures = curves(record.history, CURVES, {"reward": levels})
    if any("kl" in row and "reward" in row for row in record.history):
        both = [row for row in record.history if "kl" in row and "reward" in row]
        picture = plots.reward_against_kl(_series(both, "kl")[1], _series(both, "reward")[1], levels)
        figures.insert(1, ("Reward against KL", "What each nat of distance from the base bought.", picture))
    if len(record.adjoint_t):
        caption = "Solved backwards from t = 1; an explosion towards t = 0 drowns the target in noise."
        picture = plots.adjoint_norms(record.adjoint_t, record.adjoint_norm)
        figures.append(("Adjoint norm over t", caption, picture))
    return inlined(figures)


def curves(
    history: Sequence[Mapping[str, Any]],
    asked: Sequence[tuple[str, str, str, bool, str]],
    levels: Mapping[str, Mapping[str, float | None]],
) -> list[tuple[str, str, bytes]]:
    """(heading, caption, picture) of every asked key that some row has; ``levels`` of a key are horizontal lines."""
    figures = []
    for key, name, unit, log, caption in asked:
        steps, values = _series(history, key)
        if values:
            picture = plots.curve(steps, {key: values}, "iteration", unit, levels.get(key), log)
            figures.append((name, caption, picture))
    return figures


def inlined(figures: Sequence[tuple[str, str, bytes]]) -> list[dict[str, str]]:
    """Figures as a template takes them."""
    return [{"name": name, "caption": caption, "src": data_uri(data)} for name, caption, data in figures]


def _series(history: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """(rounds, values) of the rows that have ``key``; rows without "iteration" are counted from 0."""
    rows = [(index, row) for index, row in enumerate(history) if row.get(key) is not None]
    return [float(row.get("iteration", index)) for index, row in rows], [float(row[key]) for _, row in rows]


def data_uri(data: bytes, kind: str = "image/png") -> str:
    """A file inside the page."""
    return f"data:{kind};base64," + base64.b64encode(data).decode("ascii")
