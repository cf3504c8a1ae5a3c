"""Paired comparisons, their intervals and verdicts, from tables alone."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tests.tickets.planted import planted

from losslab.tickets import comparing

ARMS = {(0, "dense"): 0.97, (1, "ticket"): 0.97, (1, "reinit"): 0.95, (2, "ticket"): 0.97}


@pytest.mark.parametrize("n", [2, 3, 5])
def test_intervals_are_student_s_and_hold_the_mean_as_often_as_they_say(n: int) -> None:
    draws = np.random.default_rng(n).standard_normal((4000, n)) + 3
    held = 0
    for values in draws:
        mean, low, high = comparing.interval(values.tolist())
        held += low <= 3 <= high
    assert (low, high) == pytest.approx(stats.t.interval(0.95, n - 1, loc=mean, scale=stats.sem(draws[-1])))
    assert held / len(draws) == pytest.approx(0.95, abs=0.012)


def test_intervals_of_too_few_values() -> None:
    assert comparing.interval([2.0])[0] == 2.0
    assert np.isnan(comparing.interval([2.0])[1:]).all()
    assert np.isnan(comparing.interval([])).all()
    assert np.isnan(comparing.interval([1.0, math.nan])).all()
    assert np.isnan(comparing.interval([1.0, math.inf])[1:]).all()
    assert comparing.by_logarithm([100, 400])[0] == pytest.approx(200)


def test_pairs_are_made_by_replicate_in_whatever_order_rows_come() -> None:
    table = planted(ARMS, spread=0.01)
    mixed = table.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(
        comparing.compare(table, 1), comparing.compare(mixed, 1), check_like=True, check_exact=False
    )
    gap = np.subtract(*(table[table.arm == arm][:5].test_accuracy.to_numpy() for arm in ("ticket", "dense")))
    row = comparing.compare(table, 1).iloc[0]
    low, high = stats.t.interval(0.95, 4, loc=gap.mean(), scale=stats.sem(gap))
    assert (row.opponent, row.n) == ("dense", 5)
    assert (row.difference, row.low, row.high) == pytest.approx((gap.mean(), low, high))


def test_the_ratio_of_early_stops_is_taken_by_its_logarithm() -> None:
    table = planted(ARMS)
    table.loc[table.arm == "ticket", "stop_step"] = [100, 200, 400, 100, 200] * 2
    row = comparing.compare(table, 1).iloc[0]
    logs = np.log(400 / np.array([100, 200, 400, 100, 200]))
    ends = stats.t.interval(0.95, 4, loc=logs.mean(), scale=stats.sem(logs))
    assert (row.faster, row.faster_low, row.faster_high) == pytest.approx(np.exp([logs.mean(), *ends]))


def test_losses_count_with_their_sign_turned() -> None:
    table = planted(ARMS).drop(columns="test_accuracy").rename(columns={"validation_loss": "validation_loss"})
    assert comparing.score_of(table) == "test_loss"
    row = comparing.compare(table, 1).set_index("opponent").loc["reinit"]
    assert row.difference == pytest.approx(0.02)


def test_a_network_that_diverged_has_a_score_and_no_early_stop() -> None:
    table = planted(ARMS)
    table.loc[(table.arm == "ticket") & (table.replicate == 2), ["diverged", "stop_step"]] = [7, 0]
    rows = comparing.compare(table, 1)
    assert rows.n.tolist() == [5, 5]
    assert rows.diverged.tolist() == [1, 1]
    assert rows.faster.tolist() == pytest.approx([1.0, 1.0])  # not 400 times
    arms = comparing.summary(table).set_index(["level", "arm"])
    assert arms.loc[(1, "ticket"), "stop"] == pytest.approx(400)
    assert arms.loc[(1, "ticket"), "diverged"] == 1
    assert any("2 of 20 trainings diverged" in s for s in comparing.sentences(table, 0.002))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, comparing.WINS),
        ({(1, "ticket"): 0.967}, comparing.OPEN),  # 0.3 points below, 0.2 may be lost
        ({(1, "ticket"): 0.96}, comparing.LOSES),
        ({(1, "reinit"): 0.98}, comparing.LOSES),
        ({(1, "reinit"): 0.97}, comparing.OPEN),
        ({(1, "random"): 0.97}, comparing.OPEN),  # every control counts
        ({(1, "random"): 0.95}, comparing.WINS),
    ],
    ids=str,
)
def test_verdicts(changes: dict[tuple[int, str], float], said: str) -> None:
    table = planted(ARMS | changes)
    assert comparing.decide(comparing.compare(table, 1), 0.002) == said
    assert comparing.verdicts(table, 0.002).verdict.tolist() == ["dense", said, comparing.OPEN]


def test_nothing_is_decided_by_one_replicate_or_without_numbers() -> None:
    alone = planted(ARMS, n=1)
    assert comparing.decide(comparing.compare(alone, 1), 0.002) == comparing.OPEN
    assert "One replicate" in comparing.sentences(alone, 0.002)[-1]
    lost = planted(ARMS).assign(test_accuracy=math.nan)
    assert comparing.decide(comparing.compare(lost, 1), 0.002) == comparing.OPEN


def test_sentences() -> None:
    table = planted(ARMS, stop={"ticket": 200, "reinit": 800})
    told = comparing.sentences(table, 0.002)
    assert told[0].startswith("Winning tickets at 80.0 % of the weights")
    assert "at most 0.20 points against the dense network has 64.0 %" in told[1]
    assert "points better than reinit" in told[3]
    assert "stop 4.00 times as early (4.00 to 4.00)" in told[3]
    assert len(told) == 4
    ended = table.assign(final_validation_loss=table.validation_loss)
    assert (
        "20 of 20 trainings have their least validation loss at the last look"
        in (comparing.sentences(ended, 0.002)[-1])
    )
    idle = table.assign(stop_step=0)
    assert "20 of 20 trainings never got below" in comparing.sentences(idle, 0.002)[-1]
    assert comparing.sentences(table[table.level == 0], 0.002) == [
        "Only the dense networks have trained so far."
    ]
    plain = table[table.arm != "reinit"]
    assert comparing.sentences(plain, 0.002)[0].startswith("Without controls")
    worse = planted(ARMS | {(1, "ticket"): 0.9})
    assert "1 of 2 levels are shown not to" in comparing.sentences(worse, 0.002)[0]
