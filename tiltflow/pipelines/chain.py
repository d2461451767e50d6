r"""diffusers pipelines as base processes, and their low-rank adapters as controls.

The chain of a pipeline is that of its scheduler (:mod:`tiltflow.pipelines.schedules`): x_{k+1} ~ N(A_k x_k + B_k X̂_1,
s_k² I) with X̂_1 from the network at node k. The base is the network with its adapter off, the fine-tuned model the same
network with it on.

Classifier-free guidance o = o_∅ + w (o_c − o_∅) can stand in three places: in the paths that are drawn (``rollout``), in
the control that is regressed, and in the base that the adjoint goes through. With all three, p_base is the guided model's
law, and what is learned is its tilt. Guidance in the rollout alone is common and cheap: then the unguided model is tilted
along paths of the guided one, which is a heuristic unless the paths are weighted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tiltflow.core.chain import Index, at, noisy_steps
from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Euclidean, Geometry
from tiltflow.pipelines.adapters import switched
from tiltflow.pipelines.conditions import Sent, texts_of
from tiltflow.pipelines.embeddings import Rows
from tiltflow.pipelines.encode import on_host
from tiltflow.pipelines.families import Family, device_of, family_of, require_resident
from tiltflow.pipelines.networks import whole
from tiltflow.pipelines.schedules import Nodes, nodes_of

NEGATIVE = torch.tensor([-1])
"""The number of the negative prompt."""


@dataclass(frozen=True, eq=False)
class PipelineChain:
    """The memoryless chain of a pipeline; its condition is ``prompt`` (B,), numbers of rows, below 0 the negative prompt.

    Args:
        rows: of the prompts, the negative one last (:func:`~tiltflow.pipelines.encode.encode_prompts`), on the host.
        guidance: of the base.
        micro_batch: rows that the network sees at a time: the result is the same, the memory that of so many rows. Where
            more of them are differentiated at once, they are recomputed in the backward pass (None: all at once).
    """

    pipe: Any
    family: Family
    rows: Rows
    nodes: Nodes
    event_shape: tuple[int, ...]
    t: Tensor
    a: Tensor
    b: Tensor
    std: Tensor
    guidance: float
    micro_batch: int | None
    geometry: ClassVar[Geometry] = Euclidean()
    memoryless: ClassVar[bool] = True

    @cached_property
    def controlled(self) -> Tensor:
        """The steps with noise, (n,)."""
        return noisy_steps(self.std)

    @property
    def network(self) -> Any:
        """The unet or transformer."""
        return whole(self.pipe, self.family.network)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return device_of(self.pipe)

    def mean(self, k: Index, x: Tensor, x1: Tensor) -> Tensor:
        """A_k x + B_k x1."""
        return at(self.a, k, x) * x + at(self.b, k, x) * x1

    def base_mean(self, k: Index, x: Tensor, **condition: Any) -> Tensor:
        """E[x_{k+1} | x_k = x] with the adapter off."""
        return self.mean(k, x, self.x1(k, x, condition["prompt"], self.guidance, adapted=False))

    def source(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws of N(0, I), in float32."""
        return torch.randn(n, *self.event_shape, generator=generator, device=generator.device)

    def x1(self, k: Index, x: Tensor, prompt: Tensor, guidance: float, adapted: bool) -> Tensor:
        """X̂_1 at node k, with the adapter on or off; it stays so."""
        every = k if isinstance(k, Tensor) else torch.full((len(x),), k, device=x.device)
        network: Any = switched(self.network, adapted)
        given = self._given(prompt, x.device, network.dtype)
        dropped = {} if guidance == 1 else self._dropped(NEGATIVE, x.device, network.dtype)

        def part(x: Tensor, k: Tensor, *rows: Tensor) -> Tensor:
            network = switched(self.network, adapted)  # in here, since a checkpoint computes it again later
            timestep, named = at(self.nodes.timestep, k, x[:, :1].flatten(1)[:, 0]), dict(zip(given, rows, strict=True))
            output = self._output(network, x, timestep, named, dropped, guidance)
            return at(self.nodes.p, k, x) * x + at(self.nodes.q, k, x) * output

        again = x.requires_grad and bool(getattr(self.network, "is_gradient_checkpointing", False))
        return in_parts(part, self.micro_batch, x, every, *given.values(), again=again)

    @cached_property
    def _given(self) -> Sent:
        return Sent(self.rows)

    @cached_property
    def _dropped(self) -> Sent:
        return Sent(self.rows)

    def _output(self, network: Any, x: Tensor, timestep: Tensor, rows: Rows, dropped: Rows, guidance: float) -> Tensor:
        if guidance != 1:
            rows = {name: torch.cat([dropped[name].expand_as(v), v]) for name, v in rows.items()}
            x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
        output = self.family.predict(self.pipe, network, x.to(network.dtype), timestep, rows).float()
        if guidance == 1:
            return output
        without, given = output.chunk(2)
        return without + guidance * (given - without)


