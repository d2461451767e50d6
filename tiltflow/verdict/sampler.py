r"""The verdict on a sampler of e^{−E}: one row of numbers in, lines out. It never hears a method's name.

The rules of :mod:`tiltflow.verdict.line` hold: a line that straddles its bad threshold cannot tell, and the verdict is its
worst line. Thresholds:

    log Z                   difference from the exact one, and between the sampler's paths and paths drawn backwards from
                            reference samples: ≤ .05 good, > .15 bad, ± 3 standard errors. A lost mode of weight w moves the
                            first by −log(1 − w), and makes the second diverge
    mode weights            total variation ≤ .03 good, > .1 bad (its standard error is at most ½/√n)
    energies, distances     W2 over its floor ≤ 3 good, > 10 bad
    W2                      over its floor ≤ 2.5 good, > 5 bad; where modes are far apart, one floor alone is off by a third
    path weights            ESS ≥ .3 good, < .01 unusable, on the sampler's own paths and on those from the reference
    rejected energies       ≤ .1 % good, > 1 % bad
    virial                  |E[x·∇E]/d − 1| ≤ .1 good, > .3 bad; asked only where there is no reference

Without a reference, an exact log Z or exact mode weights the verdict is never pass: ESS and E[log w] ≤ log Z are means over
the sampler's own paths, which do not miss a mode that they never visit, and neither does the virial identity. What can be
told is that the sampler is wrong where it goes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tiltflow.verdict.line import SIGMAS, Line, Status, Verdict, graded, overall

GOOD_ESS, UNUSABLE_ESS = 0.3, 0.01
GOOD_REJECTED, BAD_REJECTED = 1e-3, 1e-2
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
            (key + "_floor"), virial, virial_std, dimension. What is None or missing is not asked, but see the module.
    """
    known = {key: value for key, value in row.items() if value is not None}
    lines = [_rejected(known), *_log_z(known), *_modes(known)]
    lines += [_ratio(known, *asked) for asked in RATIOS if asked[0] in known and f"{asked[0]}_floor" in known]
    if "ess" in known:
        bound = f"E[log w] = {known['elbo']:.4g} ≤ log Z; the gap is KL(sampler's paths ‖ target's)"
        lines.append(_ess("path weights ESS", known["ess"], bound))
    if "forward_ess" in known:
        bound = f"E*[log w] = {known['eubo']:.4g} ≥ log Z on paths drawn backwards from the reference, lost modes included"
        lines.append(_ess("path weights ESS from the reference", known["forward_ess"], bound))
    reference = "energy_w2" in known
    if not reference and "virial" in known:
        lines.append(_virial(known))
    if not reference and "log_z_error" not in known and "mode_tv" not in known:
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
    error = _error(row["ess"], row["log_z_std"])
    lines = []
    if "log_z_error" in row:
        text = f"{row['log_z']:.4f} from the sampler's paths; the distance to the exact value"
        lines.append(graded("log Z", row["log_z_error"], error, 0.05, 0.15, text))
    if "log_z_forward" in row:
        both = math.hypot(error, _error(row["forward_ess"], row["log_z_forward_std"]))
        text = f"{row['log_z']:.4f} from the sampler's paths, {row['log_z_forward']:.4f} backwards from the reference"
        gap = abs(row["log_z"] - row["log_z_forward"])
        lines.append(graded("log Z from both sides", gap, both, 0.05, 0.15, text))
    return lines


def _error(ess: float, error: float) -> float:
    """The standard error of a log Z; NaN (which cannot tell) where so few paths carry it that the error is no error."""
    return error if ess >= UNUSABLE_ESS else math.nan


def _modes(row: Mapping[str, Any]) -> list[Line]:
    if "mode_tv" not in row:
        return []
    text = f"shares of the modes against the exact ones; {row['modes_covered']} of {row['modes']} have a sample"
    return [graded("mode weights (total variation)", row["mode_tv"], 0.5 / row["samples"] ** 0.5, 0.03, 0.1, text)]


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
    return graded("virial identity", abs(row["virial"] / d - 1), error / d, 0.1, 0.3, text)


def _unseen() -> Line:
    text = (
        "there is no reference, exact log Z or exact mode weights: path ESS, E[log w] and the virial identity come from the "
        "sampler's own paths, and would look the same if it had lost a mode; give the problem reference samples (parallel "
        "tempering makes them)"
    )
    return Line("lost modes", None, None, None, "a reference, log Z or mode weights", "cannot tell", text)
