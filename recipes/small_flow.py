"""Small text-conditional models that recipes train for themselves: a flow, and a classifier.

The flow's network is a transformer over the patches of an image (a spectrogram is one) and the symbols of a text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tiltflow._version import __version__
from tiltflow.core.interpolant import Linear
from tiltflow.core.process import Process
from tiltflow.nn.features import time_features
from tiltflow.train.checkpoint import Checkpoint
from tiltflow.train.flow_matching import Draw, FlowMatching, pretrain
from tiltflow.train.settings import Training
from tiltflow.train.store import load_weights, save_weights, write_text

FREQUENCIES = 8


# ------------------------------------------------------------------------------------------------------------ the flow


class Block(nn.Module):
    """Attention among patches and symbols, then an MLP, each shifted and scaled by the time."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.SiLU(), nn.Linear(3 * width, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width, elementwise_affine=False) for _ in range(2)])
        self.shape = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.shape.weight)
        nn.init.zeros_(self.shape.bias)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """h (B, tokens, width), e (B, width)."""
        a, b, c, d, f, g = self.shape(e)[:, None].chunk(6, 2)
        z = self.norms[0](h) * (1 + a) + b
        q, k, v = self.qkv(z).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        z = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + (1 + c) * self.out(z)
        return h + (1 + g) * self.mlp(self.norms[1](h) * (1 + d) + f)


class PatchFlow(nn.Module):
    """X̂_1 of images x (B, channels, height, width) at t (B,), given ``text`` (B, longest), 0 for no symbol."""

    def __init__(self, event: tuple[int, int, int], patch: tuple[int, int], symbols: int, longest: int,
                 width: int = 128, blocks: int = 5, heads: int = 4) -> None:  # fmt: skip
        super().__init__()
        self.event, channels, self.rows, self.columns = event, event[0], event[1] // patch[0], event[2] // patch[1]
        self.patch = (channels, *patch)
        self.cut = nn.Conv2d(channels, width, patch, patch)
        self.place = nn.Parameter(0.02 * torch.randn(self.rows * self.columns + longest, width))
        self.symbol = nn.Embedding(symbols + 1, width)
        self.time = nn.Sequential(nn.Linear(1 + 2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(blocks)])
        self.norm, self.paste = nn.LayerNorm(width), nn.Linear(width, channels * patch[0] * patch[1])

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The denoised x, in its shape."""
        h = torch.cat([self.cut(x).flatten(2).transpose(1, 2), self.symbol(text)], 1) + self.place
        e = nn.functional.silu(self.time(time_features(t, FREQUENCIES)))
        for block in self.blocks:
            h = block(h, e)
        out = self.paste(self.norm(h[:, : -text.shape[1]])).unflatten(1, (self.rows, self.columns))
        return out.unflatten(3, self.patch).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def shown(x: Tensor) -> Tensor:
    """Samples in [−1, 1] as images in [0, 1]."""
    return (x / 2 + 0.5).clamp(0, 1)


class Guided(nn.Module):
    """Classifier-free guidance X̂_∅ + w (X̂_text − X̂_∅): the law of the guided flow is the base."""

    def __init__(self, net: nn.Module, scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Both in one call."""
        both = self.net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, torch.zeros_like(text)]))
        given, without = both.chunk(2)
        return without + self.scale * (given - without)


