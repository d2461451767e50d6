"""Write the tables and the picture of docs/benchmarks/ from benchmarks/results/*.json: ``python benchmarks/tables.py``.

Everything between ``<!-- table NAME -->`` and ``<!-- end -->`` is replaced. What was not run stands in a line below a table.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable
from statistics import median

from cost_tables import device_copies, gpu, iteration, overhead, particle_network, pipeline_memory, plan
from layout import ROOT, Row, beside, column, load, markdown, number, plain, rows_of, seeds, table, with_reference

from tiltflow.bench.conformers import METHODS as GENERATORS
from tiltflow.bench.conformers import SUBSETS
from tiltflow.bench.control import PROBLEMS as CONTROL_PROBLEMS
from tiltflow.bench.names import CONTROL, DIGITS, TILT
from tiltflow.bench.sampling import NAMES as SAMPLERS
from tiltflow.energies import ENERGY_PROBLEMS
from tiltflow.methods.registry import METHODS, names
from tiltflow.report import plots

PAGES = ROOT / "docs" / "benchmarks"
WAYS = ("reached", "ode", "exact")
STUDIES, SEEDS, TENTHS = ("words", "emoji", "speech"), 3, 10
PROBLEMS = ("mixture2d", "mixture2d-rare", "mixture32d", "quadratic2d", "inverse4d")


def tilt() -> str:
    """Analytic problems, one line per problem and sampler, mean ± standard deviation over seeds."""
    documents, lines, missing = load("tilt-*.json"), [], defaultdict(list)
    for problem, sampler in itertools.product(PROBLEMS, ("sde", "ode", "exact")):
        found = rows_of(documents, problem=problem, sampler=sampler)
        if not found:
            missing[problem].append(sampler)
            continue
        lines.append([
            problem, sampler, str(len(found)), with_reference(found, "w2", "w2_floor"), column(found, "mode_tv"),
            column(found, "mode_weight_error"), column(found, "log_z_error"), with_reference(found, "ess", "chain_ess"),
            column(found, "seconds", 0),
        ])  # fmt: skip
    columns = ["w2 (floor)", "mode_tv", "mode_weight_error", "log_z_error", "ess (chain)", "seconds"]
    return table(["problem", "sampler", "seeds", *columns], lines, documents, missing)


def memoryless() -> str:
    """The three noise schedules."""
    documents = load("memoryless-*.json")
    lines = []
    for name in ("σ = 0.2", "σ = 1", "memoryless"):
        found = rows_of(documents, noise=name)
        lines.append([
            name, column(found, "residual_correlation"), column(found, "mode_tv"), with_reference(found, "w2", "w2_floor"),
        ])  # fmt: skip
    return table(["noise", "residual_correlation", "mode_tv", "w2 (floor)"], lines, documents)


def digits() -> str:
    """Fine-tuned digits: base, exact reference, and each way of sampling, with what it is off by, of the gap."""
    lines, documents = [], load("digits-*.json")
    for d in documents:
        summary = d["rows"][0]
        rounds, last = sum(r["kind"] == "iteration" for r in d["rows"]), [f"{d['duration']:.0f}", str(d["verdict"])]
        for name in [k[: -len("_base")] for k in summary if k.endswith("_base")]:
            base, reference = summary[f"{name}_base"], summary[f"{name}_reference"]
            found = [summary[f"{name}_{way}"] for way in WAYS]
            got = [f"{v:.3f} ({100 * (v - reference) / (reference - base):+.0f} %)" for v in found]
            about = [f"{summary['path_ess']:.2f}", str(rounds), *last]
            lines.append([str(d["seed"]), name, f"{base:.3f}", f"{reference:.3f}", *got, *about])
    header = ["seed", "score", "base", "tilt", "as drawn", "by ODE", "exact", "path ESS", "rounds", "seconds", "verdict"]
    return table(header, lines, documents)


Cells = Callable[[list[Row]], list[str]]


def methods(pattern: str, names: tuple[str, ...], header: list[str], cells: Cells, more: bool = False, **only: str) -> str:
    """One line per method that was run, mean ± standard deviation over seeds; ``more``: other columns of the table above."""
    documents, lines, missing = load(pattern), [], []
    for name in names:
        found = rows_of(documents, method=name, **only)
        done = [r for r in found if "error" not in r]
        if not found:
            missing.append(name)
            continue
        bias = "yes" if METHODS[name].bias else "no"
        lines.append([name, bias, seeds(found, done, "diverged"), *(cells(done) if done else ["diverged"] * len(header))])
    return table(["method", "biased", "seeds", *header], lines, documents, {"": missing}, more)


SPENT = ("base_evaluations", "reward_calls", "seconds", "peak_memory_mb")


def spent(rows: list[Row]) -> list[str]:
    """What a method cost."""
    return [column(rows, c, 0) for c in SPENT]


def methods_tilt(sampler: str) -> str:
    """Every method on mixture2d."""
    header = ["mode_tv", "spread", "w2 (floor)", "mean_reward (exact)"]

    def cells(rows: list[Row]) -> list[str]:
        quality = [
            column(rows, "mode_tv"), column(rows, "spread", 2), with_reference(rows, "w2", "w2_floor", 2),
            with_reference(rows, "mean_reward", "mean_reward_exact"),
        ]  # fmt: skip
        own = [column(rows, "log_z_error"), column(rows, "ess", 2), column(rows, "kl", 2)]
        return quality + (own if sampler == "sde" else [])

    if sampler == "sde":
        return methods("methods-tilt-*.json", TILT, [*header, "log_z_error", "ess", "kl"], cells,
                       problem="mixture2d", sampler="sde")  # fmt: skip
    trained = names("finetune", trained=True)
    return methods("methods-tilt-*.json", trained, header, cells, more=True, problem="mixture2d", sampler="ode")


def methods_tilt_cost() -> str:
    """What every method cost on mixture2d."""
    return methods("methods-tilt-*.json", TILT, list(SPENT), spent, more=True, problem="mixture2d", sampler="sde")


def on_digits() -> tuple[str, ...]:
    """Methods that take images."""
    return DIGITS


def methods_digits() -> str:
    """Every method on the digits base, and the exact tilt's own scores."""
    columns = {"reward": 3, "judge_thickness": 3, "kl": 2, "diversity": 2, "w2": 2, "log_z_error": 2, "ess": 2}
    rows = [r for r in rows_of(load("methods-digits-*.json")) if "error" not in r]
    exact = [
        [s, column(rows, f"{s}_base"), column(rows, f"{s}_reference")] for s in ("reward", "judge_thickness", "diversity")
    ]
    exact.append(["w2", column(rows, "w2_base"), column(rows, "w2_floor")])
    every = methods("methods-digits-*.json", on_digits(), list(columns),
                    lambda rows: [column(rows, c, d) for c, d in columns.items()])  # fmt: skip
    return markdown(["score", "base", "exact tilt"], exact) + "\n\n" + every


