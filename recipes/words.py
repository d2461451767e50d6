r"""Words that can be read: a small text-to-image flow, fine-tuned with one recogniser and judged by another.

The base is trained here, from scratch: words of four or five letters rendered in the fonts that come with matplotlib, in
every weight and slant, shifted, scaled and faded, as images of 24 × 72 pixels. It is a transformer over patches and letters.
The reward is EasyOCR's log p(word | image) per letter; the judge is legere's recogniser, another network trained on other
pages, which training never sees. It confuses single letters even of clean pages, so it is asked which of the 234 words it
holds likeliest (accuracy with a lexicon, .95 on rendered words; a word spelt exactly as it reads it counts in ``exact``).
Fine-tuning draws words of one half of the vocabulary; both halves are judged.

    pip install --no-deps -r recipes/requirements-words.txt     # and EasyOCR's weights as safetensors: docs/pipelines.md
    python recipes/words.py --seeds 0 1 2 --out runs/words --results benchmarks/results/words.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from tiltflow.bench import write_result
from tiltflow.control import FineTuned
from tiltflow.errors import TiltflowError
from tiltflow.finetune import FinetuneSettings, Tuned, finetune
from tiltflow.fit import FitSettings
from tiltflow.flow_matching import FlowMatching, pretrain
from tiltflow.interpolant import Linear
from tiltflow.metrics.distance import pairwise_mean
from tiltflow.nn.features import time_features
from tiltflow.process import Process
from tiltflow.report.plots import image_grid
from tiltflow.rewards.ocr import Legibility, easyocr_recogniser
from tiltflow.run import RunFolder, document
from tiltflow.simulate import ode, sample
from tiltflow.store import load_weights, save_weights

HEIGHT, WIDTH, PATCH, LONGEST, FREQUENCIES = 24, 72, 8, 5, 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split()
FONTS = ("DejaVu Sans", "DejaVu Serif", "DejaVu Sans Mono")


# ----------------------------------------------------------------------------------------------------------- the data


@cache
def fonts() -> list[str]:
    """Files of matplotlib's own fonts, in every weight and slant."""
    found = {
        font_manager.findfont(font_manager.FontProperties(family=family, weight=weight, style=style))
        for family in FONTS
        for weight in ("normal", "bold")
        for style in ("normal", "oblique")
    }
    return sorted(found)


