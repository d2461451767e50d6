"""Right, fast and lean on a GPU? ``python benchmarks/gpu.py --out benchmarks/results/gpu-h100.json``

Random weights of real size (:mod:`networks`); nothing is downloaded. Each row is one question with its numbers; one that
raises is a row "fail", one that comes after ``--seconds`` is a row "skipped", and the next is asked. Here, in a minute:
``python benchmarks/gpu.py --device cpu --dtype float32 --sizes tiny --jobs dw4 --small``.

* Training, for each of ``--jobs``: seconds of a round and gradient steps per second on the device, with the job's batch and
  sixteen times as many rows, and on the CPU.
* Pipelines, for each of ``--sizes``: a bare call of the network; rollout, reward gradient, adjoint and loss beside as many
  bare calls; float32 on the same weights; peak memory at K and 2K steps; what micro_batch="fit" finds; offload; a run that
  was stopped and resumed; an adapter that was saved and loaded; of the smallest, the network compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from networks import LARGE, built
from torch import Tensor

from tiltflow.bench.result import Row, publish
from tiltflow.core.adjoint import lean_adjoint
from tiltflow.core.cost import RewardCost
from tiltflow.core.simulate import simulate
from tiltflow.pipelines.adapters import load_adapter, remove_adapter
from tiltflow.pipelines.chain import DecodedReward, PipelineChain, pipeline_chain
from tiltflow.pipelines.model import TiltedPipeline
from tiltflow.pipelines.settings import PipelineSettings
from tiltflow.pipelines.train import finetune_pipeline
from tiltflow.run.job import run
from tiltflow.run.memory import forget_peak, peak
from tiltflow.run.plan import ROUNDS, Planned

COMPILED = ("sd15",)
"""Sizes that are asked when compiled, too: it takes minutes."""
PROMPTS, STRENGTH, MORE = ["a", "b"], 100.0, 16
PATHS = {"sd15": (4, 10), "sdxl": (2, 10), "sd3": (2, 10), "flux": (2, 5)}
"""Paths of a round and their steps, so that all is asked in eight minutes; of others two of four steps."""
MOLECULES = ("CC(=O)Oc1ccccc1C(=O)O", "CC(C)Cc1ccc(cc1)C(C)C(=O)O", "CCCCCO", "CCOC(=O)CC", "NCCc1ccccc1", "OCCCCN")


@dataclass
class Questions:
    """Asks, and keeps the answers."""

    device: torch.device
    seconds: float
    started: float = field(default_factory=time.perf_counter)
    rows: list[Row] = field(default_factory=list)

    def ask(self, subject: str, question: str, answer: Callable[[], Row]) -> Row:
        """One row; what the answer was, {} if there is none."""
        row: Row = {"subject": subject, "question": question}
        found: Row = {}
        if time.perf_counter() - self.started > self.seconds:
            row["status"] = "skipped"
        else:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            forget_peak(self.device)
            before = time.perf_counter()
            try:
                found = answer()
                row |= {"status": "ok", **found}
            except Exception as error:  # the row says what; the next question is asked
                where = [f for f in traceback.extract_tb(error.__traceback__) if "tiltflow" in f.filename][-1:]
                row |= {"status": "fail", "error": f"{type(error).__name__}: {str(error)[:300]}"}
                row["at"] = [f"{Path(f.filename).name}:{f.lineno}" for f in where]
            high = peak(self.device)
            row |= {"seconds": time.perf_counter() - before, "peak_mb": None if high is None else high / 2**20}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        return found

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """What it returns, and its seconds by the clock."""
        self.wait()
        before = time.perf_counter()
        result = work()
        self.wait()
        return result, time.perf_counter() - before

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def generator(self, seed: int) -> torch.Generator:
        """One on the device."""
        return torch.Generator(self.device).manual_seed(seed)


def redness(x: Tensor, texts: list[str]) -> Tensor:
    """A reward of images."""
    return x[:, 0].flatten(1).mean(1) - x[:, 1:].flatten(1).mean(1)


def apart(x: Tensor, y: Tensor) -> float:
    """‖x − y‖ / ‖y‖."""
    return float((x.float() - y.float()).norm() / y.float().norm().clamp_min(1e-30))


@dataclass(frozen=True)
class Pipeline:
    """A pipeline under question: ``batch`` paths of ``steps`` steps, ``few`` rows at a time."""

    asked: Questions
    pipe: Any
    rows: dict[str, Tensor]
    batch: int
    steps: int
    few: int

    @property
    def chain(self) -> PipelineChain:
        return pipeline_chain(self.pipe, self.rows, self.steps, 1.0, self.few)

    @property
    def settings(self) -> PipelineSettings:
        quarter = max(1, self.steps // 4)
        return PipelineSettings(
            rounds=2, batch=self.batch, per_prompt=2, steps=self.steps, rank=16, micro_batch=self.few, clip=None,
            last_steps=quarter, random_steps=quarter, checkpoint_every=1,
        )  # fmt: skip

    def forward(self) -> Tensor:
        """One call of the network."""
        chain = self.chain
        x = chain.source(self.few, self.asked.generator(1))
        with torch.no_grad():
            return chain.x1(0, x, torch.arange(self.few) % 2, 1.0, False)

    def product(self) -> Tensor:
        """One with the gradient in its input."""
        chain = self.chain
        x = chain.source(self.few, self.asked.generator(1)).requires_grad_(True)
        return torch.autograd.grad(chain.base_mean(0, x, prompt=torch.arange(self.few) % 2).sum(), x)[0]

    def calls(self) -> Row:
        """Seconds of both, after one of each."""
        _, first = self.asked.timed(lambda: (self.forward(), self.product()))
        _, ahead = self.asked.timed(lambda: [self.forward() for _ in range(3)])
        _, back = self.asked.timed(lambda: [self.product() for _ in range(3)])
        return {"first_s": first, "forward_s": ahead / 3, "product_s": back / 3}

    def bare(self) -> Row:
        """Both, and the operations of a forward call."""
        from torch.utils.flop_counter import FlopCounterMode

        row = self.calls()
        with FlopCounterMode(display=False) as count:
            self.forward()
        operations = count.get_total_flops() / 1e12
        return row | {"tflop_per_row": operations / self.few, "tflop_per_s": operations / row["forward_s"]}

    def compiled(self) -> Row:
        """Both, of the network compiled in place; the first pair of calls compiles."""
        from torch._dynamo.utils import counters

        network = self.chain.network
        counters.clear()
        network.compile(dynamic=False)
        try:
            return self.calls() | {"graph_breaks": sum(counters["graph_break"].values())}
        finally:
            network._compiled_call_impl = None

    def phases(self, bare: Row) -> Row:
        """Rollout, reward gradient, adjoint, over what bare calls of the same number take."""
        chain, prompt = self.chain, torch.arange(self.batch) % 2
        cost = RewardCost(DecodedReward(chain, redness, [*PROMPTS, ""]), STRENGTH)
        x = chain.source(self.batch, self.asked.generator(1))
        path, walked = self.asked.timed(lambda: simulate(chain, None, x, self.asked.generator(2), prompt=prompt))
        _, graded = self.asked.timed(lambda: cost.grad(path.x[-1], prompt=prompt))
        adjoint, back = self.asked.timed(lambda: lean_adjoint(chain, path, cost, prompt=prompt))
        calls = self.steps * -(-self.batch // self.few)
        row = {"rollout_s": walked, "reward_s": graded, "adjoint_s": back, "finite": bool(adjoint.a.isfinite().all())}
        if bare:
            row["rollout_over_bare"] = walked / calls / bare["forward_s"]
            row["adjoint_over_bare"] = (back - graded) / calls / bare["product_s"]
        return row

    def precision(self) -> Row:
        """X̂_1 and its product with ones, beside float32 on the same weights."""
        chain, network = self.chain, self.chain.network
        x, dtype, found = chain.source(1, self.asked.generator(1)), next(self.chain.network.parameters()).dtype, []
        try:
            for kind in (dtype, torch.float32):
                network.to(kind)
                z = x.clone().requires_grad_(True)
                mean = chain.x1(self.steps // 2, z, torch.zeros(1, dtype=torch.long), 1.0, False)
                found.append((mean.detach(), torch.autograd.grad(mean, z, torch.ones_like(mean))[0]))
        finally:
            network.to(dtype)
        return {"x1_apart": apart(found[0][0], found[1][0]), "product_apart": apart(found[0][1], found[1][1])}

    def tuned(self, then: Callable[[TiltedPipeline], Row] = lambda tilted: {}, **changes: Any) -> Row:
        """Train, and take the adapter off again."""
        call = {name: changes.pop(name) for name in ("checkpoint", "resume", "callback") if name in changes}
        settings = replace(self.settings, **changes)
        try:
            tilted = finetune_pipeline(self.pipe, redness, PROMPTS, STRENGTH, settings=settings, rows=self.rows, **call)
            last = tilted.history[-1]
            row = {"round_s": last["seconds"], "loss": last["loss"], "rows_at_a_time": tilted.chain.micro_batch}
            return row | then(tilted)
        finally:
            remove_adapter(self.pipe)

    def resumed(self, **changes: Any) -> Row:
        """The loss of the second round, stopped after the first and resumed, and straight through."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "checkpoint"
            self.tuned(checkpoint=file, callback=lambda row, tilted: row["iteration"] == 0, **changes)
            again = self.tuned(checkpoint=file, resume=True, **changes)
        return {"resumed_loss": again["loss"], "straight_loss": self.tuned(**changes)["loss"]}

    def saved(self, tilted: TiltedPipeline) -> Row:
        """X̂_1 with the adapter, and with the one that was saved and loaded by diffusers."""
        chain, x, prompt = tilted.chain, self.chain.source(1, self.asked.generator(1)), torch.zeros(1, dtype=torch.long)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            mine = chain.x1(self.steps // 2, x, prompt, 1.0, True)
            tilted.save_weights(Path(folder))
            remove_adapter(self.pipe)
            base = chain.x1(self.steps // 2, x, prompt, 1.0, False)
            load_adapter(self.pipe, Path(folder))
            other = chain.x1(self.steps // 2, x, prompt, 1.0, True)
        return {"loaded_apart": apart(other, mine), "base_apart": apart(base, mine)}


def pipelines(asked: Questions, name: str, dtype: torch.dtype) -> None:
    """All questions about pipelines of a size."""
    made: list[Pipeline] = []
    batch, steps = PATHS.get(name, (2, 4))

    def build() -> Row:
        pipe, rows = built(name, asked.device, dtype)
        made.append(Pipeline(asked, pipe, rows, batch, steps, 1 if name in LARGE else 2))
        network = made[0].chain.network
        for part in (pipe.vae, network):
            part.eval().requires_grad_(False)
        return {"parameters": sum(p.numel() for p in network.parameters()), "latents": list(made[0].chain.event_shape)}

    asked.ask(name, "build", build)
    if not made:
        return
    p, few = made[0], {"rounds": 1, "steps": 4, "last_steps": 1, "random_steps": 1}
    bare = asked.ask(name, "bare network", p.bare)
    spent = asked.ask(name, "phases of a round", lambda: p.phases(bare))

    def rounds() -> Row:
        row = p.tuned()
        return row | {"loss_s": row["round_s"] - spent["rollout_s"] - spent["adjoint_s"]} if spent else row

    asked.ask(name, "beside float32", p.precision)
    asked.ask(name, f"two rounds, K = {steps}", rounds)
    asked.ask(name, f"a round, K = {2 * steps}", lambda: p.tuned(rounds=1, steps=2 * steps))
    asked.ask(name, "rows that fit", lambda: p.tuned(**few | {"steps": 3}, batch=MORE * batch, micro_batch="fit"))
    asked.ask(name, "a round, offload", lambda: p.tuned(rounds=1, offload=True))
    asked.ask(name, "resumed", lambda: p.resumed(**few | {"rounds": 2}))
    asked.ask(name, "adapter saved and loaded", lambda: p.tuned(p.saved, **few, learning_rate=1e-2, ema=0.0))
    if name in COMPILED:
        asked.ask(name, "network compiled", p.compiled)


class Enough(Exception):
    """The rounds are over: nothing is judged."""


def training(name: str, device: str, times: int, small: bool) -> Row:
    """Seconds of a round, the first not counted."""
    with tempfile.TemporaryDirectory() as folder:
        job, _ = job_of(name, device, Path(folder)).trial({"rounds": 2, "tolerance": None, "minutes": None}, 0.0)
        own = job.training
        changes: dict[str, Any] = {"batch": (16 if small else own.batch) * times}  # type: ignore[attr-defined]
        if own.minibatch is not None:
            changes["minibatch"] = (16 if small else own.minibatch) * times
        if small:
            changes["gradient_steps"] = 2
        job, _ = job.trial(changes, 0.0)
        told: list[float] = []

        def tell(what: str, done: int, total: int, note: str = "") -> None:
            if what in ROUNDS:
                told.append(time.perf_counter())
                if done == total:
                    raise Enough

        with contextlib.suppress(Enough):
            run(job, Path(folder) / "run", tell=tell)
    seconds = (told[-1] - told[0]) / (len(told) - 1)
    steps = job.training.gradient_steps
    return {"batch": changes["batch"], "round_s": seconds, "gradient_steps_per_s": steps / seconds}


def job_of(name: str, device: str, folder: Path) -> Planned:
    """A job by its name."""
    from tiltflow.energies import ENERGY_PROBLEMS
    from tiltflow.molecules.job import ConformerTrainingJob
    from tiltflow.sampling.job import SamplerJob
    from tiltflow.sampling.settings import SamplerSettings
    from tiltflow.tilting.job import TiltJob
    from tiltflow.tilting.settings import FinetuneSettings, suited

    if name == "digits":
        return TiltJob(strength=3.0, device=device, settings=FinetuneSettings.of(suited=suited("digits")))
    if name == "conformers":
        file = folder / "molecules.smi"
        file.write_text("\n".join(MOLECULES) + "\n")
        return ConformerTrainingJob(input=str(file), molecules=len(MOLECULES), device=device)
    settings = SamplerSettings.of(suited=ENERGY_PROBLEMS[name]().settings)
    return SamplerJob(problem=name, device=device, settings=settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", help="of the frozen networks")
    parser.add_argument("--sizes", default="sd15,sdxl,sd3,flux", help="names with commas")
    parser.add_argument("--jobs", default="digits,dw4,lj13,lj55,conformers", help="names with commas")
    parser.add_argument("--small", action="store_true", help="small batches in training, to try the script")
    parser.add_argument("--seconds", type=float, default=480, help="after which nothing more is asked")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device, small = torch.device(arguments.device), arguments.small
    asked = Questions(device, arguments.seconds)
    for name in filter(None, arguments.jobs.split(",")):
        for where, times in dict.fromkeys(((arguments.device, 1), (arguments.device, MORE), ("cpu", 1))):
            question = f"training on {where}" + (f", {times} times the batch" if times > 1 else "")
            asked.ask(name, question, partial(training, name, where, times, small))
    for name in filter(None, arguments.sizes.split(",")):
        pipelines(asked, name, getattr(torch, arguments.dtype))
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    failed = any(row["status"] == "fail" for row in asked.rows)
    publish(
        asked.rows, 0, arguments.out, asked.started, "fail" if failed else None, device=arguments.device, card=card,
        torch=torch.__version__, threads=torch.get_num_threads(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
