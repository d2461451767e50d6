"""The main job, from names to a run folder: fine-tune, sample, judge, report.

A run folder holds config.json, checkpoint.safetensors, weights.safetensors, samples.safetensors, metrics.json, report.html.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from tiltflow._version import __version__
from tiltflow.core.chain import InterpolantChain
from tiltflow.core.control import Control, FineTuned
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.ode import ode
from tiltflow.core.process import Process
from tiltflow.core.simulate import Samples, sample
from tiltflow.core.weights import ess, evidence, normalised
from tiltflow.report import Page, gallery, scores_table, training_blocks, write_page
from tiltflow.report.figures import TILTING
from tiltflow.report.samples import SAME_NOISE
from tiltflow.rewards.spec import RewardSpec
from tiltflow.run.folder import RunFolder, document
from tiltflow.tilting.finetune import FinetuneSettings, Tuned, finetune, require_memoryless, trainable_copy, tuned_process
from tiltflow.tilting.names import load_base, load_reward
from tiltflow.train.store import load_weights, save_weights
from tiltflow.verdict.line import Line, Verdict, overall
from tiltflow.verdict.tilt import judge_samples

Progress = Callable[[str, int, int], None]
UNSEEN, GRID, TRIAL = 8, 64, 8
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on; the run folder's config.json.

    Args:
        base, predicts, interpolant, shape, label, guidance: see :func:`tiltflow.tilting.names.load_base`.
        reward, judge: see :func:`tiltflow.tilting.names.load_reward`.
        strength: λ. seed, device: as usual.
        settings: of :func:`tiltflow.tilting.finetune.finetune`.
        reference_samples: base samples that, weighted by e^{λr}, stand for the exact tilt.
        samples: samples drawn from the result.
    """

    base: str
    reward: str
    strength: float
    judge: str | None = None
    predicts: Any = None
    interpolant: str = "linear"
    shape: tuple[int, ...] | None = None
    label: int | None = None
    guidance: float = 1.0
    seed: int = 0
    device: str = "cpu"
    reference_samples: int = 20_000
    samples: int = 4_000
    settings: FinetuneSettings = field(default_factory=FinetuneSettings)

    def load_base(self) -> Process:
        """The base process, its weights on the device."""
        process = load_base(self.base, self.predicts, self.interpolant, self.shape, self.label, self.guidance)
        if isinstance(process.model, torch.nn.Module):
            process.model.to(self.device)
        return process

    def load_reward(self) -> RewardSpec:
        """The reward and its judges."""
        return load_reward(self.reward, self.judge)

    def fit_to(self, process: Process) -> RunConfig:
        """The config with what follows from the base: images end noiselessly, and no more steps than there are."""
        noiseless = len(process.event_shape) > 1
        s = replace(self.settings, noiseless_last=noiseless)
        controlled = s.steps - int(noiseless)
        if s.last_steps is not None and s.last_steps + s.random_steps >= controlled:
            s = replace(s, last_steps=None, random_steps=0)
        return replace(self, settings=s)

    def check(self, base: Process, spec: RewardSpec) -> None:
        """Find misuse before anything is written: λ, the schedule, and what base and reward return for a few samples."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        RewardCost(spec.reward, self.strength)  # refuses λ < 0
        condition: dict[str, Any] = spec.conditions(TRIAL, generator) if spec.conditions else {}
        x = base.source(TRIAL, generator, device=self.device)
        try:
            with torch.no_grad():
                x1 = base.x1(x, torch.full((TRIAL,), 0.5, device=self.device))
            slope = RewardCost(spec.reward).grad(x1, **condition)
        except TiltflowError:
            raise
        except Exception as error:
            raise TiltflowError(
                f"the base or the reward raised {type(error).__name__} on a batch of shape {tuple(x.shape)}: {error}"
            ) from error
        if not bool(slope.any()):
            raise TiltflowError(
                f"the reward is constant: its gradient is zero on all of {TRIAL} samples; there is nothing to tilt towards."
            )
        require_memoryless(base.interpolant, self.settings)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def read(cls, folder: Path) -> RunConfig:
        """The config of a run folder. Raises TiltflowError if there is none."""
        path = folder / "config.json"
        if not path.is_file():
            raise TiltflowError(f"{folder} is not a run folder: it has no config.json.")
        saved = json.loads(path.read_text(encoding="utf-8"))
        shape = tuple(saved["shape"]) if saved["shape"] else None
        return cls(**(saved | {"shape": shape, "settings": FinetuneSettings(**saved["settings"])}))


def ignoring_conditions(base: Process) -> Process:
    """The base of a conditional reward: it does not see the condition."""

    def model(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        return base.model(x, t)

    return Process(base.interpolant, model, base.predicts, base.event_shape)


def load_tuned(folder: Path, device: str = "cpu") -> tuple[RunConfig, Process]:
    """The config and the fine-tuned process of a finished run folder."""
    config = RunConfig.read(folder)
    spec, base = config.load_reward(), config.load_base()
    net = trainable_copy(base)
    if spec.adapt is not None:
        base, net = ignoring_conditions(base), spec.adapt(net)
    load_weights(folder / WEIGHTS, net)
    process = tuned_process(base, net.to(device).requires_grad_(False))
    return config, process


def draw(
    chain: InterpolantChain,
    control: Control | None,
    n: int,
    generator: torch.Generator,
    progress: Callable[[int], None] = lambda done: None,
    batch: int = 1000,
    **condition: Any,
) -> Samples:
    """n samples in batches, with their path log-ratios; ``condition`` holds one row for all samples."""
    parts = []
    for start in range(0, n, batch):
        size = min(batch, n - start)
        rows = {name: v.expand(size, *v.shape[1:]) for name, v in condition.items()}
        parts.append(sample(chain, control, chain.source(size, generator), generator, **rows))
        progress(start + size)
    kernel = [p.log_kernel_ratio for p in parts if p.log_kernel_ratio is not None]
    merged = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("x", "log_ratio", "kl", "running")}
    return Samples(**merged, log_kernel_ratio=torch.cat(kernel) if kernel else None)


class Evaluation(NamedTuple):
    """What one target (one unseen observation, or the only one) came out as."""

    verdict: Verdict
    row: dict[str, Any]
    tuned: Tensor


def evaluate(
    config: RunConfig,
    spec: RewardSpec,
    base_samples: Tensor,
    tuned: Tuned,
    n: int,
    generator: torch.Generator,
    progress: Callable[[int], None],
    condition: dict[str, Any],
    judge_rows: dict[str, Any],
) -> Evaluation:
    """Draw n samples of the fine-tuned process for one condition and hold them against the weighted base."""

    def scored(score: Callable[..., Tensor], rows: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        return lambda x: score(x, **{name: v.expand(len(x), *v.shape[1:]) for name, v in rows.items()})

    reward = scored(spec.reward, condition)
    cost = RewardCost(reward, config.strength)
    judges = {name: scored(judge, condition | judge_rows) for name, judge in spec.judges.items()}
    drawn = draw(tuned.chain, FineTuned(tuned.process), n, generator, progress, **condition)
    own = generator if generator.device.type == "cpu" else torch.Generator().manual_seed(config.seed)
    log_weights = -cost.value(drawn.x).detach() + drawn.log_ratio
    verdict = judge_samples(drawn.x.cpu(), base_samples, cost, log_weights.cpu(), own, judges=judges)
    log_forward = config.strength * reward(base_samples).detach()
    weight = normalised(log_forward)
    row: dict[str, Any] = {}
    for name, score in {"reward": reward, **judges}.items():
        values = score(base_samples).detach().double()
        row[f"{name}_base"] = float(values.mean())
        row[f"{name}_reference"] = float(weight @ values)
        row[f"{name}_reached"] = float(score(drawn.x).detach().double().mean())
    found = evidence(log_weights)
    row |= {
        "reference_ess": ess(log_forward),
        "log_z_reference": evidence(log_forward).log_z,
        "log_z": found.log_z,
        "path_ess": found.ess,
        "kl": float(drawn.kl.mean()),
    }
    return Evaluation(verdict, row, drawn.x)


def _same_noise(chain: InterpolantChain, control: Control | None, seed: int, condition: dict[str, Any]) -> Tensor:
    generator = torch.Generator(chain_device(chain)).manual_seed(seed)
    return draw(chain, control, GRID, generator, **condition).x.cpu()


def chain_device(chain: InterpolantChain) -> str:
    """Where the chain's base lives."""
    model = chain.base.model
    parameters = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    return str(parameters[0].device) if parameters else "cpu"


