"""One self-contained HTML page for any run: the verdict first, then blocks of pictures and numbers.

The page loads nothing: pictures are inlined, styles are its own, and a content-security policy forbids the
rest. Every string is escaped, except the html of `Markup`. Numbers appear rounded, with the full value in the
markup (``<data value=…>``); what does not exist is None and a dash, what came out NaN or infinite is named.
"""

from __future__ import annotations

import base64
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from tiltflow.core.errors import TiltflowError
from tiltflow.report.plots import require
from tiltflow.train.store import write_text
from tiltflow.verdict.line import STATUSES, Verdict

NEEDED = ("matplotlib", "jinja2", "scipy")
SEVERITY = ("fail", "cannot tell", "warn", "pass")


class Picture(NamedTuple):
    """A set of samples: its name, its picture (PNG), and WAV files to hear."""

    name: str
    png: bytes
    sounds: Sequence[bytes] = ()


class Figure(NamedTuple):
    """A plot (PNG) with its name and what it shows."""

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Gallery:
    """Samples side by side; without pictures, only the caption."""

    heading: str
    pictures: Sequence[Picture]
    caption: str = ""


@dataclass(frozen=True)
class Figures:
    """Plots side by side; nothing if there are none. An empty heading continues the block before."""

    heading: str
    figures: Sequence[Figure]
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of numbers, strings and None; nothing if there are none. A cell that is a status is shown as one.

    Args:
        folded: show the heading only, until the reader opens the table.
    """

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Markup:
    """HTML of our own, shown as it is; only a page with such a block may run scripts."""

    heading: str
    html: str


Block = Gallery | Figures | Table | Markup


@dataclass(frozen=True)
class Page:
    """Everything the report of one run shows, in this order.

    Args:
        title: heading, for example "digits tilted towards thickness, λ = 8".
        command: the command line that repeats the run.
        verdict: the answer and its lines; None where there is nothing to judge.
        blocks: what came out, shown between the answer and the table of its lines.
        training: how it got there, shown after that table.
        facts: names and numbers shown beside the answer.
        notes: sentences the reader should know.
        config: settings of the run, shown as a table.
        history: one mapping per round, shown as a table; values that are lists are left out.
        version: version of tiltflow that ran it.

    Raises:
        TiltflowError: for an unknown status.
    """

    title: str
    command: str
    verdict: Verdict | None
    blocks: Sequence[Block]
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    history: Sequence[Mapping[str, Any]] = ()
    version: str = ""
    training: Sequence[Block] = ()
    facts: Mapping[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.verdict is None:
            return
        lines = {f"verdict line {line.name!r}": line.status for line in self.verdict.lines}
        for where, status in {"verdict": self.verdict.status, **lines}.items():
            if status not in STATUSES:
                raise TiltflowError(f"{where}: {status!r} is no verdict; use one of {', '.join(STATUSES)}.")


def require_report() -> None:
    """Make sure that a report can be written, without importing what it needs.

    Raises:
        TiltflowError: naming the packages of the report extra that are not installed.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise TiltflowError(f'a report needs {", ".join(missing)}: pip install "tiltflow[report]".')


def write_page(folder: Path, page: Page) -> Path:
    """Write ``folder/report.html``, all of it or nothing, and return its path.

    Raises:
        TiltflowError: if the folder is missing, or jinja2 is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TiltflowError(f"no folder {str(folder)!r} to put the report in; create it first.")
    target = folder / "report.html"
    write_text(target, render(page))
    return target


def render(page: Page) -> str:
    """The page as a string. Raises TiltflowError if jinja2 is not installed."""
    lines = page.verdict.deciding if page.verdict else []
    every = [*page.blocks, *page.training]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if any(picture.sounds for block in every if isinstance(block, Gallery) for picture in block.pictures):
        policy += "; media-src data:"
    if any(isinstance(block, Markup) for block in every):
        policy += "; script-src 'unsafe-inline'"
    keys = dict.fromkeys(key for row in page.history for key, value in row.items() if not isinstance(value, list))
    return fill(
        "report/page.html.j2",
        page=page,
        policy=policy,
        worst_first=sorted(lines, key=lambda line: SEVERITY.index(line.status)),
        tally=[(status, sum(line.status == status for line in lines)) for status in STATUSES],
        rounds=Table("Every iteration", list(keys), [[r.get(k) for k in keys] for r in page.history], folded=True),
    )


def fill(template: str, **facts: Any) -> str:
    """The text of a template of this package, ``folder/name``, with its holes filled and escaped."""
    jinja2 = require("jinja2")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    environment.filters["exact"] = lambda value: repr(value if isinstance(value, int) else float(value))
    environment.filters["kind"] = lambda block: type(block).__name__
    environment.filters["data"] = data_uri
    environment.tests["text"] = is_text
    environment.tests["status"] = lambda value: value in STATUSES
    source = resources.files("tiltflow").joinpath(template).read_text(encoding="utf-8")
    return str(environment.from_string(source).render(**facts))


def is_text(value: Any) -> bool:
    """Whether a cell is shown as it is: neither a number nor missing."""
    return isinstance(value, bool) or not isinstance(value, (Real, type(None)))


def number(value: Any) -> str:
    """A number for the eye: four significant digits; None is a dash, NaN and infinities are named.

    >>> [number(v) for v in (0.123456, 12345.6, 3, None, float("nan"), float("-inf"), 1.5e-7, -2.0)]
    ['0.1235', '12346', '3', '–', 'NaN', '−∞', '1.5e-07', '−2']
    """
    if value is None:
        return "–"
    value = float(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.4g}"
    return "−" + text[1:] if text.startswith("-") else text


def data_uri(data: bytes, kind: str = "image/png") -> str:
    """A file inside the page."""
    return f"data:{kind};base64," + base64.b64encode(data).decode("ascii")
