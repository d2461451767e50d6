r"""Rewards on 28x28 digits, x in [−1, 1] (1 is ink), and for each a judge that no training ever sees.

    reward                      what it says                            judge
    stroke_thickness            2 · area / outline of the ink           thickness_judge: distances, along the ridge
    digit_log_probability       log p(digit | x), shipped classifier    digit_judge: another net, other images
    inpainting_log_likelihood   log p(o | x), o = M x + noise           agreement_judge, completion_error

Rewards are differentiable, (x (B, 1, 28, 28), **condition) -> (B,), and tolerate samples that overshoot the range.
Judges return (B,) too, without gradients.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError
from tiltflow.digits.data import load_digits
from tiltflow.digits.weights import load_network, shipped

__all__ = [
    "OBSERVATION_STD",
    "Observations",
    "agreement_judge",
    "completion_error",
    "digit_judge",
    "digit_log_probability",
    "draw_observations",
    "inpainting_log_likelihood",
    "observe",
    "stroke_thickness",
    "thickness_judge",
]

SHARPNESS = 8.0
"""Slope of the soft threshold ink = sigmoid(SHARPNESS · x): faint grey background hardly counts."""
BLANK = 4.0
"""Outline, in pixels, added to every image's own, so that a blank page is thin rather than 0/0."""
SATURATION = 3.0
"""Stroke width, in pixels, at which `stroke_thickness` levels off."""
WIDEST = 6.0
"""Widths beyond this many pixels count as this in `thickness_judge`: they are blots, not strokes."""
OBSERVATION_STD = 0.5
"""Standard deviation of the noise on each observed block average: small enough to say something about the digit,
large enough that importance resampling of base samples (the exact answer) keeps an ESS of a few per cent."""
OBSERVED_ROWS = 16
"""Rows the observation covers; the 12 below are unseen."""


class Observations(NamedTuple):
    """`observation` (n, 28), what is known; `image` (n, 1, 28, 28) and `label` (n,), what it was made from."""

    observation: Tensor
    image: Tensor
    label: Tensor


def stroke_thickness(x: Tensor, **condition: object) -> Tensor:
    r"""Mean stroke width, r = 3 tanh(w/3) for w = 2A / (P + 4) pixels, of m = sigmoid(8x): A = Σ m, P = Σ |∇m|.

    A stroke of width w and length l ≫ w has area A = wl and outline P = 2l. The width saturates at 3 pixels, so
    that a bold pen is worth nearly as much as a page of ink: without it e^{λr} hangs on a few blots among thousands
    of samples, and no reference by importance weights is stable. |∇m| is smoothed, to be differentiable where flat.
    """
    ink = F.pad(torch.sigmoid(SHARPNESS * x), (1, 1, 1, 1))
    dx = 0.5 * (ink[..., 1:, 1:] + ink[..., :-1, 1:] - ink[..., 1:, :-1] - ink[..., :-1, :-1])
    dy = 0.5 * (ink[..., 1:, 1:] - ink[..., :-1, 1:] + ink[..., 1:, :-1] - ink[..., :-1, :-1])
    outline = ((dx**2 + dy**2 + 1e-4).sqrt() - 1e-2).flatten(1).sum(1)
    width = 2 * ink.flatten(1).sum(1) / (outline + BLANK)
    return SATURATION * torch.tanh(width / SATURATION)


@torch.no_grad()
def thickness_judge(x: Tensor, **condition: object) -> Tensor:
    """Stroke width in pixels by other means: threshold, distance to paper, its mean along the ridge.

    The image is first enlarged two-fold (bilinear). A blank image has width 0. Needs SciPy.
    """
    try:
        from scipy.ndimage import distance_transform_edt, maximum_filter
    except ModuleNotFoundError as error:
        raise TiltflowError(
            "thickness_judge needs SciPy; install it with `pip install tiltflow[report]`"
        ) from error
    zoom = 2
    ink = F.interpolate(x.detach().float(), scale_factor=zoom, mode="bilinear")[:, 0] > 0
    padded = F.pad(ink, (1, 1, 1, 1))
    column = padded.flatten(0, 1).cpu().numpy()  # one transform for all: a margin of paper is nearer than any other image
    distance = distance_transform_edt(column)
    ridge = torch.from_numpy((distance == maximum_filter(distance, size=3)) & column).reshape(padded.shape)
    width = (2 * torch.from_numpy(distance).reshape(padded.shape) - 0.5) / zoom  # widths 2n and 2n - 1 share the ridge n
    total = (width.clamp(max=WIDEST) * ridge).flatten(1).sum(1) / ridge.flatten(1).sum(1).clamp(min=1)
    return total.to(x)


@cache
def _network(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    return load_network(shipped(name), dtype)[0].to(device)


def _log_probability(name: str, x: Tensor, digit: int | Tensor) -> Tensor:
    log_p = _network(name, x.dtype, x.device)(x).log_softmax(1)
    index = torch.as_tensor(digit, device=x.device).expand(len(x))
    return log_p.gather(1, index[:, None])[:, 0]


def digit_log_probability(x: Tensor, digit: int | Tensor = 3, **condition: object) -> Tensor:
    """log p(digit | x) in nats by the shipped reward classifier; digit is one class or (B,) of them.

    The classifier was trained with label smoothing, so the value lives in about [−7, 0] and its gradient does
    not die.
    """
    return _log_probability("digits-classifier", x, digit)


@torch.no_grad()
def digit_judge(x: Tensor, digit: int | Tensor = 3, **condition: object) -> Tensor:
    """p(digit | x) by the held-out judge: a network of another make, trained on other images."""
    return _log_probability("digits-judge", x, digit).exp()


def observe(x: Tensor) -> Tensor:
    """M x: the averages of the 4x4 blocks of the image's upper 16 rows, (B, 28)."""
    return F.avg_pool2d(x[..., :OBSERVED_ROWS, :], 4).flatten(1)


def inpainting_log_likelihood(x: Tensor, observation: Tensor, **condition: object) -> Tensor:
    r"""log p(o | x) = log N(o; M x, s² I) in nats, with M = `observe`, s = `OBSERVATION_STD`; o is (B, 28).

    Tilting the base by it at λ = 1 samples the posterior p(x | o), amortised over o.
    """
    residual = (observation - observe(x)) / OBSERVATION_STD
    normaliser = 0.5 * math.log(2 * math.pi) + math.log(OBSERVATION_STD)
    return -(0.5 * residual**2 + normaliser).sum(1)


def draw_observations(n: int, generator: torch.Generator, split: str = "train") -> Observations:
    """n noisy observations of real digits from a split of `load_digits` ("held_out": unseen ones)."""
    digits = load_digits(split)
    index = torch.randint(len(digits.labels), (n,), generator=generator)
    clean = observe(digits.images[index])
    noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
    return Observations(clean + OBSERVATION_STD * noise, digits.images[index], digits.labels[index])


def agreement_judge(x: Tensor, label: Tensor, **condition: object) -> Tensor:
    """Judge's probability that a completed digit is of the class of the digit the observation came from."""
    return digit_judge(x, label)


@torch.no_grad()
def completion_error(x: Tensor, image: Tensor, **condition: object) -> Tensor:
    """Mean squared error on the unobserved rows against the digit the observation came from."""
    return (x - image)[..., OBSERVED_ROWS:, :].square().flatten(1).mean(1)
