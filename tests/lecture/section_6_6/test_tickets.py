"""C65 to C68: the judges on planted lotteries of both outcomes, and the experiment in miniature."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tests.lecture.evidence import FAILS, HOLDS, MIXED, Draw, Stored, Tables, overall, verdicts

from losslab.lecture.section_6_6 import ticket_runs
from losslab.lecture.section_6_6.ticket_runs import MATCHED, TWENTY_ONE
from losslab.lecture.section_6_6.tickets import C65, C66, C67, C68, FINE, MATCHES
from losslab.tasks import digits_task, mlp
from losslab.tickets import Plan, Scope, lottery

SEEDS = 10
SHARES = 0.8 ** np.arange(23)


def planted(
    ticket: float = 97.0, late: float = 97.0, reinit: float = 95.0, small: float = 95.0, tuned: float = 97.0,
    steps: tuple[int, int, int] = (200, 100, 220),
) -> Tables:  # fmt: skip
    """Accuracies of tickets (below 5 % of the weights ``late``), of the others, and early-stop steps."""
    noise = np.random.default_rng(0)
    rows = []

    def add(level: int, arm: str, accuracy: float, step: int) -> None:
        for i in range(SEEDS):
            told = {"level": level, "arm": arm, "replicate": i, "kept": int(50_200 * SHARES[level])}
            told |= {"remaining": SHARES[level], "stop_step": step + 10 * (i % 2), "diverged": -1}
            told |= {"accuracy": accuracy + 0.02 * noise.standard_normal(), "data": "digits"}
            rows.append(told | {"final_accuracy": accuracy, "final_train_accuracy": 100.0})

    add(0, "dense", 97.0, steps[0])
    for level in range(1, 23):
        add(level, "ticket", ticket if SHARES[level] > 0.05 else late, steps[1])
        if level in (TWENTY_ONE, MATCHED):
            add(level, "reinit", reinit, steps[2])
            add(level, "random", reinit, steps[2])
            add(level, "small dense", small, steps[2])
    table = pd.DataFrame(rows)
    first = table[table.arm == "dense"]
    after = first.assign(level=1, arm="pruned and fine-tuned", accuracy=first.accuracy + tuned - 97.0)
    curves = pd.DataFrame(
        [
            {"level": k, "arm": a, "replicate": i, "step": s, "validation_loss": 1 / (1 + s)}
            for k, a in ((0, "dense"), (TWENTY_ONE, "ticket"), (TWENTY_ONE, "reinit"))
            for i in range(SEEDS)
            for s in (0, 10, 20)
        ]
    )
    return {"runs": table, "curves": curves, "tuned": pd.concat([first, after], ignore_index=True)}


def test_tickets_match_or_do_not(stored: Stored) -> None:
    assert overall(C65, stored(planted())) is HOLDS
    assert overall(C65, stored(planted(late=60.0))) is HOLDS  # 4 % is context
    found = verdicts(C65, stored(planted(ticket=96.0)))
    assert found[MATCHES] is FAILS


def test_tickets_are_faster_or_are_not(stored: Stored) -> None:
    assert overall(C66, stored(planted())) is HOLDS
    assert overall(C66, stored(planted(steps=(200, 200, 210), reinit=98.0))) is FAILS
    assert overall(C66, stored(planted(steps=(200, 190, 400)))) is MIXED


def test_both_ends_of_the_range(stored: Stored) -> None:
    assert overall(C67, stored(planted())) is HOLDS
    assert overall(C67, stored(planted(late=90.0))) is MIXED
    assert overall(C67, stored(planted(ticket=90.0, late=90.0))) is FAILS


def test_large_networks_are_needed_or_are_not(stored: Stored) -> None:
    assert overall(C68, stored(planted())) is HOLDS
    same = verdicts(C68, stored(planted(small=97.0)))
    assert same[FINE] is HOLDS
    assert list(same.values())[1] is FAILS
    assert overall(C68, stored(planted(tuned=94.0))) is FAILS


@pytest.mark.parametrize("claim", [C65, C66, C67, C68], ids=lambda c: c.id)
def test_figures_can_be_drawn(claim: object, draw: Draw) -> None:
    draw(claim, planted())  # type: ignore[arg-type]


def test_the_plans_are_the_paper_s() -> None:
    paper = ticket_runs.plan_of("paper", 5)
    assert (paper.steps, paper.batch_size, paper.evaluate, paper.levels) == (50_000, 60, 100, 21)
    assert (paper.scope.rate, paper.scope.output) == (0.2, 0.1)
    assert paper.rule.describe()["lr"] == 1.2e-3
    assert repr(paper.init) == "xavier()"
    assert ticket_runs.plan_of("quick", 10).control_levels == (TWENTY_ONE, MATCHED)


def test_the_experiment_in_miniature(stored: Stored) -> None:
    plan = Plan(
        scope=Scope(), levels=2, controls=("reinit", "dense"), replicates=2, steps=6, evaluate=3,
        batch_size=20,
    )  # fmt: skip
    rows = ticket_runs.table(lottery(digits_task(mlp(64, 6, 5, 10)), plan, progress=False), "digits")
    assert rows.equals(stored({"runs": rows})["runs"])
    assert set(rows) == set(planted()["runs"])
    assert rows.accuracy.between(0, 100).all()
