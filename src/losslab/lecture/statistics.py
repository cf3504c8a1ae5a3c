"""The statistics behind the verdicts: pure functions, each tested against a closed form or its coverage."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from losslab.errors import LosslabError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Interval = tuple[float, float]


def clopper_pearson(k: int, n: int, level: float = 0.95) -> Interval:
    """The exact two-sided interval for a probability after ``k`` events in ``n`` independent runs.

    Its ends solve P(X >= k | low) = P(X <= k | high) = (1 - level)/2 for a binomial X; it never covers less
    than ``level`` (Clopper and Pearson 1934).

    Raises:
        LosslabError: Not 0 <= k <= n with n >= 1.

    Example:
        >>> low, high = clopper_pearson(0, 200)
        >>> low, round(high, 4)
        (0.0, 0.0183)
    """
    if not (n >= 1 and 0 <= k <= n):
        raise LosslabError(f"{k} events in {n} runs is not a count: pass 0 <= k <= n and n >= 1")
    from scipy.special import betaincinv

    tail = (1 - level) / 2
    low = float(betaincinv(k, n - k + 1, tail)) if k > 0 else 0.0
    high = float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    return low, high


def wilcoxon_one_sided(differences: ArrayLike, shift: float = 0.0) -> float:
    """The exact p-value of the signed-rank test of "the differences lie above ``shift``".

    The null distribution is that of the sum of the positive ranks when every sign is a fair coin, computed by
    convolution, so ties are exact too (mid-ranks; scipy falls back to an approximation there). Differences
    equal to ``shift`` are dropped, as Wilcoxon did. Infinite differences have the largest rank. Costs O(n^3).

    Returns:
        P(W+ >= observed); 1.0 when every difference equals ``shift``. Never below 2^-n.

    Raises:
        LosslabError: A difference is NaN.

    Example:
        >>> wilcoxon_one_sided([1.0, 2.0, 3.0, 4.0, 5.0])
        0.03125
    """
    moved = _clean(differences, "differences") - shift
    moved = moved[moved != 0]
    if moved.size == 0:
        return 1.0
    from scipy.stats import rankdata

    doubled = np.rint(2 * rankdata(np.abs(moved))).astype(int)  # mid-ranks are halves, doubled they are whole
    probability = np.zeros(doubled.sum() + 1)
    probability[0] = 1.0
    for rank in doubled:
        shifted = np.zeros_like(probability)
        shifted[rank:] = probability[:-rank]
        probability = (probability + shifted) / 2
    return float(min(1.0, probability[doubled[moved > 0].sum() :].sum()))


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[..., NDArray[np.float64]] = np.median,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """The percentile interval of ``statistic(values)`` over resamples with replacement.

    Args:
        values: One number a unit, at least one; infinities are kept.
        statistic: Called once as ``statistic(samples, axis=-1)`` on all resamples, shape (resamples, n).
        level: The coverage aimed at. Small samples cover less: near 0.9 for a median of ten.
        seed: Of the generator that draws the resamples.
        resamples: Their number.

    Raises:
        LosslabError: No values, or one of them is NaN.

    Example:
        >>> bootstrap_interval([2.0, 2.0, 2.0])
        (2.0, 2.0)
    """
    units = _clean(values, "values")
    if units.size == 0:
        raise LosslabError("there are no values to resample: pass at least one")
    draws = np.random.default_rng(seed).integers(units.size, size=(resamples, units.size))
    with np.errstate(invalid="ignore"):  # a median between -inf and inf is NaN, and so is the interval
        replicates = statistic(units[draws], axis=-1)
    tail = (1 - level) / 2
    # No interpolation: between two resampled medians, one of them infinite, there is nothing to interpolate.
    return (
        float(np.quantile(replicates, tail, method="lower")),
        float(np.quantile(replicates, 1 - tail, method="higher")),
    )


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's adjusted p-values, in the order given.

    With the p-values sorted, p'_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)); rejecting where p' < a keeps
    the chance of any false rejection in the family below a (Holm 1979).

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
        [0.03, 0.06, 0.06]
    """
    p = _clean(p_values, "p-values")
    order = np.argsort(p, kind="stable")
    stepped = np.minimum(1.0, p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(stepped)
    return adjusted


class PowerLaw(NamedTuple):
    """A fitted y = constant * x^slope with the t intervals of both."""

    slope: float
    slope_interval: Interval
    constant: float
    constant_interval: Interval
    n: int


def fit_power_law(x: ArrayLike, y: ArrayLike, level: float = 0.95) -> PowerLaw:
    """Least squares of log y on log x, with the t intervals of the slope and of the constant.

    Raises:
        LosslabError: Fewer than three points, unequal lengths, a single x, or numbers not positive.

    Example:
        >>> fit = fit_power_law([1, 2, 4, 8], [3, 12, 48, 192])
        >>> round(fit.slope, 6), round(fit.constant, 6)
        (2.0, 3.0)
    """
    u, v = _clean(x, "x"), _clean(y, "y")
    if u.shape != v.shape or u.size < 3 or not (_positive(u) and _positive(v)) or np.ptp(u) == 0:
        raise LosslabError(
            f"a power law was asked of {u.size} x and {v.size} y: pass at least three pairs of positive "
            "finite numbers with different x"
        )
    from scipy.special import stdtrit

    u, v = np.log(u), np.log(v)
    spread = float(((u - u.mean()) ** 2).sum())
    slope = float(((u - u.mean()) * (v - v.mean())).sum() / spread)
    intercept = float(v.mean() - slope * u.mean())
    freedom = u.size - 2
    noise = float(((v - intercept - slope * u) ** 2).sum() / freedom)
    t = float(stdtrit(freedom, (1 + level) / 2))
    wide = t * np.sqrt(noise / spread)
    tall = t * np.sqrt(noise * (1 / u.size + u.mean() ** 2 / spread))
    with np.errstate(over="ignore"):  # a hopeless fit has an infinite bound, and that is the answer
        constant, low, high = (float(np.exp(intercept + shift)) for shift in (0.0, -tall, tall))
    return PowerLaw(slope, (slope - float(wide), slope + float(wide)), constant, (low, high), u.size)


def max_relative_error(a: ArrayLike, b: ArrayLike) -> float:
    """Max |a - b| / max(max |a|, max |b|): the largest difference in units of the largest entry.

    Scale-free: multiplying both by any number changes nothing. Two arrays of zeros agree (0.0). An entry that
    is NaN or infinite on either side counts as an infinite error, also where both sides agree on it.

    Raises:
        LosslabError: The shapes differ; nothing is broadcast.

    Example:
        >>> max_relative_error([1.0, 3.0], [1.0, 4.0])
        0.25
        >>> max_relative_error([1.0], [float("nan")])
        inf
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise LosslabError(
            f"shapes {left.shape} and {right.shape} are compared: pass two arrays of one shape"
        )
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return float("inf")
    scale = max(np.abs(left).max(initial=0.0), np.abs(right).max(initial=0.0))
    return float(np.abs(left / scale - right / scale).max()) if scale > 0 else 0.0


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """The rank correlation of two samples; NaN when one of them is constant.

    Example:
        >>> round(spearman([1, 2, 3], [10, 20, 300]), 6)
        1.0
    """
    u, v = _clean(x, "x"), _clean(y, "y")
    if u.shape != v.shape or u.size < 2:
        raise LosslabError(f"{u.size} x and {v.size} y were given: pass at least two pairs")
    if np.ptp(u) == 0 or np.ptp(v) == 0:
        return float("nan")
    from scipy.stats import spearmanr

    return float(spearmanr(u, v).statistic)


def _clean(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).ravel()
    if np.isnan(array).any():
        raise LosslabError(
            f"{np.isnan(array).sum()} of {array.size} {name} are NaN: drop them, or let failure be infinite"
        )
    return array


def _positive(values: NDArray[np.float64]) -> bool:
    return bool((values > 0).all() and np.isfinite(values).all())
