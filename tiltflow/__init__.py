"""tiltflow: tilt a flow or diffusion model towards a reward, p_base(x)·exp(r(x)), and know whether it is right."""

from tiltflow._version import __version__
from tiltflow.core.control import tilted
from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import VP, Cosine, Follmer, Linear
from tiltflow.core.ode import ode
from tiltflow.core.process import Process
from tiltflow.energies import EnergyProblem, Evaluator
from tiltflow.sampling.settings import SamplerSettings
from tiltflow.sampling.model import Sampler
from tiltflow.sampling.train import train_sampler
from tiltflow.tilting.settings import FinetuneSettings
from tiltflow.tilting.model import TiltedModel
from tiltflow.tilting.train import finetune
from tiltflow.verdict.check_energy import check_energy
from tiltflow.verdict.check_reward import check_reward

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
    "__version__",
    "check_energy",
    "check_reward",
    "finetune",
    "ode",
    "tilted",
    "train_sampler",
]
