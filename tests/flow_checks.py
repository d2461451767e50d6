"""What must hold of every flow-matching pipeline, for the tests and for ``benchmarks/pipeline_classes.py``."""

import tiny_flows as flows
import torch

from tiltflow.core.adjoint import lean_adjoint
from tiltflow.core.cost import RewardCost
from tiltflow.core.simulate import simulate
from tiltflow.pipelines.adapters import load_adapter
from tiltflow.pipelines.chain import DecodedReward, pipeline_chain
from tiltflow.pipelines.encode import encode_prompts
from tiltflow.pipelines.recorded import Recorded, stands_for
from tiltflow.pipelines.settings import PipelineSettings
from tiltflow.pipelines.train import finetune_pipeline

PROMPTS = ["a red cat", "blue"]
BOTH = torch.tensor([0, 1])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mean(x, texts):
    return x.flatten(1).mean(1)


def prepared(name, steps=4, **options):
    """The chain of a tiny pipeline, and what its own call is given in the place of rows."""
    pipe, call, rows = flows.build(name)
    network = "transformer"
    family = Recorded(network, call)
    if rows is None:
        given, encoded = {"prompt": PROMPTS}, encode_prompts(pipe, PROMPTS, family=family)
    else:
        said = rows(2)
        said, given = said if isinstance(said, tuple) else (said, said)
        encoded = with_last(said)
    return pipe, call, given, pipeline_chain(pipe, encoded, steps, family=family, **options)


def with_last(rows):
    """With an unconditional row."""
    return {key: torch.cat([v, v[:1] * 0.5 if v.is_floating_point() else v[:1]]) for key, v in rows.items()}


def off(pipe):
    """Arguments that leave guidance out."""
    import inspect

    told = pipe.transformer.config.get("guidance_embeds")
    taken = inspect.signature(type(pipe).__call__).parameters
    return {k: 1.0 for k in taken if k.endswith("guidance_scale") and not (told and k == "guidance_scale")} | {
        k: 1.0 for k in taken if k.endswith("cfg_scale")
    }


def stock_error(name, steps=4):
    """Largest difference between Euler's steps of our X̂_1 and the pipeline's own latents; and what both decode to."""
    pipe, call, given, chain = prepared(name, steps)
    x = x0 = chain.source(2, generator(1))
    beta = chain.nodes.beta
    for k in range(steps):
        with torch.no_grad():
            x1 = chain.x1(k, x, BOTH, 1.0, adapted=False)
        x = x + (beta[k] - beta[k + 1]).float() * (x1 - x) / beta[k].float()
    call = off(pipe) | call | given | {"latents": x0, "num_inference_steps": steps, "return_dict": False}
    call["generator"] = generator()
    if chain.family.prepared:  # its argument has another shape than what its scheduler sees
        pipe.prepare_latents = stands_for(pipe.prepare_latents, call.pop("latents"))
    step, seen = pipe.scheduler.step, []
    pipe.scheduler.step = lambda *args, **options: seen.append(step(*args, **options)) or seen[-1]
    torch.manual_seed(0)
    shown = pipe(**call, output_type="pt")[0]
    with torch.no_grad():
        mine = chain.family.decode(pipe, x)
    return float((x - seen[-1][0]).abs().max()), float((mine - shown.reshape(mine.shape).float()).abs().max() / mine.std())


def adjoint_error(name):
    """Relative difference between the lean adjoint and autograd through two frozen steps, with guidance."""
    pipe, _, _, chain = prepared(name, 3, guidance=2.0)
    with torch.no_grad():
        wanted = torch.randn(chain.family.decode(pipe, chain.source(1, generator())).shape, generator=generator(4))
    cost = RewardCost(DecodedReward(chain, lambda x, texts: (x * wanted).flatten(1).sum(1), PROMPTS), 0.7)
    path = simulate(chain, None, chain.source(2, generator()), generator(1), prompt=BOTH)
    found = lean_adjoint(chain, path, cost, prompt=BOTH)
    x = path.x[1].clone().requires_grad_(True)
    end = x
    for k in (1, 2):
        end = chain.base_mean(k, end, prompt=BOTH) + path.x[k + 1] - path.mean[k]
    (expected,) = torch.autograd.grad(-0.7 * cost.reward(end, prompt=BOTH).sum(), x)
    scale = float(expected.abs().max())
    assert scale > 0
    return float((found.a[1] - expected).abs().max()) / scale


def adapter_error(name, folder):
    """An adapter is trained, saved, and put on a fresh pipeline: the difference of their paths, and how far both moved."""
    pipe, call, rows = flows.build(name)
    settings = PipelineSettings(
        rounds=1, batch=2, per_prompt=1, steps=3, rank=2, learning_rate=0.05, warmup=0, clip=None,
        call=tuple(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in call.items() if plain(v)),
    )  # fmt: skip
    given = None if rows is None else rows(2)
    given = given and with_last(given[0] if isinstance(given, tuple) else given)
    model = finetune_pipeline(pipe, mean, PROMPTS, 100.0, settings=settings, rows=given)
    model.save(folder)
    x = model.chain.source(2, generator(3))
    here, base = (everywhere(model.chain, x, adapted) for adapted in (True, False))
    fresh, _, _ = flows.build(name)
    load_adapter(fresh, folder)
    other = pipeline_chain(fresh, model.chain.rows, 3, family=model.chain.family)
    there = everywhere(other, x, True)
    return float((here - there).abs().max()), float((here - base).abs().amax(tuple(range(1, here.ndim))).min())


@torch.no_grad()
def everywhere(chain, x, adapted):
    """X̂_1 at the first two nodes."""
    return torch.stack([chain.x1(k, x, BOTH, 1.0, adapted) for k in (0, 1)])


def plain(value):
    return isinstance(value, int | float | str)
