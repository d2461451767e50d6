"""A finished run, opened again: what it was, and the model that it left."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from tiltflow.core.errors import TiltflowError
from tiltflow.methods.registry import METHODS
from tiltflow.run.folder import FORMAT, RunFolder, read_config

JOBS = {
    "finetune": "tilting.job:TiltJob",
    "train-sampler": "sampling.job:SamplerJob",
    "finetune-pipeline": "pipelines.job:PipelineJob",
    "conformers": "molecules.job:ConformersJob",
    "train-conformers": "molecules.job:ConformerTrainingJob",
}
"""What config.json calls a job → where it is. Each has ``read(config)`` and ``load(folder, device, **given)``."""


def open_run(folder: Path | str) -> Any:
    """The job of a run folder, with its settings.

    Raises:
        TiltflowError: no run folder, one of another format, or of a job that leaves no model.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config["job"] not in JOBS:
        raise TiltflowError(f"{folder} is a run of {config['job']!r}, which leaves no model; these do: {', '.join(JOBS)}.")
    module, _, name = JOBS[config["job"]].partition(":")
    return getattr(import_module(f"tiltflow.{module}"), name).read(config, folder)


def load(folder: Path | str, device: str = "cpu", **given: Any) -> Any:
    """The model of a finished run: a TiltedModel, a Sampler or a TiltedPipeline; of conformers, a list of Ensembles.

    Args:
        folder: The run folder, or what a model's ``save`` wrote; it may have been moved or copied.
        device: Where to put it.
        given: What its config cannot name: ``base=`` and ``reward=``, ``problem=``, ``pipe=`` and ``reward=``.

    Raises:
        TiltflowError: no such run, one that is not finished, or something that has to be given.
    """
    from tiltflow.run.device import check_device

    return open_run(folder).load(Path(folder), check_device(device), **given)


def save_model(folder: Path | str, job: str, method: str, write: Callable[[Path], None], **fields: Any) -> Path:
    """Write a model that was trained in Python into a new folder, for :func:`load`.

    Args:
        folder: Where; it must not exist, or be empty.
        job: What config.json calls it.
        method: The method that trained it.
        write: Writes its weights.
        fields: The other fields of the config.

    Raises:
        TiltflowError: the folder holds something, or the method is not one of the table.
    """
    if method not in METHODS:
        raise TiltflowError(f"the method {method!r} is not in the table: a file cannot name it.")
    with RunFolder(Path(folder), {"job": job, "format": FORMAT, "method": method, **fields}) as opened:
        write(opened.path)
    return Path(folder)