def run_finetune(
    config: RunConfig, folder: RunFolder, command: str, progress: Progress = lambda what, done, total: None
) -> dict[str, Any]:
    """Run the whole job inside an opened run folder; returns the document that metrics.json holds.

    ``progress(what, done, total)`` is called as the stages advance. Raises what :func:`finetune` raises.
    """
    started = time.perf_counter()
    generator = torch.Generator(config.device).manual_seed(config.seed)
    torch.manual_seed(config.seed)  # initial weights of adapters
    spec, base = config.load_reward(), config.load_base()
    net = trainable_copy(base, config.settings.rank, generator)
    if spec.adapt is not None:
        base, net = ignoring_conditions(base), spec.adapt(net).to(config.device)
    total = config.settings.iterations
    tuned = finetune(
        base,
        spec.reward,
        config.strength,
        config.settings,
        generator=generator,
        tuned=tuned_process(base, net),
        conditions=spec.conditions,
        checkpoint=folder.checkpoint,
        resume=folder.resume,
        callback=lambda row: progress("fine-tuning", row["iteration"] + 1, total),
    )
    trained = time.perf_counter() - started
    save_weights(folder.path / WEIGHTS, net)

    n = config.reference_samples
    base_samples = draw(
        tuned.chain, None, n, generator, lambda done: progress("reference: base samples", done, n)
    ).x.cpu()
    evaluations = []
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, {})]
    if spec.unseen is not None:
        rows, judge_rows = spec.unseen(UNSEEN, generator)
        cases = [
            ({k: v[i : i + 1] for k, v in rows.items()}, {k: v[i : i + 1] for k, v in judge_rows.items()})
            for i in range(UNSEEN)
        ]
    for i, (condition, judge_row) in enumerate(cases):
        m = config.samples

        def advance(done: int, i: int = i, m: int = m) -> None:
            progress("fine-tuned samples", i * m + done, m * len(cases))

        evaluations.append(
            evaluate(config, spec, base_samples, tuned, m, generator, advance, condition, judge_row)
        )
    return _conclude(config, folder, command, tuned, base_samples, evaluations, cases[0][0], started, trained)