def methods_digits_cost() -> str:
    """What every method cost on digits."""
    return methods("methods-digits-*.json", on_digits(), list(SPENT), spent, more=True)


def control() -> str:
    """Optimal-control methods on problems with a known control."""
    documents, lines, missing = load("control-*.json"), [], defaultdict(list)
    for problem, name in itertools.product(CONTROL_PROBLEMS, CONTROL):
        found = rows_of(documents, problem=problem, method=name)
        if not found:
            missing[problem].append(name)
            continue
        lines.append([
            problem, name, str(len(found)), column(found, "control_error"), column(found, "control_error_own_paths"),
            with_reference(found, "objective", "objective_exact"), column(found, "seconds", 0),
        ])  # fmt: skip
    header = ["problem", "method", "seeds", "control_error", "control_error_own_paths", "objective (exact)", "seconds"]
    return table(header, lines, documents, missing)


def sampling(header: list[str], cells: Cells, more: bool = False) -> str:
    """Samplers of e^{−E}: one line per problem and method that was run; ``more`` as in :func:`methods`."""
    documents, lines, missing = load("sampling-*.json"), [], defaultdict(list)
    for problem in dict.fromkeys((*ENERGY_PROBLEMS, *(r["problem"] for r in rows_of(documents)))):
        mine = rows_of(documents, problem=problem)
        for name in SAMPLERS if mine else ("all methods",):
            found = [r for r in mine if r["method"] == name]
            done = [r for r in found if "error" not in r]
            if not found:
                missing[problem].append(name)
                continue
            values = cells(done) if done else ["failed"] * len(header)
            lines.append([problem, name, seeds(found, done, "failed"), *values])
    return table(["problem", "method", "seeds", *header], lines, documents, missing, more)


def sampling_quality() -> str:
    """How right the samples are."""
    return sampling(
        ["w2 (floor)", "energy_w2 (floor)", "mode_tv", "ess", "log_z_error"],
        lambda rows: [
            with_reference(rows, "w2", "w2_floor", 2), with_reference(rows, "energy_w2", "energy_w2_floor", 2),
            column(rows, "mode_tv"), column(rows, "ess", 2), column(rows, "log_z_error"),
        ],
    )  # fmt: skip


