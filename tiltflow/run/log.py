"""Where rounds of training are logged besides metrics.json: TensorBoard, Weights & Biases or trackio, if asked for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tiltflow.core.errors import TiltflowError

LOGGERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""Names and the packages that they need."""
FOLDER = "log"


class Log:
    """Logs the numbers of a round under its number; a context manager. ``kind`` None logs nothing.

    Raises:
        TiltflowError: an unknown logger, or one whose package is not installed.
    """

    def __init__(self, kind: str | None, folder: Path, config: Mapping[str, Any]) -> None:
        require_logger(kind)
        self.kind, self.folder, self.config = kind, folder, config
        self.writer: Any = None

    def __enter__(self) -> Self:
        if self.kind == "tensorboard":
            self.writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(self.folder / FOLDER))
        elif self.kind is not None:
            module = importlib.import_module(self.kind)
            self.writer = module.init(project="tiltflow", name=self.folder.name, config=dict(self.config))
        return self

    def __call__(self, row: Mapping[str, Any], step: int) -> None:
        """Log the numbers of a row."""
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "iteration"}
        if self.kind == "tensorboard":
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
        elif self.writer is not None:
            self.writer.log(numbers, step=step)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.kind == "tensorboard":
            self.writer.close()
        elif self.writer is not None:
            self.writer.finish()


def require_logger(kind: str | None) -> None:
    """Raises TiltflowError for an unknown logger, or one that is not installed."""
    if kind is None:
        return
    if kind not in LOGGERS:
        raise TiltflowError(f"unknown log {kind!r}: use one of {', '.join(LOGGERS)}.")
    if importlib.util.find_spec(LOGGERS[kind]) is None:
        raise TiltflowError(f"--log {kind} needs the package {LOGGERS[kind]}: pip install {LOGGERS[kind]}.")
