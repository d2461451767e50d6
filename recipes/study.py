r"""Fine-tune a small text-conditional flow and judge it, before and after: the job of the recipes that have one.

A recipe brings a base, a reward, judges that training never sees, and two lists of texts: fine-tuning draws the first, both
are judged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tiltflow.bench.result import require_result, write_result
from tiltflow.cli.common import Bars
from tiltflow.core.control import FineTuned
from tiltflow.core.errors import TiltflowError
from tiltflow.core.ode import ode
from tiltflow.core.process import Process
from tiltflow.core.settings import Count, NonNegative, Range, Seed, check_value
from tiltflow.core.simulate import sample
from tiltflow.metrics.distance import pairwise_mean
from tiltflow.report import Block, gallery, scores_table, training_blocks
from tiltflow.report.figures import TILTING
from tiltflow.report.samples import SAME_NOISE
from tiltflow.report.sounds import wav
from tiltflow.rewards import combine
from tiltflow.run import job
from tiltflow.run.folder import FORMAT, METRICS, RunFolder, document, read_json
from tiltflow.tilting.model import TiltedModel
from tiltflow.tilting.settings import FinetuneSettings
from tiltflow.tilting.train import finetune
from tiltflow.train.store import save_weights
from tiltflow.verdict.line import REWARD, Score, Verdict, overall
from tiltflow.verdict.paired import Judged, against_base

SHOWN, HEARD = 24, 6
"""Samples in a picture, and how many of them as sound."""
EVALUATION = 1_000
"""Added to the seed for the samples that are judged."""
PLAIN, WEIGHTED = "adjoint_matching_plain", "adjoint_matching"
JUDGED = "samples"
"""Kind of the rows of metrics.json that are results: one for each list of texts and each way to sample."""
MINIBATCH = 1_024


def halves(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts for fine-tuning, and texts that it never draws; the base knows both."""
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = [texts[i] for i in order]
    return shuffled[::2], shuffled[1::2]


@dataclass(frozen=True)
class Study:
    """What is fine-tuned and how it is judged.

    Args:
        base: its condition is ``text``. texts: the first list is drawn in fine-tuning, the others are only judged.
        spell: n texts to (n, longest) symbols. decode: samples to what is scored, differentiable.
        reward, judges: (what is decoded, texts) → (n,). picture: what is decoded to images in [0, 1].
        rate: what is decoded is sound (n, 1, samples) of this many Hz.
    """

    name: str
    base: Process
    texts: Mapping[str, list[str]]
    spell: Callable[[list[str]], Tensor]
    decode: Callable[[Tensor], Tensor]
    reward: combine.Score
    judges: Mapping[str, combine.Score]
    picture: Callable[[Tensor], Tensor] = lambda decoded: decoded
    rate: int | None = None


def settings_of(args: argparse.Namespace) -> FinetuneSettings:
    """The settings of the fine-tuning. Raises TiltflowError for one that is out of range, and for other options that are."""
    for seed in args.seeds:
        check_value("a seed", seed, Seed)
    check_value("strength", args.strength, NonNegative)
    check_value("samples", args.samples, Annotated[int, Range(4)])
    check_value("base-steps", args.base_steps, Count)
    last, others = (args.steps + 3) // 4, args.steps // 4
    rows = max(1, min((last + others) * args.batch, MINIBATCH))
    return FinetuneSettings.of(
        args.method, {"gradient_steps": 2, "buffer_rounds": 4, "minibatch": rows}, rounds=args.rounds, batch=args.batch,
        steps=args.steps, rank=8, learning_rate=args.learning_rate, noiseless_last=True, last_steps=last,
        random_steps=others, variance_samples=128, max_cost_gradient=args.max_cost_gradient,
    )  # fmt: skip


def fine_tuned(study: Study, seed: int, args: argparse.Namespace, work: job.Work) -> TiltedModel:
    """One seed of Adjoint Matching, with low-rank updates, on the first list of texts."""
    texts = next(iter(study.texts.values()))
    symbols = study.spell(texts)
    named = {tuple(row): text for row, text in zip(symbols.tolist(), texts, strict=True)}

    def conditions(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"text": symbols[torch.randint(len(texts), (n,), generator=generator)]}

    def score(x: Tensor, text: Tensor) -> Tensor:
        return study.reward(study.decode(x), [named[tuple(row)] for row in text.tolist()])

    def progress(row: dict[str, Any]) -> None:
        work.round(row, f"seed {seed}", args.rounds, f"reward {row['reward']:.3f}, KL {row['kl']:.2f}")

    return finetune(
        study.base, score, args.strength, args.method, settings_of(args), seed=seed, conditions=conditions,
        checkpoint=work.checkpoint, resume=work.resume, callback=progress,
    )  # fmt: skip


