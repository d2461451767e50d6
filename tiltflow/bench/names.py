"""The methods that each benchmark runs, from the one table of :mod:`tiltflow.methods.registry`; nothing here needs torch."""

from __future__ import annotations

from tiltflow.methods.registry import METHODS, names

TILT = names("finetune")
DIGITS = names("finetune", without=("vectors",))
CONTROL = tuple(
    name for name in names("finetune", trained=True, without=("interpolant",)) if not METHODS[name].bias
)
"""On a chain with no interpolant those that reach its optimum: a method that ends elsewhere has no exact control to miss."""
VERDICT = ("mixture2d", "mixture32d", "digits")
"""Bases of the benchmark of the verdict."""
TEMPERING, AUTOMATIC = "parallel_tempering", "automatic"
"""The classical sampler, and the stages of ``tiltflow sample-energy``."""
SAMPLING = (*names("sample"), AUTOMATIC)
COLUMNS = (
    "problem", "method", "seed", "w2", "w2_floor", "energy_w2", "energy_w2_floor", "mode_tv", "ess", "log_z_error",
    "energy_calls", "gradient_steps", "seconds", "processor_seconds", "network_evaluations", "energy_evaluations",
)  # fmt: skip
"""Keys of every row of the benchmark of samplers; None where they do not apply."""
