"""The one table of methods: what the front doors, the command line and the benchmarks call by name.

A row is a class or function of :mod:`tiltflow.methods` with settings. ``bias`` says why its fixed point is not the target,
and is empty where the method is right in the limit (of paths, of steps and of a network that can hold the answer). A new
method takes a file and a row. Nothing here needs torch: a row's method is imported when it is built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, TypeVar, get_type_hints

from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import hints

Job = Literal["finetune", "sample"]
S = TypeVar("S")
ONCE = {"gradient_steps": 1, "minibatch": None, "buffer_rounds": 1}
"""Training that uses a round for one gradient step, on all of its rows."""
REPEATED = {"gradient_steps": 8, "buffer_rounds": 20}
RECENT = {"gradient_steps": 8, "buffer_rounds": 4}


@dataclass(frozen=True)
class Row:
    """One method.

    Args:
        name: What it is called everywhere.
        build: ``file:attribute`` under :mod:`tiltflow.methods`, or the class or function itself.
        paper: Where it is from.
        jobs: What it is for: to fine-tune a base towards a reward, or to sample from an energy.
        trained: Whether it trains a control; otherwise it draws samples at once.
        bias: Why it does not reach its target; empty if it does, in the limit.
        needs: ``gradient`` (of the reward), ``interpolant`` (a memoryless chain over one), ``vectors`` (of few entries),
            ``prediction`` (the end point X̂_1 that a state is heading for).
        on_policy: Whether each round may be used only once, by the control that drew it.
        compares: Whether its loss compares rows with one another, so that it cannot be computed in parts.
        options: Arguments of ``build`` that make it this method.
        training: Settings of the training that suit it.
        rate: Its learning rate over that of the others; less for methods that nothing holds near the base.
        source: Of samplers: the base starts at a point, from noise, or is stationary.
        step_variance: Of samplers: whether the variance of their steps is learned too.
    """

    name: str
    build: str | Callable[..., Any]
    paper: str = ""
    jobs: tuple[Job, ...] = ("finetune",)
    trained: bool = True
    bias: str = ""
    needs: tuple[str, ...] = ("gradient",)
    on_policy: bool = False
    compares: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=lambda: ONCE)
    rate: float = 1.0
    source: Literal["point", "noise", "stationary"] = "point"
    step_variance: bool = False

    @property
    def needs_gradient(self) -> bool:
        """Whether the reward must be differentiable."""
        return "gradient" in self.needs

    def made(self, **available: Any) -> Any:
        """The method, given those of the ``available`` arguments that it takes; ``batch`` is shared by the processes.

        Raises:
            TiltflowError: One of :data:`CHOICES` that the method does not take, or a batch that cannot be shared.
        """
        from tiltflow.train.distributed import share_of, shared

        self.require(**available)
        if "batch" in available:
            available["batch"] = share_of(available["batch"])
        available["conditions"] = shared(available.get("conditions"))
        make, taken = self._make()
        wanted = {n: v for n, v in available.items() if v is not None or n not in CHOICES}
        return make(**{n: v for n, v in wanted.items() if n in taken and n not in self.options}, **self.options)

    def require(self, **asked: Any) -> None:
        """Raise TiltflowError for one of :data:`CHOICES` that is asked for (not None) and that the method does not take."""
        _, taken = self._make()
        refused = [n for n in CHOICES if asked.get(n) is not None and (n not in taken or n in self.options)]
        if refused:
            raise TiltflowError(f"the method {self.name!r} takes no {refused[0]}: leave it out.")

    def takes(self, name: str) -> bool:
        """Whether ``name`` is an argument of the method that its row leaves open."""
        return name in self._make()[1] and name not in self.options

    def require_training(self, buffer_rounds: int, accumulate: int | None, batch: int) -> None:
        """Raise TiltflowError for training that the method does not bear, or that the processes cannot share."""
        from tiltflow.train.distributed import share_of, world

        if self.compares and world().size > 1:
            raise TiltflowError(f"the method {self.name!r} compares all rows with one another: train it in one process.")
        share_of(batch)
        if self.on_policy and buffer_rounds != 1:
            raise TiltflowError(f"the method {self.name!r} uses each round once: buffer_rounds must be 1.")
        if self.compares and accumulate is not None:
            raise TiltflowError(f"the method {self.name!r} compares all rows with one another: leave accumulate out.")

    def _make(self) -> tuple[Callable[..., Any], set[str]]:
        make = self.build
        if isinstance(make, str):
            module, _, attribute = make.partition(":")
            make = getattr(import_module(f"tiltflow.methods.{module}"), attribute)
        return make, _parameters(make)


def _parameters(make: Callable[..., Any]) -> set[str]:
    """The names that a function or class takes; of ``**settings``, those of what it returns."""
    found = inspect.signature(make).parameters
    names = {name for name, p in found.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    if len(names) < len(found):
        made = get_type_hints(make)["return"]
        names |= set(inspect.signature(made).parameters)
    return names


CHOICES = ("last_steps", "random_steps", "clip", "conditions")
"""Options that only some methods take, and that are refused by name by the others."""
NO_KL = "ignores the base: its optimum is the reward's maximum"
AM, DRAFT = "Domingo-Enrich et al. 2025, arXiv:2409.08861", "Clark et al. 2023, arXiv:2309.17400"
AS, PG = "Havens et al. 2025, arXiv:2504.11713", "policy_gradient"
VALUES: tuple[str, ...] = ()
INTERPOLANT, BOTH = ("interpolant",), ("gradient", "interpolant")
SAMPLE: tuple[Job, ...] = ("sample",)
KEPT = {"gradient_steps": 100, "minibatch": 512, "buffer_rounds": 10}

ROWS: tuple[Row, ...] = (
    Row("adjoint_matching", "adjoint_matching:AdjointMatching", AM + ", under path weights",
        options={"importance": True}, training=REPEATED),
    Row("adjoint_matching_plain", "adjoint_matching:AdjointMatching", AM),
    Row("adjoint_matching_endpoint", "variants:with_endpoints", AM + ", with rows of end points",
        needs=(*BOTH, "vectors"), training=REPEATED),
    Row("adjoint_matching_truncated", "variants:truncated", AM,
        bias="regresses on the last quarter of the steps only"),
    Row("adjoint_matching_deterministic", "deterministic:DeterministicAdjointMatching", needs=BOTH,
        bias="the adjoint of the ODE is the reward's gradient at one end point, not of the expected e^r"),
    Row("adjoint_matching_basic", "adjoint_matching:AdjointMatching", AM, options={"adjoint": "full"}),
    Row("discrete_adjoint", "backpropagation:discrete_adjoint", "Zhang & Chen 2022, arXiv:2111.15141", on_policy=True),
    Row("log_variance", "variants:log_variance", "Nüsken & Richter 2021, arXiv:2005.05409",
        jobs=("finetune", "sample"), needs=VALUES, on_policy=True, compares=True),
    Row("socm", "variants:socm", "Domingo-Enrich et al. 2024, arXiv:2312.02027", needs=("gradient", "vectors"),
        on_policy=True),
    Row("draft_1", "backpropagation:draft", DRAFT, bias=NO_KL, rate=0.1, on_policy=True),
    Row("draft_10", "backpropagation:draft", DRAFT, bias=NO_KL, rate=0.1, on_policy=True, options={"last": 10}),
    Row("refl", "backpropagation:refl", "Xu et al. 2023, arXiv:2304.05977", bias=NO_KL, rate=0.1, on_policy=True,
        needs=("gradient", "prediction")),
    Row("reinforce", f"{PG}:reinforce", "Williams 1992", needs=VALUES, on_policy=True),
    Row("flow_grpo", f"{PG}:flow_grpo", "Liu et al. 2025, arXiv:2505.05470", needs=VALUES, on_policy=True,
        bias="the reward is divided by its spread in the group, so λ is lost; clipped ratios",
        training={**ONCE, "gradient_steps": 4}, rate=0.1),
    Row("reward_weighted", "weighted_flow_matching:reward_weighted", "Peters & Schaal 2007",
        needs=INTERPOLANT, training=REPEATED),
    Row("path_weighted", "weighted_flow_matching:path_weighted", needs=INTERPOLANT, training=REPEATED),
    Row("online_reward_weighted", "weighted_flow_matching:online_reward_weighted", "Fan et al. 2025, arXiv:2502.06061",
        needs=INTERPOLANT, training=RECENT, bias="tilts its own samples again in every round"),
    Row("advantage_weighted", "weighted_flow_matching:advantage_weighted", "Peng et al. 2019, arXiv:1910.00177",
        needs=INTERPOLANT, training=RECENT, bias="its penalty balances the tilt on Gaussians with linear rewards only"),
    Row("diffusion_dpo", "preference:PreferencePairs", "Wallace et al. 2023, arXiv:2311.12908", needs=INTERPOLANT,
        training=REPEATED, bias="the loss is a bound of the preference likelihood, not the likelihood"),
    Row("reinforce_adjoint_matching", "score_function:ReinforceAdjointMatching",
        "Bergmeister et al. 2026, arXiv:2605.10759", needs=INTERPOLANT, training=RECENT,
        bias="its target equals the lean adjoint's on isotropic Gaussian bases only"),
    Row("efficient_adjoint_matching", "reciprocal:ReciprocalMatching", "Shin et al. 2026, arXiv:2605.11480", needs=BOTH,
        options={"target": "linear_adjoint"}, training=RECENT,
        bias="the base's Jacobian is replaced by that of a Gaussian"),
    Row("reciprocal_matching", "reciprocal:ReciprocalMatching", needs=(*BOTH, "vectors"), training=RECENT),
    Row("best_of_4", "best_of_n:BestOfN", trained=False, needs=VALUES, options={"candidates": 4},
        bias="the law of the best of 4, whatever λ is"),
    Row("gradient_guidance", "guidance:GradientGuidance", "Chung et al. 2023, arXiv:2209.14687", trained=False,
        needs=("gradient", "prediction"), bias="takes r(E[X_1|x]) for −V(x)"),
    Row("feynman_kac", "smc:feynman_kac", "Singhal et al. 2025, arXiv:2501.06848", trained=False,
        needs=("prediction",)),
    Row("urge", "smc:urge", "Wang et al. 2026, arXiv:2605.17850", trained=False,
        needs=("gradient", "prediction")),
    Row("weighted_adjoint_sampling", "adjoint_sampling:AdjointSampling", AS + ", under path weights", SAMPLE,
        options={"target": "least_variance"}, training=KEPT, step_variance=True),
    Row("adjoint_sampling", "adjoint_sampling:AdjointSampling", AS, SAMPLE,
        options={"target": "adjoint", "minimum_ess": None}, training=KEPT, step_variance=True),
    Row("asbs", "bridge_sampling:AdjointBridgeSampling", "Liu et al. 2025, arXiv:2506.22565", SAMPLE,
        training=KEPT, source="noise", step_variance=True),
    Row("bridge_matching", "bridge_sampling:DampedBridgeMatching", "Peluchetti 2023, arXiv:2304.00917", SAMPLE,
        training=KEPT, source="noise", step_variance=True),
    Row("pis", "backpropagation:discrete_adjoint", "Zhang & Chen 2022, arXiv:2111.15141", SAMPLE, on_policy=True),
    Row("dds", "backpropagation:discrete_adjoint", "Vargas et al. 2023, arXiv:2302.13834", SAMPLE, on_policy=True,
        source="stationary"),
    Row("idem", "idem:IteratedDenoising", "Akhound-Sadegh et al. 2024, arXiv:2402.06121", SAMPLE,
        bias="its estimate of the score is biased for a finite number of draws", training=KEPT, source="noise"),
    Row("parallel_tempering", "tempering:temper", "Geyer 1991", SAMPLE, trained=False),
)  # fmt: skip
METHODS: dict[str, Row] = {row.name: row for row in ROWS}
WHERE = {"finetune": "samples from an energy: use train_sampler", "sample": "tilts a base towards a reward: use finetune"}


def names(job: Job, trained: bool | None = None, without: Iterable[str] = ()) -> tuple[str, ...]:
    """The methods of a job, in the table's order; ``without`` leaves out those with such needs."""
    rows = [r for r in ROWS if job in r.jobs and trained in (None, r.trained) and not {*without} & {*r.needs}]
    return tuple(r.name for r in rows)


