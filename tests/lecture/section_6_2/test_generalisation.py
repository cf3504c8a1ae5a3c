"""C12: runs are read at the same training loss, and the judge on planted accuracies."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from losslab.lecture.claim import Lab
from losslab.lecture.section_6_2 import generalisation as g
from losslab.lecture.section_6_2.matched import ARMS, Problem, fitted

HOLDS, FAILS = "holds", "does not hold"
EASY = Problem(40, 0.0, 16, 0.1)


@pytest.mark.parametrize("arm", ["GD", "B = 8", "GD + noise"])
def test_a_run_is_read_where_it_first_is_at_the_target(arm):
    run, rows = fitted(EASY, ARMS[arm], [0.3, 0.3, 1e-4], [0, 1, 0], updates=200, every=10)
    assert np.isfinite(rows.updates).tolist() == [True, True, False]
    assert (rows.train_loss[:2] <= 0.1).all()
    assert rows.train_loss[2] > 1
    before = run.history.dropna(subset="train_loss")
    for member in (0, 1):
        loss = before[before.member == member].set_index("step").train_loss
        at = rows.updates[member]
        assert loss[at] == pytest.approx(rows.train_loss[member], rel=1e-4)
        assert (loss[loss.index < at] > 0.1).all()


def test_wrong_labels_are_a_share_and_fixed():
    clean, noisy = (Problem(200, noise, 8, 0.1).task().train.all()[1] for noise in (0.0, 0.2))
    assert 0.1 < (clean != noisy).float().mean() < 0.25
    assert (noisy == Problem(200, 0.2, 8, 0.1).task().train.all()[1]).all()


def test_small_run(stored):
    sizes = g.Sizes((EASY,), ("GD", "B = 8"), 1, 2, 60)
    kept = stored(g.evidence(Lab(), sizes))
    assert set(kept["ends"].arm) == {"GD", "B = 8"}
    assert kept["ways"].epoch.max() >= 1
    assert [f.n for f in g.judge(kept)] == [2, 2]


def planted(gain=1.0, smallest=None, early=0.0):
    seeds, ends, ways = np.arange(10), [], []
    for noise in (0.0, 0.2):
        problem = str(Problem(200, noise, 0, 0.0))
        for arm in ("GD", "B = 32", "B = 8"):
            better = gain if arm == "B = 32" else gain if smallest is None else smallest
            test = 90 + 0.01 * seeds + (0 if arm == "GD" else better)
            told = {"problem": problem, "arm": arm}
            rows = {"seed": seeds, "lr": 0.1, "at_edge": False, "updates": 100.0, "epochs": 4.0, "test": test}
            ends.append(pd.DataFrame(rows).assign(**told))
            for step in (0, 4, 100):
                rows = {"seed": seeds, "step": step, "test": 90 + early, "loss": 0.1, "epoch": float(step)}
                ways.append(pd.DataFrame(rows).assign(**told))
    return {"ends": pd.concat(ends, ignore_index=True), "ways": pd.concat(ways, ignore_index=True)}


@pytest.mark.parametrize(
    ("change", "overall"),
    [({}, HOLDS), ({"gain": 0.1}, FAILS), ({"gain": -1.0}, FAILS), ({"smallest": 0.0}, "mixed")],
)
def test_judge(verdicts, change, overall):
    found = verdicts(g.C12, planted(**change))
    assert found["all"] == overall
    assert len([name for name in found if ": test accuracy" in name]) == 4


def test_the_same_epochs_are_context(verdicts):
    name = "200 images, 0 % wrong labels: B = 8 less gradient descent after as many epochs"
    assert verdicts(g.C12, planted(early=-20.0))[name] == HOLDS
    found = verdicts(g.C12, planted(early=5.0))
    assert (found[name], found["all"]) == (FAILS, HOLDS)