def in_parts(function: Callable[..., Tensor], size: int | None, *rows: Tensor, again: bool = False) -> Tensor:
    """``function`` of rows, ``size`` at a time; with gradients, what it computes is forgotten and computed again.

    ``again``: also if all rows are seen at once. The function then sets its own stage for what is checkpointed inside it.
    """
    n = len(rows[0])
    if (size is None or size >= n) and not (again and torch.is_grad_enabled()):
        return function(*rows)
    size = size or n
    parts = [tuple(v[i : i + size] for v in rows) for i in range(0, n, size)]
    if not torch.is_grad_enabled():
        return torch.cat([function(*part) for part in parts])
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])


def pipeline_chain(
    pipe: Any,
    rows: Rows,
    steps: int,
    guidance: float = 1.0,
    micro_batch: int | None = None,
    family: Family | None = None,
) -> PipelineChain:
    """The chain of a supported pipeline on ``steps`` steps of its scheduler; its weights are frozen, except an adapter's.

    Raises:
        TiltflowError: a pipeline or scheduler that is not supported.
    """
    family, rows = family or family_of(pipe), on_host(rows)
    require_resident(pipe)
    if micro_batch is not None and micro_batch < 1:
        raise TiltflowError(f"micro_batch must be at least 1, got {micro_batch}.")
    family = family.bound(pipe, rows)
    nodes = nodes_of(pipe.scheduler, steps, **family.timing(pipe, steps))
    a, b, variance = nodes.steps()
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    shape = family.event_shape(pipe)
    return PipelineChain(pipe, family, rows, nodes, shape, t, a, b, variance.sqrt(), guidance, micro_batch)


@dataclass(frozen=True, eq=False)
class Adapted:
    """The network with its adapter on (or off), as a control.

    Args:
        guidance: of the fine-tuned model. reads: the condition that says the numbers of its rows. relative: the chain's base
            has other guidance or rows, so add the difference that the adapter makes under these to the base mean that is
            given. regrouped: so too for rows of several steps, whose base means are of other batches: in half precision
            that alone makes a difference.
    """

    network: nn.Module
    guidance: float = 1.0
    reads: str = "prompt"
    relative: bool = False
    regrouped: bool = False
    on: bool = True

    @property
    def module(self) -> nn.Module:
        """The network; only its adapter has gradients."""
        return self.network

    def mean(
        self, chain: PipelineChain, k: Index, x: Tensor, base_mean: Tensor | None = None, **condition: Any
    ) -> Tensor:
        """A_k x + B_k X̂_1 of the fine-tuned model."""
        prompt = condition[self.reads]
        if self.relative or (self.regrouped and isinstance(k, Tensor)):
            if base_mean is None:
                base_mean = chain.base_mean(k, x, **condition)
            with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
                base = chain.x1(k, x, prompt, self.guidance, adapted=False)
            return base_mean + at(chain.b, k, x) * (chain.x1(k, x, prompt, self.guidance, adapted=self.on) - base)
        return chain.mean(k, x, chain.x1(k, x, prompt, self.guidance, adapted=self.on))

    def ratios(self, chain: PipelineChain) -> Tensor | None:
        """The base\'s step variance."""
        return None


@dataclass(frozen=True, eq=False)
class DecodedReward:
    """r of latents: ``reward(images or audio, texts)`` after the decoder, a few rows at a time; ``texts`` of the prompts."""

    chain: PipelineChain
    reward: Callable[[Tensor, list[str]], Tensor]
    texts: Sequence[str]

    def __call__(self, x: Tensor, *, prompt: Tensor, **condition: Tensor) -> Tensor:
        """r(x), (B,)."""

        def part(x: Tensor, prompt: Tensor) -> Tensor:
            return self.reward(self.chain.family.decode(self.chain.pipe, x), texts_of(self.texts, prompt))

        return in_parts(part, self.chain.micro_batch, x, prompt)
