"""tiltflow: tilt a flow or diffusion model towards a reward, p_base(x)·exp(r(x)), and know whether it is right."""

from importlib.metadata import version

__version__ = version("tiltflow")

from tiltflow.control import tilted
from tiltflow.errors import TiltflowError
from tiltflow.finetune import FinetuneSettings, Tuned, finetune
from tiltflow.interpolant import VP, Cosine, Follmer, Linear
from tiltflow.process import Process
from tiltflow.simulate import ode

__all__ = [
    "VP",
    "Cosine",
    "FinetuneSettings",
    "Follmer",
    "Linear",
    "Process",
    "TiltflowError",
    "Tuned",
    "finetune",
    "ode",
    "tilted",
]
