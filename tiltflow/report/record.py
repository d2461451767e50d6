"""The facts a report shows, as plain frozen data: a run fills a `RunRecord`, the report only lays it out.

A quantity that does not exist is None and a dash; one that came out NaN or infinite is shown as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.verdict.line import STATUSES, Line, Status


class SummaryRow(NamedTuple):
    """One quantity before fine-tuning, under the reference (the exact tilt) and after."""

    name: str
    before: float | None
    reference: float | None
    after: float | None


@dataclass(frozen=True)
class RunRecord:
    """Everything the report of one fine-tuning run shows.

    Args:
        title: heading, for example "digits tilted towards thickness, λ = 8".
        command: the command line that repeats the run.
        status: overall verdict.
        verdict: its lines, each with attributes of `Line`.
        summary: rows of the before / reference / after table.
        before, after: samples from the same X_0, (N, 1 | 3, H, W) images or (N, 2) points.
        reference: samples from the exact tilt, same event shape, or None.
        history: one mapping per iteration. All keys are tabulated; "reward", "judge", "kl", "diversity",
            "loss" and "grad_norm" are plotted over "iteration", from the rows that have them.
        adjoint_t, adjoint_norm: times in [0, 1] and the mean norm ‖ã(t)‖ at each.
        path_ess: effective sample size of the path weights as a fraction of N, or None.
        config: settings of the run, shown as a table.
        notes: sentences the reader should know.
        sounds: WAV files to hear, (before, after).
        value_range: (low, high) of image intensities, mapped to black and white.
        version: version of tiltflow that ran it.

    Raises:
        TiltflowError: for an unknown status, samples of another shape, or adjoint lists of unequal length.
    """

    title: str
    command: str
    status: Status
    verdict: Sequence[Line]
    summary: Sequence[SummaryRow]
    before: Tensor
    after: Tensor
    reference: Tensor | None = None
    history: Sequence[Mapping[str, float]] = ()
    adjoint_t: Sequence[float] = ()
    adjoint_norm: Sequence[float] = ()
    path_ess: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    sounds: tuple[Sequence[bytes], Sequence[bytes]] = ((), ())
    value_range: tuple[float, float] = (-1.0, 1.0)
    version: str = ""

    def __post_init__(self) -> None:
        given = [
            ("status", self.status),
            *((f"verdict line {line.name!r}", line.status) for line in self.verdict),
        ]
        for where, status in given:
            if status not in STATUSES:
                raise TiltflowError(f"{where}: {status!r} is no verdict; use one of {', '.join(STATUSES)}.")
        for name in ("before", "after", "reference"):
            samples = getattr(self, name)
            if samples is not None and not (is_images(samples) or is_points(samples)):
                raise TiltflowError(
                    f"{name} samples have shape {tuple(samples.shape)}; a report shows images "
                    "(N, 1 or 3, H, W) or points (N, 2); project others to two coordinates."
                )
        if len(self.adjoint_t) != len(self.adjoint_norm):
            raise TiltflowError(
                f"adjoint_t has {len(self.adjoint_t)} entries and adjoint_norm {len(self.adjoint_norm)}; "
                "give one norm per time."
            )


def is_images(samples: Tensor) -> bool:
    """Whether ``samples`` is (N, 1 | 3, H, W) with N > 0."""
    return samples.ndim == 4 and samples.shape[1] in (1, 3) and samples.shape[0] > 0


def is_points(samples: Tensor) -> bool:
    """Whether ``samples`` is (N, 2) with N > 0."""
    return samples.ndim == 2 and samples.shape[1] == 2 and samples.shape[0] > 0
