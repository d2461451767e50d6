r"""Rewards of images and texts from a CLIP model with a head. They share everything but the head:

    CLIPScore    100 · max(cos(image, text), 0)                     Hessel et al. 2021, arXiv:2104.08718
    PickScore    e^τ cos(image, text), τ the model's own scale      Kirstain et al. 2023, arXiv:2305.01569
    HPSv2        cos(image, text), of a model tuned to preferences   Wu et al. 2023, arXiv:2306.09341
    aesthetic    head(image / ‖image‖)                               LAION, a small network on image embeddings

Images are resized (bicubic, antialiased, shortest side) and cropped as the model's processor says, in torch, so that the
gradient reaches them. All weights are read from safetensors: nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tiltflow.core.errors import TiltflowError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of OpenAI's models, where a folder has no preprocessor_config.json."""


@dataclass(frozen=True, eq=False)
class CLIPReward:
    """``(images (n, 3, H, W) in [0, 1], texts) -> (n,)``: a head on the normalised embeddings of images and texts.

    Args:
        model, tokenizer: of transformers. mean, std: of the model's pixels.
        head: (image, text embeddings, each (n, d) of norm 1, and the model's scale e^τ) → (n,).
    """

    model: Any
    tokenizer: Any
    head: Callable[[Tensor, Tensor, Tensor], Tensor]
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD

    def __call__(self, images: Tensor, texts: list[str]) -> Tensor:
        """Scores, (n,). Raises TiltflowError for anything but n images in three colours and n texts."""
        if images.ndim != 4 or images.shape[1] != 3 or len(texts) != len(images):
            raise TiltflowError(f"{len(texts)} texts need as many images (n, 3, H, W); got {tuple(images.shape)}.")
        device = self.model.device
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        with torch.no_grad():
            text = self.model.text_projection(self.model.text_model(**tokens).pooler_output)
        pixels = self.pixels(images).to(device, self.model.dtype)
        image = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        return self.head(image, text, self.model.logit_scale.float().exp().detach()).to(images.device)

    def pixels(self, images: Tensor) -> Tensor:
        """What the vision model sees, (n, 3, s, s)."""
        return prepared(images, self.model.config.vision_config.image_size, self.mean, self.std)


def prepared(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """What a vision model sees, (n, 3, size, size), of images in [0, 1]."""
    sides = images.shape[-2:]
    target = [size * side // min(sides) for side in sides]
    x = F.interpolate(images.float(), target, mode="bicubic", antialias=True, align_corners=False)
    top, left = ((side - size) // 2 for side in target)
    x = x[..., top : top + size, left : left + size].clamp(0, 1)
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


def pixel_statistics(folder: str | Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation that the model's processor subtracts and divides by."""
    config = Path(folder) / "preprocessor_config.json"
    said = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return said.get("image_mean", list(MEAN)), said.get("image_std", list(STD))


def load_clip(folder: str | Path, head: Callable[[Tensor, Tensor, Tensor], Tensor], device: str = "cpu") -> CLIPReward:
    """A reward from a folder (or hub name) of a transformers CLIP model with safetensors weights, frozen.

    Raises:
        TiltflowError: transformers is not installed, or there is no such model.
    """
    try:
        from transformers import CLIPModel, CLIPTokenizerFast
    except ImportError as error:
        raise TiltflowError('CLIP rewards need transformers: pip install "tiltflow[diffusers]".') from error
    try:
        model = CLIPModel.from_pretrained(folder, use_safetensors=True)
        tokenizer = CLIPTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise TiltflowError(
            f"{folder} holds no CLIP model of transformers with safetensors weights: {str(error).splitlines()[0]}"
        ) from error
    return CLIPReward(model.to(device).eval().requires_grad_(False), tokenizer, head, *pixel_statistics(folder))


def clip_score(folder: str | Path = "openai/clip-vit-large-patch14", device: str = "cpu") -> CLIPReward:
    """CLIPScore, 0 to 100."""
    return load_clip(folder, lambda image, text, scale: 100 * (image * text).sum(1).clamp_min(0), device)


def pick_score(folder: str | Path = "yuvalkirstain/PickScore_v1", device: str = "cpu") -> CLIPReward:
    """PickScore, about 15 to 25."""
    return load_clip(folder, lambda image, text, scale: scale * (image * text).sum(1), device)


def hps_v2(folder: str | Path, device: str = "cpu") -> CLIPReward:
    """HPSv2, about .2 to .3, from its weights in transformers' format (the published file is pickled)."""
    return load_clip(folder, lambda image, text, scale: (image * text).sum(1), device)


def aesthetic(folder: str | Path, head: str | Path, device: str = "cpu") -> CLIPReward:
    """LAION's aesthetic score, about 1 to 10, of images alone.

    Args:
        head: safetensors file of linear layers, ``layers.0.weight``, ``layers.0.bias``, … in rising order, one output.

    Raises:
        TiltflowError: no such file, or layers that do not fit the model.
    """
    layers = _linear_layers(Path(head)).to(device)
    reward = load_clip(folder, lambda image, text, scale: layers(image)[:, 0], device)
    width = reward.model.config.projection_dim
    if layers[0].in_features != width:
        raise TiltflowError(f"{head} takes embeddings of {layers[0].in_features}, {folder} gives {width}.")
    return reward


def _linear_layers(file: Path) -> nn.Sequential:
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise TiltflowError(f"{file} is no safetensors file of an aesthetic head: {error}.") from error
    numbers = sorted({int(key.split(".")[1]) for key in state if key.startswith("layers.")})
    if not numbers:
        raise TiltflowError(f"{file} has no layers.0.weight; it holds {', '.join(sorted(state)[:3])}.")
    layers = []
    for number in numbers:
        weight, bias = state[f"layers.{number}.weight"], state[f"layers.{number}.bias"]
        layers.append(nn.Linear(weight.shape[1], weight.shape[0]))
        layers[-1].load_state_dict({"weight": weight, "bias": bias})
    return nn.Sequential(*layers).eval().requires_grad_(False)


def image_reward(name: str = "ImageReward-v1.0", device: str = "cpu") -> Callable[[Tensor, list[str]], Tensor]:
    """ImageReward (Xu et al. 2023, arXiv:2304.05977), by its own package, which is not tiltflow's to install.

    Raises:
        TiltflowError: the package is missing or does not load. It unpickles its weights: install it if you trust them.
    """
    try:
        import ImageReward

        scorer = ImageReward.load(name, device=device)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise TiltflowError(f"ImageReward does not load here ({why}): pip install image-reward.") from error

    def reward(images: Tensor, texts: list[str]) -> Tensor:
        x = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True)
        mean, std = (x.new_tensor(v)[:, None, None] for v in (MEAN, STD))
        tokens = scorer.blip.tokenizer(texts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        rows = (tokens.input_ids, tokens.attention_mask, (x - mean) / std)
        return scorer.score_gard(*(v.to(device) for v in rows))[:, 0]

    return reward