def train_base(net: PatchFlow, draw: Draw, steps: int, file: Path, data: str) -> Process:
    """The flow of ``net``, from ``file`` if it is there; else trained on batches of 128, where it left off.

    ``data`` says in the model card, ``file`` with the suffix .md, what it was trained on and under which licence.
    """
    process = Process(Linear(), net, "x1", net.event)
    if file.is_file():
        load_weights(file, net)
        return process
    file.parent.mkdir(parents=True, exist_ok=True)
    checkpoint, started = Checkpoint(file.with_suffix(".checkpoint.safetensors")), time.process_time()
    settings = Training(rounds=steps, learning_rate=1e-3, betas=(0.9, 0.99), warmup=100, ema=0.99, checkpoint_every=500)
    with tqdm(total=steps, desc="base", mininterval=5) as bar:
        pretrain(
            FlowMatching(process, draw, 128, floor=0.15), settings, torch.Generator().manual_seed(0),
            checkpoint=checkpoint.path, resume=checkpoint.exists(),
            callback=lambda row: bar.update(row["iteration"] + 1 - bar.n) and None,
        )  # fmt: skip
    save_weights(file, net)
    size, minutes = sum(p.numel() for p in net.parameters()), (time.process_time() - started) / 60
    write_text(
        file.with_suffix(".md"),
        f"# {file.stem}\n\nA flow by tiltflow {__version__}: {size:,} weights, {steps:,} steps of 128; {minutes:.0f} "
        f"processor minutes since its start or last resume.\n\nData: {data}\n",
    )
    checkpoint.remove()
    return process


# ------------------------------------------------------------------------------------------------- texts and what is read


class Symbols:
    """Texts as rows of numbers (n, longest), from 1, 0 after the end; the symbols of a text are ``split(text)``."""

    def __init__(self, texts: Iterable[str], longest: int, split: Callable[[str], Sequence[str]] = list) -> None:
        known = sorted({symbol for text in texts for symbol in split(text)})
        self.number, self.longest, self.split = {symbol: i for i, symbol in enumerate(known, 1)}, longest, split

    def __len__(self) -> int:
        return len(self.number)

    def __call__(self, texts: Iterable[str]) -> Tensor:
        """The rows."""
        rows = [[self.number[symbol] for symbol in self.split(text)] for text in texts]
        return torch.tensor([row + [0] * (self.longest - len(row)) for row in rows])


class Recogniser(nn.Module):
    """A convolutional classifier of images (n, channels, h, w) in [0, 1] into ``classes``: log p(text | image), (n,)."""

    def __init__(self, classes: Sequence[str], channels: int, widths: Sequence[int], kernel: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.number = {name: i for i, name in enumerate(classes)}
        layers: list[nn.Module] = []
        for a, b in zip((channels, *widths[:-1]), widths, strict=True):
            layers += [nn.Conv2d(a, b, kernel, padding=kernel // 2), nn.SiLU(), nn.Conv2d(b, b, kernel, 2, kernel // 2)]
            layers += [nn.GroupNorm(8, b), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * widths[-1], len(classes)))

    def forward(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """log p(text | image), at least −30."""
        which = torch.tensor([self.number[text] for text in texts])
        return self.net(images).log_softmax(1)[torch.arange(len(which)), which].clamp_min(-30.0)

    @torch.no_grad()
    def knows(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """1 where the text is the likeliest class, (n,)."""
        return (self.net(images).argmax(1) == torch.tensor([self.number[text] for text in texts])).float()


def train(
    module: nn.Module, loss: Callable[[torch.Generator], Tensor], steps: int, seed: int, file: Path
) -> nn.Module:
    """Minimise ``loss(generator)`` by AdamW, or take the weights of ``file`` if it is there; they are fixed from then on."""
    if file.is_file():
        load_weights(file, module)
        return module.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(module.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps)
    for _ in tqdm(range(steps), desc=file.stem, mininterval=5):
        optimiser.zero_grad()
        loss(generator).backward()
        optimiser.step()
        schedule.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_weights(file, module)
    return module.eval().requires_grad_(False)


def train_recogniser(
    recogniser: Recogniser, draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]], steps: int, seed: int, file: Path
) -> Recogniser:
    """On batches of 128 images with their classes' numbers; ``file`` as in :func:`train`."""

    def loss(generator: torch.Generator) -> Tensor:
        images, which = draw(128, generator)
        return nn.functional.cross_entropy(recogniser.net(images), which)

    train(recogniser, loss, steps, seed, file)
    return recogniser
