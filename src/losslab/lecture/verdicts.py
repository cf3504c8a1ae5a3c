"""The rules that turn evidence into a verdict, fixed before any experiment ran.

Four rules and one building block. An identity (V1) holds when no instance contradicts it. A count (V2),
and any estimate with an interval, holds when the whole interval meets the threshold, fails when the whole
interval misses it, and is undecided in between. A paired comparison (V3) needs significance and size. A law
(V4) needs its interval to contain the theory and its error to be small.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from losslab.errors import LosslabError
from losslab.lecture.claim import Finding, Verdict
from losslab.lecture.numbers import number
from losslab.lecture.statistics import bootstrap_interval, clopper_pearson, holm, wilcoxon_one_sided

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

INSTANCES = 100
"""The least number of random instances behind an identity."""

SEEDS = 5
"""The least number of seeds behind any paired comparison."""

SIGNIFICANCE = 0.01
"""The one-sided p-value below which paired differences count as an effect."""

ROUNDING = 1e-9
"""The share of the theory by which a law's limits are widened: a noise-free fit has no interval."""


def identity(name: str, errors: ArrayLike, tolerance: float = 1e-9, n: int | None = None) -> Finding:
    """V1: an identity or theorem, checked on random instances.

    Holds iff at least 100 instances were checked and the largest error is at most the tolerance (1e-9 in
    float64, 1e-6 when one side is float32). One counter-instance, NaN included, makes it fail, however few
    were checked; fewer than 100 without one leave it undecided. The interval is the range of the errors.

    Args:
        name: What was checked.
        errors: The relative error of each instance.
        tolerance: The largest error that counts as rounding.
        n: The number of instances, where each error is already the largest of several.

    Example:
        >>> str(identity("a = a", [0.0] * 100).verdict), str(identity("a = b", [0.0, 1e-8]).verdict)
        ('holds', 'does not hold')
    """
    worst = np.asarray(errors, dtype=np.float64).ravel()
    worst = np.where(np.isnan(worst), np.inf, np.abs(worst))
    n = worst.size if n is None else n
    largest = float(worst.max()) if worst.size else float("nan")
    if largest > tolerance:
        verdict = Verdict.FAILS
    else:
        verdict = Verdict.HOLDS if n >= INSTANCES and worst.size else Verdict.UNDECIDED
    return Finding(
        name,
        verdict,
        largest,
        (float(worst.min()) if worst.size else float("nan"), largest),
        n,
        "largest relative error over random instances",
        f"≤ {number(tolerance)} on at least {INSTANCES} instances",
        _few(n, INSTANCES, "instances"),
    )


def bound(
    name: str,
    estimate: float,
    interval: tuple[float, float],
    n: int,
    test: str,
    at_least: float | None = None,
    at_most: float | None = None,
    note: str = "",
) -> Finding:
    """An estimate against a threshold, or against a range when both ends are given.

    Holds when the whole interval meets the threshold, fails when the whole interval misses it, undecided when
    the threshold cuts the interval or a number is NaN. An exact number has the interval ``(x, x)``.

    Raises:
        LosslabError: Neither ``at_least`` nor ``at_most``, or a range turned around.

    Example:
        >>> str(bound("speed-up", 6.0, (5.2, 7.1), 10, "ratio of medians", at_least=5).verdict)
        'holds'
    """
    least = -np.inf if at_least is None else at_least
    most = np.inf if at_most is None else at_most
    if least > most or (at_least is None and at_most is None):
        raise LosslabError(
            f"the bounds are {at_least} and {at_most}: pass at_least, at_most, or both in order"
        )
    low, high = interval
    if np.isnan([estimate, low, high]).any():
        verdict = Verdict.UNDECIDED
        note = join_notes(note, "the estimate is not a number")
    elif low >= least and high <= most:
        verdict = Verdict.HOLDS
    else:
        verdict = Verdict.FAILS if high < least or low > most else Verdict.UNDECIDED
    threshold = " and ".join(
        f"{sign} {number(value)}" for sign, value in (("≥", at_least), ("≤", at_most)) if value is not None
    )
    return Finding(name, verdict, float(estimate), (float(low), float(high)), n, test, threshold, note)


def count(
    name: str, k: int, n: int, at_least: float | None = None, at_most: float | None = None, note: str = ""
) -> Finding:
    """V2: ``k`` events in ``n`` independent runs against a threshold on their probability.

    Judged by `bound` on the Clopper-Pearson 95 % interval: undecided means that more runs would decide.

    Raises:
        LosslabError: A threshold that no number of runs can meet (at_least=1 or at_most=0).

    Example:
        >>> str(count("bad minima", 0, 200, at_most=0.02).verdict)
        'holds'
    """
    if (at_least is not None and at_least >= 1) or (at_most is not None and at_most <= 0):
        raise LosslabError(
            "a probability of exactly 0 or 1 cannot be shown by counting: pass a threshold that the interval "
            "can meet, e.g. at_least=0.69 for ten of ten"
        )
    share = k / n if n else float("nan")
    interval = clopper_pearson(k, n)
    return bound(name, share, interval, n, f"{k} of {n}, Clopper-Pearson", at_least, at_most, note)


def paired(name: str, differences: ArrayLike, delta: float, least: int = 10, note: str = "") -> Finding:
    """V3: the per-seed differences of two arms that share data, initial weights and batch order.

    See `paired_family`, of which this is a family of one.

    Example:
        >>> str(paired("SGD beats GD", [1.2, 0.9, 1.4, 1.1, 1.0, 1.3, 0.8, 1.2, 1.1, 0.9], delta=0.5).verdict)
        'holds'
    """
    (finding,) = paired_family({name: differences}, delta, least, note)
    return finding


