"""The main job, from names to a run folder: fine-tune, sample, judge, report.

A run folder holds config.json, checkpoint.safetensors, weights.safetensors, chain.safetensors, samples.safetensors,
metrics.json and report.html.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from tiltflow.core.chain import InterpolantChain
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.process import Process
from tiltflow.core.settings import as_json, from_json, settings
from tiltflow.core.weights import ess, evidence, normalised
from tiltflow.methods.registry import row_of
from tiltflow.report import gallery, scores_table, training_blocks
from tiltflow.report.figures import TILTING
from tiltflow.report.page import Block
from tiltflow.report.samples import SAME_NOISE
from tiltflow.rewards.spec import RewardSpec
from tiltflow.run.job import Outcome, Work
from tiltflow.run.names import anchored
from tiltflow.tilting.chain import ends_noiselessly, require_memoryless, trainable_copy, tuned_process
from tiltflow.tilting.model import TiltedModel
from tiltflow.tilting.names import load_base, load_reward
from tiltflow.tilting.settings import TiltConfig
from tiltflow.tilting.train import check_door, finetune, require_applies
from tiltflow.tilting.weights import load_chain, load_network
from tiltflow.verdict.line import Line, Score, Verdict, overall

UNSEEN, GRID, FLOWED = 8, 64, 1_000
"""Conditions that a conditional reward is judged on; samples that are shown; ODE samples."""
Cases = list[tuple[dict[str, Any], dict[str, Any]]]


@settings
class TiltJob(TiltConfig):
    """A fine-tuning run."""

    name: ClassVar[str] = "finetune"

    def config(self) -> dict[str, Any]:
        """The fields as JSON; files and folders by their absolute paths."""
        named = {name: anchored(value) for name in ("base", "reward", "conditions") if (value := getattr(self, name))}
        return as_json(self) | named | {"judges": [anchored(judge) for judge in self.judges]}

    @classmethod
    def read(cls, config: dict[str, Any], folder: Path) -> Self:
        """The job of a config.json."""
        fields = {k: v for k, v in config.items() if k not in ("job", "format")}
        return from_json(cls, fields, str(folder / "config.json"))

    def load_base(self) -> Process:
        """The base process, its weights on the device."""
        if self.base is None:
            raise TiltflowError("this run was saved from Python: give its base, load(folder, base=…, reward=…).")
        process = load_base(self.base, self.predicts, self.interpolant, self.shape, self.label, self.guidance)
        if isinstance(process.model, torch.nn.Module):
            process.model.to(self.device)
        return process

    def load_reward(self) -> RewardSpec:
        """The reward and its judges."""
        if self.reward is None:
            raise TiltflowError("this run was saved from Python: give its reward, load(folder, base=…, reward=…).")
        return load_reward(self.reward, self.judges, self.conditions)

    def check(self) -> None:
        """Find misuse: λ, the schedule, the method, and what base and reward return for a few samples."""
        row, spec, base = row_of(self.method, "finetune"), self.load_reward(), self.load_base()
        require_applies(row, base, self.settings, spec.conditions)
        require_memoryless(base.interpolant, self.settings)
        generator = torch.Generator(self.device).manual_seed(self.seed)
        check_door(row, base, spec.reward, generator, spec.conditions, seen=spec.adapt is None)

    def load(
        self, folder: Path, device: str = "cpu", base: Process | None = None, reward: Callable[..., Tensor] | None = None
    ) -> TiltedModel:
        """The model of a finished run folder; ``base`` and ``reward`` replace those that it names."""
        spec = RewardSpec(reward, {}) if reward is not None else self.load_reward()
        base, process = starting(replace(self, device=device), base or replace(self, device=device).load_base(), spec)
        row = row_of(self.method, "finetune")
        if row.trained:
            load_network(folder, process)
        cost = RewardCost(spec.reward, self.strength, self.settings.max_cost_gradient)
        return TiltedModel(base, process, load_chain(folder, base), cost, row, self.settings, spec.conditions, [])

    def draw(
        self, folder: Path, n: int, asked: dict[str, Any], seed: int, device: str
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """n new samples, with their conditions, and their mean reward."""
        model, spec = self.load(folder, device), self.load_reward()
        condition: dict[str, Any] = {}
        if spec.unseen is not None:
            rows = spec.unseen(UNSEEN, torch.Generator(device).manual_seed(seed))[0]
            condition = {k: v[torch.arange(n) % UNSEEN].to(device) for k, v in rows.items()}
        x = model.sample(n, seed=seed, **asked, **condition)
        reward = float(spec.reward(x, **condition).detach().mean())
        return {"samples": x, **condition}, {"noise": asked.get("noise", "chain"), "reward": reward}

    def perform(self, work: Work) -> Outcome:
        """Train, save, judge."""
        spec, base = self.load_reward(), self.load_base()
        base, process = starting(self, base, spec, self.settings.rank)
        model = finetune(
            base,
            spec.reward,
            self.strength,
            self.method,
            self.settings,
            seed=self.seed,
            device=self.device,
            tuned=process if row_of(self.method, "finetune").trained else None,
            conditions=spec.conditions,
            checkpoint=work.checkpoint,
            resume=work.resume,
            callback=lambda row: work.round(row, "fine-tuning", self.settings.rounds),
        )
        model.save_weights(work.path)
        cases = self.cases(spec)
        seen = cases[0][0] if spec.adapt is None else {}  # a base that does not see the condition is drawn once
        shared = model.base_samples(self.reference_samples, self.seed, work.tell) if not seen else None
        found = [assess(self, spec, model, shared, case, judge, work) for case, judge in cases]
        return conclude(self, spec, model, found, cases[0][0], work)

    def cases(self, spec: RewardSpec) -> Cases:
        """The conditions that the result is judged under, each with what only the judges see."""
        if spec.unseen is None:
            return [({}, {})]
        rows, judged = spec.unseen(UNSEEN, torch.Generator(self.device).manual_seed(self.seed + 1))
        return [
            ({k: v[i : i + 1] for k, v in rows.items()}, {k: v[i : i + 1] for k, v in judged.items()})
            for i in range(UNSEEN)
        ]


def starting(job: TiltJob, base: Process, spec: RewardSpec, rank: int | None = None) -> tuple[Process, Process]:
    """The base as the reward needs it, and the process to train, which starts there (the base, if nothing is trained)."""
    if not row_of(job.method, "finetune").trained:
        return base, base
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)  # initial weights of adapters
        net = trainable_copy(base, rank, torch.Generator(job.device).manual_seed(job.seed))
        if spec.adapt is not None:
            base, net = ignoring_conditions(base), spec.adapt(net).to(job.device)
    return base, tuned_process(base, net)


def ignoring_conditions(base: Process) -> Process:
    """The base of a conditional reward: it does not see the condition."""

    def model(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        return base.model(x, t)

    return Process(base.interpolant, model, base.predicts, base.event_shape)


class Found(NamedTuple):
    """What one condition (or the only one) came out as."""

    verdict: Verdict
    row: dict[str, Any]
    base: Tensor
    log_forward: Tensor
    drawn: Tensor


def assess(
    job: TiltJob,
    spec: RewardSpec,
    model: TiltedModel,
    base: Tensor | None,
    condition: dict[str, Any],
    judged: dict[str, Any],
    work: Work,
) -> Found:
    """Draw under one condition, and hold it against the weighted base (None: drawn under the condition too)."""
    if base is None:
        base = model.base_samples(job.reference_samples, job.seed, work.tell, **condition)
    n = job.samples
    drawn = model.paths(n, job.seed + 1, lambda done: work.tell("samples of the model", done, n, ""), **condition)
    judges = {name: _seeing(judge, judged) for name, judge in spec.judges.items()}
    verdict, reached, log_forward = model.judge(drawn, base, judges, job.seed, tell=work.tell, **condition)
    row = {
        "reference_ess": ess(log_forward),
        "log_z_reference": evidence(log_forward).log_z,
        "log_z": None,
        "path_ess": None,
        "kl": float(drawn.kl.mean()) if model.row.trained else None,
    }
    if model.row.trained:
        own = evidence(reached + drawn.log_ratio.cpu())
        row |= {"log_z": own.log_z, "path_ess": own.ess}
    return Found(verdict, row, base, log_forward, drawn.x)


def _seeing(judge: Callable[..., Tensor], judged: dict[str, Any]) -> Callable[..., Tensor]:
    """A judge that is told, besides the condition, what only judges see."""
    return lambda x, **condition: judge(x, **condition, **{k: v.expand(len(x), *v.shape[1:]) for k, v in judged.items()})


def conclude(
    job: TiltJob, spec: RewardSpec, model: TiltedModel, found: list[Found], condition: dict[str, Any], work: Work
) -> Outcome:
    """The outcome of all conditions: their lines, the means of their numbers, the pictures of the first."""
    lines: list[Line] = []
    for i, one in enumerate(found):
        suffix = f" (unseen {i + 1})" if len(found) > 1 else ""
        lines += [line._replace(name=line.name + suffix) for line in one.verdict.lines]
    scores = [
        Score(parts[0].name, *(_mean([getattr(s, field) for s in parts]) for field in Score._fields[1:]))
        for parts in zip(*(one.verdict.scores for one in found), strict=True)
    ]
    row = {name: _mean([one.row[name] for one in found]) for name in found[0].row}
    tensors = {"samples": found[0].drawn}
    shown = {"Before": model.base_samples(GRID, job.seed + 2, **condition)}
    if model.row.trained:
        shown["After"] = model.paths(GRID, job.seed + 2, **condition).x
        tensors |= {"before": shown["Before"], "after": shown["After"]}
        row["reward_reached_ode"] = _by_ode(job, spec, model, condition)
    shown["Samples" if "After" not in shown else "Reference"] = (
        found[0].drawn[:GRID] if "After" not in shown else _reference(job, found[0])
    )
    return Outcome(
        title=f"{job.base} tilted towards {job.reward}, λ = {job.strength:g}",
        summary={"base": job.base, "reward": job.reward, "strength": job.strength, "method": job.method, **row,
                 "train_seconds": sum(h["seconds"] for h in model.history)},
        verdict=Verdict(overall(lines), lines, scores),
        tensors=tensors,
        history=model.history,
        facts={"path ESS, of 1": row["path_ess"]},
        notes=_notes(job, model, len(found)),
        draw=lambda: _blocks(job, model, scores, row, shown),
    )  # fmt: skip


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _by_ode(job: TiltJob, spec: RewardSpec, model: TiltedModel, condition: dict[str, Any]) -> float | None:
    """The mean reward of ODE samples, where the training's schedule allows them."""
    if job.settings.chi != 0 or job.settings.sigma is not None:
        return None
    rows = {name: v.expand(FLOWED, *v.shape[1:]) for name, v in condition.items()}
    return float(spec.reward(model.sample(FLOWED, noise="ode", seed=job.seed, **condition), **rows).detach().mean())


