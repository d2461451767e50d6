"""Every flow-matching pipeline class of the installed diffusers: does it run, as a tiny model with random weights?

    python benchmarks/pipeline_classes.py > benchmarks/results/pipeline_classes.md

Four numbers for those that do: the largest difference from stock latents over four steps, and from what stock shows; of the
lean adjoint from autograd, relative; of an adapter on a fresh pipeline from the trained one. A reason for those that do not.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
warnings.simplefilter("ignore")

import diffusers.pipelines  # noqa: E402
import flow_checks as checks  # noqa: E402
import tiny_flows as flows  # noqa: E402

FLOW = "FlowMatchEulerDiscreteScheduler"
TOKENS = "steps some of its tokens or frames only"
REASONS = {
    "LTXCondition": TOKENS, "LTXImageToVideo": TOKENS, "FluxInpaintPipeline": "mixes an image into the latents it is given",
    "QwenImageEdit": "its call takes PIL images only, and rows are tensors", "WanVACE": "one video at a time",
    "Kandinsky5": "its prompt_cu_seqlens run over the batch", "Cosmos2TextToImage": "needs torchvision",
    "LongCatImagePipeline": "its call wants texts beside their embeddings",
}  # fmt: skip
"""Of classes whose name holds the key; the last that fits."""


def classes() -> list[str]:
    """Names of the pipeline classes in files that use the scheduler, with a call that takes latents, or without."""
    found = set()
    for module in pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines."):
        if ".pipeline_" not in module.name or FLOW not in Path(importlib.util.find_spec(module.name).origin).read_text():
            continue
        try:
            file = importlib.import_module(module.name)
        except Exception:  # an optional dependency
            found.add(f"{module.name.rpartition('.')[2]} (does not import here)")
            continue
        own = [c for _, c in inspect.getmembers(file, inspect.isclass) if c.__module__ == module.name]
        found |= {c.__name__ for c in own if c.__name__.endswith("Pipeline")}
    return sorted(found)


def reason(name: str) -> str:
    """Why a class is not built here."""
    kind = getattr(diffusers, name, None)
    if kind is not None and "latents" not in inspect.signature(kind.__call__).parameters:
        return "its call takes no latents"
    known = [text for key, text in REASONS.items() if key in name]
    return known[-1] if known else "no tiny build yet"


def tried(name: str) -> str:
    """The numbers of one build, or what it raised."""
    try:
        latents, shown = checks.stock_error(name)
        adjoint = checks.adjoint_error(name)
        with tempfile.TemporaryDirectory() as folder:
            adapter, _ = checks.adapter_error(name, Path(folder) / "lora")
    except Exception as error:
        return f"{name} | {type(error).__name__}: {str(error)[:80]} | | | "
    return f"{name} | {latents:.1e} | {shown:.1e} | {adjoint:.1e} | {adapter:.1e}"


def main() -> None:
    """Print the table."""
    print("| class | latents | shown | adjoint | adapter |\n|---|---|---|---|---|")
    for name in flows.BUILDERS:
        print(f"| {tried(name)} |", flush=True)
    built = {name.split()[0] for name in flows.BUILDERS}
    print("\n| not run | reason |\n|---|---|")
    for name in classes():
        if name not in built:
            print(f"| {name} | {reason(name)} |")


if __name__ == "__main__":
    main()
