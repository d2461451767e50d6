r"""The verdict on a sampler of e^{−E}: one row of numbers in, lines out. It never hears a method's name.

The rules of :mod:`tiltflow.verdict.line` hold: a line that straddles its bad threshold cannot tell, and the verdict is its
worst line. Thresholds:

    log Z                   against the exact one, and from paths drawn backwards from reference samples, in standard errors:
                            good if within three of them, and three are at most .15; bad if further than .03 beyond three.
                            A lost mode of weight w moves it by −log(1 − w)
    weights' tail           Pareto k̂ ≤ .5 good, > .7: neither log Z nor its error means anything, and both cannot tell
    mode weights            total variation ≤ .03 good, > .1 bad (its standard error is at most ½/√n); a mode that has less
                            than half of its exact weight, by more than chance, fails
    agreement               with reference samples, or else with an independent classical run, region by region
                            (:mod:`tiltflow.metrics.regions`). Bad: apart by more than chance, and by > .05 or at less than
                            half of the share that is there. Good: a region of 1 % could not be lost unseen. Cannot tell: one
                            of 5 % could, or the classical run has not settled
    energies, distances     W2 over its floor ≤ 3 good, > 10 bad
    W2                      over its floor ≤ 2.5 good, > 5 bad; where modes are far apart, one floor alone is off by a third
    path weights            ESS ≥ .3 good, < .01 unusable, on the sampler's own paths and on those from the reference
    rejected energies       ≤ .1 % good, > 1 % bad
    temperature, virial     T of the samples (:func:`tiltflow.energies.temperature`) and E[x·∇E]/d are 1 exactly. Good within
                            three standard errors, if 5 % are two away; bad if further than .03 beyond three. The virial is
                            asked only where there is no reference, and only accuses

ESS, E[log w] ≤ log Z and the virial identity are means over the sampler's own paths, which do not miss a mode that they
never visit. So where nothing is known exactly, and no classical run agrees, the verdict is never pass; where one does agree,
what neither of them has found is still missing from both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tiltflow.verdict.line import SIGMAS, Line, Status, Verdict, graded, overall

GOOD_ESS, UNUSABLE_ESS = 0.3, 0.01
GOOD_REJECTED, BAD_REJECTED = 1e-3, 1e-2
HEAVY = 0.7
"""Pareto k̂ above which weights have no mean that any number of them would come near."""
WIDEST, BEYOND, SURE = 0.15, 0.03, 0.05
"""Of log Z and the identities: three standard errors at most; distance beyond them that is bad; error of a classical log Z
that may accuse."""
OFF = 0.05
"""Of the temperature: what must be two standard errors away."""
FINE, POOR, APART = 0.01, 0.05, 0.05
"""Of regions: share that would be seen if it were lost, and above which nothing is judged; difference that is bad."""
KINDS = (
    ("reference", "agreement with the reference"),
    ("classical", "agreement with an independent classical run"),
)
RATIOS = (  # key, name, good, bad
    ("energy_w2", "energy W2 over its floor", 3.0, 10.0),
    ("w2", "W2 over its floor", 2.5, 5.0),
    ("distance_w2", "distances of particles, W2 over its floor", 3.0, 10.0),
)


def judge_sampler(row: Mapping[str, Any]) -> Verdict:
    """The verdict on the numbers of :func:`tiltflow.sampling.assess.assess` and its ``from_both_sides``.

    Args:
        row: "samples", "rejected" and whatever else is known of: ess, elbo, log_z, log_z_std, log_z_error, log_z_forward,
            log_z_forward_std, forward_ess, eubo, mode_tv, modes, modes_covered, w2, energy_w2, distance_w2 and their floors
            (key + "_floor"), virial, virial_std, dimension, pareto_k, modes_lost, and what
            :mod:`tiltflow.sampling.evidence` says. What is None or missing is not asked, but see the module.
    """
    known = {key: value for key, value in row.items() if value is not None}
    lines = [_rejected(known), *_log_z(known), *_modes(known)]
    lines += [_ratio(known, *asked) for asked in RATIOS if asked[0] in known and f"{asked[0]}_floor" in known]
    if "ess" in known:
        bound = f"E[log w] = {known['elbo']:.4g} ≤ log Z; the gap is KL(sampler's paths ‖ target's)"
        lines.append(_ess("path weights ESS", known["ess"], bound))
    if "pareto_k" in known:
        lines.append(_tail(known["pareto_k"]))
    if "forward_ess" in known:
        bound = f"E*[log w] = {known['eubo']:.4g} ≥ log Z on paths drawn backwards from the reference, lost modes included"
        lines.append(_ess("path weights ESS from the reference", known["forward_ess"], bound))
    reference = "energy_w2" in known
    if "temperature" in known:
        lines.append(_temperature(known["temperature"], known["temperature_std"]))
    if not reference and "virial" in known:
        lines.append(_virial(known))
    lines += [_agreement(known, *kind) for kind in KINDS if f"{kind[0]}_score" in known]
    if not reference and not known.keys() & {"log_z_error", "mode_tv", "classical_score"}:
        lines.append(_unseen())
    return Verdict(overall(lines), lines)


def _rejected(row: Mapping[str, Any]) -> Line:
    share = row["rejected"] / row["samples"]
    status: Status = "pass" if share <= GOOD_REJECTED else "fail" if share > BAD_REJECTED else "warn"
    text = f"{row['rejected']} of {row['samples']} samples have no finite energy: they cannot be draws of e^{{−E}}"
    threshold = f"≤ {GOOD_REJECTED:g} good, > {BAD_REJECTED:g} bad"
    return Line("rejected energies", share, None, None, threshold, status, text)


def _log_z(row: Mapping[str, Any]) -> list[Line]:
    if "log_z" not in row:
        return []
    error = _error(row.get("ess"), row["log_z_std"], row.get("pareto_k"))
    lines = []
    if "log_z_error" in row:
        text = f"{row['log_z']:.4f} ± {row['log_z_std']:.2g} from the sampler's paths; the distance to the exact value"
        lines.append(_in_errors("log Z", row["log_z_error"], error, text))
    if "log_z_forward" in row:
        both = math.hypot(error, _error(row["forward_ess"], row["log_z_forward_std"]))
        text = f"{row['log_z']:.4f} from the sampler's paths, {row['log_z_forward']:.4f} backwards from the reference"
        gap = abs(row["log_z"] - row["log_z_forward"])
        lines.append(_in_errors("log Z from both sides", gap, both, text))
    if "classical_log_z" in row and row["classical_drift"] <= 1:
        both = math.hypot(error, row["classical_log_z_std"])
        text = f"{row['log_z']:.4f} from the samples, {row['classical_log_z']:.4f} from an independent classical run"
        line = _in_errors("log Z beside a classical run", abs(row["log_z"] - row["classical_log_z"]), both, text)
        lines += [line] if line.status == "pass" or both <= SURE else []
    return lines


def _error(ess: float | None, error: float, tail: float | None = None) -> float:
    """The standard error of a log Z; NaN (which cannot tell) where so few paths carry it that the error is no error."""
    poor = (ess is not None and ess < UNUSABLE_ESS) or (tail is not None and tail > HEAVY)
    return math.nan if poor else error


def _temperature(value: float, error: float) -> Line:
    text = f"{value:.4g} ± {error:.2g} of the samples, by detailed balance of moves of all lengths; 1 under e^{{−E}}"
    line = _in_errors("temperature", abs(value - 1), error, text)
    told = abs(value - 1) + 2 * error <= OFF
    if line.status != "pass" or told:
        return line
    return line._replace(status="warn", explanation=f"{text}; more samples would tell it from one that is {OFF:.0%} off")


def _in_errors(name: str, gap: float, error: float, text: str) -> Line:
    """A line for a distance that should be 0, judged in its standard errors."""
    low, high = max(gap - SIGMAS * error, 0.0), gap + SIGMAS * error
    status: Status = "pass" if low == 0 else "fail" if low > BEYOND else "warn"
    if not SIGMAS * error <= WIDEST and status != "fail":
        status = "cannot tell"
    threshold = f"within {SIGMAS:g} standard errors good, > {BEYOND:g} beyond them bad"
    return Line(name, gap, low, high, threshold, status, text)


def _modes(row: Mapping[str, Any]) -> list[Line]:
    if "mode_tv" not in row:
        return []
    text = f"shares of the modes against the exact ones; {row['modes_covered']} of {row['modes']} have a sample"
    lines = [graded("mode weights (total variation)", row["mode_tv"], 0.5 / row["samples"] ** 0.5, 0.03, 0.1, text)]
    if row.get("modes_lost"):
        text = "weight of the modes that have less than half of it among the samples, by more than chance"
        lines.append(Line("lost modes", row["modes_lost"], None, None, "0", "fail", text))
    return lines


def _tail(k: float) -> Line:
    status: Status = "cannot tell" if not k <= HEAVY else "pass" if k <= 0.5 else "warn"
    text = "shape k̂ of the largest weights' law: the weights have finite moments up to order 1/k̂ only"
    return Line("weights' tail (Pareto k̂)", k, None, None, f"≤ 0.5 good, > {HEAVY:g}: no mean", status, text)


def _agreement(row: Mapping[str, Any], kind: str, name: str) -> Line:
    """Are the samples where the others are? See :class:`tiltflow.metrics.regions.Apart`."""
    found = {key.removeprefix(f"{kind}_"): value for key, value in row.items() if key.startswith(f"{kind}_")}
    gap, error, seen, score = (found[key] for key in ("gap", "error", "seen", "score"))
    poor = not seen <= POOR or found.get("drift", 0.0) > 1
    wrong = abs(gap) > APART or found["lost"] > 0
    text = (
        f"furthest apart where {found['region']}: {found['share'] + gap:.3g} of the samples and {found['share']:.3g} of the "
        f"others, {score:.2g} times what chance explains; a region of {seen:.1%} could not be lost unseen"
    )
    if score > 1 and found["lost"] > 0:
        text += f"; regions of {found['lost']:.3g} and less are missing by half or more"
    if found.get("drift", 0.0) > 1:
        text += "; the classical run has not settled, its two halves differ"
    elif not seen <= POOR:
        text += "; the others are too few, or too related, to judge"
    status: Status = "cannot tell" if poor else "fail" if score > 1 and wrong else "warn"
    status = "pass" if status == "warn" and score <= 1 and seen <= FINE else status
    threshold = f"apart by chance only, {FINE:.0%} not lost unseen"
    return Line(name, gap, gap - SIGMAS * error, gap + SIGMAS * error, threshold, status, text)


def _ratio(row: Mapping[str, Any], key: str, name: str, good: float, bad: float) -> Line:
    value, floor = row[key], row[f"{key}_floor"]
    ratio = value / floor if floor > 0 else math.nan
    status: Status = "cannot tell" if not ratio >= 0 else "pass" if ratio <= good else "fail" if ratio > bad else "warn"
    text = f"{value:.4g} to the reference, {floor:.4g} between two reference sets of the same size"
    return Line(name, ratio, None, None, f"≤ {good:g} good, > {bad:g} bad", status, text)


def _ess(name: str, value: float, text: str) -> Line:
    status: Status = "pass" if value >= GOOD_ESS else "warn" if value >= UNUSABLE_ESS else "cannot tell"
    return Line(name, value, None, None, f"≥ {GOOD_ESS:g} good, < {UNUSABLE_ESS:g} unusable", status, text)


def _virial(row: Mapping[str, Any]) -> Line:
    d, error = row["dimension"], row["virial_std"]
    text = (
        f"E[x·∇E] = {row['virial']:.4g} ± {error:.2g} over the samples, exactly {d} under e^{{−E}}, whatever its log Z: the "
        f"relative gap ± {SIGMAS:g} standard errors; a wrong temperature shows here, a lost mode does not"
    )
    line = _in_errors("virial identity", abs(row["virial"] / d - 1), error / d, text)
    return line._replace(status="pass") if line.status == "cannot tell" and line.low == 0 else line


def _unseen() -> Line:
    text = (
        "there is no reference, exact log Z or exact mode weights: path ESS, E[log w] and the virial identity come from the "
        "sampler's own paths, and would look the same if it had lost a mode; give the problem reference samples (parallel "
        "tempering makes them), or an independent classical run energies enough (--evidence)"
    )
    return Line("lost modes", None, None, None, "a reference, log Z or mode weights", "cannot tell", text)
