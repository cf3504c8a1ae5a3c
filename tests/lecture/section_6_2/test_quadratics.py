"""C15 to C17: the experiments at small sizes, the judges on planted evidence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from losslab.lecture.claim import Lab
from losslab.lecture.section_6_2 import quadratics as q

HOLDS, FAILS = "holds", "does not hold"


def test_c15_holds_as_run_and_not_when_a_formula_is_wrong(verdicts):
    tables = q.experiment_c15(Lab())
    assert set(verdicts(q.C15, tables).values()) == {HOLDS}
    wrong = {"gradients": tables["gradients"].assign(error_Ax=lambda t: t.error_Ax + t.symmetric * 1e-6)}
    assert verdicts(q.C15, wrong)[q.SYMMETRIC] == FAILS
    symmetric = {"gradients": tables["gradients"].assign(error_Ax=0.0)}
    assert verdicts(q.C15, symmetric)[q.LOPSIDED] == FAILS


def test_closed_form_is_matrix_powers():
    a, start, rates = q.saddles(3, 6)
    exact, values, _ = q.closed_form(a, start, rates, 4)
    for n in range(3):
        step = torch.eye(6, dtype=torch.float64) - rates[n] * a[n]
        assert torch.allclose(exact[4, n], torch.linalg.matrix_power(step, 4) @ start[n], rtol=1e-10)
        assert values[n].abs().min() < 1e-12
        assert values[n, 0] <= -0.5 + 1e-12


def test_c16_holds_though_the_printed_expansion_does_not(verdicts):
    tables = q.expansion(instances=100, dimension=8, steps=50)
    assert verdicts(q.C16, tables) == {q.CORRECTED: HOLDS, q.PRINTED: FAILS, "all": HOLDS}
    other = tables | {"instances": tables["instances"].assign(error=1e-6, unreachable=0.0)}
    assert verdicts(q.C16, other) == {q.CORRECTED: FAILS, q.PRINTED: HOLDS, "all": FAILS}


@pytest.fixture(scope="module")
def escapes():
    return {
        "instances": q.formula_instances(120),
        "ridge": q.resting(100, steps=50),
        "starts": q.starts_grid([10.0**-k for k in range(8, 1, -1)]),
        "noisy": q.noisy_escapes([1e-2, 1e-4], 1000),
    }


def test_c17_holds_as_run(verdicts, escapes):
    assert set(verdicts(q.C17, escapes).values()) == {HOLDS}


@pytest.mark.parametrize(
    ("table", "change", "finding"),
    [
        ("starts", lambda t: t.assign(steps=2 * t.steps), q.LAW),
        ("instances", lambda t: t.assign(steps=t.steps + (t.index == 3)), q.STEPS),
        ("instances", lambda t: t.assign(least_growth=np.where(t.index == 3, 1.0, 1.1)), q.GROWS),
        ("ridge", lambda t: t.assign(away=np.where(t.index == 3, 1e-300, 0.0)), q.RESTS),
        ("noisy", lambda t: t.assign(steps=1.2 * t.steps), q.NOISY),
    ],
)
def test_c17_fails_on_one_planted_counterexample(verdicts, escapes, table, change, finding):
    found = verdicts(q.C17, escapes | {table: change(escapes[table])})
    assert found[finding] == FAILS
    assert found["all"] == "mixed"


def test_a_run_that_never_escapes_decides_against_the_law(verdicts, escapes):
    stuck = escapes["noisy"].assign(steps=lambda t: np.where(t.index == 0, math.inf, t.steps))
    assert verdicts(q.C17, escapes | {"noisy": stuck})[q.NOISY] != HOLDS
