"""tiltflow: tilt a flow or diffusion model towards a reward, p_base(x)·exp(r(x)), and know whether it is right."""

from importlib.metadata import version

__version__ = version("tiltflow")
