"""tiltflow: tilt a flow or diffusion model towards a reward, p_base(x)·exp(r(x)), and know whether it is right."""

from importlib.metadata import version

__version__ = version("tiltflow")

from tiltflow.check import check_reward
from tiltflow.check_energy import check_energy
from tiltflow.control import tilted
from tiltflow.energies import EnergyProblem, Evaluator
from tiltflow.errors import TiltflowError
from tiltflow.finetune import FinetuneSettings, Tuned, finetune
from tiltflow.interpolant import VP, Cosine, Follmer, Linear
from tiltflow.process import Process
from tiltflow.sampler import SamplerSettings, TrainedSampler, train_sampler
from tiltflow.simulate import ode

__all__ = [
    "VP",
    "Cosine",
    "EnergyProblem",
    "Evaluator",
    "FinetuneSettings",
    "Follmer",
    "Linear",
    "Process",
    "SamplerSettings",
    "TiltflowError",
    "TrainedSampler",
    "Tuned",
    "check_energy",
    "check_reward",
    "finetune",
    "ode",
    "tilted",
    "train_sampler",
]
