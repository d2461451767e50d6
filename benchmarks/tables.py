"""Write the tables and the picture of docs/benchmarks.md from benchmarks/results/*.json: ``python benchmarks/tables.py``.

Everything between ``<!-- table NAME -->`` and ``<!-- end -->`` is replaced; a missing result says "not run".
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from tiltflow.bench.conformers import METHODS as GENERATORS
from tiltflow.bench.conformers import SUBSETS
from tiltflow.bench.control import METHODS as CONTROL_METHODS
from tiltflow.bench.control import PROBLEMS as CONTROL_PROBLEMS
from tiltflow.bench.sampling import NAMES as SAMPLERS
from tiltflow.energies import ENERGY_PROBLEMS
from tiltflow.methods.registry import METHODS, TRAINED
from tiltflow.report import plots

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
Row = dict[str, Any]

STUDIES, SEEDS, TENTHS = ("words", "emoji", "speech"), 3, 10
PROBLEMS = ("mixture2d", "mixture2d-rare", "mixture32d", "quadratic2d", "inverse4d")


def load(pattern: str) -> list[Row]:
    """Every result document whose file name matches, oldest name first."""
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(RESULTS.glob(pattern))]


def number(values: list[float | None], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds, or the only value, or "not run"."""
    known = [v for v in values if v is not None]
    if not known:
        return "–" if values else "not run"
    spread = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{mean(known):.{digits}f}{spread}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(r) + " |" for r in [header, ["---"] * len(header), *rows])


def _duration(document: Row) -> str:
    seconds = document.get("duration")
    return "duration not recorded" if seconds is None else f"{seconds:.0f} s"


def provenance(documents: list[Row]) -> str:
    """Commands, commits and durations behind a table."""
    seen = [
        f"`{d['command']}` (commit {d.get('commit')}, {_duration(d)})" for d in documents
    ]
    return "From: " + "; ".join(seen) + "." if seen else "Not run."


def tilt() -> str:
    """Analytic problems, one line per problem and sampler, mean ± standard deviation over seeds."""
    documents = load("tilt-*.json")
    rows = [row for d in documents for row in d["rows"]]
    columns = ("w2", "w2_floor", "mode_tv", "mode_weight_error", "log_z_error", "ess", "chain_ess", "seconds")
    lines = []
    for problem in PROBLEMS:
        for sampler in ("sde", "ode"):
            found = [r for r in rows if r["problem"] == problem and r["sampler"] == sampler]
            cells = [number([r.get(c) for r in found], 0 if c == "seconds" else 3) for c in columns]
            lines.append([problem, sampler, str(len(found)), *cells])
    return markdown(["problem", "sampler", "seeds", *columns], lines) + "\n\n" + provenance(documents)


def memoryless() -> str:
    """The three noise schedules."""
    documents = load("memoryless-*.json")
    columns = ("residual_correlation", "mode_tv", "w2", "w2_floor")
    names = ("σ = 0.2", "σ = 1", "memoryless")
    lines = []
    for name in names:
        found = [r for d in documents for r in d["rows"] if r["noise"] == name]
        lines.append([name, *(number([r[c] for r in found]) for c in columns)])
    return markdown(["noise", *columns], lines) + "\n\n" + provenance(documents)


def digits() -> str:
    """Fine-tuned digits: base, exact reference, reached."""
    lines, documents = [], load("digits-*.json")
    for d in documents:
        summary = d["rows"][0]
        for name in [k[: -len("_base")] for k in summary if k.endswith("_base")]:
            base, exact, got = (summary[f"{name}_{c}"] for c in ("base", "reference", "reached"))
            gap = f"{100 * (got - exact) / (exact - base):+.0f} %" if exact != base else "–"
            lines.append(
                [
                    summary["reward"],
                    f"{summary['strength']:g}",
                    str(d["seed"]),
                    name,
                    *(f"{v:.3f}" for v in (base, exact, got)),
                    gap,
                    f"{summary['path_ess']:.2f}",
                    str(d["verdict"]),
                ]
            )
    header = ["reward", "λ", "seed", "score", "base", "exact tilt", "reached", "off the gap", "path ESS", "verdict"]
    return (markdown(header, lines) if lines else "not run") + "\n\n" + provenance(documents)


def methods(pattern: str, names: tuple[str, ...], columns: dict[str, int], **only: str) -> str:
    """One line per method, mean ± standard deviation over seeds; ``columns`` with their digits."""
    documents = load(pattern)
    rows = [r for d in documents for r in d["rows"] if all(r.get(k) == v for k, v in only.items())]
    lines = []
    for name in names:
        found = [r for r in rows if r["method"] == name]
        bias = "yes" if METHODS[name].bias is not None else "no"
        done = [r for r in found if "error" not in r]
        cells = [number([r.get(c) for r in done], digits) for c, digits in columns.items()]
        seeds = f"{len(done)}" + (f", {len(found) - len(done)} diverged" if len(done) < len(found) else "")
        lines.append([name, bias, seeds, *(cells if done else ["diverged" if found else "not run"] * len(columns))])
    return markdown(["method", "biased", "seeds", *columns], lines) + "\n\n" + provenance(documents)


