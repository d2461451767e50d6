r"""`tiltflow bench digits`: every method on a real image model, at one budget.

The digits base, tilted towards stroke thickness at λ = 3, where base samples weighted by e^{λr} have an effective sample
size of a third, so the exact mean reward, judge and diversity are known. One budget of model evaluations (base and trained
copy, which are of one size) and of reward calls for every trained method; a training-free one states what its samples cost.

A trained model is sampled by the chain of its own denoiser, last noiseless step included; KL to the base, log Z and ESS
come from its paths on the base's chain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tiltflow.bench.budget import Budget, Counted, Counter, counted, counted_reward, fit_within, peak_memory_mb
from tiltflow.bench.tilt import Row, failed_row, run_apart
from tiltflow.core.chain import InterpolantChain
from tiltflow.core.control import FineTuned
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.core.weights import ess, evidence, log_mean_exp, normalised, systematic
from tiltflow.methods.registry import METHODS
from tiltflow.metrics.distance import mean_w2, pairwise_mean
from tiltflow.nn.lora import merge_low_rank
from tiltflow.rewards.spec import RewardSpec
from tiltflow.tilting.chain import trainable_copy, training_chain, tuned_process
from tiltflow.tilting.draw import draw_paths
from tiltflow.tilting.names import load_base, load_reward
from tiltflow.tilting.settings import FinetuneSettings
from tiltflow.train.settings import Training


@dataclass(frozen=True)
class DigitsSettings:
    """How one method is trained and judged.

    Args:
        reward, strength: the tilt.
        steps, batch, minibatch, learning_rate, rank: training chain, paths per round, rows per gradient step, Adam's rate,
            rank of the low-rank updates.
        budget: rounds, or what they may cost.
        reference_samples: base samples, which weighted by e^{λr} stand for the exact tilt.
        samples, path_samples: drawn from the result for its means, and for KL, log Z and ESS.
        w2_samples, w2_draws: rows of one assignment problem, and how many of them.
    """

    reward: str = "thickness"
    strength: float = 3.0
    steps: int = 25
    batch: int = 96
    minibatch: int = 1024
    learning_rate: float = 5e-4
    rank: int = 16
    budget: Budget | int = Budget(250_000, 6_000)  # noqa: RUF009 (a frozen dataclass)
    reference_samples: int = 10_000
    samples: int = 2_000
    path_samples: int = 1_000
    w2_samples: int = 500
    w2_draws: int = 4


def train(method: str, seed: int, settings: DigitsSettings, counter: Counter) -> tuple[InterpolantChain, FineTuned]:
    """Fine-tune the digits base by a named method; the uncounted training chain and the result."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    base, reward = load_base("digits"), load_reward(settings.reward).reward
    chain = training_chain(base, FinetuneSettings(steps=settings.steps, noiseless_last=True), generator)
    meter = counted(base, counter)
    cost = RewardCost(counted_reward(reward, counter), settings.strength)
    net = trainable_copy(base, settings.rank, generator)
    control = FineTuned(tuned_process(meter, Counted(net, counter)))
    row = METHODS[method]
    fit_within(
        settings.budget,
        counter,
        row.made(chain=replace(chain, base=meter), cost=cost, batch=settings.batch, generator=generator),
        row,
        control,
        Training(learning_rate=settings.learning_rate, minibatch=settings.minibatch, warmup=5, ema=0.97),
        generator,
    )
    merge_low_rank(net)
    return chain, control


