"""A finished run, opened again: what it was, and the model that it left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from tiltflow.core.errors import TiltflowError
from tiltflow.core.settings import as_json, from_json
from tiltflow.methods.registry import METHODS
from tiltflow.run.folder import CONFIG, FORMAT, RunFolder, read_config, require_whole
from tiltflow.run.names import marked

JOBS = {
    "finetune": "tilting.job:TiltJob",
    "train-sampler": "sampling.job:SamplerJob",
    "finetune-pipeline": "pipelines.job:PipelineJob",
    "conformers": "molecules.job:ConformersJob",
    "train-conformers": "molecules.job:ConformerTrainingJob",
}
"""What config.json calls a job → where it is. Each has ``read(config)`` and ``load(folder, device, **given)``."""


def open_run(folder: Path | str, trust: bool = False) -> Any:
    """The job of a run folder, with its settings.

    Args:
        folder: The run folder.
        trust: Whether code that its config names may be imported.

    Raises:
        TiltflowError: no run folder, one of another format, of a job that leaves no model, or with a damaged file.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config["job"] not in JOBS:
        raise TiltflowError(f"{folder} is a run of {config['job']!r}, which leaves no model; these do: {', '.join(JOBS)}.")
    require_whole(folder)
    job = job_class(config["job"]).read(marked(config, trust), folder)
    lacking = [*_lacking(config, as_json(job))]
    if lacking:
        raise TiltflowError(f"{folder / CONFIG} is not whole: it lacks {', '.join(lacking)}.")
    return job


def _lacking(config: dict[str, Any], whole: dict[str, Any], where: str = "") -> Iterator[str]:
    """Fields of a whole config that a config has not; who did the work, and how long it might take, is in none."""
    for key, value in whole.items():
        if key not in config and key not in ("ray", "time_limit"):
            yield f"{where}{key}"
        elif isinstance(value, dict) and isinstance(config[key], dict):
            yield from _lacking(config[key], value, f"{where}{key}.")


def job_class(job: str) -> Any:
    """The class of a job of the table."""
    module, _, name = JOBS[job].partition(":")
    return getattr(import_module(f"tiltflow.{module}"), name)


def load(folder: Path | str, device: str = "cpu", trust: bool = False, **given: Any) -> Any:
    """The model of a finished run: a TiltedModel, a Sampler or a TiltedPipeline; of conformers, a list of Ensembles.

    Args:
        folder: The run folder, or what a model's ``save`` wrote; it may have been moved or copied.
        device: Where to put it.
        trust: Whether code that its config names (``file.py:function``) may be imported and run; what tiltflow ships always
            may.
        given: In place of those names, or what a config cannot name: ``base=`` and ``reward=``, ``problem=``, ``pipe=`` and
            ``reward=``.

    Raises:
        TiltflowError: no such run, one that is not finished, or something that has to be given.
    """
    from tiltflow.run.device import check_device

    return open_run(folder, trust).load(Path(folder), check_device(device), **given)


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
    config = as_json(from_json(job_class(job), {"method": method, **fields}, "the model"))
    with RunFolder(Path(folder), {"job": job, "format": FORMAT, **config}, writes=("*",)) as opened:
        write(opened.path)
    return Path(folder)