def _reference(job: TiltJob, found: Found) -> Tensor:
    """Draws of the weighted base."""
    generator = torch.Generator().manual_seed(job.seed)
    chosen = torch.multinomial(normalised(found.log_forward), GRID, replacement=True, generator=generator)
    return found.base[chosen.to(found.base.device)]


def _blocks(
    job: TiltJob, model: TiltedModel, scores: list[Score], row: dict[str, Any], shown: dict[str, Tensor]
) -> tuple[list[Block], list[Block]]:
    """What came out, and how it got there."""
    reward = scores[0]
    best = None if reward.reference is None else job.strength * reward.reference - row["log_z_reference"]
    table = [("mean reward", *reward[1:]), *((f"judge: {s.name}", *s[1:]) for s in scores[1:])]
    table += [
        ("log Z", None, row["log_z_reference"], row["log_z"]),
        ("KL to the base", 0.0, best, row["kl"]),
        ("effective sample size", None, row["reference_ess"], row["path_ess"]),
    ]
    levels = {"reward": {"before": reward.base, "reference": reward.reference}}
    caption = f"{SAME_NOISE} The reference follows the tilted law p_base · e^{{λr}} itself."
    blocks: list[Block] = [gallery(shown, caption=caption if "After" in shown else ""), scores_table(table)]
    return blocks, training_blocks(model.history, TILTING, levels, _times(model.chain))


def _times(chain: InterpolantChain) -> list[float]:
    return chain.t.tolist()


def _notes(job: TiltJob, model: TiltedModel, targets: int) -> list[str]:
    notes = [f"The exact tilt is {job.reference_samples} base samples weighted by exp(λ r): importance resampling."]
    if model.row.bias:
        notes.append(f"The method {job.method!r} does not reach that tilt: it {model.row.bias}.")
    if ends_noiselessly(model.base, job.settings):
        notes.append(
            "Images are the noiseless last prediction of the base; path weights are exact for the law of that chain."
        )
    if targets > 1:
        notes.append(
            f"Conditional: amortised over conditions and checked on {targets} that training never saw; the table averages "
            "over them, the pictures show the first."
        )
    return notes
