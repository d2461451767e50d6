r"""How a check asks: a question has a name, a threshold, the questions that must be answered well first, and a function.

What a question raises is the answer "fail" under its own name; a question whose needs were not met is not asked, and its
answer is "cannot tell". :mod:`tiltflow.verdict.check_reward`, ``check_energy`` and ``check_base`` share this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from tiltflow.verdict.line import Line, Status, overall

Answer = tuple[float | None, Status, str]
"""The number, the answer, and what it means."""


class Question(NamedTuple):
    """``ask`` maps what is checked to an :data:`Answer`."""

    name: str
    threshold: str
    needs: tuple[str, ...]
    ask: Callable[[Any], Answer]


@dataclass(frozen=True)
class Report:
    """The ``lines`` of a check."""

    lines: list[Line]

    @property
    def status(self) -> Status:
        """The worst line: fail, then cannot tell, then warn, then pass."""
        return overall(self.lines)


def answered(name: str, threshold: str, ask: Callable[[], Answer]) -> Line:
    """The line of an answer; an exception is the answer "fail" under its own name."""
    try:
        value, status, text = ask()
    except Exception as error:
        value, status, text = None, "fail", f"it raised {type(error).__name__}: {error}"
    return Line(name, value, None, None, threshold, status, text)


def untried(name: str, threshold: str, missing: str) -> Line:
    """The line of a question that was not asked because ``missing`` was not answered well."""
    return Line(name, None, None, None, threshold, "cannot tell", f"not tried: see {missing!r}")


def unmet(needs: Iterable[str], lines: dict[str, Line]) -> str | None:
    """The first of ``needs`` that failed or could not be told."""
    return next((n for n in needs if lines[n].status in ("fail", "cannot tell")), None)


def ask_all(
    questions: Iterable[Question], subject: Any, tell: Callable[[int], None] = lambda done: None
) -> dict[str, Line]:
    """Every question's line, in order; ``tell`` is told how many are answered."""
    lines: dict[str, Line] = {}
    for name, threshold, needs, ask in questions:
        missing = unmet(needs, lines)
        lines[name] = untried(name, threshold, missing) if missing else answered(name, threshold, partial(ask, subject))
        tell(len(lines))
    return lines
