"""C19 and C20: Newton's method, what it gains and what it costs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from tests.lecture.evidence import FAILS, HOLDS, MIXED, UNDECIDED, Draw, Stored, Tables, overall, verdicts

from losslab.lecture.claim import Verdict
from losslab.lecture.section_6_3 import expense, newton, softmax
from losslab.lecture.section_6_3.convergence import iterations
from losslab.lecture.section_6_3.expense import C20
from losslab.lecture.section_6_3.newton import C19

# -- C19 -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Tables:
    steep = iterations(["Newton", "Newton, η = 1/2"], [10, 1e4], [0])
    slow = iterations(["gradient descent", "momentum"], [10, 30], [0])
    return {
        "one_step": newton.one_step(100, dimension=5),
        "damped": newton.damped([10, 1e6], range(50)),
        "affine": newton.affine(100, steps=3),
        "iterations": pd.concat([slow, steep], ignore_index=True),
        "trajectories": newton.trajectories(10),
        "rosenbrock": newton.rosenbrock_run(10),
        "saddle": newton.saddle_run(40, steps=15),
        **softmax.runs_on_digits([0], limit=40, tuning_steps=10, share=0.1),
    }


def planted(needed: dict[tuple[str, str], float], seeds: int = 5) -> pd.DataFrame:
    """Softmax runs that are done after so many iterations."""
    rows = []
    for (method, start), done in needed.items():
        for seed in range(seeds):
            for iteration in (0, 1, 15, 16, 999, 1000, 5000):
                excess = 1e-11 if iteration >= done else 0.5
                rows.append((iteration, excess, method, start, seed))
    return pd.DataFrame(rows, columns=["iteration", "excess", "method", "start", "seed"])


GOOD: dict[tuple[str, str], float] = {
    (softmax.SEARCHED, softmax.RANDOM): 15,
    (softmax.FULL, softmax.ZERO): 1,
    (softmax.FULL, softmax.RANDOM): 15,
    (softmax.DESCENT, softmax.RANDOM): 1000,
}


def digits_verdicts(needed: dict[tuple[str, str], float]) -> list[Verdict]:
    return [finding.verdict for finding in softmax.findings(planted(needed))]


def test_c19_on_its_own_experiment(small: Tables, stored: Stored, draw: Draw) -> None:
    found = verdicts(C19, stored(small))
    for name in (newton.ONE_STEP, newton.DAMPED, newton.AFFINE, newton.VALLEY):
        assert found[name] is HOLDS, name
    assert found[newton.CURVED] is FAILS, "near a saddle Newton's method finds the saddle"
    draw(C19, small)


def test_c19_holds_if_everything_converges(small: Tables) -> None:
    good = small | {"softmax": planted(GOOD)}
    assert verdicts(C19, good)[newton.CURVED] is FAILS  # shown, and left out of the verdict
    assert overall(C19, good) is HOLDS
    ends = small["saddle"].assign(end_x=0.0, end_y=-1.0)
    assert verdicts(C19, good | {"saddle": ends})[newton.CURVED] is HOLDS
    slow = small["one_step"].assign(error=1e-3)
    assert overall(C19, good | {"one_step": slow}) is MIXED


@pytest.mark.parametrize("case", list(GOOD))
def test_c19_slow_newton_or_quick_descent_is_seen(case: tuple[str, str]) -> None:
    assert digits_verdicts(GOOD) == [HOLDS] * 4
    wrong = 999 if case[0] == softmax.DESCENT else 16
    assert digits_verdicts(GOOD | {case: wrong}).count(FAILS) == 1
    never = digits_verdicts(GOOD | {case: np.inf})
    assert never.count(FAILS) == (0 if case[0] == softmax.DESCENT else 1)


@pytest.mark.parametrize(("table", "name"), [("one_step", newton.ONE_STEP), ("damped", newton.DAMPED)])
def test_c19_one_counter_instance_is_enough(small: Tables, table: str, name: str) -> None:
    broken = small[table].copy()
    broken.loc[5, "error"] = 1e-8
    assert verdicts(C19, small | {table: broken})[name] is FAILS


def test_c19_a_valley_that_takes_longer_fails(small: Tables) -> None:
    slow = pd.DataFrame({"step": range(20), "loss": [1.0] * 16 + [0.0] * 4})
    assert verdicts(C19, small | {"rosenbrock": slow})[newton.VALLEY] is FAILS
    never = slow.assign(loss=1.0)
    assert verdicts(C19, small | {"rosenbrock": never})[newton.VALLEY] is FAILS


def test_backtracking_never_climbs_and_ends_at_the_minimum() -> None:
    problem, starts = softmax.digits_problem(1, share=0.1)
    path = softmax.backtracked(problem, starts[1:], 40)
    values = torch.cat([problem.value(x) for x in path])
    assert bool((values.diff() <= 1e-14).all())
    assert float(problem.gradient(path[-1]).abs().max()) < 1e-12
    # Strictly convex: from zero the same minimum.
    assert torch.allclose(softmax.backtracked(problem, starts[:1], 40)[-1], path[-1], atol=1e-9)


# -- C20 -----------------------------------------------------------------------------------------------


def costs(update: float, gradient: float, entry: float = 8.0, noise: float = 0.0) -> Tables:
    """Times that follow powers of P."""
    p = np.array(expense.SIZES, dtype=float)
    wobble = np.exp(noise * np.array([(-1.0) ** k for k in range(len(p))]))
    return {
        "newton": pd.DataFrame({"P": p, "update": 1e-9 * p**update * wobble, "bytes": entry * p**2}),
        "network": pd.DataFrame({"P": p, "gradient": 1e-6 * p**gradient, "product": 3e-6 * p**gradient}),
    }


def test_c20_on_its_own_experiment(stored: Stored, draw: Draw) -> None:
    # Too small for the exponent to mean anything; the memory is exact.
    tables = {
        "newton": expense.newton_cost((100, 800, 820, 850), budget=0.0),
        "network": expense.network_cost((1, 11, 12, 13), budget=0.0),
    }
    assert verdicts(C20, stored(tables))[expense.MEMORY] is HOLDS
    assert tables["network"].P.tolist() == [85, 835, 910, 985]
    assert (tables["newton"]["update"] > 0).all()
    draw(C20, tables)


@pytest.mark.parametrize(
    ("tables", "verdict"),
    [
        (costs(2.8, 1.0), HOLDS),
        (costs(2.0, 1.0), MIXED),
        (costs(3.5, 1.0), MIXED),
        (costs(2.8, 1.0, entry=4.0), MIXED),
        (costs(2.0, 1.0, entry=4.0), FAILS),
        (costs(2.8, 1.0, noise=0.3), HOLDS),  # the estimate decides
        (costs(3.4, 1.0, noise=0.3), UNDECIDED),  # but outside the interval may reach in
        (costs(2.8, 2.0), HOLDS),  # the gradient is context
    ],
)
def test_c20_judges_powers(tables: Tables, verdict: Verdict) -> None:
    assert overall(C20, tables) is verdict


def test_c20_the_shortest_of_at_least_two_runs_counts() -> None:
    calls: list[int] = []
    assert expense.seconds(lambda: calls.append(1), budget=0.0) >= 0
    assert len(calls) == 2


def test_c20_times_one_thread_and_gives_the_others_back() -> None:
    torch.set_num_threads(2)
    try:
        with expense.one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