SPENT = {"base_evaluations": 0, "reward_calls": 0, "seconds": 0, "peak_memory_mb": 0}


def methods_tilt(sampler: str) -> str:
    """Every method on mixture2d."""
    columns = {"mode_tv": 3, "spread": 2, "w2": 2, "w2_floor": 2, "mean_reward": 3, "mean_reward_exact": 3}
    if sampler == "sde":
        columns |= {"log_z_error": 3, "ess": 2, "kl": 2} | SPENT
    names = tuple(METHODS) if sampler == "sde" else tuple(TRAINED)
    return methods("methods-tilt-*.json", names, columns, problem="mixture2d", sampler=sampler)


def methods_digits() -> str:
    """Every method on the digits base, and the exact tilt's own scores."""
    columns = {"reward": 3, "judge_thickness": 3, "kl": 2, "diversity": 2, "w2": 2, "log_z_error": 2, "ess": 2} | SPENT
    names = tuple(n for n, m in METHODS.items() if not getattr(m, "vectors", False))
    rows = [r for d in load("methods-digits-*.json") for r in d["rows"] if "error" not in r]
    scores = ("reward", "judge_thickness", "diversity")
    exact = [[s, *(number([r[f"{s}_{c}"] for r in rows]) for c in ("base", "reference"))] for s in scores]
    exact.append(["w2", number([r["w2_base"] for r in rows]), number([r["w2_floor"] for r in rows])])
    return markdown(["score", "base", "exact tilt"], exact) + "\n\n" + methods("methods-digits-*.json", names, columns)


def control() -> str:
    """Optimal-control methods on problems with a known control."""
    documents = load("control-*.json")
    rows = [r for d in documents for r in d["rows"]]
    columns = {"control_error": 3, "control_error_own_paths": 3, "objective": 3, "objective_exact": 3, "seconds": 0}
    lines = []
    for problem, name in itertools.product(CONTROL_PROBLEMS, CONTROL_METHODS):
        found = [r for r in rows if r["problem"] == problem and r["method"] == name]
        cells = [number([r[c] for r in found], digits) for c, digits in columns.items()]
        lines.append([problem, name, str(len(found)), *(cells if found else ["not run"] * len(columns))])
    return markdown(["problem", "method", "seeds", *columns], lines) + "\n\n" + provenance(documents)


def sampling() -> str:
    """Samplers of e^{−E}: every method for each problem that was run, mean ± standard deviation over seeds."""
    documents = load("sampling-*.json")
    rows = [r for d in documents for r in d["rows"]]
    columns = {
        "w2": 2, "w2_floor": 2, "energy_w2": 2, "energy_w2_floor": 2, "mode_tv": 3, "ess": 2, "log_z_error": 3,
        "energy_calls": 0, "gradient_steps": 0, "processor_seconds": 0, "seconds": 0,
    }  # fmt: skip
    lines = []
    for problem in dict.fromkeys((*ENERGY_PROBLEMS, *(r["problem"] for r in rows))):
        mine = [r for r in rows if r["problem"] == problem]
        for name in SAMPLERS if mine else ("all",):
            found = [r for r in mine if r["method"] == name]
            done = [r for r in found if "error" not in r]
            seeds = f"{len(done)}" + (f", {len(found) - len(done)} failed" if len(done) < len(found) else "")
            cells = [number([r.get(c) for r in done], digits) for c, digits in columns.items()]
            cells = cells if done else ["failed" if found else "not run"] * len(columns)
            lines.append([problem, name, seeds, *cells])
    return markdown(["problem", "method", "seeds", *columns], lines) + "\n\n" + provenance(documents)