def _conclude(
    config: RunConfig,
    folder: RunFolder,
    command: str,
    tuned: Tuned,
    base_samples: Tensor,
    evaluations: list[Evaluation],
    condition: dict[str, Any],
    started: float,
    trained: float,
) -> dict[str, Any]:
    lines: list[Line] = []
    for i, e in enumerate(evaluations):
        suffix = f" (unseen {i + 1})" if len(evaluations) > 1 else ""
        lines += [line._replace(name=line.name + suffix) for line in e.verdict.lines]
    verdict = Verdict(overall(lines), lines)
    row = {k: sum(e.row[k] for e in evaluations) / len(evaluations) for k in evaluations[0].row}
    control = FineTuned(tuned.process)
    before = _same_noise(tuned.chain, None, config.seed, condition)
    after = _same_noise(tuned.chain, control, config.seed, condition)
    flow_start = tuned.chain.source(1000, torch.Generator(config.device).manual_seed(config.seed))
    rows = {name: v.expand(1000, *v.shape[1:]) for name, v in condition.items()}
    spec = config.load_reward()
    flowed = ode(tuned.process, flow_start, config.settings.steps, **rows)
    row["reward_reached_ode" if len(evaluations) == 1 else "reward_reached_ode_unseen_1"] = float(
        spec.reward(flowed, **rows).detach().mean()
    )
    save_file({"before": before, "after": after, "samples": evaluations[0].tuned.cpu().contiguous()},
              folder.path / "samples.safetensors")  # fmt: skip
    scalars = [
        {k: v for k, v in h.items() if not isinstance(v, list)} | {"kind": "iteration"} for h in tuned.history
    ]
    seconds = time.perf_counter() - started
    summary = {
        "kind": "summary",
        "base": config.base,
        "reward": config.reward,
        "strength": config.strength,
        **row,
        "train_seconds": trained,
        "seconds": seconds,
    }
    said = [summary, *({"kind": "verdict", **line._asdict()} for line in lines), *scalars]
    result = document(command, config.seed, config.device, said, verdict.status)
    folder.write_json("metrics.json", result)
    weights = normalised(config.strength * _reward_of(spec, base_samples, condition))
    chosen = torch.multinomial(weights, GRID, replacement=True, generator=torch.Generator().manual_seed(config.seed))
    sets = {"Before": before, "After": after, "Reference": base_samples[chosen]}
    write_page(folder.path, _page(config, command, verdict, row, sets, tuned, len(evaluations)))
    return result


