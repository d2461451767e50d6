"""One family for any flow-matching pipeline: its own ``__call__`` is run for one step and recorded.

So prompts, packing, masks, positions, sizes, signs and the choice between two networks are the pipeline's, at any height,
width or number of frames that its call takes. Rows are of two kinds: arguments of the call, such as ``prompt_embeds`` or
``image``, one a prompt; or what ``encode_prompt`` returned for a text, which is then returned again in its place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError
from tiltflow.pipelines.embeddings import Rows, joined
from tiltflow.pipelines.networks import names_of, parts_of, whole

SAID = "encode_prompt"
"""Begins the names of rows that it returned; the others are arguments of the call."""
PREPARE = "prepare_latents"
SOME_STEPS = 4
"""Steps that the call is asked for; the scheduler in its place knows of one."""


class Done(Exception):
    """Ends a call where what it was made for is known."""

    def __init__(self, *found: Any) -> None:
        super().__init__()
        self.found = found


@dataclass(frozen=True, eq=False)
class Recorded:
    """A pipeline through its own call.

    Args:
        network: The component that is trained.
        call: Arguments of the call that are the same for all rows: height, width, num_frames, guidance_scale, …
        prepared: Whether latents take the place of what ``prepare_latents`` returns, and not of the call's argument, whose
            shape is another one.
        example: One row, which stands for all where nothing depends on it.
        shape: Of latents as the scheduler sees them.
    """

    network: str
    call: Mapping[str, Any]
    prepared: bool = False
    example: Rows = field(default_factory=dict)
    shape: tuple[int, ...] = ()

    def bound(self, pipe: Any, rows: Rows) -> Recorded:
        """The family of these rows. Raises TiltflowError for a call that does not do as it is told."""
        one = replace(self, prepared=False, example={name: v[:1] for name, v in rows.items()})
        calls: list[int] = []
        network = whole(pipe, self.network)
        handles = [part.register_forward_pre_hook(lambda *_: calls.append(1)) for part in parts_of(network)]
        try:
            drawn = one._latents(pipe, None)
            one = replace(one, prepared=hasattr(pipe, PREPARE) and not one._takes(pipe, drawn))
            calls.clear()
            again = one._latents(pipe, drawn + 1)
        finally:
            for handle in handles:
                handle.remove()
        name = type(pipe).__name__
        if len(calls) != 1:
            times = f"{len(calls)} times a step"
            raise TiltflowError(f"{name} asks its {self.network} {times}: turn its own guidance off in call.")
        if not _same(again, drawn + 1):
            raise TiltflowError(f"{name} changes the latents that it is given before the first step.")
        return replace(one, shape=tuple(drawn.shape[1:]))

    def _takes(self, pipe: Any, drawn: Tensor) -> bool:
        """Whether the call takes latents as its scheduler is given them."""
        try:
            return _same(self._latents(pipe, drawn + 1), drawn + 1)
        except (ValueError, RuntimeError):
            return False

    def _latents(self, pipe: Any, x: Tensor | None) -> Tensor:
        """What the scheduler is given in the first step."""
        network = whole(pipe, self.network)
        rows = _beside(self.example, network)
        with torch.no_grad():
            _, latents = self._step(pipe, network, x, torch.tensor(500.0), rows)
        return latents

    def event_shape(self, pipe: Any) -> tuple[int, ...]:
        """Of what the scheduler sees."""
        return self.shape

    def timing(self, pipe: Any, steps: int) -> dict[str, Any]:
        """What the call passes to ``set_timesteps``."""
        network = whole(pipe, self.network)
        scheduler = _scheduler(pipe, Done)
        asked = self._run(pipe, network, scheduler, _beside(self.example, network), {"num_inference_steps": steps})
        return {name: v for name, v in asked.items() if v is not None and name not in ("num_inference_steps", "device")}

    def encode(self, pipe: Any, prompts: dict[str, Any]) -> Rows:
        """Rows of texts, each encoded by itself, the empty one last unless there is a negative one."""
        if not hasattr(pipe, SAID):
            raise TiltflowError(f"{type(pipe).__name__} has no {SAID}: give rows of arguments of its call.")
        negative = prompts.get("negative_prompt", [""])[:1]
        plain = {"complex_human_instruction": None}  # which is for what is wanted
        parts = [self._said(pipe, [text], {}) for text in prompts["prompt"]]
        last = self._said(pipe, negative, plain)
        both = self._said(pipe, [*negative, *negative], plain)  # tells what grows with the number of texts
        found = [_named(part, both) for part in (*parts, last)]
        ends = found[-1]
        pairs = [{name: torch.cat([v, ends[name]]) for name, v in _alike(part, ends).items()} for part in found[:-1]]
        return joined(pairs)

    def _said(self, pipe: Any, texts: list[str], more: dict[str, Any]) -> list[Any]:
        old, network = pipe.encode_prompt, whole(pipe, self.network)

        def listen(*args: Any, **given: Any) -> None:
            raise Done(old(*args, **given))

        taken = inspect.signature(type(pipe).__call__).parameters
        pipe.encode_prompt = listen
        try:
            found = self._run(pipe, network, None, {}, {"prompt": texts} | {k: v for k, v in more.items() if k in taken})
        finally:
            del pipe.encode_prompt
        return [*found] if isinstance(found, tuple) else [found]

    def predict(self, pipe: Any, network: nn.Module, x: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        """What the scheduler is given of the network, a time at a time."""
        times, place = timestep.unique(return_inverse=True)
        if len(times) == 1:
            return self._step(pipe, network, x, times[0], rows)[0]
        parts, order = [], []
        for i, t in enumerate(times):
            index = torch.nonzero(place == i)[:, 0]
            some = {name: v[index] for name, v in rows.items()}
            parts.append(self._step(pipe, network, x[index], t, some)[0])
            order.append(index)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def _step(self, pipe: Any, network: Any, x: Tensor | None, t: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        def stop(output: Tensor, _: Any, latents: Tensor, *more: Any, **options: Any) -> None:
            if options.get("per_token_timesteps") is not None:
                raise TiltflowError(f"{type(pipe).__name__} takes steps of each token's own, which no chain here has.")
            raise Done((output, latents))

        given = {} if x is None else {"latents": x}
        return self._run(pipe, network, _scheduler(pipe, None, t.reshape(1), stop), rows, given)

    def decode(self, pipe: Any, x: Tensor) -> Tensor:
        """What the call makes of latents after its last step: images (B, 3, H, W), videos (B, frames, 3, H, W), audio."""
        network = whole(pipe, self.network)
        rows = {name: v.expand(len(x), *v.shape[1:]) for name, v in _beside(self.example, network).items()}
        given = {"latents": x.to(network.dtype), "output_type": "pt", "return_dict": False}

        def leave(output: Tensor, _: Any, latents: Tensor, *more: Any, **options: Any) -> tuple[Tensor]:
            return (latents,)

        strength = "strength" in inspect.signature(type(pipe).__call__).parameters  # these insist on a step
        times = torch.tensor([500.0] * strength)
        made = self._run(pipe, network, _scheduler(pipe, None, times, leave), rows, given)[0]
        made = torch.stack([*made]) if isinstance(made, list) else made
        return made.float()[:, None] if made.ndim == 2 else made.float()

    def _run(
        self, pipe: Any, network: Any, scheduler: Any, rows: Rows, given: dict[str, Any]
    ) -> Any:
        """The call with gradients, and what it ended with."""
        call = type(pipe).__call__
        while hasattr(call, "__wrapped__"):  # out of no_grad
            call = call.__wrapped__
        taken = inspect.signature(call).parameters
        arguments = {"num_inference_steps": SOME_STEPS} | _unguided(taken, network) | dict(self.call)
        arguments |= {name: v for name, v in rows.items() if not name.startswith(SAID)} | given
        instead: dict[str, Any] = {}
        if self.prepared and "latents" in arguments:
            instead[PREPARE] = stands_for(getattr(pipe, PREPARE), arguments.pop("latents"))
        if "generator" in taken:
            arguments["generator"] = torch.Generator(network.device).manual_seed(0)
        said = {name: v for name, v in rows.items() if name.startswith(SAID)}
        if said:
            arguments["prompt"] = [""] * len(next(iter(said.values())))
        devices = [] if network.device.type == "cpu" else [network.device]
        if said:
            instead[SAID] = _replay(said)
        if scheduler is not None:
            instead["scheduler"] = scheduler
        instead |= zip(names_of(pipe, self.network), parts_of(network), strict=True)
        with _in_place(pipe, instead), torch.random.fork_rng(devices):
            torch.manual_seed(0)  # of encoders that draw what they make of an image
            try:
                return call(pipe, **arguments)
            except Done as done:
                return done.found[0]


def _unguided(taken: Mapping[str, Any], network: Any) -> dict[str, Any]:
    """Arguments that leave classifier-free guidance out; a guidance that the network is told stays."""
    told = bool(network.config.get("guidance_embeds"))
    scales = [name for name in taken if name.endswith(("guidance_scale", "cfg_scale"))]
    return {name: 1.0 for name in scales if not (told and name == "guidance_scale")}


@contextmanager
def _in_place(pipe: Any, parts: dict[str, Any]) -> Iterator[None]:
    """The pipeline with other parts, as attributes that hide its own."""
    old = {name: pipe.__dict__[name] for name in parts if name in pipe.__dict__}
    pipe.__dict__.update(parts)
    try:
        yield
    finally:
        for name in parts:
            del pipe.__dict__[name]
        pipe.__dict__.update(old)


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.allclose(x.float(), y.float(), atol=1e-3)


def stands_for(prepare: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """``prepare_latents`` whose latents, the first of what it returns, are these."""

    def prepare_latents(*args: Any, **given: Any) -> Any:
        found = prepare(*args, **given)
        own = found[0] if isinstance(found, tuple) else found
        if own.shape != x.shape:
            raise TiltflowError(f"the pipeline makes latents {tuple(own.shape)} and its scheduler sees {tuple(x.shape)}.")
        return (x, *found[1:]) if isinstance(found, tuple) else x

    return prepare_latents


def _scheduler(pipe: Any, stop: Any, timesteps: Tensor | None = None, step: Any = None) -> Any:
    """A scheduler like the pipeline's own with these times and this step; ``stop`` ends the call where they are set."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)

    def set_timesteps(
        num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None, timesteps: Any = None
    ) -> None:
        if stop is not None:
            raise stop({"sigmas": sigmas, "mu": mu, "timesteps": timesteps})
        scheduler.timesteps = times.to(device)
        scheduler.sigmas = torch.cat([times / scheduler.config.num_train_timesteps, torch.zeros(1)]).to(device)
        scheduler.num_inference_steps = len(times)

    times = torch.empty(0) if timesteps is None else timesteps.detach().float().cpu()
    scheduler.set_timesteps, scheduler.step = set_timesteps, step
    return scheduler