def training_curve() -> str:
    """How the energies of end points fall while a sampler trains, a tenth of the rounds at a time."""
    documents = load("training-curve-*.json")
    lines = []
    for d in documents:
        problem, rounds = d["rows"][0]["problem"], d["rows"][1:]
        for i in range(TENTHS):
            last = len(rounds) * (i + 1) // TENTHS
            part = [r["energy"] for r in rounds[len(rounds) * i // TENTHS : last]]
            spent = (sum(r[c] for r in rounds[:last]) / 60 for c in ("processor_seconds", "seconds"))
            lines.append([problem, str(last), *(f"{m:.0f}" for m in spent), f"{median(part):.4g}"])
    header = ["problem", "rounds so far", "processor minutes", "minutes", "median energy in the last tenth"]
    return (markdown(header, lines) if lines else "not run") + "\n\n" + provenance(documents)


def conformers() -> str:
    """Coverage of CREST's conformers: every method, as generated and relaxed, for all molecules and the flexible ones."""
    documents = load("conformers-*.json")
    rows = [r for d in documents for r in d["rows"] if r["kind"] == "summary"]
    lines = []
    for subset, name, relaxed in itertools.product(SUBSETS, GENERATORS, (False, True)):
        found = [r for r in rows if (r["subset"], r["method"], r["relaxed"]) == (subset, name, relaxed)]
        at = {t: [r for r in found if r["threshold"] == t] for t in (1.0, 1.25)}
        molecules = ", ".join(sorted({f"{r['molecules']} of {r['listed']}" for r in at[1.0]})) or "0"
        failed = ", ".join(sorted({m for r in at[1.0] for m in r["failed"]}))
        cells = [
            number([r["recall_coverage"] for r in at[1.0]]), _bounds(at[1.0]),
            number([r["recall_coverage"] for r in at[1.25]]), _bounds(at[1.25]),
            number([r["recall_amr"] for r in at[1.0]]),
            number([r["precision_coverage"] for r in at[1.0]]), number([r["precision_coverage"] for r in at[1.25]]),
            number([r["precision_amr"] for r in at[1.0]]),
            number([r["energy_calls"] for r in at[1.0]], 0), number([r["seconds"] for r in at[1.0]], 0),
        ]  # fmt: skip
        seeds = str(len(at[1.0])) + (f"; failed: {failed}" if failed else "")
        lines.append([subset, name, "yes" if relaxed else "no", molecules, seeds, *cells])
    header = [
        "molecules", "method", "relaxed", "number", "seeds", "recall 1 Å", "95 %", "recall 1.25 Å", "95 %", "recall AMR (Å)",
        "precision 1 Å", "precision 1.25 Å", "precision AMR (Å)", "energy_calls", "seconds",
    ]  # fmt: skip
    return markdown(header, lines) + "\n\n" + provenance(documents)


def _bounds(rows: list[Row]) -> str:
    """The bootstrap interval of each seed."""
    return "; ".join(f"{r['recall_coverage_low']:.3f}–{r['recall_coverage_high']:.3f}" for r in rows) or "not run"


def few_steps() -> str:
    """Training with few simulation steps."""
    documents = load("few-steps-*.json")
    rows = [r for d in documents for r in d["rows"]]
    lines = []
    for name in dict.fromkeys(r["variant"] for r in rows):
        sde, ode = ([r for r in rows if r["variant"] == name and r["sampler"] == s] for s in ("sde", "ode"))
        lines.append(
            [
                name,
                str(len(sde)),
                number([r["mode_tv"] for r in sde]),
                number([r["mode_tv"] for r in ode]),
                number([r["w2"] for r in sde], 2),
                number([r["w2_floor"] for r in sde], 2),
                number([r["ess"] for r in sde], 2),
                number([r["base_evaluations"] / 1e6 for r in sde], 2),
            ]
        )
    header = ["variant", "seeds", "mode_tv (SDE)", "mode_tv (ODE)", "w2", "w2_floor", "ess", "million base evaluations"]
    return (markdown(header, lines) if lines else "not run") + "\n\n" + provenance(documents)


def iteration() -> str:
    """One round of Adjoint Matching."""
    documents = load("iteration.json")
    lines = [
        ["path weights" if r["importance"] else "plain", *(f"{r[c]:.0f}" for c in ("median_ms", "lowest_ms", "highest_ms"))]
        for d in documents
        for r in d["rows"]
    ]
    header = ["Adjoint Matching", "median ms", "lowest", "highest"]
    return (markdown(header, lines) if lines else "not run") + "\n\n" + provenance(documents)


def particle_network() -> str:
    """The dense particle network beside a scatter-based one that computes the same function, and the MLP."""
    documents = load("particle-network.json")
    parts = {"ms": 1, "reference_ms": 1, "ratio": 2}
    columns = {f"{what}_{c}": digits for what in ("forward", "step") for c, digits in parts.items()}
    lines = [
        [r["system"], str(r["batch"]), *(number([r.get(c)], digits) for c, digits in columns.items())]
        for d in documents
        for r in d["rows"]
    ]
    return (markdown(["system", "batch", *columns], lines) if lines else "not run") + "\n\n" + provenance(documents)


def torsional_quadrature() -> str:
    """Torsional samplers beside quadrature, molecule by molecule."""
    documents = load("torsional-quadrature-*.json")
    columns = {"tv": 3, "tv_raw": 3, "log_z_error": 3, "log_z_std": 3, "energy_error": 3, "ess": 2, "seconds": 0}
    lines = [
        [r["molecule"], str(r["torsions"]), str(r["seed"]), *(number([r[c]], digits) for c, digits in columns.items())]
        for d in documents
        for r in d["rows"]
    ]
    header = ["molecule", "torsions", "seed", *columns]
    return (markdown(header, lines) if lines else "not run") + "\n\n" + provenance(documents)


def conformer_ensembles() -> str:
    """Free energies from two samplers, and what is left after weighting for another energy."""
    documents = load("conformer-ensembles-*.json")
    columns = {"ess": 2, "ess_other": 2, "difference": 3, "sigma": 3, "rescored_ess": 3, "rescored_shift": 2}
    columns |= {"seconds": 0, "rescored_seconds": 0}
    lines = [
        [r["molecule"], str(r["torsions"]), str(r["templates"]), *(number([r.get(c)], d) for c, d in columns.items())]
        for document in documents
        for r in document["rows"]
    ]
    header = ["molecule", "torsions", "templates", *columns]
    return (markdown(header, lines) if lines else "not run") + "\n\n" + provenance(documents)


def step_variance() -> str:
    """Exact drifts with the base's step variance and with the matched one."""
    documents = load("step-variance*.json")
    columns = {"ess": 2, "elbo": 3, "log_z": 4}
    lines = [
        [str(r["steps"]), r["step_variance"], *(number([r[c]], digits) for c, digits in columns.items())]
        for d in documents
        for r in d["rows"]
    ]
    return (markdown(["steps", "step variance", *columns], lines) if lines else "not run") + "\n\n" + provenance(documents)


def pipeline_memory() -> str:
    """Peak memory of fine-tuning a pipeline against the number of steps."""
    documents = load("pipeline-memory.json")
    columns = {"peak_mb": 0, "stored_mb": 1}
    lines = [
        [r["method"], str(r["steps"]), *(number([r[c]], digits) for c, digits in columns.items())]
        for d in documents
        for r in d["rows"]
    ]
    return (markdown(["method", "steps", *columns], lines) if lines else "not run") + "\n\n" + provenance(documents)


def small_models() -> str:
    """The recipes with a base of their own: every score before and after, mean ± standard deviation over seeds."""
    documents = [d for name in STUDIES for d in load(f"{name}.json")]
    rows = [r for d in documents for r in d["rows"]]
    lines = []
    for name in STUDIES:
        found = [r for r in rows if r["problem"] == name]
        for texts, sampler in itertools.product(dict.fromkeys(r["texts"] for r in found), ("sde", "ode")):
            mine = [r for r in found if (r["texts"], r["sampler"]) == (texts, sampler)]
            seeds = f"{len(mine)}" + (f", {SEEDS - len(mine)} not run" if len(mine) < SEEDS else "")
            for score in [k.removesuffix("_change") for k in mine[0] if k.endswith("_change")]:
                cells = [number([r[f"{score}{kind}"] for r in mine]) for kind in ("_base", "", "_change", "_change_error")]
                lines.append([name, texts, sampler, seeds, score, *cells])
            kept = [r["diversity"] / r["diversity_base"] for r in mine]
            lines.append([name, texts, sampler, seeds, "diversity, share kept", "1", number(kept), "–", "–"])
        if not found:
            lines.append([name, *["not run"] * 8])
    header = ["recipe", "texts", "sampler", "seeds", "score", "base", "after", "change", "error of one seed's change"]
    return markdown(header, lines) + "\n\n" + provenance(documents)


TABLES: dict[str, Callable[[], str]] = {
    "tilt": tilt,
    "memoryless": memoryless,
    "digits": digits,
    "methods tilt sde": lambda: methods_tilt("sde"),
    "methods tilt ode": lambda: methods_tilt("ode"),
    "methods digits": methods_digits,
    "control": control,
    "few steps": few_steps,
    "sampling": sampling,
    "training curve": training_curve,
    "conformers": conformers,
    "torsional quadrature": torsional_quadrature,
    "conformer ensembles": conformer_ensembles,
    "step variance": step_variance,
    "particle network": particle_network,
    "pipeline memory": pipeline_memory,
    "small models": small_models,
    "iteration": iteration,
}


def pareto() -> None:
    """The picture of reward against KL and diversity on digits, if the table was run."""
    rows = [r for d in load("methods-digits-*.json") for r in d["rows"] if "error" not in r]
    if rows:
        (ROOT / "docs" / "images" / "pareto.png").write_bytes(plots.pareto(rows, "reward", ("kl", "diversity")))


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, make=make: f"{m[1]}\n{make()}\n\n{m[2]}", text, flags=re.DOTALL)
    PAGE.write_text(text, encoding="utf-8")
    pareto()


if __name__ == "__main__":
    main()
