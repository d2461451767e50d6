"""Pipelines, rewards and judges by name."""

from __future__ import annotations

from pathlib import Path
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


def load_pipeline(
    name: str, device: str = "cpu", dtype: str = "float32", variant: str | None = None, single_file: str | None = None
) -> Any:
    """A diffusers pipeline of a folder or hub name; weights are safetensors only.

    Args:
        name: Folder or hub name.
        device: Where it goes.
        dtype: Of its weights.
        variant: Of its files, such as fp16.
        single_file: A checkpoint with all its weights; the folder then says what they are weights of.

    Raises:
        TiltflowError: diffusers or peft is not installed, or there is no pipeline with safetensors weights.
    """
    require_diffusers()
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    kind: Any = diffusers.DiffusionPipeline
    try:
        if single_file is None:
            pipe = kind.from_pretrained(name, dtype=DTYPES[dtype], use_safetensors=True, variant=variant)
        else:
            named = kind.load_config(name)["_class_name"]
            kind = getattr(diffusers, named, None)
            if not hasattr(kind, "from_single_file"):
                raise TiltflowError(f"diffusers reads no {named} of a single file: convert it into a folder.")
            if not (Path(single_file).suffix == ".safetensors" and Path(single_file).is_file()):
                raise TiltflowError(f"{single_file} is no .safetensors file; others may run code when they are read.")
            pipe = kind.from_single_file(single_file, config=name, dtype=DTYPES[dtype], disable_mmap=False)
    except (OSError, ValueError, KeyError, SingleFileComponentError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise TiltflowError(f"{name} holds no diffusers pipeline that can be read: {first}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_scores(reward: str, judges: tuple[str, ...]) -> dict[str, Score]:
    """The reward and the judges, by name. Raises TiltflowError for one that cannot be imported, or called."""
    return {REWARD: import_callable(reward, "the reward")} | {name: import_callable(name, "the judge") for name in judges}