@cache
def glyphs(size: int, file: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


def render(word: str, draw: np.random.Generator) -> np.ndarray:
    """(24, 72) in [−1, 1], −1 is ink: font, size, place and ink at random, the whole word inside, near the left."""
    file, ink = str(draw.choice(fonts())), int(draw.integers(0, 60))
    for size in range(int(draw.integers(18, 22)), 7, -1):
        left, top, right, bottom = glyphs(size, file).getbbox(word)
        if right - left <= WIDTH - 2 and bottom - top <= HEIGHT - 2:
            break
    x = int(draw.integers(1, max(2, min(6, WIDTH - (right - left))))) - left
    y = int(draw.integers(1, HEIGHT - (bottom - top))) - top
    picture = Image.new("L", (WIDTH, HEIGHT), 255)
    ImageDraw.Draw(picture).text((x, y), word, fill=ink, font=glyphs(size, file))
    return np.asarray(picture, dtype=np.float32) / 127.5 - 1


def spell(words: list[str]) -> Tensor:
    """(n, 5) numbers of letters from 1, 0 after the end."""
    return torch.tensor([[LETTERS.index(c) + 1 for c in word] + [0] * (LONGEST - len(word)) for word in words])


def halves() -> tuple[list[str], list[str]]:
    """Words for fine-tuning, and words that it never draws; the base knows both."""
    order = np.random.default_rng(0).permutation(len(WORDS))
    shuffled = [WORDS[i] for i in order]
    return shuffled[::2], shuffled[1::2]


# ---------------------------------------------------------------------------------------------------------- the model


class Block(nn.Module):
    """Attention among patches and letters, then an MLP, each shifted and scaled by the time."""

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


class WordNet(nn.Module):
    """Velocity of an image (B, 1, 24, 72) at t (B,), given ``letters`` (B, 5)."""

    def __init__(self, width: int = 128, blocks: int = 5, heads: int = 4) -> None:
        super().__init__()
        patches = HEIGHT // PATCH * (WIDTH // PATCH)
        self.cut = nn.Conv2d(1, width, PATCH, PATCH)
        self.place = nn.Parameter(0.02 * torch.randn(patches + LONGEST, width))
        self.letter = nn.Embedding(len(LETTERS) + 1, width)
        self.time = nn.Sequential(nn.Linear(1 + 2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(blocks)])
        self.norm, self.paste = nn.LayerNorm(width), nn.Linear(width, PATCH**2)

    def forward(self, x: Tensor, t: Tensor, letters: Tensor) -> Tensor:
        """The velocity."""
        h = torch.cat([self.cut(x).flatten(2).transpose(1, 2), self.letter(letters)], 1) + self.place
        e = nn.functional.silu(self.time(time_features(t, FREQUENCIES)))
        for block in self.blocks:
            h = block(h, e)
        out = self.paste(self.norm(h[:, : -letters.shape[1]]))
        rows, columns = HEIGHT // PATCH, WIDTH // PATCH
        return out.reshape(-1, 1, rows, columns, PATCH, PATCH).permute(0, 1, 2, 4, 3, 5).reshape(x.shape)


def train_base(args: argparse.Namespace, file: Path) -> Process:
    """The base, from ``file`` if it is there."""
    torch.manual_seed(0)
    process = Process(Linear(), WordNet(), "velocity", (1, HEIGHT, WIDTH))
    if file.is_file():
        load_weights(file, process.model)
        return process

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        seed = int(torch.randint(1 << 31, (1,), generator=generator))
        chance = np.random.default_rng(seed)
        words = [WORDS[i] for i in chance.integers(0, len(WORDS), n)]
        return torch.from_numpy(np.stack([render(w, chance) for w in words]))[:, None], {"letters": spell(words)}

    checkpoint = file.with_suffix(".checkpoint.safetensors")
    settings = FitSettings(args.base_steps, learning_rate=2e-3, warmup=200, ema=0.998, checkpoint_every=500)
    with tqdm(total=args.base_steps, desc="base", mininterval=5) as bar:
        pretrain(
            FlowMatching(process, draw, 128), settings, torch.Generator().manual_seed(0),
            checkpoint=checkpoint, resume=checkpoint.is_file(),
            callback=lambda row: bar.update(row["iteration"] + 1 - bar.n) and None,
        )  # fmt: skip
    save_weights(file, process.model)
    return process


# ----------------------------------------------------------------------------------------------------- reward and judge


def shown(x: Tensor) -> Tensor:
    """Samples as images in [0, 1]."""
    return (x / 2 + 0.5).clamp(0, 1)


class Judge:
    """legere's recogniser: what it reads, letter by letter, or as the likeliest word of the vocabulary."""

    def __init__(self) -> None:
        try:
            from legere import load_model
            from legere.charset import encode_text
            from legere.model import ctc_greedy_decode
        except ImportError as error:
            raise TiltflowError(f"{error}: pip install --no-deps -r recipes/requirements-words.txt") from error
        self.model, self.decode = load_model(), ctc_greedy_decode
        self.targets = torch.tensor([number for word in WORDS for number in encode_text(word)])
        self.lengths = torch.tensor([len(word) for word in WORDS])

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Of images (n, 1, 24, 72) in [0, 1], brought to its height of 32."""
        x = nn.functional.interpolate(images, (32, 4 * round(WIDTH * 32 / HEIGHT / 4)), mode="bilinear", align_corners=False)
        return self.model(2 * x.clamp(0, 1) - 1)

    def spelt(self, images: Tensor) -> list[str]:
        """Letter by letter."""
        return [text.strip() for text in self.decode(self.logits(images))]

    def read(self, images: Tensor) -> list[str]:
        """The likeliest word of the vocabulary."""
        columns = self.logits(images).log_softmax(2).transpose(0, 1)
        steps = torch.full((len(WORDS),), len(columns))
        found = []
        for i in range(len(images)):
            row = columns[:, i : i + 1].expand(-1, len(WORDS), -1)
            loss = nn.functional.ctc_loss(row, self.targets, steps, self.lengths, reduction="none")
            found.append(WORDS[int(loss.argmin())])
        return found


def describe(x: Tensor, words: list[str], reward: Legibility, judge: Judge) -> dict[str, float]:
    """Reward, the shares of words that EasyOCR and legere read, and the distance between images of one word."""
    images, n = shown(x), len(words)
    with torch.no_grad():
        scores = torch.cat([reward(images[i : i + 64], words[i : i + 64]) for i in range(0, n, 64)])
    read = {"trained_on": reward.read(images), "held_out": judge.read(images), "exact": judge.spelt(images)}
    accuracy = {name: np.mean([a == b for a, b in zip(texts, words)]) for name, texts in read.items()}
    groups = [x[[w == word for w in words]].flatten(1) for word in sorted(set(words))]
    return {
        "reward": float(scores.mean()),
        **{f"{name}_accuracy": float(a) for name, a in accuracy.items()},
        "held_out_error": float((accuracy["held_out"] * (1 - accuracy["held_out"]) / n) ** 0.5),
        "diversity": float(np.mean([pairwise_mean(g)[0] for g in groups if len(g) > 1])),
    }


# -------------------------------------------------------------------------------------------------------------- the job


def fine_tuned(base: Process, seed: int, args: argparse.Namespace, reward: Legibility) -> Tuned:
    """One seed of Adjoint Matching towards legibility, on the first half of the words."""
    words = halves()[0]
    letters = spell(words)

    def conditions(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"letters": letters[torch.randint(len(words), (n,), generator=generator)]}

    def score(x: Tensor, letters: Tensor) -> Tensor:
        return reward(shown(x), ["".join(LETTERS[i - 1] for i in row if i) for row in letters.tolist()])

    settings = FinetuneSettings(
        iterations=args.iterations, batch=args.batch, steps=args.steps, rank=8, learning_rate=1e-3, noiseless_last=True,
        last_steps=(args.steps + 3) // 4, random_steps=args.steps // 4, variance_samples=128, max_reward_grad=50.0,
    )  # fmt: skip
    with tqdm(total=args.iterations, desc=f"seed {seed}", mininterval=5) as bar:

        def progress(row: dict[str, Any]) -> None:
            bar.update()
            bar.set_postfix(reward=f"{row['reward']:.3f}", kl=f"{row['kl']:.2f}")

        generator = torch.Generator().manual_seed(seed)
        return finetune(base, score, args.strength, settings, generator=generator, conditions=conditions, callback=progress)


def judged(base: Process, tuned: Tuned, seed: int, args: argparse.Namespace, reward: Legibility, judge: Judge,
           folder: Path) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of both halves of the vocabulary, before and after, by the chain and by the ODE, from the same noise."""
    rows = []
    for half, words in zip(("trained words", "other words"), halves()):
        chosen = [words[i % (args.samples // 4)] for i in range(args.samples)]  # four or more images of each
        condition = {"letters": spell(chosen)}
        x0 = tuned.chain.source(args.samples, torch.Generator().manual_seed(1_000 + seed))
        for sampler in ("sde", "ode"):
            found = []
            for process, control in ((base, None), (tuned.process, FineTuned(tuned.process))):
                if sampler == "ode":
                    found.append(ode(process, x0, args.steps, "heun", **condition))
                else:
                    noise = torch.Generator().manual_seed(2_000 + seed)
                    found.append(sample(tuned.chain, control, x0, noise, **condition).x)
            before, after = (describe(x, chosen, reward, judge) for x in found)
            head = {"problem": "words", "seed": seed, "words": half, "sampler": sampler, "samples": args.samples}
            rows.append(head | {f"{k}_base": v for k, v in before.items()} | after)
            pairs = torch.cat([torch.cat([x[i : i + 6] for x in found]) for i in range(0, 24, 6)])
            (folder / f"{half.split()[0]}-{sampler}-{seed}.png").write_bytes(image_grid(pairs, 6))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a small text-to-image flow so that its words can be read.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--reader", type=Path, default=Path("english.safetensors"), help="EasyOCR's weights")
    parser.add_argument("--base", type=Path, default=Path("runs/words-base.safetensors"), help="trained if it is not there")
    parser.add_argument("--base-steps", type=int, default=6_000)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--steps", type=int, default=25, help="simulation steps K")
    parser.add_argument("--batch", type=int, default=64, help="paths per iteration")
    parser.add_argument("--strength", type=float, default=5.0, help="lambda, per letter's log-probability")
    parser.add_argument("--samples", type=int, default=480, help="images of each kind that are measured")
    parser.add_argument("--out", type=Path, default=Path("runs/words"))
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--results", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    args.base.parent.mkdir(parents=True, exist_ok=True)
    reward, judge = easyocr_recogniser(args.reader), Judge()  # what is missing is said first
    base = train_base(args, args.base)
    rows: list[dict[str, Any]] = []
    config = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    with RunFolder(args.out, config, overwrite=args.overwrite) as folder:
        for seed in args.seeds:
            began = time.perf_counter()
            tuned = fine_tuned(base, seed, args, reward)
            seconds = time.perf_counter() - began
            save_weights(folder.path / f"seed{seed}.safetensors", FineTuned(tuned.process).module)
            kl = float(np.mean([row["kl"] for row in tuned.history[-5:]]))
            found = judged(base, tuned, seed, args, reward, judge, folder.path)
            rows += [row | {"kl": kl, "seconds": seconds} for row in found]
            command = "python recipes/words.py " + " ".join(sys.argv[1:] if argv is None else argv)
            result = document(command, args.seeds, "cpu", rows, None)
            folder.write_json("metrics.json", result)
            for row in rows[-4:]:
                print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}))
    if args.results is not None:
        write_result(args.results, result, time.perf_counter() - started)


if __name__ == "__main__":
    try:
        main()
    except TiltflowError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
