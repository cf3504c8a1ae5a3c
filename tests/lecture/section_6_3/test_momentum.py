"""C27: Polyak's momentum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.lecture.claim import Claim, Verdict
from losslab.lecture.section_6_3 import momentum
from losslab.lecture.section_6_3.convergence import heavy_ball, iterations
from losslab.lecture.section_6_3.momentum import C27

HOLDS, MIXED, FAILS = Verdict.HOLDS, Verdict.MIXED, Verdict.FAILS
Tables = dict[str, pd.DataFrame]


def verdicts(tables: Tables) -> dict[str, Verdict]:
    return {finding.name: finding.verdict for finding in C27.judge(tables)}


def overall(tables: Tables) -> Verdict:
    return C27.combine(C27.judge(tables))


@pytest.fixture(scope="module")
def small() -> Tables:
    levels = (momentum.HALFWAY, momentum.TARGET)
    methods = ["gradient descent", "momentum"]
    return {
        "updates": momentum.updates(100, steps=15),
        "steady": momentum.steady_steps(100),
        "iterations": iterations(methods, [10, 100, 200, 400], range(10), levels=levels),
        "edges": momentum.edges(100, steps=200),
    }


def test_its_own_experiment(
    small: Tables, stored: Callable[[Tables], Tables], draw: Callable[[Claim, Tables], None]
) -> None:
    found = verdicts(stored(small))
    identities = (
        momentum.EQUATION,
        momentum.TORCH,
        momentum.HEAVY,
        momentum.SUM,
        momentum.STEADY,
        momentum.EDGE,
    )
    for name in identities:
        assert found[name] is HOLDS, name
    draw(C27, small)


@pytest.mark.parametrize(("power", "verdict"), [(0.5, HOLDS), (0.55, FAILS), (1.0, FAILS)])
def test_the_power_of_kappa_is_judged(small: Tables, power: float, verdict: Verdict) -> None:
    runs = small["iterations"]
    share = np.where(runs.level == momentum.HALFWAY, 1.0, 2.0)
    planted = small | {"iterations": runs.assign(iterations=10 * share * runs.kappa**power)}
    found = verdicts(planted)
    assert found[momentum.SLOPE] is verdict
    assert found[momentum.WHOLE] is verdict
    assert overall(planted) is (HOLDS if verdict is HOLDS else MIXED)


@pytest.mark.parametrize(
    ("column", "name"),
    [
        ("equation", momentum.EQUATION),
        ("torch", momentum.TORCH),
        ("heavy", momentum.HEAVY),
        ("sum", momentum.SUM),
    ],
)
def test_one_counter_instance_is_enough(small: Tables, column: str, name: str) -> None:
    broken = small["updates"].copy()
    broken.loc[50, column] = 1e-7
    assert verdicts(small | {"updates": broken})[name] is FAILS


@pytest.mark.parametrize("growth", [1.5, np.nan])
def test_a_stable_rate_that_diverges_is_a_counterexample(small: Tables, growth: float) -> None:
    edge = small["edges"].copy()
    edge.loc[edge.index[edge.share < 1][3], "growth"] = growth
    assert verdicts(small | {"edges": edge})[momentum.EDGE] is FAILS


def test_the_best_momentum_contracts_as_polyak_says() -> None:
    # The slowest root of z^2 - (1 + beta - lr lambda) z + beta over the spectrum has the modulus
    # (sqrt k - 1)/(sqrt k + 1), and no other pair of rate and decay nearby does better.
    mu, L = torch.tensor([1.0]), torch.tensor([100.0])
    rule = heavy_ball(mu, L)
    lr, beta = float(torch.as_tensor(rule.lr)), float(torch.as_tensor(rule.beta))

    def slowest(lr: float, beta: float) -> float:
        roots = [np.roots([1, -(1 + beta - lr * value), beta]) for value in np.geomspace(1, 100, 50)]
        return float(np.abs(np.concatenate(roots)).max())

    best = slowest(lr, beta)
    assert best == pytest.approx(9 / 11, abs=1e-6)
    for factor in (0.97, 1.03):
        assert slowest(lr * factor, beta) > best
        assert slowest(lr, beta * factor) > best
