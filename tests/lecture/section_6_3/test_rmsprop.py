"""C25 and C26: RMSProp's update and how it weighs past gradients."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tests.lecture.evidence import FAILS, HOLDS, MIXED, Draw, Stored, Tables, overall, verdicts

from losslab.lecture.section_6_3 import rmsprop
from losslab.lecture.section_6_3.rmsprop import C25, C26

# -- C25 -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts() -> Tables:
    return {
        "updates": rmsprop.updates(100, steps=12),
        "rates": rmsprop.rates_over_time(steps=1500, runs=4, weights=60),
        "floors": rmsprop.floors([0.003, 0.01, 0.03], runs=5, steps=2000),
        "printed": rmsprop.printed_runs(range(6)),
    }


def test_c25_on_its_own_experiment(parts: Tables, stored: Stored, draw: Draw) -> None:
    found = verdicts(C25, stored(parts))
    for name in (rmsprop.EQUATION, rmsprop.TORCH, rmsprop.STEADY, rmsprop.NOISY, rmsprop.FIRST):
        assert found[name] is HOLDS, name
    assert found[rmsprop.PRINTED] is FAILS
    assert overall(C25, parts) is MIXED
    draw(C25, parts)


def test_c25_holds_if_the_printed_update_stays_finite(parts: Tables) -> None:
    alive = parts["printed"].assign(finite=True)
    many = pd.concat([alive, alive.assign(seed=alive.seed + 6)])
    assert overall(C25, parts | {"printed": many}) is HOLDS


def test_c25_adagrad_s_rates_would_fail(parts: Tables) -> None:
    rates = parts["rates"]
    summed = rates[rates.rule == "AdaGrad"].assign(rule="RMSProp")
    found = verdicts(C25, parts | {"rates": summed})
    assert found[rmsprop.STEADY] is FAILS
    assert found[rmsprop.NOISY] is FAILS


@pytest.mark.parametrize(
    ("column", "name"),
    [("equation", rmsprop.EQUATION), ("torch", rmsprop.TORCH), ("first", rmsprop.FIRST)],
)
def test_c25_one_counter_instance_is_enough(parts: Tables, column: str, name: str) -> None:
    broken = parts["updates"].copy()
    broken.loc[50, column] = 1e-7
    assert verdicts(C25, parts | {"updates": broken})[name] is FAILS


def test_the_floor_is_a_law(parts: Tables) -> None:
    exact = parts["floors"].assign(loss=lambda table: 2.0 * table.lr)
    assert verdicts(C25, parts | {"floors": exact})[rmsprop.FLOOR] is HOLDS
    square = exact.assign(loss=lambda table: table.lr**2)
    assert verdicts(C25, parts | {"floors": square})[rmsprop.FLOOR] is FAILS


def test_rates_are_those_of_the_closed_forms(parts: Tables) -> None:
    rates = parts["rates"]
    constant = rates[(rates.gradients == "constant") & (rates.run == 0)]
    t = constant.step + 1
    size = 0.1  # of run 0
    expected = np.where(
        constant.rule == "AdaGrad", 0.01 / (size * np.sqrt(t)), 0.01 / size / np.sqrt(1 - 0.9**t)
    )
    assert constant.rate.to_numpy() == pytest.approx(expected, rel=1e-6)


# -- C26 -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> Tables:
    return {"impulses": rmsprop.impulses((0.5, 0.9), 50), "sequences": rmsprop.sequences(100, 30)}


def test_c26_on_its_own_experiment(weights: Tables, stored: Stored, draw: Draw) -> None:
    assert set(verdicts(C26, stored(weights)).values()) == {HOLDS}
    assert overall(C26, weights) is HOLDS
    draw(C26, weights)


@pytest.mark.parametrize(
    ("table", "column", "name"),
    [
        ("impulses", "rmsprop", rmsprop.WEIGHTS),
        ("impulses", "adagrad", rmsprop.WEIGHTS),
        ("impulses", "total", rmsprop.TOTAL),
        ("sequences", "weighted", rmsprop.ANY),
        ("sequences", "limit", rmsprop.LIMIT),
    ],
)
def test_c26_one_other_weight_is_enough(weights: Tables, table: str, column: str, name: str) -> None:
    broken = weights[table].copy()
    broken.loc[7, column] = broken.loc[7, column] * 1.001 + 1e-6
    found = verdicts(C26, weights | {table: broken})
    assert found[name] is FAILS
    assert list(found.values()).count(FAILS) == 1
