"""Sample e^{−E} without training, by stages: anneal a population, fit a mixture to it, weigh the mixture's draws exactly.

    from tiltflow import EnergyProblem, sample
    energy = lambda x: 8 * (x.norm(dim=1) - 2) ** 2
    problem = EnergyProblem(name="ring", energy=energy, event_shape=(2,), scale=3, finest=0.03)
    found = sample(problem)
    found.x, found.log_z, found.stage

What a stage cannot improve it leaves as it is: on particles and angles, and where a mixture's draws are worth too little,
the annealed population is the answer. All samples end with moves that keep e^{−E}.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from tiltflow.core.device import companion, double
from tiltflow.core.geometry import Euclidean
from tiltflow.core.progress import Tell, silent
from tiltflow.core.settings import Seed, check_value
from tiltflow.core.weights import Evidence, ess, evidence, pareto_k, systematic, truncated
from tiltflow.energies import EnergyProblem, Evaluator
from tiltflow.energies.anchor import Anchor, fitted
from tiltflow.energies.annealing import Annealed, anneal, jittered, quenched
from tiltflow.energies.population import Weighted, adapt, weigh
from tiltflow.run.device import check_device
from tiltflow.run.job import Outcome, report
from tiltflow.sampling.assess import assess_all
from tiltflow.sampling.drawn import Drawn
from tiltflow.sampling.outcome import EVALUATION_SEED, judged, spent_on, with_evidence
from tiltflow.sampling.settings import EVIDENCE, AutomaticSettings
from tiltflow.verdict.line import Verdict

ANNEALED, MIXTURE = "annealed population", "mixture"
QUENCHED, SNAPSHOTS, MOST = 200, 4, 20
"""Moves of draws that fall into the modes near them; states of the annealed population that a mixture is fitted to; weighted
draws for a sample at most."""


class LogZ(NamedTuple):
    """log ∫ e^{−E} with its standard error; of weighted draws the ESS, of 1, E[log w], and Pareto k̂."""

    value: float
    error: float
    ess: float | None = None
    elbo: float | None = None
    pareto_k: float | None = None

    @classmethod
    def of(cls, log_w: Tensor) -> Self:
        """Of weighted draws."""
        return cls(*evidence(log_w), pareto_k(log_w))


@dataclass(frozen=True)
class Sampled:
    """Samples of e^{−E}/Z, equally weighted, and what is known of Z.

    Args:
        problem: What was sampled.
        x: (n, *event).
        energies: (n,).
        groups: (n,), rows that come of one draw, or of one island.
        stage: Which stage gave them: the annealed population, or a mixture's weighted draws.
        log_z: By that stage.
        annealed: By the first stage, from islands that know nothing of each other.
        proposals: The mixtures that were adapted.
        energy: The evaluator, which counts every evaluation.
        history: One row per round that adapted a mixture.
        seconds: In all.
    """

    problem: EnergyProblem
    x: Tensor
    energies: Tensor
    groups: Tensor
    stage: str
    log_z: LogZ
    annealed: LogZ
    proposals: Sequence[Anchor]
    energy: Evaluator
    history: list[dict[str, Any]]
    seconds: float

    def verdict(self, compared: int = 2_000, seed: int = 0, evidence: int = EVIDENCE) -> Verdict:
        """The verdict, with so many samples compared with the problem's reference, if it has one.

        ``evidence``: energies at most for an independent classical run, if it has none.
        """
        found = self.outcome(compared, evidence, seed).verdict
        assert found is not None
        return found

    def report(self, folder: Path | str, compared: int = 2_000, seed: int = 0, evidence: int = EVIDENCE) -> Path:
        """Write ``folder/report.html``: the verdict, samples beside the reference, the mixture. Returns its path."""
        return report(self.outcome(compared, evidence, seed), folder, {"stage": self.stage})

    @property
    def drawn(self) -> Drawn:
        """The samples, as what is assessed."""
        return Drawn(self.x, self.energies, None, self.groups)

    @property
    def numbers(self) -> dict[str, Any]:
        """What is known of Z, as the verdict asks for it."""
        row = {"log_z": self.log_z.value, "log_z_std": self.log_z.error, "ess": self.log_z.ess, "elbo": self.log_z.elbo}
        row["pareto_k"] = self.log_z.pareto_k
        exact = self.problem.log_z
        return row if exact is None else row | {"log_z_error": abs(self.log_z.value - exact)}

    def outcome(
        self, compared: int, evidence: int, seed: int, notes: Sequence[str] = (), tell: Tell = silent
    ) -> Outcome:
        """Compare and judge."""
        tell("distances", 0, 1, "")
        generator = torch.Generator().manual_seed(EVALUATION_SEED + seed)
        assessed = assess_all(self.problem, self.drawn, None, None, generator, compared)
        tell("distances", 1, 1, "")
        assessed, said = with_evidence(self.problem, self.energy.energy, self.drawn, assessed, evidence, seed, tell)
        found = f"{self.annealed.value:.4g} ± {self.annealed.error:.2g}"
        notes = [*notes, *said, f"The samples are those of the {self.stage}."]
        notes += [f"The annealed population alone says log Z = {found}."]
        return judged(
            self.problem, self.stage, self.drawn, assessed._replace(row=assessed.row | self.numbers), self.history,
            spent_on(self.energy) | {"sample_seconds": self.seconds}, notes,
        )  # fmt: skip


def sample(
    problem: EnergyProblem,
    samples: int = 10_000,
    settings: AutomaticSettings | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    energy: Evaluator | None = None,
    tell: Tell = silent,
) -> Sampled:
    """Samples of e^{−E}/Z with log Z, by the stages that the energy needs.

    Args:
        problem: The energy, its space, and its two lengths ``scale`` and ``finest``.
        samples: How many.
        settings: Of the stages.
        seed: Of every draw.
        device: Where energies and moves are computed; mixtures are fitted on the CPU.
        energy: The evaluator to use; None: a new one, with neither budget nor cache.
        tell: Told what is going on: (what, done, total, note).

    Raises:
        TiltflowError: an energy that fails (see :class:`~tiltflow.energies.Evaluator`), or that no draw of N(0, scale²) has.
    """
    check_value("seed", seed, Seed)
    device, started = check_device(device), time.perf_counter()
    s, energy = settings or AutomaticSettings(), energy or Evaluator(problem.energy)
    work = _Work(problem, energy, s, torch.Generator(device).manual_seed(seed), tell)
    start = anneal(problem, energy, s.islands, s.particles, s.moves, work.generator, work.advance)
    annealed, history, proposals = LogZ(*start.evidence), list[dict[str, Any]](), list[Anchor]()
    stage, log_z = ANNEALED, annealed
    if type(problem.geometry) is Euclidean:
        proposals = work.mixtures(start, history)
        weighted = weigh(proposals, work.energies, max(s.draws, samples), work.host)
        found = LogZ.of(weighted.log_weights)
        if ess(truncated(weighted.log_weights)) >= s.least_ess:
            stage, log_z = MIXTURE, found
    x, groups = work.resampled(proposals, weighted, samples) if stage == MIXTURE else work.spread(start, samples)
    x = work.moved(x, start.step)
    seconds = time.perf_counter() - started
    return Sampled(problem, x, energy.value(x), groups, stage, log_z, annealed, proposals, energy, history, seconds)


class _Work:
    """What the stages share; mixtures and resampling are on the host."""

    def __init__(
        self, problem: EnergyProblem, energy: Evaluator, s: AutomaticSettings, generator: torch.Generator, tell: Tell
    ) -> None:
        self.problem, self.energy, self.s, self.generator, self.tell = problem, energy, s, generator, tell
        self.host = companion(generator, torch.device("cpu"))

    def advance(self, beta: float) -> None:
        """Annealing goes on."""
        self.tell("annealing", round(100 * beta), 100, f"β {beta:.2g}")

    def events(self, x: Tensor) -> Tensor:
        """Rows (n, d) as what the energy takes."""
        return x.view(-1, *self.problem.event_shape).to(self.generator.device, torch.get_default_dtype())

    def energies(self, x: Tensor) -> Tensor:
        """E of rows (n, d), float64."""
        return double(self.energy.value(self.events(x)))

    def some(self, x: Tensor, n: int) -> Tensor:
        """n rows at most, in random order."""
        return x[torch.randperm(len(x), generator=self.host)[:n].to(x.device)]

    def mixtures(self, start: Annealed, history: list[dict[str, Any]]) -> list[Anchor]:
        """Mixtures, first fitted to the annealed population and to draws that fell into their nearest modes, then adapted.

        One half of the islands chooses between mixtures that are fitted to the other: rows of one island are related.
        """
        s, problem, energy = self.s, self.problem, self.energy
        n, half = s.islands * s.particles // 2, s.particles * (s.islands // 2)
        self.tell("quenching", 0, 1, "")
        fallen = quenched(problem, energy, n, QUENCHED, self.generator)
        self.tell("quenching", 1, 1, "")
        parts, x = list[list[Tensor]]([[], []]), start.x
        for _ in range(SNAPSHOTS):
            x = jittered(energy, x, start.step, s.moves, self.generator, problem).x
            for part, rows in zip(parts, (x[:half], x[half:]), strict=True):
                part.append(self.some(rows, max(1, n // 2)))
        begun = [[fallen[0::2]], [fallen[1::2]]]
        halves = [[double(torch.cat(part).flatten(1)) for part in pair] for pair in (begun, parts)]
        self.tell("mixture", 0, s.rounds, "")
        clock = time.perf_counter()

        def advance(done: int, found: Evidence) -> None:
            nonlocal clock
            now, clock = clock, time.perf_counter()
            said = {"ess": found.ess, "log_z": found.log_z, "elbo": found.elbo}
            history.append({"iteration": done - 1, **said, "seconds": clock - now})
            self.tell("mixture", done, s.rounds, f"ESS {found.ess:.2g}")

        starts = [fitted(train, held, self.host) for train, held in halves]
        return adapt(self.energies, starts, s.draws, s.rounds, self.host, advance)

    def resampled(self, proposals: Sequence[Anchor], first: Weighted, n: int) -> tuple[Tensor, Tensor]:
        """n rows of weighted draws, of as many that they are worth n, or :data:`MOST` n; and which draw each is."""
        parts, log_w = [first.x], first.log_weights
        missing = min(n / ess(truncated(log_w)), MOST * n) - len(log_w)
        if missing > 0:
            more = weigh(proposals, self.energies, math.ceil(missing), self.host)
            parts, log_w = [*parts, more.x], torch.cat([log_w, more.log_weights])
        chosen = systematic(truncated(log_w), self.host, n)[torch.randperm(n, generator=self.host)]
        return self.events(torch.cat(parts)[chosen]), chosen

    def spread(self, start: Annealed, n: int) -> tuple[Tensor, Tensor]:
        """n states of the annealed population as it goes on moving, and the island of each."""
        x, parts, times = start.x, [start.x], -(-n // len(start.x))
        for i in range(1, times):
            self.tell("moves", i, times, "")
            x = jittered(self.energy, x, start.step, self.s.moves, self.generator, self.problem).x
            parts.append(x)
        some = torch.randperm(times * len(start.x), generator=self.host)[:n]
        return torch.cat(parts)[some.to(start.x.device)], some % len(start.x) // self.s.particles

    def moved(self, x: Tensor, step: float) -> Tensor:
        """After moves of MALA that keep e^{−E}."""
        self.tell("last moves", 0, 1, "")
        x = jittered(self.energy, x, step, self.s.moves, self.generator, self.problem).x
        self.tell("last moves", 1, 1, "")
        return x
