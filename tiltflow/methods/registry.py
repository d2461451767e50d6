"""Every method under its paper's name: what ``bench tilt --methods`` and ``bench digits --methods`` run.

A preset is a class of :mod:`tiltflow.methods` with settings; ``bias`` says why its fixed point is not p_base e^{−g}, and is
None where the method is right in the limit (of paths, of steps and of a network that can hold the answer).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tiltflow.core.chain import InterpolantChain
from tiltflow.core.cost import RewardCost
from tiltflow.core.errors import TiltflowError
from tiltflow.methods.adjoint_matching import AdjointMatching, endpoint_share
from tiltflow.methods.backpropagation import discrete_adjoint, draft, refl
from tiltflow.methods.best_of_n import BestOfN
from tiltflow.methods.deterministic import DeterministicAdjointMatching
from tiltflow.methods.guidance import GradientGuidance
from tiltflow.methods.log_variance import LogVariance
from tiltflow.methods.policy_gradient import flow_grpo, reinforce
from tiltflow.methods.preference import PreferencePairs
from tiltflow.methods.reciprocal import ReciprocalMatching
from tiltflow.methods.score_function import ReinforceAdjointMatching
from tiltflow.methods.smc import feynman_kac, urge
from tiltflow.methods.socm import SOCM, LearnedMatrices
from tiltflow.methods.weighted_flow_matching import (
    advantage_weighted,
    online_reward_weighted,
    path_weighted,
    reward_weighted,
)
from tiltflow.train.method import Method, Sampler


@dataclass(frozen=True)
class Trained:
    """A method that :func:`tiltflow.train.fit.fit` runs.

    Args:
        build: (chain, cost, batch, generator) → method.
        bias: why it does not reach p_base e^{−g}; None: it does, in the limit.
        gradient: whether it needs ∇r.
        updates: gradient steps per round. rounds: rounds kept in the buffer (None: the last only, all its rows per step).
        rate: its learning rate over the benchmark's; less for methods that nothing holds near the base.
        vectors: for states (B, d) with d small only.
    """

    build: Callable[[InterpolantChain, RewardCost, int, torch.Generator], Method]
    bias: str | None = None
    gradient: bool = True
    updates: int = 1
    rounds: int | None = None
    rate: float = 1.0
    vectors: bool = False


@dataclass(frozen=True)
class TrainingFree:
    """A method that samples from the base at once. ``build``: (chain, cost) → sampler; the rest as in :class:`Trained`."""

    build: Callable[[InterpolantChain, RewardCost], Sampler]
    bias: str | None = None
    gradient: bool = False


NO_KL = "ignores the base: its optimum is the reward's maximum"
SHARE_PATHS = 4096


def weighted_adjoint_matching(
    chain: InterpolantChain, cost: RewardCost, batch: int, generator: torch.Generator
) -> AdjointMatching:
    """Adjoint Matching under path weights, with the share of end-point target that the adjoint's tails call for.

    For bases whose X̂_1 is exact: the end-point target says what the chain's own denoiser is, right or not.
    """
    share = endpoint_share(chain, cost, SHARE_PATHS, generator)
    return AdjointMatching(chain, cost, batch, importance=True, endpoint_share=share)


TRAINED: dict[str, Trained] = {
    "adjoint_matching": Trained(weighted_adjoint_matching, updates=8, rounds=20, vectors=True),
    "adjoint_matching_weighted": Trained(
        lambda chain, cost, n, g: AdjointMatching(chain, cost, n, importance=True), updates=8, rounds=20
    ),
    "adjoint_matching_plain": Trained(lambda chain, cost, n, g: AdjointMatching(chain, cost, n)),
    "adjoint_matching_truncated": Trained(
        lambda chain, cost, n, g: AdjointMatching(chain, cost, n, last_steps=len(chain.t) // 4),
        "regresses on the last quarter of the steps only",
    ),
    "adjoint_matching_deterministic": Trained(
        lambda chain, cost, n, g: DeterministicAdjointMatching(chain, cost, n),
        "the adjoint of the ODE is the reward's gradient at one end point, not of the expected e^r",
    ),
    "adjoint_matching_basic": Trained(lambda chain, cost, n, g: AdjointMatching(chain, cost, n, adjoint="full")),
    "discrete_adjoint": Trained(lambda chain, cost, n, g: discrete_adjoint(chain, cost, n)),
    "log_variance": Trained(lambda chain, cost, n, g: LogVariance(chain, cost, n), gradient=False),
    "socm": Trained(
        lambda chain, cost, n, g: SOCM(chain, cost, LearnedMatrices(chain.base.event_shape[0]), n), vectors=True
    ),
    "draft_1": Trained(lambda chain, cost, n, g: draft(chain, cost, n), NO_KL, rate=0.1),
    "draft_10": Trained(lambda chain, cost, n, g: draft(chain, cost, n, last=10), NO_KL, rate=0.1),
    "refl": Trained(lambda chain, cost, n, g: refl(chain, cost, n), NO_KL, rate=0.1),
    "reinforce": Trained(lambda chain, cost, n, g: reinforce(chain, cost, n), gradient=False),
    "flow_grpo": Trained(
        lambda chain, cost, n, g: flow_grpo(chain, cost, n),
        "the reward is divided by its spread in the group, so λ is lost; clipped ratios",
        gradient=False,
        updates=4,
        rate=0.1,
    ),
    "reward_weighted": Trained(
        lambda chain, cost, n, g: reward_weighted(chain, cost, batch=n), gradient=False, updates=8, rounds=20
    ),
    "path_weighted": Trained(
        lambda chain, cost, n, g: path_weighted(chain, cost, batch=n), gradient=False, updates=8, rounds=20
    ),
    "online_reward_weighted": Trained(
        lambda chain, cost, n, g: online_reward_weighted(chain, cost, batch=n),
        "tilts its own samples again in every round",
        gradient=False,
        updates=8,
        rounds=4,
    ),
    "advantage_weighted": Trained(
        lambda chain, cost, n, g: advantage_weighted(chain, cost, batch=n),
        "its penalty balances the tilt on Gaussians with linear rewards only",
        gradient=False,
        updates=8,
        rounds=4,
    ),
    "diffusion_dpo": Trained(
        lambda chain, cost, n, g: PreferencePairs(chain, cost, n),
        "the loss is a bound of the preference likelihood, not the likelihood",
        gradient=False,
        updates=8,
        rounds=20,
    ),
    "reinforce_adjoint_matching": Trained(
        lambda chain, cost, n, g: ReinforceAdjointMatching(chain, cost, n),
        "its target equals the lean adjoint's on isotropic Gaussian bases only",
        gradient=False,
        updates=8,
        rounds=4,
    ),
    "efficient_adjoint_matching": Trained(
        lambda chain, cost, n, g: ReciprocalMatching(chain, cost, n, target="linear_adjoint"),
        "the base's Jacobian is replaced by that of a Gaussian",
        updates=8,
        rounds=4,
    ),
    "reciprocal_matching": Trained(
        lambda chain, cost, n, g: ReciprocalMatching(chain, cost, n), updates=8, rounds=4, vectors=True
    ),
}

FREE: dict[str, TrainingFree] = {
    "best_of_4": TrainingFree(lambda chain, cost: BestOfN(chain, cost, 4), "the law of the best of 4, whatever λ is"),
    "gradient_guidance": TrainingFree(
        lambda chain, cost: GradientGuidance(chain, cost), "takes r(E[X_1|x]) for −V(x)", gradient=True
    ),
    "feynman_kac": TrainingFree(lambda chain, cost: feynman_kac(chain, cost)),
    "urge": TrainingFree(lambda chain, cost: urge(chain, cost), gradient=True),
}

METHODS: dict[str, Trained | TrainingFree] = {**TRAINED, **FREE}


def chosen(names: str, vectors: bool) -> tuple[str, ...]:
    """Method names from "all" or a comma-separated list; ``vectors``: whether methods for small vectors apply.

    Raises:
        TiltflowError: an unknown name, or one that does not apply.
    """
    usable = [n for n, m in METHODS.items() if vectors or not getattr(m, "vectors", False)]
    if names == "all":
        return tuple(usable)
    wanted = tuple(n.strip() for n in names.split(","))
    for name in wanted:
        if name not in usable:
            raise TiltflowError(f"unknown method {name!r} here: use all, or some of {', '.join(usable)}.")
    return wanted