def scores(
    spec: RewardSpec, x: Tensor, reference: tuple[Tensor, Tensor], settings: DigitsSettings, generator: torch.Generator
) -> Row:
    """Samples against the weighted base samples (x, log weights)."""
    base, log_w = reference
    weight = normalised(log_w)

    def exact(count: int) -> Tensor:
        return base[torch.multinomial(weight, count, replacement=True, generator=generator)]

    row: Row = {}
    for name, score in {"reward": spec.reward, **{f"judge_{n}": j for n, j in spec.judges.items()}}.items():
        values = score(base).detach().double()
        row |= {
            name: float(score(x).detach().double().mean()),
            f"{name}_base": float(values.mean()),
            f"{name}_reference": float(weight @ values),
        }
    n, draws = settings.w2_samples, settings.w2_draws
    once = exact(len(x))
    chosen = torch.multinomial(weight, min(n, len(base)), replacement=False, generator=generator)
    return row | {
        "diversity": pairwise_mean(x[:1000])[0],
        "diversity_base": pairwise_mean(base[:1000])[0],
        "diversity_reference": pairwise_mean(base[chosen])[0],
        "w2": mean_w2(x, once, n, draws, generator),
        "w2_base": mean_w2(base, once, n, draws, generator),
        "w2_floor": mean_w2(exact(len(x)), once, n, draws, generator),
        "reference_ess": ess(log_w),
    }


def bench_method(
    method: str, seed: int, settings: DigitsSettings, reference: tuple[Tensor, Tensor], threads: int | None = None
) -> list[Row]:
    """The row of one method."""
    if threads is not None:
        torch.set_num_threads(threads)
    spec, counter, started = load_reward(settings.reward), Counter(), time.perf_counter()
    generator = torch.Generator().manual_seed(10_000 + seed)
    row: Row
    if METHODS[method].trained:
        chain, control = train(method, seed, settings, counter)
        spent = {"base_evaluations": counter.base, "reward_calls": counter.reward}
        seconds = time.perf_counter() - started
        x = draw_paths(replace(chain, base=control.process), None, settings.samples, generator).x
        paths = draw_paths(chain, control, settings.path_samples, generator)
        found = evidence(settings.strength * spec.reward(paths.x).detach() + paths.log_ratio)
        row = {"kl": float(paths.kl.mean()), "ess": found.ess, "log_z_error": abs(found.log_z - log_mean_exp(reference[1]))}
    else:
        base = load_base("digits")
        chain = training_chain(base, FinetuneSettings(steps=settings.steps, noiseless_last=True), generator)
        chain, cost = replace(chain, base=counted(base, counter)), RewardCost(
            counted_reward(spec.reward, counter), settings.strength
        )
        drawn = METHODS[method].made(chain=chain, cost=cost).sample(None, settings.samples, generator)
        spent = {"base_evaluations": counter.base, "reward_calls": counter.reward}
        seconds, row = time.perf_counter() - started, {}
        x = drawn.x[systematic(drawn.log_weights.double(), generator)]
        if drawn.log_z is not None:
            row = {"ess": ess(drawn.log_weights), "log_z_error": abs(drawn.log_z - log_mean_exp(reference[1]))}
    return [
        {"method": method, "seed": seed, "biased": bool(METHODS[method].bias)}
        | scores(spec, x.detach(), reference, settings, generator)
        | row
        | spent
        | {"seconds": seconds, "peak_memory_mb": peak_memory_mb()}
    ]


def bench_digits(
    methods: tuple[str, ...],
    seed: int,
    rounds: int | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    settings: DigitsSettings | None = None,
) -> list[Row]:
    """One row per method; the reference is drawn once."""
    settings = settings or DigitsSettings()
    if rounds is not None:
        settings = replace(settings, budget=rounds)
    generator = torch.Generator().manual_seed(20_000 + seed)
    base, reward = load_base("digits"), load_reward(settings.reward).reward
    chain = training_chain(base, FinetuneSettings(steps=settings.steps, noiseless_last=True), generator)
    x = draw_paths(chain, None, settings.reference_samples, generator).x
    reference = (x, settings.strength * reward(x).detach())
    jobs: list[Any] = [(method, seed, settings, reference) for method in methods]
    return run_apart(_bench_or_fail, jobs, progress)


def _bench_or_fail(
    method: str, seed: int, settings: DigitsSettings, reference: tuple[Tensor, Tensor], threads: int
) -> list[Row]:
    try:
        return bench_method(method, seed, settings, reference, threads)
    except TiltflowError as error:
        return [failed_row(method, seed, error)]
