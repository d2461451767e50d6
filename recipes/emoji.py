r"""Emoji by name: a small guided text-to-image flow, fine-tuned with one classifier and judged by another.

The base is trained here, from scratch: the 147 plants, foods and animals of Debian's fonts-noto-color-emoji (Google, SIL
Open Font License 1.1) as images of 24 × 24 pixels, shifted, scaled, on any pale background, and faded until nobody knows
them. Its condition is the character's Unicode name, word by word; one name in ten is dropped; what is fine-tuned is the flow
with classifier-free guidance.
The reward is how well a convolutional classifier recognises the emoji in noise: its log p(emoji | image + 0.3 noise), the
mean of four noises. The judge (``held_out``: the share of four other noises in which it names the emoji, among all) is
another network, of another shape, trained with other random numbers; fine-tuning never sees it, nor half the names.

    apt-get download fonts-noto-color-emoji && dpkg -x fonts-noto-color-emoji_*.deb emoji     # no root needed
    python recipes/emoji.py --font emoji/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf \
        --seeds 0 1 2 --out runs/emoji --results benchmarks/results/emoji.json
"""

from __future__ import annotations

import argparse
import unicodedata
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fontTools.ttLib import TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont
from small_flow import Guided, PatchFlow, Recogniser, Symbols, shown, train_base, train_recogniser
from study import Study, arguments, halves, parsed, run, start
from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError
from tiltflow.core.process import Process
from tiltflow.rewards.combine import Smoothed

SIZE, DRAWN, LONGEST = 24, 109, 5
"""Pixels of an image; the only size the font has; words of a name at most."""
CODES = [*range(0x1F32D, 0x1F380), *range(0x1F400, 0x1F440)]
"""Plants, food and animals."""
DROPPED, NOISE, FAINTEST = 0.1, 0.3, 0.06
"""Share of names; standard deviation; opacity, whose logarithm is uniform."""
DATA = "plants, food and animals of Noto Color Emoji (Google, SIL Open Font License 1.1) and their Unicode names."


# ------------------------------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Emoji:
    """``pictures`` (n, 4, 96, 96) of every name in [0, 1]: colours times opacity, opacity."""

    names: list[str]
    pictures: Tensor

    def draw(self, n: int, generator: torch.Generator, faded: bool = True) -> tuple[Tensor, Tensor]:
        """Images (n, 3, 24, 24) in [−1, 1] of random emoji, and their numbers (n,)."""
        which = torch.randint(len(self.names), (n,), generator=generator)
        scale = 1 + 0.2 * torch.rand(n, 1, generator=generator)
        shift = (scale - 1) * (2 * torch.rand(n, 2, generator=generator) - 1)
        theta = torch.cat([torch.diag_embed(scale.expand(-1, 2)), shift[:, :, None]], 2)
        grid = nn.functional.affine_grid(theta, [n, 4, SIZE, SIZE], align_corners=False)
        seen = nn.functional.grid_sample(self.pictures[which], grid, align_corners=False)
        if faded:
            seen = seen * FAINTEST ** torch.rand(n, 1, 1, 1, generator=generator)
        paper = 0.65 + 0.35 * torch.rand(n, 3, 1, 1, generator=generator)
        return 2 * (seen[:, :3] + (1 - seen[:, 3:]) * paper) - 1, which


def load_emoji(font: Path) -> Emoji:
    """The plants, food and animals of the font whose names have at most five words.

    Raises:
        TiltflowError: no such font, or one without coloured pictures.
    """
    try:
        letters, glyphs = ImageFont.truetype(str(font), DRAWN), TTFont(font).getBestCmap()
    except (OSError, TTLibError) as error:
        raise TiltflowError(f"--font {font}: {error}. It comes with Debian's fonts-noto-color-emoji.") from error
    names, pictures = [], []
    for code in sorted(glyphs.keys() & CODES):
        name = unicodedata.name(chr(code), "").lower()
        if not name or len(name.split()) > LONGEST:
            continue
        picture = Image.new("RGBA", (136, 136))
        ImageDraw.Draw(picture).text((0, 4), chr(code), "black", letters, embedded_color=True)
        small = np.asarray(picture.resize((4 * SIZE, 4 * SIZE), Image.Resampling.BOX), dtype=np.float32) / 255
        small[..., :3] *= small[..., 3:]  # so that a mean of pixels is one
        if small[..., :3].any():  # not blank, not in black
            names.append(name)
            pictures.append(small)
    if not names:
        raise TiltflowError(f"--font {font} has no coloured pictograph; take NotoColorEmoji.ttf.")
    fine = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return Emoji(names, nn.functional.avg_pool2d(fine, 5, 1, 2))  # no detail that 24 pixels cannot hold


# ------------------------------------------------------------------------------------------------------ reward and judge


def classifiers(emoji: Emoji, folder: Path) -> tuple[Recogniser, Recogniser]:
    """The reward's and the judge's, from ``folder`` if they are there."""

    def noisy(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, which = emoji.draw(n, generator)
        level = NOISE * torch.rand(n, 1, 1, 1, generator=generator)
        return shown(x + level * torch.randn(x.shape, generator=generator)), which

    shapes = {"reward": ((32, 64, 128), 3), "judge": ((32, 64), 5)}
    made = [
        train_recogniser(Recogniser(emoji.names, 3, *shape, seed=seed), noisy, 400, seed, folder / f"{name}.safetensors")
        for seed, (name, shape) in enumerate(shapes.items(), 1)
    ]
    return made[0], made[1]


# -------------------------------------------------------------------------------------------------------------- the job


def base_flow(emoji: Emoji, args: argparse.Namespace) -> tuple[Process, Symbols]:
    """The guided flow, which learns the emoji first and then how they fade, and how names are spelt for it."""
    symbols = Symbols(emoji.names, LONGEST, str.split)
    rows = symbols(emoji.names)

    def draw(faded: bool, n: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x, which = emoji.draw(n, generator, faded)
        kept = torch.rand(n, 1, generator=generator) >= DROPPED
        return x, {"text": rows[which] * kept}

    torch.manual_seed(0)
    net = PatchFlow((3, SIZE, SIZE), (8, 8), len(symbols), LONGEST, width=256, blocks=3)
    train_base(net, partial(draw, False), args.base_steps, args.base.with_name(args.base.stem + "-clear.safetensors"), DATA)
    base = train_base(net, partial(draw, True), args.base_steps * 3 // 10, args.base, DATA)
    return Process(base.interpolant, Guided(net, args.guidance), "x1", base.event_shape), symbols


def main(argv: list[str] | None = None) -> None:
    parser = arguments(
        "Fine-tune a small text-to-image flow so that its emoji are what their names say.",
        Path("runs/emoji-base.safetensors"), base_steps=1_600, batch=32, rounds=30, samples=160, strength=40.0,
        learning_rate=4e-3, out=Path("runs/emoji"),
    )  # fmt: skip
    parser.add_argument("--font", type=Path, default=Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
    parser.add_argument("--guidance", type=float, default=2.0, help="classifier-free, of the base that is fine-tuned")
    args = parsed(parser, argv)
    emoji = load_emoji(args.font)
    base, symbols = base_flow(emoji, args)
    reward, judge = classifiers(emoji, args.base.parent / "emoji-classifiers")
    texts = dict(zip(("trained names", "other names"), halves(emoji.names), strict=True))
    judges = {"held_out": Smoothed(judge.knows, NOISE, seed=1)}
    run(Study("emoji", base, texts, symbols, shown, Smoothed(reward, NOISE), judges), args, argv)


if __name__ == "__main__":
    start(main)