def _page(
    config: RunConfig, command: str, verdict: Verdict, row: dict[str, Any], sets: dict[str, Tensor], tuned: Tuned,
    targets: int,
) -> Page:  # fmt: skip
    scores = [
        ("mean reward" if k == "reward" else f"judge: {k}", row[f"{k}_base"], row[f"{k}_reference"], row[f"{k}_reached"])
        for k in (key.removesuffix("_base") for key in row if key.endswith("_base"))
    ]
    levels = {"reward": {"before": row["reward_base"], "reference": row["reward_reference"]}}
    scores += [
        ("log Z", None, row["log_z_reference"], row["log_z"]),
        ("KL to the base", 0.0, config.strength * row["reward_reference"] - row["log_z_reference"], row["kl"]),
        ("effective sample size", None, row["reference_ess"], row["path_ess"]),
    ]
    caption = f"{SAME_NOISE} The reference follows the tilted law p_base · e^{{λr}} itself."
    return Page(
        title=f"{config.base} tilted towards {config.reward}, λ = {config.strength:g}",
        command=command,
        verdict=verdict,
        blocks=[gallery(sets, caption=caption), scores_table(scores)],
        training=training_blocks(tuned.history, TILTING, levels, tuned.chain.t.tolist()),
        facts={"path ESS, of 1": row["path_ess"]},
        history=tuned.history,
        config=asdict(config) | asdict(config.settings),
        notes=_notes(config, targets),
        version=__version__,
    )


def _reward_of(spec: RewardSpec, x: Tensor, condition: dict[str, Any]) -> Tensor:
    return spec.reward(x, **{name: v.expand(len(x), *v.shape[1:]) for name, v in condition.items()}).detach()


def _notes(config: RunConfig, targets: int) -> list[str]:
    notes = [f"The exact tilt is {config.reference_samples} base samples weighted by exp(λ r): importance resampling."]
    if config.settings.noiseless_last:
        notes.append(
            "Images are the noiseless last prediction of the base; path weights are exact for the law of that chain."
        )
    if targets > 1:
        notes.append(
            f"Conditional reward: amortised over observations and checked on {targets} that training never saw; the table "
            "averages over them, the pictures show the first."
        )
    return notes