def sampling_cost() -> str:
    """What training cost."""
    columns = ["energy_calls", "gradient_steps", "processor_seconds", "seconds"]
    return sampling(columns, lambda rows: [column(rows, c, 0) for c in columns], more=True)


def training_curve() -> str:
    """How the energies of end points fall while a sampler trains, a tenth of the rounds at a time."""
    documents, lines = load("training-curve-*.json"), []
    for d in documents:
        problem, rounds = d["rows"][0]["problem"], d["rows"][1:]
        for i in range(TENTHS):
            last = len(rounds) * (i + 1) // TENTHS
            part = [r["energy"] for r in rounds[len(rounds) * i // TENTHS : last]]
            minutes = (sum(r[c] for r in rounds[:last]) / 60 for c in ("processor_seconds", "seconds"))
            lines.append([problem, str(last), *(f"{m:.0f}" for m in minutes), f"{median(part):.4g}"])
    header = ["problem", "rounds so far", "processor minutes", "minutes", "median energy in the last tenth"]
    return table(header, lines, documents)


def interval(rows: list[Row]) -> str:
    """The bootstrap interval of each seed."""
    return "; ".join(f"{r['recall_coverage_low']:.3f}–{r['recall_coverage_high']:.3f}" for r in rows)


def conformers(header: list[str], cells: Callable[[list[Row], list[Row]], list[str]], more: bool = False) -> str:
    """CREST's conformers: every method that was run, as generated and relaxed, for all molecules and the flexible ones."""
    documents = load("conformers-*.json")
    lines, missing = [], defaultdict(list)
    for subset, name, relaxed in itertools.product(SUBSETS, GENERATORS, (False, True)):
        found = rows_of(documents, kind="summary", subset=subset, method=name, relaxed=relaxed)
        near, wide = ([r for r in found if r["threshold"] == t] for t in (1.0, 1.25))
        if not near:
            missing[subset].extend([] if name in missing[subset] else [name])
            continue
        molecules = ", ".join(sorted({f"{r['molecules']} of {r['listed']}" for r in near}))
        failed = ", ".join(sorted({m for r in near for m in r["failed"]}))
        count = str(len(near)) + (f"; failed: {failed}" if failed else "")
        lines.append([subset, name, "yes" if relaxed else "no", molecules, count, *cells(near, wide)])
    return table(["molecules", "method", "relaxed", "number", "seeds", *header], lines, documents, missing, more)


def conformer_recall() -> str:
    """The share of the references that were found."""
    return conformers(
        ["recall 1 Å (95 %)", "recall 1.25 Å (95 %)", "recall AMR (Å)"],
        lambda near, wide: [
            *(beside(column(rows, "recall_coverage"), interval(rows)) for rows in (near, wide)), column(near, "recall_amr"),
        ],
    )  # fmt: skip


def conformer_precision() -> str:
    """The share of what was generated that is near a reference, and what it cost."""
    return conformers(
        ["precision 1 Å", "precision 1.25 Å", "precision AMR (Å)", "energy_calls", "seconds"],
        lambda near, wide: [
            column(near, "precision_coverage"), column(wide, "precision_coverage"), column(near, "precision_amr"),
            column(near, "energy_calls", 0), column(near, "seconds", 0),
        ],
        more=True,
    )  # fmt: skip


def few_steps() -> str:
    """Training with few simulation steps."""
    documents, lines = load("few-steps-*.json"), []
    for name in dict.fromkeys(r["variant"] for r in rows_of(documents)):
        sde, ode = (rows_of(documents, variant=name, sampler=s) for s in ("sde", "ode"))
        lines.append([
            name, str(len(sde)), column(sde, "mode_tv"), column(ode, "mode_tv"), with_reference(sde, "w2", "w2_floor", 2),
            column(sde, "ess", 2), number([r["base_evaluations"] / 1e6 for r in sde], 2),
        ])  # fmt: skip
    header = ["variant", "seeds", "mode_tv (SDE)", "mode_tv (ODE)", "w2 (floor)", "ess", "million base evaluations"]
    return table(header, lines, documents)


def torsional_quadrature() -> str:
    """Torsional samplers beside quadrature, molecule by molecule."""
    columns = {"tv": 3, "tv_raw": 3, "log_z_error": 3, "log_z_std": 3, "energy_error": 3, "ess": 2, "seconds": 0}
    return plain("torsional-quadrature-*.json", ("molecule", "torsions", "seed"), columns)


def conformer_ensembles() -> str:
    """Free energies from two samplers, and what is left after weighting for another energy."""
    columns = {"ess": 2, "ess_other": 2, "difference": 3, "sigma": 3, "rescored_ess": 3, "rescored_shift": 2}
    columns |= {"seconds": 0, "rescored_seconds": 0}
    return plain("conformer-ensembles-*.json", ("molecule", "torsions", "templates"), columns)


def step_variance() -> str:
    """Exact drifts with the base's step variance and with the matched one."""
    columns = {"ess": 2, "elbo": 3, "log_z": 4}
    return plain("step-variance*.json", ("steps", "step_variance"), columns, {"step_variance": "step variance"})


def small_models() -> str:
    """The recipes with a base of their own: every score before and after, mean ± standard deviation over seeds."""
    documents = [d for name in STUDIES for d in load(f"{name}.json")]
    lines, missing = [], []
    for name in STUDIES:
        found = rows_of(documents, problem=name)
        missing.extend([] if found else [name])
        for texts, sampler in itertools.product(dict.fromkeys(r["texts"] for r in found), ("sde", "ode")):
            mine = [r for r in found if (r["texts"], r["sampler"]) == (texts, sampler)]
            count = f"{len(mine)}" + (f", {SEEDS - len(mine)} not run" if len(mine) < SEEDS else "")
            for score in [k.removesuffix("_change") for k in mine[0] if k.endswith("_change")]:
                cells = [column(mine, f"{score}{kind}") for kind in ("_base", "", "_change", "_change_error")]
                lines.append([name, texts, sampler, count, score, *cells])
            kept = [r["diversity"] / r["diversity_base"] for r in mine]
            lines.append([name, texts, sampler, count, "diversity, share kept", "1", number(kept), "–", "–"])
    header = ["recipe", "texts", "sampler", "seeds", "score", "base", "after", "change", "error of one seed's change"]
    return table(header, lines, documents, {"": missing})


def verdict() -> str:
    """Answers by case and base, and the two rates."""
    documents = load("verdict.json")
    found = sorted(rows_of(documents, kind="summary"), key=lambda r: r["base"] != "all")
    kinds = ("pass", "warn", "cannot_tell", "fail", "refused", "wrong")
    lines = [
        [r["case"], r["base"], str(r["verdicts"]), *(str(r[k]) for k in kinds), f"{100 * r['share']:.1f} %"] for r in found
    ]
    return table(["case", "base", "verdicts", *kinds, "wrong, share"], lines, documents)


TABLES: dict[str, Callable[[], str]] = {
    "tilt": tilt,
    "memoryless": memoryless,
    "digits": digits,
    "methods tilt sde": lambda: methods_tilt("sde"),
    "methods tilt cost": methods_tilt_cost,
    "methods tilt ode": lambda: methods_tilt("ode"),
    "methods digits": methods_digits,
    "methods digits cost": methods_digits_cost,
    "verdict": verdict,
    "control": control,
    "few steps": few_steps,
    "sampling": sampling_quality,
    "sampling cost": sampling_cost,
    "training curve": training_curve,
    "conformer recall": conformer_recall,
    "conformer precision": conformer_precision,
    "torsional quadrature": torsional_quadrature,
    "conformer ensembles": conformer_ensembles,
    "step variance": step_variance,
    "particle network": particle_network,
    "pipeline memory": pipeline_memory,
    "small models": small_models,
    "iteration": iteration,
    "overhead": overhead,
    "plan": plan,
    "gpu": gpu,
    "device copies": device_copies,
}


def pareto() -> None:
    """The picture of reward against KL and diversity on digits, if the table was run."""
    rows = [r for r in rows_of(load("methods-digits-*.json")) if "error" not in r]
    if rows:
        (ROOT / "docs" / "images" / "pareto.png").write_bytes(plots.pareto(rows, "reward", ("kl", "diversity")))


def filled(page: str, make: Callable[[str], str]) -> str:
    """``page`` with every table replaced by what ``make`` gives for its name."""
    return re.sub(
        r"(<!-- table ([^>]+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}\n{make(m[2])}\n\n{m[3]}", page, flags=re.DOTALL
    )


def main() -> None:
    for path in sorted(PAGES.glob("*.md")):
        path.write_text(filled(path.read_text(encoding="utf-8"), lambda name: TABLES[name]()), encoding="utf-8")
    pareto()


if __name__ == "__main__":
    main()