def _beside(rows: Rows, network: Any) -> Rows:
    return {
        name: v.to(network.device, network.dtype if v.is_floating_point() else v.dtype) for name, v in rows.items()
    }


def _named(said: list[Any], twice: list[Any]) -> Rows:
    """What ``encode_prompt`` returned for one text, as rows (1, …) whose names tell the place and kind of each."""
    rows: Rows = {}
    for i, (one, two) in enumerate(zip(said, twice, strict=True)):
        name = f"{SAID}.{len(said)}.{i}"
        if isinstance(one, list) and len(one) == 1 and isinstance(one[0], Tensor):
            rows[f"{name}.list"] = one[0][None]
            rows[f"{name}.length"] = torch.tensor([len(one[0])])
        elif isinstance(one, Tensor):
            batch = next((d for d, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if b == 2 * a == 2), None)
            if batch is None:
                rows[f"{name}.same"] = one[None]
            else:
                rows[f"{name}.rows{batch}"] = one.movedim(batch, 0)
                if one.ndim > 2:
                    rows[f"{name}.length"] = torch.tensor([one.movedim(batch, 0).shape[-2]])
                elif not one.is_floating_point():  # a mask
                    rows[f"{name}.length"] = torch.tensor([one.shape[-1]])
        elif one is not None:
            raise TiltflowError(f"encode_prompt returned {type(one).__name__}, which no row can hold.")
    return rows


