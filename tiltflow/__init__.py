"""tiltflow: tilt a flow or diffusion model towards a reward, p_base(x)·exp(r(x)), and know whether it is right."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tiltflow._version import __version__

if TYPE_CHECKING:
    from tiltflow.core.control import tilted
    from tiltflow.core.errors import TiltflowError
    from tiltflow.core.interpolant import VP, Cosine, Follmer, Linear
    from tiltflow.core.ode import ode
    from tiltflow.core.process import Process
    from tiltflow.core.wrappers import from_azula, from_flow_matching
    from tiltflow.energies.evaluator import Evaluator
    from tiltflow.energies.problem import EnergyProblem
    from tiltflow.molecules.conformers import conformers
    from tiltflow.molecules.ensemble import Ensemble
    from tiltflow.pipelines.model import TiltedPipeline
    from tiltflow.pipelines.settings import PipelineSettings
    from tiltflow.pipelines.train import finetune_pipeline
    from tiltflow.run.open import load
    from tiltflow.sampling.automatic import sample
    from tiltflow.sampling.model import Sampler
    from tiltflow.sampling.settings import SamplerSettings
    from tiltflow.sampling.train import train_sampler
    from tiltflow.tilting.model import TiltedModel
    from tiltflow.tilting.settings import FinetuneSettings
    from tiltflow.tilting.train import finetune
    from tiltflow.verdict.check_base import check_base
    from tiltflow.verdict.check_energy import check_energy
    from tiltflow.verdict.check_reward import check_reward

_WHERE = {
    "Cosine": "core.interpolant",
    "EnergyProblem": "energies.problem",
    "Ensemble": "molecules.ensemble",
    "Evaluator": "energies.evaluator",
    "FinetuneSettings": "tilting.settings",
    "Follmer": "core.interpolant",
    "Linear": "core.interpolant",
    "PipelineSettings": "pipelines.settings",
    "Process": "core.process",
    "Sampler": "sampling.model",
    "SamplerSettings": "sampling.settings",
    "TiltedModel": "tilting.model",
    "TiltedPipeline": "pipelines.model",
    "TiltflowError": "core.errors",
    "VP": "core.interpolant",
    "check_base": "verdict.check_base",
    "check_energy": "verdict.check_energy",
    "check_reward": "verdict.check_reward",
    "conformers": "molecules.conformers",
    "finetune": "tilting.train",
    "finetune_pipeline": "pipelines.train",
    "from_azula": "core.wrappers",
    "from_flow_matching": "core.wrappers",
    "load": "run.open",
    "ode": "core.ode",
    "sample": "sampling.automatic",
    "tilted": "core.control",
    "train_sampler": "sampling.train",
}
"""Public name → its module, imported when the name is first used: ``import tiltflow`` is quick, and needs no extra."""
__all__ = [
    "VP",
    "Cosine",
    "EnergyProblem",
    "Ensemble",
    "Evaluator",
    "FinetuneSettings",
    "Follmer",
    "Linear",
    "PipelineSettings",
    "Process",
    "Sampler",
    "SamplerSettings",
    "TiltedModel",
    "TiltedPipeline",
    "TiltflowError",
    "__version__",
    "check_base",
    "check_energy",
    "check_reward",
    "conformers",
    "finetune",
    "finetune_pipeline",
    "from_azula",
    "from_flow_matching",
    "load",
    "ode",
    "sample",
    "tilted",
    "train_sampler",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'tiltflow' has no attribute {name!r}")
    return getattr(import_module(f"tiltflow.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
