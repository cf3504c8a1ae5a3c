"""The statistics against scipy, enumeration, closed forms, and by their coverage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from losslab.errors import LosslabError
from losslab.lecture.statistics import (
    bootstrap_interval,
    clopper_pearson,
    fit_power_law,
    holm,
    max_relative_error,
    spearman,
    wilcoxon_one_sided,
)

counts = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(counts, st.sampled_from([0.9, 0.95, 0.99]))
def test_clopper_pearson_agrees_with_scipy(count: tuple[int, int], level: float) -> None:
    k, n = count
    expected = scipy.stats.binomtest(k, n).proportion_ci(level, method="exact")
    assert clopper_pearson(k, n, level) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(("n", "p"), [(10, 0.3), (10, 0.02), (50, 0.9), (200, 0.5)])
def test_clopper_pearson_never_covers_less_than_its_level(n: int, p: float) -> None:
    covered = [low <= p <= high for low, high in (clopper_pearson(k, n) for k in range(n + 1))]
    chance = scipy.stats.binom.pmf(np.arange(n + 1), n, p)
    assert 0.95 <= chance @ np.array(covered) <= 1.0


def test_clopper_pearson_at_the_ends_is_the_rule_of_three() -> None:
    low, high = clopper_pearson(0, 200)
    assert low == 0.0
    assert high == pytest.approx(1 - 0.025 ** (1 / 200))
    assert clopper_pearson(200, 200) == pytest.approx((1 - high, 1.0))


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_clopper_pearson_refuses_what_is_no_count(k: int, n: int) -> None:
    with pytest.raises(LosslabError, match="is not a count"):
        clopper_pearson(k, n)


def enumerated(differences: list[float]) -> float:
    """P(W+ >= observed) by going through all sign patterns."""
    moved = np.array([d for d in differences if d != 0])
    ranks = rankdata(np.abs(moved))
    observed = ranks[moved > 0].sum()
    patterns = list(itertools.product([0, 1], repeat=len(moved)))
    return float(np.mean([np.dot(pattern, ranks) >= observed - 1e-9 for pattern in patterns]))


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_wilcoxon_is_exact_with_ties_and_zeros(differences: list[int]) -> None:
    assert wilcoxon_one_sided(differences) == pytest.approx(enumerated([float(d) for d in differences]))


@pytest.mark.parametrize("n", [5, 10, 30])
def test_wilcoxon_agrees_with_scipy_without_ties(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.2, 1, n)
    expected = scipy.stats.wilcoxon(differences, alternative="greater", method="exact").pvalue
    assert wilcoxon_one_sided(differences) == pytest.approx(expected)


@given(st.lists(finite, min_size=1, max_size=12), st.floats(-10, 10))
def test_wilcoxon_shift_moves_the_null(differences: list[float], shift: float) -> None:
    moved = np.array(differences) - shift
    assert wilcoxon_one_sided(differences, shift) == wilcoxon_one_sided(moved)


def test_wilcoxon_rejects_at_its_level() -> None:
    draws = np.random.default_rng(0).normal(size=(2000, 12))
    rejected = np.mean([wilcoxon_one_sided(row) < 0.05 for row in draws])
    assert 0.03 < rejected <= 0.06


def test_wilcoxon_of_extremes() -> None:
    assert wilcoxon_one_sided([0.0, 0.0]) == 1.0
    assert wilcoxon_one_sided([-1.0, -2.0, -3.0]) == 1.0
    assert wilcoxon_one_sided([np.inf] * 7) == 2.0**-7
    with pytest.raises(LosslabError, match="1 of 2 differences are NaN"):
        wilcoxon_one_sided([1.0, np.nan])


@pytest.mark.parametrize(("statistic", "truth", "n"), [(np.median, 0.0, 20), (np.mean, 0.0, 40)])
def test_bootstrap_covers(statistic: object, truth: float, n: int) -> None:
    draws = np.random.default_rng(1).normal(size=(300, n))
    intervals = [bootstrap_interval(row, statistic, resamples=500) for row in draws]  # type: ignore[arg-type]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.89 <= covered <= 0.985


def test_bootstrap_is_a_function_of_its_seed_and_leaves_the_global_state_alone() -> None:
    values = np.random.default_rng(2).normal(size=30)
    before = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    first = bootstrap_interval(values, np.mean)
    assert bootstrap_interval(values, np.mean) == first
    assert bootstrap_interval(values, np.mean, seed=1) != first
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]


@given(st.lists(finite, min_size=1, max_size=15))
def test_bootstrap_of_the_median_stays_among_the_values(values: list[float]) -> None:
    low, high = bootstrap_interval(values, resamples=200)
    assert min(values) <= low <= high <= max(values)


def test_bootstrap_narrows_with_the_level_and_keeps_infinity() -> None:
    values = np.random.default_rng(3).normal(size=50)
    wide, narrow = bootstrap_interval(values, level=0.99), bootstrap_interval(values, level=0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert bootstrap_interval([1.0, np.inf, np.inf])[1] == np.inf
    with pytest.raises(LosslabError, match="no values"):
        bootstrap_interval([])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.999))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values: list[float], level: float) -> None:
    expected = np.zeros(len(p_values), dtype=bool)
    for position, index in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[index] * (len(p_values) - position) > level:
            break
        expected[index] = True
    adjusted = holm(p_values)
    assert ((adjusted <= level) == expected).all()
    assert (adjusted <= 1).all()


@pytest.mark.parametrize("n", [3, 4, 12, 50])
def test_fit_power_law_agrees_with_scipy(n: int) -> None:
    generator = np.random.default_rng(n)
    x = generator.uniform(1, 100, n)
    y = 3 * x**-0.7 * np.exp(0.1 * generator.normal(size=n))
    fit, expected = fit_power_law(x, y), scipy.stats.linregress(np.log(x), np.log(y))
    t = scipy.stats.t.ppf(0.975, n - 2)
    wide, tall = t * expected.stderr, t * expected.intercept_stderr
    assert fit.n == n
    assert fit.slope == pytest.approx(expected.slope)
    assert fit.slope_interval == pytest.approx((expected.slope - wide, expected.slope + wide))
    assert fit.constant == pytest.approx(np.exp(expected.intercept))
    assert fit.constant_interval == pytest.approx(
        (np.exp(expected.intercept - tall), np.exp(expected.intercept + tall))
    )


def test_fit_power_law_covers() -> None:
    generator = np.random.default_rng(9)
    x = np.array([1.0, 2, 4, 8, 16])
    fits = [fit_power_law(x, 2 * x**-1 * np.exp(0.2 * generator.normal(size=5))) for _ in range(800)]
    slopes = np.mean([low <= -1 <= high for low, high in (fit.slope_interval for fit in fits)])
    constants = np.mean([low <= 2 <= high for low, high in (fit.constant_interval for fit in fits)])
    assert 0.93 < slopes < 0.97
    assert 0.93 < constants < 0.97


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([1, 2], [1, 2]),
        ([1, 2, 3], [1, 2]),
        ([1, 2, 3], [1, 0, 3]),
        ([1, 2, -3], [1, 2, 3]),
        ([2, 2, 2], [1, 2, 3]),
        ([1, 2, np.inf], [1, 2, 3]),
        ([1, 2, 3], [1, np.nan, 3]),
    ],
)
def test_fit_power_law_refuses_what_has_no_logarithm(x: list[float], y: list[float]) -> None:
    with pytest.raises(LosslabError):
        fit_power_law(x, y)


pairs = st.lists(st.tuples(finite, finite), min_size=1, max_size=8)


@given(pairs, st.integers(-60, 60))
def test_max_relative_error_has_no_scale_and_no_sides(both: list[tuple[float, float]], power: int) -> None:
    left, right = np.array(both).T
    error = max_relative_error(left, right)
    assert 0 <= error <= 2
    assert error == max_relative_error(right, left)
    assert error == pytest.approx(max_relative_error(left * 2.0**power, right * 2.0**power), abs=1e-12)
    assert max_relative_error(left, left) == 0


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_max_relative_error_sees_one_wrong_digit_at_any_scale(scale: float) -> None:
    a = scale * np.array([1.0, -4.0, 2.0])
    assert max_relative_error(a, a + scale * np.array([0, 0, 0.4])) == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_max_relative_error_of_what_is_not_finite_is_infinite(bad: float) -> None:
    assert max_relative_error([1.0, bad], [1.0, 2.0]) == np.inf
    assert max_relative_error([1.0, bad], [1.0, bad]) == np.inf


def test_max_relative_error_broadcasts_nothing() -> None:
    with pytest.raises(LosslabError, match="shapes"):
        max_relative_error([1.0], [1.0, 1.0])
    assert max_relative_error([], []) == 0


def test_spearman() -> None:
    generator = np.random.default_rng(4)
    x, y = generator.normal(size=(2, 30))
    ranks = np.corrcoef(rankdata(x), rankdata(y))[0, 1]
    assert spearman(x, y) == pytest.approx(ranks)
    assert spearman(x, -np.exp(x)) == pytest.approx(-1)
    assert spearman([1, 2], [2, 1]) == pytest.approx(-1)
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))
    with pytest.raises(LosslabError, match="at least two pairs"):
        spearman([1], [2])