def _alike(part: Rows, ends: Rows) -> Rows:
    """One row lengthened with zeros to the other's size, which is lengthened in place to its."""
    for name, v in part.items():
        size = [max(a, b) for a, b in zip(v.shape, ends[name].shape, strict=True)]
        part[name], ends[name] = (_lengthened(w, size) for w in (v, ends[name]))
    return part


def _lengthened(v: Tensor, size: list[int]) -> Tensor:
    wide = v.new_zeros(size)
    wide[tuple(slice(n) for n in v.shape)] = v
    return wide


def _replay(said: Rows) -> Callable[..., Any]:
    """What stands for ``encode_prompt``: it returns these rows as they came, no longer than the longest of them."""

    def encode_prompt(*args: Any, **given: Any) -> Any:
        out: dict[int, Any] = {}
        for name, v in said.items():
            _, count, place, kind = name.split(".")
            lengths = said.get(name.rpartition(".")[0] + ".length")
            if kind == "list":
                assert lengths is not None
                out[int(place)] = [row[:n] for row, n in zip(v, lengths.tolist(), strict=True)]
            elif kind == "same":
                out[int(place)] = v[0]
            elif kind.startswith("rows"):
                if lengths is not None:
                    v = v.narrow(-2 if v.ndim > 2 else -1, 0, int(lengths.max()))
                out[int(place)] = v.movedim(0, int(kind[4:]))
        return tuple(out.get(i) for i in range(int(count)))

    return encode_prompt