def paired_family(
    differences: Mapping[str, ArrayLike], delta: float, least: int = 10, note: str = ""
) -> list[Finding]:
    """V3 for several comparisons that answer one question, their p-values Holm-corrected.

    The claimed direction is the sign of ``delta`` (positive when delta is 0). Holds iff the one-sided
    Wilcoxon p < 0.01 and the median is at least ``delta``. Does not hold iff the bootstrap 95 % interval of
    the median lies wholly short of ``delta``. Otherwise mixed. Where 2^-n >= 0.01 no p-value can be small
    enough (n <= 6), so there all differences must have the claimed sign instead. Undecided with fewer than
    ``least`` seeds, or when a difference is NaN: a diverged arm belongs in the table as an infinite loss.

    Args:
        differences: For each comparison, one difference a seed.
        delta: The smallest median effect that counts, in the differences' unit.
        least: The seeds required: 10 on digits, 5 on MNIST and CIFAR-10, never fewer.
        note: Goes to every finding.
    """
    arms = {name: np.asarray(values, dtype=np.float64).ravel() for name, values in differences.items()}
    sign, least = (-1.0 if delta < 0 else 1.0), max(least, SEEDS)
    raw = {
        name: wilcoxon_one_sided(sign * arm)
        for name, arm in arms.items()
        if arm.size >= least and not np.isnan(arm).any()
    }
    p_values = dict(zip(raw, holm(list(raw.values())), strict=True))
    if len(raw) > 1:
        note = join_notes(note, f"p-values Holm-corrected over {len(raw)} comparisons")
    return [
        _judge_pair(name, arm, delta, sign, p_values[name], note)
        if name in p_values
        else _unusable_pair(name, arm, delta, least, note)
        for name, arm in arms.items()
    ]


def _judge_pair(
    name: str, arm: NDArray[np.float64], delta: float, sign: float, p: float, note: str
) -> Finding:
    with np.errstate(invalid="ignore"):  # halfway between -inf and inf
        median = float(np.median(arm))
    low, high = bootstrap_interval(arm)
    by_sign = 2.0**-arm.size >= SIGNIFICANCE
    significant = bool((sign * arm > 0).all()) if by_sign else p < SIGNIFICANCE
    if significant and sign * median >= sign * delta:
        verdict = Verdict.HOLDS
    else:
        short = high < delta if sign > 0 else low > delta
        verdict = Verdict.FAILS if short else Verdict.MIXED
    test = "median paired difference, all of one sign" if by_sign else "median paired difference, Wilcoxon"
    need = "all of one sign" if by_sign else f"p < {SIGNIFICANCE}"
    threshold = f"{need} and median {'≥' if sign > 0 else '≤'} {number(delta)}"
    return Finding(
        name,
        verdict,
        median,
        (low, high),
        arm.size,
        test,
        threshold,
        join_notes(note, f"one-sided p = {number(p)}"),
    )


def _unusable_pair(name: str, arm: NDArray[np.float64], delta: float, least: int, note: str) -> Finding:
    lost = int(np.isnan(arm).sum())
    sign = "≤" if delta < 0 else "≥"
    why = f"{lost} of {arm.size} differences are NaN" if lost else _few(arm.size, least, "seeds")
    nan = float("nan")
    median = nan if lost or not arm.size else float(np.median(arm))
    return Finding(
        name,
        Verdict.UNDECIDED,
        median,
        (nan, nan),
        arm.size,
        "median paired difference, Wilcoxon",
        f"p < {SIGNIFICANCE} and median {sign} {number(delta)} on at least {least} seeds",
        join_notes(note, why),
    )


def law(
    name: str,
    estimate: float,
    interval: tuple[float, float],
    theory: float,
    tolerance: float = 0.05,
    n: int = 1,
    note: str = "",
) -> Finding:
    """V4: a fitted slope or constant against its theoretical value.

    Holds iff the 95 % interval contains the theory and |estimate - theory| <= tolerance |theory|. Fails when
    neither is true. Mixed when the estimate is close but the interval resolves a difference; undecided when
    the interval contains the theory only because it is wide, or when a number is NaN.

    Args:
        name: What was fitted.
        estimate: The fitted value.
        interval: Its 95 % interval.
        theory: The predicted value; when it is 0 the tolerance is absolute.
        tolerance: 0.05, or 0.10 for an estimate from fewer than ten seeds.
        n: The number of points or seeds behind the fit.
        note: What else a reader must know.

    Example:
        >>> str(law("slope", -1.01, (-1.03, -0.99), theory=-1.0).verdict)
        'holds'
    """
    scale = abs(theory) or 1.0
    low, high = interval
    slack = ROUNDING * scale
    contained = low - slack <= theory <= high + slack
    close = abs(estimate - theory) <= tolerance * scale + slack
    verdict = {
        (True, True): Verdict.HOLDS,
        (True, False): Verdict.UNDECIDED,
        (False, True): Verdict.MIXED,
        (False, False): Verdict.FAILS,
    }[contained, close]
    if np.isnan([estimate, low, high]).any():
        verdict, note = Verdict.UNDECIDED, join_notes(note, "the estimate is not a number")
    return Finding(
        name,
        verdict,
        float(estimate),
        (float(low), float(high)),
        n,
        "fitted value with its 95 % interval",
        f"interval contains {number(theory)}, error ≤ {number(tolerance * scale)}",
        note,
    )


def _few(n: int, needed: int, what: str) -> str:
    return f"{n} {what}, {needed} are needed" if n < needed else ""


def join_notes(*parts: str) -> str:
    """What a reader must know, in one line; empty parts are left out."""
    return "; ".join(part for part in parts if part)
