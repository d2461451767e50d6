"""The judges during training: a reward that is hacked ends it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiltflow.pipelines.model import TiltedPipeline
from tiltflow.rewards.combine import Score
from tiltflow.verdict.line import SIGMAS, Line
from tiltflow.verdict.paired import Judged


class Watch:
    """Asks the judges every few rounds about a quarter of the samples; says stop when one has fallen.

    Fallen: lower than of the base by more than three standard errors of the difference in the same noise.

    Args:
        every: Rounds between looks; 0: none.
        judges: Held-out scores by name.
        samples: Of the final verdict.
        seed: Of the run.
    """

    def __init__(self, every: int, judges: Mapping[str, Score], samples: int, seed: int) -> None:
        self.every, self.judges, self.seed = every, judges, seed + 1
        self.n = max(samples // 4, 8)
        self.base: Judged | None = None
        self.stopped: tuple[str, float, int] | None = None

    def __call__(self, tilted: TiltedPipeline, row: dict[str, Any]) -> bool:
        """Put judge and diversity into the round's row; True to stop."""
        if not self.every or (row["iteration"] + 1) % self.every:
            return False
        if self.base is None:
            self.base = tilted.judge(self.judges, self.n, self.seed, base=True)
        now = tilted.judge(self.judges, self.n, self.seed)
        row["diversity"] = now.diversity
        for name, value in now.scores.items():
            change = value - self.base.scores[name]
            row["judge"] = row[f"judge {name}"] = float(value.mean())
            if float(change.mean()) < -SIGMAS * float(change.std()) / len(change) ** 0.5:
                self.stopped = name, float(change.mean()), row["iteration"] + 1
        return self.stopped is not None

    def lines(self) -> list[Line]:
        """That it was stopped, and by whom, if it was."""
        if self.stopped is None:
            return []
        name, change, done = self.stopped
        said = f"stopped after round {done}: {name} had fallen while the reward rose"
        return [Line("reward hacking", change, None, None, "judges do not fall", "fail", said)]
