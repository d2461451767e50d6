"""Peak memory against steps: ``python benchmarks/pipeline_memory.py --out benchmarks/results/pipeline-memory.json``

One round of Adjoint Matching on a pipeline of Stable Diffusion's class with random weights (latents of 4 × 32 × 32, eight
paths, a quarter and a quarter of the steps in the loss), beside one reward gradient that is propagated through all steps of
the simulation, as DRaFT-K does. Every row is a process of its own; ``peak_mb`` is how far its resident memory rose above
what it was before the round, ``stored_mb`` what states and adjoints of the path hold. The claim: without ``stored_mb`` the
first kind does not grow with K, and the second does.
"""

from __future__ import annotations

import argparse
import gc
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tiltflow.pipelines.settings import PipelineSettings
from tiltflow.pipelines.train import finetune_pipeline

from tiltflow.bench.result import publish
from tiltflow.core.simulate import walk
from tiltflow.pipelines.adapters import remove_adapter
from tiltflow.pipelines.memory import peak_bytes

STEPS, BATCH, TOKENS = (10, 20, 40), 8, 8
METHODS = ("adjoint_matching", "backpropagation")
METHOD = "adjoint_matching_plain"


def pipeline() -> Any:
    """A small Stable Diffusion without text: prompts are given as embeddings."""
    import diffusers

    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=32, in_channels=4, out_channels=4, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    return diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=network, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def measure(method: str, steps: int) -> dict[str, Any]:
    """One row, in a process of its own."""
    torch.set_num_threads(1)
    pipe = pipeline()
    rows = {"text": torch.randn(2, TOKENS, 16, generator=torch.Generator().manual_seed(0))}

    def brightness(images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        return images.flatten(1).mean(1)

    settings = PipelineSettings.of(METHOD, rounds=1, batch=BATCH, steps=steps, rank=4)
    # of strength 0, which trains nothing; the reward is checked: the decoder is warm
    untrained = finetune_pipeline(pipe, brightness, [""], 0.0, METHOD, settings, rows=rows)

    def work() -> None:
        if method == "adjoint_matching":
            remove_adapter(pipe)
            finetune_pipeline(pipe, brightness, [""], 1.0, METHOD, settings, rows=rows)
            return
        chain, generator = untrained.chain, torch.Generator().manual_seed(0)
        prompt = torch.zeros(BATCH, dtype=torch.long)
        for step in walk(chain, untrained.control, chain.source(BATCH, generator), generator, prompt=prompt):
            x = step.x_next
        untrained.cost.value(x, prompt=prompt).mean().backward()

    gc.collect()
    started = time.perf_counter()
    return {
        "method": method,
        "steps": steps,
        "peak_mb": peak_bytes(work, torch.device("cpu")) / 2**20,
        "stored_mb": 4 * (steps + 1) * BATCH * 4 * 32 * 32 * 4 / 2**20,
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of fine-tuning a pipeline against the number of steps.")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    started, rows = time.perf_counter(), []
    for method in METHODS:
        for steps in STEPS:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                rows.append(pool.submit(measure, method, steps).result())
    publish(rows, 0, args.out, started)


if __name__ == "__main__":
    main()