def row_of(method: str | Callable[..., Any], job: Job) -> Row:
    """The row of a name, or a row for a method class or function of one's own: ``(chain, cost, …)``.

    Raises:
        TiltflowError: An unknown name, or a method of the other job.
    """
    if callable(method):
        free = hasattr(method, "sample") and not hasattr(method, "collect")
        return Row(getattr(method, "__name__", "method"), method, jobs=(job,), trained=not free, needs=VALUES)
    if method not in METHODS:
        raise TiltflowError(f"unknown method {method!r}; use one of {', '.join(names(job))}, or a class of your own.")
    if job not in METHODS[method].jobs:
        raise TiltflowError(f"the method {method!r} {WHERE[job]}. Methods here: {', '.join(names(job))}.")
    return METHODS[method]


def settings_of(cls: type[S], row: Row, suited: Mapping[str, Any], given: Mapping[str, Any]) -> S:
    """Settings of a training: the class's defaults, what suits the problem, what suits the method, and what is given."""
    known = hints(cls)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TiltflowError(f"there is no setting {unknown[0]!r}; there are {', '.join(known)}.")
    values = {**suited, **{name: value for name, value in row.training.items() if name not in suited or row.on_policy}}
    rate = values.get("learning_rate", getattr(cls, "learning_rate", 1.0))
    return cls(**{**values, "learning_rate": rate * row.rate, **given})


def chosen(text: str, usable: tuple[str, ...]) -> tuple[str, ...]:
    """Method names from "all" or names with commas. Raises TiltflowError for one that is not ``usable`` here."""
    wanted = usable if text == "all" else tuple(name.strip() for name in text.split(","))
    unknown = [name for name in wanted if name not in usable]
    if unknown:
        raise TiltflowError(f"unknown method {unknown[0]!r} here: use all, or some of {', '.join(usable)}.")
    return wanted