@torch.no_grad()
def judged(study: Study, x: Tensor, kl: Tensor, texts: list[str]) -> Judged:
    """Reward and judges of samples; diversity is the mean distance of two samples of one text."""
    decoded = torch.cat([study.decode(rows) for rows in x.split(64)])
    values = {name: score(decoded, texts).double() for name, score in ({REWARD: study.reward} | dict(study.judges)).items()}
    groups = [x[[t == text for t in texts]].flatten(1) for text in sorted(set(texts))]
    return Judged(x, values, kl, sum(pairwise_mean(g)[0] for g in groups) / len(groups))


def before_and_after(study: Study, tuned: TiltedModel, seed: int, texts: list[str], args: argparse.Namespace,
                     sampler: str) -> tuple[Judged, Judged]:  # fmt: skip
    """Samples of the base and of the fine-tuned model from the same noise, four or more of each text."""
    chosen = [texts[i % max(1, min(len(texts), args.samples // 4))] for i in range(args.samples)]
    condition = {"text": study.spell(chosen)}
    x0 = tuned.chain.source(args.samples, torch.Generator().manual_seed(EVALUATION + seed))
    found = []
    for process, control in ((study.base, None), (tuned.process, FineTuned(tuned.process))):
        if sampler == "ode":
            x, kl = ode(process, x0, (args.steps + 1) // 2, "heun", **condition), torch.zeros(args.samples)
        else:
            drawn = sample(tuned.chain, control, x0, torch.Generator().manual_seed(2 * EVALUATION + seed), **condition)
            x, kl = drawn.x, drawn.kl
        found.append(judged(study, x, kl, chosen))
    return found[0], found[1]


def row_of(before: Judged, after: Judged) -> dict[str, float]:
    """Means of every score and of the diversity, the errors of the means, and the error of the paired change."""
    row = {"diversity_base": before.diversity, "diversity": after.diversity, "kl": float(after.kl.mean())}
    for name, value in after.scores.items():
        old = before.scores[name]
        for key, scores in ((f"{name}_base", old), (name, value), (f"{name}_change", value - old)):
            row |= {key: float(scores.mean()), f"{key}_error": float(scores.std()) / len(scores) ** 0.5}
    return row


@dataclass(frozen=True)
class StudyJob:
    """One seed of a study: fine-tune, judge both lists of texts by the chain and by the ODE."""

    name: ClassVar[str] = "study"
    writes: ClassVar[tuple[str, ...]] = ("model.safetensors",)
    study: Study
    seed: int
    args: argparse.Namespace
    device: str = "cpu"

    def config(self) -> dict[str, Any]:
        """The options of the recipe, without those that say where results go."""
        where = {"seeds", "out", "resume", "overwrite", "results"}
        shared = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items() if k not in where}
        return {"problem": self.study.name, "seed": self.seed} | shared

    def check(self) -> None:
        """Options that are out of range."""
        settings_of(self.args)

    def train(self, work: job.Work) -> Any:
        """Fine-tune."""
        return fine_tuned(self.study, self.seed, self.args, work)

    def judge(self, model: Any, work: job.Work) -> job.Outcome:
        """Weights in model.safetensors; rows of kind "samples", one for each list of texts and each way to sample."""
        study, args, tuned = self.study, self.args, model
        seconds = sum(row["seconds"] for row in tuned.history)
        save_weights(work.path / "model.safetensors", tuned.module)
        kinds = list(itertools.product(study.texts, ("sde", "ode")))
        pairs = [before_and_after(study, tuned, self.seed, study.texts[kind], args, sampler) for kind, sampler in kinds]
        rows = [
            {"kind": JUDGED, "problem": study.name, "seed": self.seed, "texts": kind, "sampler": sampler,
             "samples": args.samples} | row_of(*pair) | {"seconds": seconds, "verdict": overall(against_base(*pair))}
            for (kind, sampler), pair in zip(kinds, pairs, strict=True)
        ]  # fmt: skip
        before, after = pairs[0]
        lines = against_base(before, after)
        scores = [Score(k, float(v.mean()), None, float(after.scores[k].mean())) for k, v in before.scores.items()]
        scores.append(Score("diversity", before.diversity, None, after.diversity))
        return job.Outcome(
            title=f"{study.name}, seed {self.seed}",
            summary={"problem": study.name, "method": args.method, "strength": args.strength, "kl": rows[0]["kl"],
                     "train_seconds": seconds},
            verdict=Verdict(overall(lines), lines, scores),
            rows=rows,
            history=tuned.history,
            draw=lambda: blocks(study, tuned, pairs[0], scores),
        )  # fmt: skip


def blocks(
    study: Study, tuned: TiltedModel, pair: tuple[Judged, Judged], scores: list[Score]
) -> tuple[list[Block], list[Block]]:
    """The page of one seed: the chain's samples of the texts that fine-tuning draws."""
    with torch.no_grad():
        decoded = [study.decode(found.x[:SHOWN]) for found in pair]
    sounds = [[wav(sound, study.rate) for sound in made[:HEARD]] if study.rate else [] for made in decoded]
    pictures = {name: study.picture(made) for name, made in zip(("Before", "After"), decoded, strict=True)}
    heard = dict(zip(("Before", "After"), sounds, strict=True))
    levels = {"reward": {"before": scores[0].base}}
    shown: list[Block] = [gallery(pictures, value_range=(0.0, 1.0), sounds=heard, caption=SAME_NOISE), scores_table(scores)]
    return shown, training_blocks(tuned.history, TILTING, levels)


def arguments(description: str, base: Path, **defaults: Any) -> argparse.ArgumentParser:
    """Options that the recipes share, with a recipe's own ``defaults``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--base", type=Path, default=base, help="trained if it is not there")
    parser.add_argument("--base-steps", type=int, help="training steps of the base")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of fine-tuning")
    parser.add_argument("--steps", type=int, default=20, help="simulation steps K")
    parser.add_argument("--batch", type=int, default=48, help="paths per round")
    parser.add_argument("--strength", type=float, help="lambda of the tilt exp(lambda reward)")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-cost-gradient", type=float, default=50.0, help="bound on a sample's gradient, times lambda")
    parser.add_argument("--method", choices=(PLAIN, WEIGHTED), default=PLAIN, help="without or under path weights")
    parser.add_argument("--samples", type=int, default=320, help="of each kind that are judged")
    parser.add_argument("--out", type=Path, help="run folders seed0, seed1, ... are made here")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument("--results", type=Path, help="also write the rows here")
    parser.set_defaults(**defaults)
    return parser


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options. Raises TiltflowError, before a base is trained, for what a run would refuse."""
    args = parser.parse_args(argv)
    settings_of(args)
    require_result(args.results)
    return args


def finished(one: StudyJob, out: Path) -> dict[str, Any] | None:
    """The document of a seed that is done; None if there is something left to do."""
    config = {"job": one.name, "format": FORMAT, **one.config()}
    with RunFolder(out, config, resume=True, writes=one.writes) as folder:
        found = read_json(out / METRICS) if (out / METRICS).is_file() else {"verdict": None}
        return found if found["verdict"] is not None and len(folder.rounds()) == one.args.rounds else None


def run(study: Study, args: argparse.Namespace, argv: list[str] | None = None) -> None:
    """Every seed in its own run folder; rows as JSON lines on stdout."""
    command = shlex.join(["python", f"recipes/{Path(sys.argv[0]).name}", *(sys.argv[1:] if argv is None else argv)])
    rows: list[dict[str, Any]] = []
    seconds = 0.0  # of fine-tuning, in this process or in the one that is resumed
    for seed in args.seeds:
        one, out, bars = StudyJob(study, seed, args), args.out / f"seed{seed}", Bars()
        begun = args.resume and (out / "config.json").is_file()
        result = finished(one, out) if begun else None
        if result is None:
            result = job.run(one, out, command=command, resume=begun, overwrite=args.overwrite, tell=bars)
        bars.close()
        judged_rows = [{k: v for k, v in row.items() if k != "kind"} for row in result["rows"] if row["kind"] == JUDGED]
        rows += judged_rows
        seconds += judged_rows[0]["seconds"]
        for row in judged_rows:
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    if args.results is not None:
        write_result(args.results, document(command, args.seeds, "cpu", rows, None), seconds)


def start(main: Callable[[], None]) -> None:
    """Run a recipe's ``main``; a TiltflowError is one line and exit code 2."""
    try:
        main()
    except TiltflowError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
