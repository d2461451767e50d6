r"""Networks for 28x28 digits: the base flow, ways to condition it further, and two classifiers.

`DigitNet` is cheap on purpose, about 5 million floating-point operations per image: adjoint matching evaluates it
some 180 times per sample and iteration. Its activations are smooth, since adjoints differentiate through it;
nothing depends on a train/eval mode or on the other images of a batch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError

__all__ = ["CLASSES", "DigitNet", "Guided", "JudgeClassifier", "Labelled", "ObservationAdapter", "RewardClassifier"]

SIDE = 28
PIXELS = SIDE * SIDE
CLASSES = 10
"""Number of classes; the label -1 (or None) means "any"."""


class Embedding(nn.Module):
    """e(t, label): sines and cosines at geometrically spaced frequencies, an MLP, plus a row per label."""

    def __init__(self, width: int, frequencies: int = 16, labels: int = CLASSES) -> None:
        super().__init__()
        self.register_buffer(
            "omega", torch.exp(torch.linspace(0.0, math.log(100.0), frequencies)), persistent=False
        )
        self.omega: Tensor
        self.time = nn.Sequential(nn.Linear(2 * frequencies + 1, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(labels + 1, width)  # the last row is the null label

    def forward(self, t: Tensor, label: Tensor | None) -> Tensor:
        null = self.label.num_embeddings - 1
        if label is None:
            label = torch.full(t.shape, null, device=t.device)
        label = torch.where(label < 0, null, label)
        phase = t[:, None] * self.omega
        features = torch.cat([t[:, None], phase.sin(), phase.cos()], dim=1)
        return F.silu(self.time(features) + self.label(label))


class DigitNet(nn.Module):
    r"""Residual MLP that predicts the clean image, x̂_1 = E[X_1 | X_t = x, label], on the linear interpolant.

    With the input brought to unit variance, z = x / √(t² + (1−t)²), and e = e(t, label):

        h ← W z
        h ← h + W₂ silu(W₁ [LN(h)(1 + a(e)) + b(e)])        (blocks times)
        x̂_1 = tanh(V silu(LN(h)) + g(e) ∘ z)

    The pixel-wise gate g lets the image pass through near t = 1; tanh keeps a mean of images in [−1, 1].

    Arguments:
        hidden: width of h.
        blocks: number of residual blocks.
        embedding: width of e.
    """

    def __init__(self, hidden: int = 480, blocks: int = 3, embedding: int = 64) -> None:
        super().__init__()
        self.embedding = Embedding(embedding)
        self.stem = nn.Linear(PIXELS, hidden)
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.modulation = nn.ModuleList(nn.Linear(embedding, 2 * hidden) for _ in range(blocks))
        self.residual = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
            for _ in range(blocks)
        )
        self.final = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, PIXELS)
        self.gate = nn.Linear(embedding, PIXELS)
        for layer in (self.head, self.gate):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """x̂_1 (B, 1, 28, 28) from x of that shape, t (B,) and labels (B,) of integers; None or -1: any."""
        e = self.embedding(t, label)
        z = x.flatten(1) * (t**2 + (1 - t) ** 2).rsqrt()[:, None]
        h = self.stem(z)
        for modulation, residual in zip(self.modulation, self.residual):
            scale, shift = modulation(e).chunk(2, dim=1)
            h = h + residual(torch.addcmul(shift, self.norm(h), 1 + scale))
        return torch.tanh(torch.addcmul(self.head(F.silu(self.final(h))), self.gate(e), z)).view_as(x)


class ObservationAdapter(nn.Module):
    r"""A net that also sees o: f(x, t, o) = n + W₂ silu(W₁ [x, n, o, τ(t)]) with n = net(x, t, label).

    W₂ starts at zero, so the adapter starts exactly at the net. It inherits the net's prediction type.

    Arguments:
        net: module (x, t, label=...) -> a tensor of the shape of x.
        event_shape: shape of one sample.
        observation_size: number of entries of one flattened observation.
        hidden: width of the adapter's only hidden layer.
    """

    def __init__(
        self, net: nn.Module, event_shape: tuple[int, ...], observation_size: int, hidden: int = 256
    ) -> None:
        super().__init__()
        self.net = net
        size = math.prod(event_shape)
        self.register_buffer("omega", torch.exp(torch.linspace(0.0, math.log(100.0), 8)), persistent=False)
        self.omega: Tensor
        self.input = nn.Linear(2 * size + observation_size + 1 + 2 * len(self.omega), hidden)
        self.output = nn.Linear(hidden, size)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, t: Tensor, observation: Tensor, label: Tensor | None = None) -> Tensor:
        """A tensor of the shape of x; observation (B, ...) is flattened."""
        base = self.net(x, t, label=label)
        phase = t[:, None] * self.omega
        parts = [x.flatten(1), base.flatten(1), observation.flatten(1), t[:, None], phase.sin(), phase.cos()]
        return base + self.output(F.silu(self.input(torch.cat(parts, dim=1)))).view_as(x)


class Guided(nn.Module):
    r"""Classifier-free guidance, net(x, t, ∅) + s (net(x, t, label) − net(x, t, ∅)); s = 1 is the net itself.

    Ho & Salimans 2022, arXiv:2207.12598, applied to whatever the net predicts (x̂_1, velocity and noise
    agree, being affine in each other). Without a label it is the unconditional net. One call costs two
    evaluations.
    """

    def __init__(self, net: nn.Module, scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        if label is None or self.scale == 1.0:
            return self.net(x, t, label=label)
        conditional, free = self.net(x, t, label=label), self.net(x, t, label=None)
        return torch.lerp(free, conditional, self.scale)


class RewardClassifier(nn.Module):
    """The reward's view: strided convolutions, an MLP, all smooth; (B, 1, 28, 28) -> logits (B, 10)."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * channels * (SIDE // 4) ** 2, 64),
            nn.SiLU(),
            nn.Linear(64, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class JudgeClassifier(nn.Module):
    """The held-out judge, of another make: ReLU and max-pooling; (B, 1, 28, 28) -> logits (B, 10)."""

    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
        )
        self.logits = nn.Linear(18 * channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))


class Labelled(nn.Module):
    """A class-conditional net with its label fixed, guided by ``scale`` (see :class:`Guided`)."""

    def __init__(self, net: nn.Module, label: int, scale: float = 1.0) -> None:
        super().__init__()
        if not 0 <= label < CLASSES:
            raise TiltflowError(f"label {label} is not a digit; use 0 to {CLASSES - 1}.")
        self.guided, self.label = Guided(net, scale), label

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x̂_1 of the fixed class."""
        return self.guided(x, t, torch.full(t.shape, self.label, device=t.device))
