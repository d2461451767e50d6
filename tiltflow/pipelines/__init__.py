"""diffusers pipelines as bases. Needs diffusers and peft: ``pip install tiltflow[diffusers,report]``."""
