"""Pipelines, rewards and judges by name."""

from __future__ import annotations

from typing import Any

import torch

from tiltflow.core.errors import TiltflowError
from tiltflow.rewards.combine import Score
from tiltflow.run.names import import_callable
from tiltflow.verdict.line import REWARD

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def require_diffusers() -> None:
    """Raise TiltflowError unless diffusers and peft are installed."""
    try:
        import diffusers  # noqa: F401
        import peft  # noqa: F401
    except ImportError as error:
        raise TiltflowError('pipelines need diffusers and peft: pip install "tiltflow[diffusers,report]".') from error


def load_pipeline(name: str, device: str = "cpu", dtype: str = "float32") -> Any:
    """A diffusers pipeline of a folder or hub name; weights are safetensors only.

    Raises:
        TiltflowError: diffusers or peft is not installed, or there is no pipeline with safetensors weights.
    """
    require_diffusers()
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(name, torch_dtype=DTYPES[dtype], use_safetensors=True)
    except (OSError, ValueError) as error:
        raise TiltflowError(f"{name} holds no diffusers pipeline that can be read: {str(error).splitlines()[0]}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_scores(reward: str, judges: tuple[str, ...]) -> dict[str, Score]:
    """The reward and the judges, by name. Raises TiltflowError for one that cannot be imported, or called."""
    return {REWARD: import_callable(reward, "the reward")} | {name: import_callable(name, "the judge") for name in judges}
