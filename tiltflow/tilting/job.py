"""The main job, from names to a run folder: fine-tune, sample, judge, report.

A run folder holds config.json, checkpoint.safetensors, weights.safetensors, chain.safetensors, samples.safetensors,
metrics.json and report.html.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from tiltflow.core.cost import RewardCost
from tiltflow.core.device import seeded
from tiltflow.core.errors import TiltflowError
from tiltflow.core.process import Process
from tiltflow.core.settings import as_json, from_json, settings
from tiltflow.methods.registry import row_of
from tiltflow.rewards.spec import RewardSpec
from tiltflow.run.job import Outcome, Work
from tiltflow.run.names import anchored
from tiltflow.tilting.chain import require_memoryless, trainable_copy, tuned_process
from tiltflow.tilting.draw import CHAIN
from tiltflow.tilting.model import BATCH, TiltedModel
from tiltflow.tilting.names import load_base, load_reward
from tiltflow.tilting.outcome import Case, Evaluation, outcome
from tiltflow.tilting.settings import FEWEST, FinetuneSettings, TiltConfig
from tiltflow.tilting.train import check_door, finetune, require_applies
from tiltflow.tilting.weights import CHAIN as CHAIN_FILE
from tiltflow.tilting.weights import WEIGHTS, load_chain, load_network

UNSEEN = 8
"""Conditions that a conditional reward is judged on."""


@settings
class TiltJob(TiltConfig):
    """A fine-tuning run."""

    name: ClassVar[str] = "finetune"
    writes: ClassVar[tuple[str, ...]] = (WEIGHTS, CHAIN_FILE)

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

    def load_reward(self, judged: bool = True) -> RewardSpec:
        """The reward and, where something is ``judged``, its judges."""
        if self.reward is None:
            raise TiltflowError("this run was saved from Python: give its reward, load(folder, base=…, reward=…).")
        return load_reward(self.reward, self.judges if judged else (), self.conditions)

    @property
    def training(self) -> FinetuneSettings:
        """How it trains."""
        return self.settings

    def trial(self, training: Mapping[str, Any], share: float) -> tuple[Self, float]:
        """With other settings of the training, and a share of the samples: of the base's at least what is drawn together."""
        share = min(1.0, max(share, FEWEST / self.samples, BATCH / self.reference_samples))
        few = {name: max(FEWEST, round(share * getattr(self, name))) for name in ("samples", "reference_samples")}
        return replace(self, **few, settings=replace(self.settings, **training)), share

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
        spec = RewardSpec(reward, {}) if reward is not None else self.load_reward(judged=False)
        base, process = starting(replace(self, device=device), base or replace(self, device=device).load_base(), spec)
        row = row_of(self.method, "finetune")
        if row.trained:
            load_network(folder, process)
        cost = RewardCost(spec.reward, self.strength, self.settings.max_cost_gradient)
        return TiltedModel(base, process, load_chain(folder, base), cost, row, self.settings, spec.conditions, [])

    def draw(
        self, folder: Path, n: int, asked: dict[str, Any], seed: int, device: str
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """n new samples and their mean reward; with conditions, and with log path weights if drawn as trained."""
        model, spec = self.load(folder, device), self.load_reward(judged=False)
        condition: dict[str, Any] = {}
        if spec.unseen is not None:
            rows = spec.unseen(UNSEEN, torch.Generator(device).manual_seed(seed))[0]
            condition = {k: v[torch.arange(n) % UNSEEN].to(device) for k, v in rows.items()}
        row: dict[str, Any] = {"noise": asked.get("noise", CHAIN)}
        if model.row.trained and not asked.get("exact") and row["noise"] == CHAIN and "steps" not in asked:
            drawn = model.paths(n, seed, **condition)
            x, weights = drawn.x, {"log_weights": model.log_weights(drawn, **condition)}
        else:
            x, weights = model.sample(n, seed=seed, **asked, **condition), {}
        row["reward"] = float(spec.reward(x, **condition).detach().mean())
        return {"samples": x, **condition, **weights}, row

    def train(self, work: Work) -> TiltedModel:
        """Fine-tune the base."""
        spec, base = self.load_reward(), self.load_base()
        base, process = starting(self, base, spec, self.settings.rank)
        return finetune(
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
            tell=work.tell,
        )

    def judge(self, model: TiltedModel, work: Work) -> Outcome:
        """Save and judge."""
        spec = self.load_reward()
        model.save_weights(work.path)
        how = Evaluation(
            spec.judges, cases(spec, torch.Generator(self.device).manual_seed(self.seed + 1)), spec.adapt is None,
            self.samples, self.reference_samples, self.seed, str(self.base), str(self.reward), work.tell,
        )  # fmt: skip
        return outcome(model, how)


def cases(spec: RewardSpec, generator: torch.Generator) -> tuple[Case, ...]:
    """The conditions that a result is judged under, each with what only the judges see."""
    if spec.unseen is None:
        return (({}, {}),)
    rows, judged = spec.unseen(UNSEEN, generator)
    parts = range(UNSEEN)
    return tuple(({k: v[i : i + 1] for k, v in rows.items()}, {k: v[i : i + 1] for k, v in judged.items()}) for i in parts)


def starting(job: TiltJob, base: Process, spec: RewardSpec, rank: int | None = None) -> tuple[Process, Process]:
    """The base as the reward needs it, and the process to train, which starts there (the base, if nothing is trained)."""
    if not row_of(job.method, "finetune").trained:
        return base, base
    with seeded(job.seed):  # initial weights of adapters
        net = trainable_copy(base, rank, torch.Generator(job.device).manual_seed(job.seed))
        if spec.adapt is not None:
            base, net = ignoring_conditions(base), spec.adapt(net).to(job.device)
    return base, tuned_process(base, net)


def ignoring_conditions(base: Process) -> Process:
    """The base of a conditional reward: it does not see the condition."""

    def model(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        return base.model(x, t)

    return Process(base.interpolant, model, base.predicts, base.event_shape)
