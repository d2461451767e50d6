"""Is a reward fit to tilt a pipeline with, and by how much?"""

from __future__ import annotations

from typing import Any

import torch

from tiltflow.core.settings import Seed, check_value
from tiltflow.core.simulate import simulate
from tiltflow.pipelines.chain import DecodedReward, pipeline_chain
from tiltflow.pipelines.embeddings import Rows
from tiltflow.pipelines.encode import encode_prompts
from tiltflow.pipelines.families import device_of, family_of
from tiltflow.pipelines.settings import PipelineSettings
from tiltflow.rewards.combine import Score
from tiltflow.verdict.check_reward import RewardReport, check_reward


@torch.no_grad()
def check_pipeline_reward(
    pipe: Any,
    reward: Score,
    prompt: str,
    samples: int = 128,
    *,
    settings: PipelineSettings | None = None,
    seed: int = 0,
    rows: Rows | None = None,
    judge: Score | None = None,
) -> RewardReport:
    """:func:`tiltflow.check_reward` on latents of the pipeline itself, for one prompt: is the reward sound, and which λ?

    Args:
        pipe: Of a supported family.
        reward: ``(images or audio, texts) -> (n,)``.
        prompt: Its text.
        samples: At least 100, of the chain that would be fine-tuned.
        settings: Its steps, guidance and micro-batches.
        seed: Of the samples.
        rows: Of the prompt and the negative one, if they are encoded already.
        judge: A held-out score, whose mean under each λ is predicted too.

    Raises:
        TiltflowError: an unknown pipeline or scheduler, too few samples.
    """
    check_value("seed", seed, Seed)
    s, generator = settings or PipelineSettings(), torch.Generator(str(device_of(pipe))).manual_seed(seed)
    family = family_of(pipe, s.arguments)
    rows = encode_prompts(pipe, [prompt], family=family) if rows is None else rows
    chain = pipeline_chain(pipe, rows, s.steps, s.guidance, s.rows, family)
    number = torch.zeros(samples, dtype=torch.long)
    x = simulate(chain, None, chain.source(samples, generator), generator, prompt=number).x[-1]
    held_out = None if judge is None else DecodedReward(chain, judge, [prompt])
    decoded = DecodedReward(chain, reward, [prompt])
    return check_reward(chain, decoded, samples=x, generator=generator, judge=held_out, prompt=number)
