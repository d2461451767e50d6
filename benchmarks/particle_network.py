"""How fast the particle network is: ``python benchmarks/particle_network.py --out benchmarks/results/particle-network.json``

:class:`tiltflow.nn.particles.ParticleNet` against the usual way to write the same function: one list of all N(N − 1)
directed edges of the batch, edge inputs [h_i, h_j, features] concatenated, sums by scatter. Same weights, width, depth,
features; the outputs are compared before anything is timed. Timed are the forward pass without gradients and a training step
(forward, backward, Adam), and the plain MLP's gradient step with Adam's default and its fused implementation. All variants
of a row take turns in one loop and medians are reported, so that other load cancels in the ratio. Goals: LJ13 at batch 512
at least 2 times faster forward and 1.6 times per training step; the MLP's step under 2.5 ms.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from tiltflow.bench.result import publish
from tiltflow.nn.features import time_features
from tiltflow.nn.mlp import MLP
from tiltflow.nn.particles import Layer, ParticleNet

SYSTEMS = {"LJ13": (13, 3, 512), "LJ13 small batch": (13, 3, 32), "DW4": (4, 2, 512), "LJ55": (55, 3, 32)}


def joined(*layers: nn.Linear) -> nn.Linear:
    """One linear layer on the concatenation of the inputs of several; their biases add."""
    biases = [n.bias for n in layers if n.bias is not None]
    whole = nn.Linear(sum(n.in_features for n in layers), layers[0].out_features, bias=len(biases) > 0)
    with torch.no_grad():
        whole.weight.copy_(torch.cat([n.weight for n in layers], 1))
        if biases:
            whole.bias.copy_(torch.stack(biases).sum(0))
    return whole


class DirectedLayer(nn.Module):
    """The weights of one layer, as the usual implementation holds them."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.edge = nn.Sequential(joined(layer.node, layer.node, layer.radial), nn.SiLU(), copied(layer.message), nn.SiLU())
        self.coordinate = nn.Sequential(copied(layer.coordinate), nn.SiLU())
        self.push, self.last = copied(layer.push), layer.last
        if not layer.last:
            self.move = copied(layer.move)
            self.node = nn.Sequential(joined(layer.own, layer.received), nn.SiLU(), copied(layer.update))


def copied(layer: nn.Linear) -> nn.Linear:
    """A linear layer with the same weights."""
    twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    twin.load_state_dict(layer.state_dict())
    return twin


class DirectedNet(nn.Module):
    """The function of a ParticleNet on directed edges: the reference of this benchmark."""

    def __init__(self, net: ParticleNet, batch: int) -> None:
        super().__init__()
        self.shape, self.frequencies = (batch, net.particles, net.space), net.frequencies
        self.shortest, self.scale, self.radial = net.shortest, net.scale, net.radial
        self.time = nn.Sequential(copied(net.time[0]), nn.SiLU(), copied(net.time[2]))
        self.layers = nn.ModuleList(DirectedLayer(layer) for layer in net.layers)
        self.gate = copied(net.gate)
        one = torch.cartesian_prod(torch.arange(net.particles), torch.arange(net.particles))
        one = one[one[:, 0] != one[:, 1]]
        edges = (one[None] + net.particles * torch.arange(batch)[:, None, None]).reshape(-1, 2)
        self.register_buffer("target", edges[:, 0].clone())
        self.register_buffer("source", edges[:, 1].clone())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The field (B, N, m)."""
        count = self.shape[1]
        time = self.time(time_features(t, self.frequencies))
        h = time.repeat_interleave(count, 0)
        y = x.reshape(-1, self.shape[2])
        field = torch.zeros_like(y)
        for layer in self.layers:
            difference = y[self.target] - y[self.source]
            squared = difference.square().sum(-1, keepdim=True)
            unit = difference / (squared + self.shortest**2).sqrt()
            features = self.radial(squared[:, 0], None)
            m = layer.edge(torch.cat([h[self.target], h[self.source], features], 1))
            c = layer.coordinate(m)
            field = field + self.scale * torch.zeros_like(y).index_add_(0, self.target, unit * layer.push(c))
            if not layer.last:
                moved = torch.zeros_like(y).index_add_(0, self.target, unit * layer.move(c))
                y = y + self.shortest * self.scale * moved
                received = self.scale * torch.zeros_like(h).index_add_(0, self.target, m)
                h = h + layer.node(torch.cat([h, received], 1))
        return field.view(x.shape) + self.gate(silu(time))[:, None] * (x - x.mean(1, keepdim=True))


def interleaved(variants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, all taking turns; three rounds warm up."""
    marks: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 3):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            if turn >= 3:
                marks[name].append(1e3 * (time.perf_counter() - started))
    return {name: median(times) for name, times in marks.items()}


