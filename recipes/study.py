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
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tiltflow._version import __version__
from tiltflow.bench.tilt import write_result
from tiltflow.core.control import FineTuned
from tiltflow.core.errors import TiltflowError
from tiltflow.core.ode import ode
from tiltflow.core.process import Process
from tiltflow.core.simulate import sample
from tiltflow.metrics.distance import pairwise_mean
from tiltflow.report import Page, gallery, scores_table, training_blocks, write_page
from tiltflow.report.figures import TILTING
from tiltflow.report.samples import SAME_NOISE
from tiltflow.report.sounds import wav
from tiltflow.rewards.combine import Score
from tiltflow.run.folder import RunFolder, document
from tiltflow.tilting.settings import FinetuneSettings
from tiltflow.tilting.model import TiltedModel
from tiltflow.tilting.train import finetune
from tiltflow.train.store import save_weights
from tiltflow.verdict.line import REWARD, Verdict, overall
from tiltflow.verdict.paired import Judged, against_base

SHOWN, HEARD = 24, 6
"""Samples in a picture, and how many of them as sound."""
EVALUATION = 1_000
"""Added to the seed for the samples that are judged."""


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
    reward: Score
    judges: Mapping[str, Score]
    picture: Callable[[Tensor], Tensor] = lambda decoded: decoded
    rate: int | None = None


def fine_tuned(study: Study, seed: int, args: argparse.Namespace, folder: RunFolder) -> Tuned:
    """One seed of Adjoint Matching, with low-rank updates, on the first list of texts."""
    texts = next(iter(study.texts.values()))
    symbols = study.spell(texts)
    named = {tuple(row): text for row, text in zip(symbols.tolist(), texts, strict=True)}

    def conditions(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"text": symbols[torch.randint(len(texts), (n,), generator=generator)]}

    def score(x: Tensor, text: Tensor) -> Tensor:
        return study.reward(study.decode(x), [named[tuple(row)] for row in text.tolist()])

    settings = FinetuneSettings(
        rounds=args.rounds, batch=args.batch, gradient_steps=2, steps=args.steps, rank=8, learning_rate=args.learning_rate,
        noiseless_last=True, last_steps=(args.steps + 3) // 4, random_steps=args.steps // 4, variance_samples=128,
        max_cost_gradient=args.max_cost_gradient, importance=args.importance,
    )  # fmt: skip
    with tqdm(total=args.rounds, desc=f"seed {seed}", mininterval=5) as bar:

        def progress(row: dict[str, Any]) -> None:
            bar.update(row["iteration"] + 1 - bar.n)
            bar.set_postfix(reward=f"{row['reward']:.3f}", kl=f"{row['kl']:.2f}")

        return finetune(
            study.base, score, args.strength, settings, generator=torch.Generator().manual_seed(seed),
            conditions=conditions, checkpoint=folder.checkpoint, resume=folder.checkpoint.is_file(), callback=progress,
        )  # fmt: skip


@torch.no_grad()
def judged(study: Study, x: Tensor, kl: Tensor, texts: list[str]) -> Judged:
    """Reward and judges of samples; diversity is the mean distance of two samples of one text."""
    decoded = torch.cat([study.decode(rows) for rows in x.split(64)])
    values = {name: score(decoded, texts).double() for name, score in ({REWARD: study.reward} | dict(study.judges)).items()}
    groups = [x[[t == text for t in texts]].flatten(1) for text in sorted(set(texts))]
    return Judged(x, values, kl, sum(pairwise_mean(g)[0] for g in groups) / len(groups))


def before_and_after(study: Study, tuned: Tuned, seed: int, texts: list[str], args: argparse.Namespace,
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


def one_seed(study: Study, seed: int, args: argparse.Namespace, folder: RunFolder, command: str) -> dict[str, Any]:
    """Fine-tune, judge both lists of texts by the chain and by the ODE, and leave weights, metrics and a report."""
    began = time.perf_counter()
    tuned = fine_tuned(study, seed, args, folder)
    seconds = time.perf_counter() - began
    save_weights(folder.path / "model.safetensors", FineTuned(tuned.process).module)
    kinds = list(itertools.product(study.texts, ("sde", "ode")))
    pairs = [before_and_after(study, tuned, seed, study.texts[kind], args, sampler) for kind, sampler in kinds]
    rows = [
        {"problem": study.name, "seed": seed, "texts": kind, "sampler": sampler, "samples": args.samples}
        | row_of(*pair) | {"seconds": seconds, "verdict": overall(against_base(*pair))}
        for (kind, sampler), pair in zip(kinds, pairs, strict=True)
    ]  # fmt: skip
    result = document(command, seed, "cpu", rows, rows[0]["verdict"])
    report(study, folder, tuned, pairs[0], result)
    folder.write_json("metrics.json", result | {"history": tuned.history})  # last: it says that the seed is done
    return result


def report(study: Study, folder: RunFolder, tuned: Tuned, pair: tuple[Judged, Judged], result: dict[str, Any]) -> None:
    """The page of one seed: the chain's samples of the texts that fine-tuning draws."""
    before, after = pair
    with torch.no_grad():
        decoded = [study.decode(found.x[:SHOWN]) for found in pair]
    sounds = [[wav(sound, study.rate) for sound in made[:HEARD]] if study.rate else [] for made in decoded]
    pictures = {name: study.picture(made) for name, made in zip(("Before", "After"), decoded, strict=True)}
    heard = dict(zip(("Before", "After"), sounds, strict=True))
    scores = [(k, float(v.mean()), None, float(after.scores[k].mean())) for k, v in before.scores.items()]
    scores.append(("diversity", before.diversity, None, after.diversity))
    levels = {"reward": {"before": float(before.scores[REWARD].mean())}}
    write_page(
        folder.path,
        Page(
            title=f"{study.name}, seed {result['seed']}", command=result["command"],
            verdict=Verdict(result["verdict"], against_base(*pair)),
            blocks=[gallery(pictures, value_range=(0.0, 1.0), sounds=heard, caption=SAME_NOISE), scores_table(scores)],
            training=training_blocks(tuned.history, TILTING, levels), history=tuned.history, config=folder.config,
            version=__version__,
        ),
    )  # fmt: skip


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
    parser.add_argument("--importance", action=argparse.BooleanOptionalAction, default=False, help="weight paths")
    parser.add_argument("--samples", type=int, default=320, help="of each kind that are judged")
    parser.add_argument("--out", type=Path, help="run folders seed0, seed1, ... are made here")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument("--results", type=Path, help="also write the rows here")
    parser.set_defaults(**defaults)
    return parser


def run(study: Study, args: argparse.Namespace, argv: list[str] | None = None) -> None:
    """Every seed in its own run folder; rows as JSON lines on stdout."""
    command = shlex.join(["python", f"recipes/{Path(sys.argv[0]).name}", *(sys.argv[1:] if argv is None else argv)])
    where = {"seeds", "out", "resume", "overwrite", "results"}
    shared = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in where}
    rows: list[dict[str, Any]] = []
    seconds = 0.0  # of fine-tuning, in this process or in the one that is resumed
    for seed in args.seeds:
        out = args.out / f"seed{seed}"
        begun = args.resume and (out / "config.json").is_file()
        with RunFolder(out, shared | {"seed": seed}, resume=begun, overwrite=args.overwrite) as folder:
            done = out / "metrics.json"
            result = json.loads(done.read_text()) if done.is_file() else one_seed(study, seed, args, folder, command)
        rows += result["rows"]
        seconds += result["rows"][0]["seconds"]
        for row in result["rows"]:
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
