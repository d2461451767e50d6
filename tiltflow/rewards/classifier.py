r"""Reward of images by a classifier: log p(class | image), of one class or of the class that each text names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.core.errors import TiltflowError
from tiltflow.rewards.clip import pixel_statistics, prepared


@dataclass(frozen=True, eq=False)
class ClassProbability:
    """``(images (n, 3, H, W) in [0, 1], texts) -> (n,)``, log p(class | image).

    Args:
        model: an image classifier of transformers. mean, std: of its pixels.
        label: the class of every image; None: each text is the name of its class.
    """

    model: Any
    mean: list[float]
    std: list[float]
    label: str | None = None

    def __call__(self, images: Tensor, texts: list[str]) -> Tensor:
        """Scores, (n,). Raises TiltflowError for a text that is no class."""
        numbers = self.model.config.label2id
        wanted = [self.label] * len(images) if self.label is not None else texts
        unknown = sorted({str(text) for text in wanted if text not in numbers})
        if unknown or len(wanted) != len(images):
            raise TiltflowError(
                f"{len(images)} images need as many names of classes; unknown: {unknown}; known: {sorted(numbers)[:5]} …"
            )
        pixels = prepared(images, self.model.config.image_size, self.mean, self.std).to(self.model.device, self.model.dtype)
        log_p = self.model(pixel_values=pixels).logits.float().log_softmax(1)
        which = torch.tensor([int(numbers[text]) for text in wanted], device=log_p.device)
        return log_p.gather(1, which[:, None])[:, 0].to(images.device)


def image_classifier(folder: str | Path, label: str | None = None, device: str = "cpu") -> ClassProbability:
    """A reward from a folder (or hub name) of a transformers image classifier with safetensors weights, frozen.

    Raises:
        TiltflowError: transformers is not installed, there is no such model, or it has no such class.
    """
    try:
        from transformers import AutoModelForImageClassification
    except ImportError as error:
        raise TiltflowError('classifier rewards need transformers: pip install "tiltflow[diffusers]".') from error
    try:
        model = AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise TiltflowError(
            f"{folder} holds no image classifier of transformers with safetensors weights: {str(error).splitlines()[0]}"
        ) from error
    if label is not None and label not in model.config.label2id:
        raise TiltflowError(f"{folder} has no class {label!r}; it has {', '.join(sorted(model.config.label2id)[:5])} …")
    return ClassProbability(model.to(device).eval().requires_grad_(False), *pixel_statistics(folder), label)