def training(net: nn.Module, x: Tensor, t: Tensor, target: Tensor, clip: bool, fused: bool = False) -> Callable[[], None]:
    """One gradient step of the mean squared error."""
    weights = list(net.parameters())
    optimiser = torch.optim.Adam(weights, lr=1e-4, fused=fused)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        (net(x, t) - target).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()

    return step


def without_gradients(net: nn.Module, x: Tensor, t: Tensor) -> Callable[[], Tensor]:
    return torch.no_grad()(lambda: net(x, t))


def nonzero(net: nn.Module) -> None:
    """Give the layers that start at zero random weights: a function worth comparing."""
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.3)


def system(name: str, repeats: int) -> dict[str, Any]:
    """Both implementations on one system."""
    particles, space, batch = SYSTEMS[name]
    torch.manual_seed(0)
    net = ParticleNet(particles, space)
    nonzero(net)
    reference = DirectedNet(net, batch)
    x, t, target = 1.5 * torch.randn(batch, particles, space), torch.rand(batch), torch.randn(batch, particles, space)
    with torch.no_grad():
        field = net(x, t)
        error = float((field - reference(x, t)).abs().max() / field.abs().max())
    if not error < 1e-4:
        raise SystemExit(f"{name}: the two implementations differ by {error:.1e}; nothing to compare.")
    forward = {"pairs": without_gradients(net, x, t), "edges": without_gradients(reference, x, t)}
    step = {"pairs": training(net, x, t, target, clip=False), "edges": training(reference, x, t, target, clip=False)}
    a, b = interleaved(forward, repeats), interleaved(step, repeats)
    return {
        "system": name,
        "particles": particles,
        "batch": batch,
        "difference": error,
        "forward_ms": a["pairs"],
        "forward_reference_ms": a["edges"],
        "forward_ratio": a["edges"] / a["pairs"],
        "step_ms": b["pairs"],
        "step_reference_ms": b["edges"],
        "step_ratio": b["edges"] / b["pairs"],
    }


def mlp(repeats: int) -> dict[str, Any]:
    """The gradient step of the 2-D network of 3 layers of 64, with both Adams, and its parts."""
    x, t, target = torch.randn(512, 2), torch.rand(512), torch.randn(512, 2)
    nets = {name: MLP(2, 2) for name in ("step_ms", "step_fused_ms", "step_unclipped_ms", "forward_ms")}
    steps: dict[str, Callable[[], Any]] = {
        "step_ms": training(nets["step_ms"], x, t, target, clip=True),
        "step_fused_ms": training(nets["step_fused_ms"], x, t, target, clip=True, fused=True),
        "step_unclipped_ms": training(nets["step_unclipped_ms"], x, t, target, clip=False),
        "forward_ms": without_gradients(nets["forward_ms"], x, t),
    }
    return {"system": "MLP", "particles": 1, "batch": 512} | interleaved(steps, 20 * repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--systems", nargs="+", choices=[*SYSTEMS, "MLP"], default=[*SYSTEMS, "MLP"])
    arguments = parser.parse_args()
    started = time.perf_counter()
    rows = []
    for name in arguments.systems:
        rows.append(mlp(arguments.repeats) if name == "MLP" else system(name, arguments.repeats))
        print(name, *(f"{k} {v:.3g}" for k, v in rows[-1].items() if isinstance(v, float)), sep="   ", file=sys.stderr)
    publish(rows, 0, arguments.out, started, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
