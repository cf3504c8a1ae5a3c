"""Each rule at each side of each of its boundaries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from losslab.errors import LosslabError
from losslab.lecture.claim import Verdict
from losslab.lecture.statistics import clopper_pearson
from losslab.lecture.verdicts import bound, count, identity, law, paired, paired_family

HOLDS, MIXED, FAILS, UNDECIDED = Verdict.HOLDS, Verdict.MIXED, Verdict.FAILS, Verdict.UNDECIDED
nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("errors", "options", "verdict"),
    [
        ([1e-9] * 100, {}, HOLDS),
        ([1e-9] * 99, {}, UNDECIDED),
        ([1e-9] * 99 + [1.01e-9], {}, FAILS),
        ([1.01e-9], {}, FAILS),
        ([-1.0] + [0.0] * 99, {}, FAILS),
        ([0.0] * 99 + [nan], {}, FAILS),
        ([0.0] * 99 + [inf], {}, FAILS),
        ([1e-6] * 100, {"tolerance": 1e-6}, HOLDS),
        ([1.01e-6] * 100, {"tolerance": 1e-6}, FAILS),
        ([0.0], {"n": 100}, HOLDS),
        ([0.0] * 100, {"n": 99}, UNDECIDED),
        ([], {}, UNDECIDED),
        ([], {"n": 100}, UNDECIDED),
    ],
)
def test_identity(errors: Sequence[float], options: dict[str, float], verdict: Verdict) -> None:
    assert identity("a = b", errors, **options).verdict is verdict  # type: ignore[arg-type]


def test_identity_reports_the_worst_and_the_range() -> None:
    finding = identity("a = b", [1e-12, 3e-12, 2e-12])
    assert (finding.estimate, finding.interval, finding.n) == (3e-12, (1e-12, 3e-12), 3)
    assert finding.note == "3 instances, 100 are needed"
    assert identity("a = b", [0.0] * 100).note == ""


@pytest.mark.parametrize(
    ("interval", "limits", "verdict"),
    [
        ((5.0, 6.0), {"at_least": 5.0}, HOLDS),
        ((4.9, 6.0), {"at_least": 5.0}, UNDECIDED),
        ((4.0, 5.0), {"at_least": 5.0}, UNDECIDED),
        ((4.0, 4.9), {"at_least": 5.0}, FAILS),
        ((4.0, 5.0), {"at_most": 5.0}, HOLDS),
        ((4.0, 5.1), {"at_most": 5.0}, UNDECIDED),
        ((5.0, 6.0), {"at_most": 5.0}, UNDECIDED),
        ((5.1, 6.0), {"at_most": 5.0}, FAILS),
        ((2.3, 3.2), {"at_least": 2.3, "at_most": 3.2}, HOLDS),
        ((2.2, 3.0), {"at_least": 2.3, "at_most": 3.2}, UNDECIDED),
        ((2.5, 3.3), {"at_least": 2.3, "at_most": 3.2}, UNDECIDED),
        ((2.0, 2.2), {"at_least": 2.3, "at_most": 3.2}, FAILS),
        ((3.3, 4.0), {"at_least": 2.3, "at_most": 3.2}, FAILS),
        ((2.0, 2.0), {"at_least": 2.0, "at_most": 2.0}, HOLDS),
        ((nan, 6.0), {"at_least": 5.0}, UNDECIDED),
        ((6.0, nan), {"at_least": 5.0}, UNDECIDED),
        ((5.5, inf), {"at_least": 5.0}, HOLDS),
    ],
)
def test_bound(interval: tuple[float, float], limits: dict[str, float], verdict: Verdict) -> None:
    assert bound("x", 5.0, interval, 10, "test", **limits).verdict is verdict  # type: ignore[arg-type]


def test_bound_says_what_it_demands() -> None:
    assert bound("x", 1, (1, 1), 1, "test", at_least=2.3, at_most=3.2).threshold == "≥ 2.3 and ≤ 3.2"
    finding = bound("x", nan, (1, 1), 1, "test", at_least=0, note="why")
    assert (finding.verdict, finding.note) == (UNDECIDED, "why; the estimate is not a number")


@pytest.mark.parametrize("limits", [{}, {"at_least": 2.0, "at_most": 1.0}])
def test_bound_needs_bounds(limits: dict[str, float]) -> None:
    with pytest.raises(LosslabError, match="pass at_least, at_most, or both in order"):
        bound("x", 1, (1, 1), 1, "test", **limits)  # type: ignore[arg-type]


@pytest.mark.parametrize(("k", "n"), [(10, 10), (0, 200), (37, 50)])
def test_count_flips_where_the_interval_ends(k: int, n: int) -> None:
    low, high = clopper_pearson(k, n)
    step = 1e-6
    if low > 0:
        assert count("x", k, n, at_least=low - step).verdict is HOLDS
        assert count("x", k, n, at_least=low + step).verdict is UNDECIDED
        assert count("x", k, n, at_most=low - step).verdict is FAILS
    if high < 1:
        assert count("x", k, n, at_most=high + step).verdict is HOLDS
        assert count("x", k, n, at_most=high - step).verdict is UNDECIDED
        assert count("x", k, n, at_least=high + step).verdict is FAILS
    finding = count("x", k, n, at_least=0.5)
    assert (finding.estimate, finding.interval, finding.n) == (k / n, (low, high), n)


@pytest.mark.parametrize("limits", [{"at_least": 1.0}, {"at_most": 0.0}])
def test_count_refuses_what_no_count_can_show(limits: dict[str, float]) -> None:
    with pytest.raises(LosslabError, match="exactly 0 or 1"):
        count("x", 10, 10, **limits)


def spread(middle: float, n: int, width: float = 0.1) -> np.ndarray:
    return middle + width * np.linspace(-1, 1, n)


@pytest.mark.parametrize(
    ("differences", "delta", "options", "verdict"),
    [
        # the size of the effect
        (spread(0.6, 11), 0.5, {}, HOLDS),
        (spread(0.5, 11), 0.5, {}, HOLDS),
        (spread(0.499, 11), 0.5, {}, MIXED),
        (spread(0.3, 11), 0.5, {}, FAILS),
        (spread(-0.6, 11), 0.5, {}, FAILS),
        # significance: a median above delta is not enough
        ([*spread(1.0, 6), *spread(-1.0, 5)], 0.5, {}, MIXED),
        ([1, 1, 1, 1, 1, 1, 1, 1, 1, -9.0], 0.5, {}, MIXED),
        # the number of seeds
        (spread(0.6, 10), 0.5, {}, HOLDS),
        (spread(0.6, 9), 0.5, {}, UNDECIDED),
        (spread(0.3, 9), 0.5, {}, UNDECIDED),
        (spread(0.6, 5), 0.5, {"least": 5}, HOLDS),
        (spread(0.6, 4), 0.5, {"least": 5}, UNDECIDED),
        (spread(0.6, 4), 0.5, {"least": 1}, UNDECIDED),
        # too few for a p-value: all of one sign
        ([0.6, 0.6, 0.6, 0.6, 0.01], 0.5, {"least": 5}, HOLDS),
        ([0.6, 0.6, 0.6, 0.6, 0.0], 0.5, {"least": 5}, MIXED),
        ([0.6, 0.6, 0.6, 0.6, -0.01], 0.5, {"least": 5}, MIXED),
        ([0.4, 0.4, 0.4, 0.6, 0.6], 0.5, {"least": 5}, MIXED),
        (spread(0.6, 6), 0.5, {"least": 5}, HOLDS),
        (spread(0.6, 7), 0.5, {"least": 5}, HOLDS),
        ([0.6] * 6 + [-0.6], 0.5, {"least": 5}, MIXED),
        # the other direction
        (spread(-0.6, 11), -0.5, {}, HOLDS),
        (spread(-0.499, 11), -0.5, {}, MIXED),
        (spread(-0.3, 11), -0.5, {}, FAILS),
        (spread(0.6, 11), -0.5, {}, FAILS),
        (spread(-0.6, 5), -0.5, {"least": 5}, HOLDS),
        # an interval that ends at delta is not short of it
        ([0.5] * 6 + [-0.5] * 5, 0.5, {}, MIXED),
        ([-0.5] * 6 + [0.5] * 5, -0.5, {}, MIXED),
        # no size demanded
        (spread(0.2, 11), 0.0, {}, HOLDS),
        (spread(0.0, 11), 0.0, {}, MIXED),
        (spread(-0.2, 11), 0.0, {}, FAILS),
        ([0.0] * 11, 0.0, {}, MIXED),
        # divergence
        ([inf] * 11, 0.5, {}, HOLDS),
        ([*spread(0.6, 10), nan], 0.5, {}, UNDECIDED),
        ([], 0.5, {}, UNDECIDED),
    ],
)
def test_paired(
    differences: Sequence[float], delta: float, options: dict[str, int], verdict: Verdict
) -> None:
    assert paired("x", differences, delta, **options).verdict is verdict  # type: ignore[arg-type]


def test_paired_reports_median_interval_and_p() -> None:
    finding = paired("x", spread(-0.6, 11), -0.5, note="context")
    assert finding.estimate == pytest.approx(-0.6)
    assert finding.interval[0] <= finding.estimate <= finding.interval[1]
    assert finding.threshold == "p < 0.01 and median ≤ −0.5"
    assert finding.note == "context; one-sided p = 4.9 × 10⁻⁴"
    assert "3 seeds, 10 are needed" in paired("x", [1.0] * 3, 0.5).note
    assert paired("x", [1.0], 0.0).threshold == "p < 0.01 and median ≥ 0 on at least 10 seeds"
    assert "1 of 2 differences are NaN" in paired("x", [1.0, nan], 0.5).note


def test_paired_family_corrects_for_its_size() -> None:
    # 2^-8 = 0.0039 is significant alone and beside one other, but not beside two
    arm = spread(0.6, 8)
    alone = paired("x", arm, 0.5, least=8)
    two = paired_family({"x": arm, "y": arm}, 0.5, least=8)
    three = paired_family({"x": arm, "y": arm, "z": arm}, 0.5, least=8)
    assert [alone.verdict, two[0].verdict, three[0].verdict] == [HOLDS, HOLDS, MIXED]
    assert "over 3 comparisons" in three[0].note
    # an unusable arm is no test, so it costs the others nothing
    rest = paired_family({"x": arm, "short": arm[:2], "lost": [nan] * 8, "y": arm}, 0.5, least=8)
    assert [finding.verdict for finding in rest] == [HOLDS, UNDECIDED, UNDECIDED, HOLDS]
    assert [finding.name for finding in rest] == ["x", "short", "lost", "y"]


@pytest.mark.parametrize(
    ("estimate", "interval", "theory", "tolerance", "verdict"),
    [
        (-1.0, (-1.1, -0.9), -1.0, 0.05, HOLDS),
        (1.05, (0.9, 1.2), 1.0, 0.05, HOLDS),
        (1.051, (0.9, 1.2), 1.0, 0.05, UNDECIDED),
        (0.949, (0.9, 1.2), 1.0, 0.05, UNDECIDED),
        (1.09, (0.9, 1.2), 1.0, 0.10, HOLDS),
        (1.04, (1.03, 1.05), 1.0, 0.05, MIXED),
        (0.96, (0.95, 0.97), 1.0, 0.05, MIXED),
        (1.04, (1.0, 1.05), 1.0, 0.05, HOLDS),
        (0.96, (0.95, 1.0), 1.0, 0.05, HOLDS),
        (1.2, (1.1, 1.3), 1.0, 0.05, FAILS),
        (-1.0, (-1.1, -0.9), 1.0, 0.05, FAILS),
        (0.02, (-0.1, 0.1), 0.0, 0.02, HOLDS),
        (0.021, (-0.1, 0.1), 0.0, 0.02, UNDECIDED),
        (100.0, (90.0, 110.0), 104.0, 0.05, HOLDS),
        (1 + 1e-12, (1 + 1e-12, 1 + 1e-12), 1.0, 0.05, HOLDS),
        (1 + 1e-8, (1 + 1e-8, 1 + 1e-8), 1.0, 0.05, MIXED),
        (100 + 5e-8, (100 + 5e-8, 100 + 5e-8), 100.0, 0.05, HOLDS),
        (nan, (0.9, 1.1), 1.0, 0.05, UNDECIDED),
        (1.0, (nan, nan), 1.0, 0.05, UNDECIDED),
        (1.2, (1.1, nan), 1.0, 0.05, UNDECIDED),
    ],
)
def test_law(
    estimate: float, interval: tuple[float, float], theory: float, tolerance: float, verdict: Verdict
) -> None:
    assert law("x", estimate, interval, theory, tolerance).verdict is verdict


def test_law_says_what_it_demands() -> None:
    assert law("x", 2.0, (1.9, 2.1), 2.0).threshold == "interval contains 2, error ≤ 0.1"
