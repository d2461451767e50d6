"""The card beside an adapter, or beside a pipeline with all its weights trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tiltflow._version import __version__
from tiltflow.core.settings import as_json
from tiltflow.pipelines.settings import PipelineConfig


def card(config: PipelineConfig, summary: Mapping[str, Any], verdict: str, command: str) -> str:
    """The text of the card, Markdown."""
    from diffusers import __version__ as diffusers
    from peft import __version__ as peft

    numbers = "\n".join(f"| {k} | {v} |" for k, v in summary.items())
    settings = "\n".join(f"| {k} | {v} |" for k, v in as_json(config.settings).items())
    kind = "All weights of" if config.settings.rank is None else "Adapter for"
    made_by = f"tiltflow {__version__} (torch {torch.__version__}, diffusers {diffusers}, peft {peft})"
    return (
        f"# {kind} {config.pipeline}\n\nTilted towards `{config.reward}` by {config.method} with λ = {config.strength:g}, "
        f"seed {config.seed}, {len(config.prompts)} prompts; made with {made_by}.\n\n"
        f"Verdict: **{verdict}**.\n\n    {command}\n\n"
        f"| | |\n|---|---|\n{numbers}\n\n| setting | |\n|---|---|\n{settings}\n\n"
        "The licence is that of the base model; check that it allows derived weights.\n"
    )
