"""One law in many places: the worst place decides, exact laws and limits are judged by their own rules."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from losslab.lecture.section_6_5.cells import everywhere, student_interval


def table(means: dict[str, float], n: int = 20, noise: float = 0.01) -> pd.DataFrame:
    wiggle = noise * np.linspace(-1, 1, n)
    return pd.concat(
        [pd.DataFrame({"place": place, "value": mean + wiggle}) for place, mean in means.items()],
        ignore_index=True,
    )


@pytest.mark.parametrize(
    ("means", "noise", "exact", "limit"),
    [
        ({"a": 1.0, "b": 1.001}, 0.01, "holds", "holds"),
        ({"a": 1.0, "b": 1.03}, 0.01, "mixed", "holds"),  # resolved, and small
        ({"a": 1.0, "b": 1.2}, 0.01, "does not hold", "does not hold"),
        ({"a": 1.0, "b": 1.06}, 0.2, "undecided", "undecided"),
    ],
)
def test_the_worst_place_decides(means, noise, exact, limit) -> None:
    rows = table(means, noise=noise)
    for wide, wanted in ((False, exact), (True, limit)):
        found = everywhere("law", rows, ["place"], "value", wide=wide, note="more")
        assert str(found.verdict) == wanted
        assert found.note == "worst of 2: place b; more"
        assert found.estimate == pytest.approx(means["b"])


def test_one_place_needs_no_name_and_zero_is_absolute() -> None:
    found = everywhere("mean", table({"a": 0.01}), ["place"], "value", theory=0.0, tolerance=0.02)
    assert str(found.verdict) == "mixed"
    assert found.note == ""


def test_laws_in_many_places_are_given_wider_intervals() -> None:
    one = everywhere("law", table({"a": 1.0}), ["place"], "value").interval
    many = everywhere("law", table(dict.fromkeys("abcdefghij", 1.0)), ["place"], "value").interval
    wide = everywhere("law", table(dict.fromkeys("abcdefghij", 1.0)), ["place"], "value", wide=True).interval
    assert many[1] - many[0] > 1.2 * (one[1] - one[0])
    assert wide == pytest.approx(one)


def test_coverage_of_the_interval() -> None:
    rng = np.random.default_rng(0)
    ends = [student_interval(rng.normal(size=5))[1] for _ in range(800)]
    assert 0.93 < np.mean([low <= 0 <= high for low, high in ends]) < 0.97


def test_one_replicate_decides_nothing() -> None:
    for wide in (False, True):
        found = everywhere("law", table({"a": 1.0}, n=1), ["place"], "value", wide=wide)
        assert str(found.verdict) == "undecided"
        assert found.note == "one replicate has no interval"
