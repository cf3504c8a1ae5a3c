"""C4: sizes, half success, a small run, and the judge on planted runs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from losslab.lecture.claim import Lab
from losslab.lecture.section_6_1 import width as c
from losslab.tasks import mlp

HOLDS, FAILS = "holds", "does not hold"


def test_the_number_of_parameters():
    for width in (1, 3, 32):
        assert c.parameters(width) == sum(p.numel() for p in mlp(64, width, 10)().parameters())


def test_random_labels_are_drawn_once_and_differ():
    true, drawn, again = (c.pictures(name).all()[1] for name in (*c.LABELS, "random labels"))
    assert (drawn == again).all()
    assert 0.02 < (true == drawn).float().mean() < 0.2


def test_half_success():
    assert c.half_success(pd.Series({1.0: 0.0, 2.0: 0.25, 8.0: 0.75})) == pytest.approx(4.0)
    assert c.half_success(pd.Series({3.0: 0.9})) == pytest.approx(3.0)
    assert c.half_success(pd.Series({1.0: 0.0, 2.0: 0.4})) == np.inf


@pytest.fixture(scope="module")
def tables():
    return c.evidence(Lab(), c.Sizes((1, 32), 2, 400, 2, 50))


def test_small_run(tables, verdicts):
    fits = tables["fits"]
    assert fits[(fits.width == 32) & (fits.labels == "true labels")].solved.all()
    assert not fits[fits.width == 1].solved.any()
    assert set(verdicts(c.C4, tables)) >= {c.success_title(labels) for labels in c.LABELS}


def planted(solved=1.0, one_cell=1.0, half=4, bad=0.0):
    runs, rows = np.arange(20), []
    for labels in c.LABELS:
        for activation in ("relu", "tanh"):
            for width in (1, 2, 4, 8, 32, 64):
                share = solved if width >= 32 else float(width >= half)
                if (labels, activation, width) == ("random labels", "relu", 32):
                    share = min(share, one_cell)
                rows.append(
                    pd.DataFrame({"labels": labels, "activation": activation, "width": width, "seed": runs})
                    .assign(solved=runs < share * 20, train_loss=0.01)
                )  # fmt: skip
    students = [
        pd.DataFrame({"students": 10 + extra, "bad": runs < (0.5 if extra == 0 else bad) * 20})
        for extra in (0, 1, 2)
    ]
    students = [pd.concat([table] * 4) for table in students]
    return {"fits": pd.concat(rows, ignore_index=True), "students": pd.concat(students, ignore_index=True)}


@pytest.mark.parametrize(
    ("change", "overall"),
    [({}, HOLDS), ({"solved": 0.2}, FAILS), ({"one_cell": 0.8}, "mixed"), ({"half": 32}, HOLDS)],
)
def test_judge(verdicts, change, overall):
    found = verdicts(c.C4, planted(**change))
    assert found["all"] == overall


def test_the_threshold_and_the_students_are_judged_apart(verdicts):
    near, far = (verdicts(c.C4, planted(half=half)) for half in (4, 32))
    name = f"true labels: {c.THRESHOLD}"
    assert (near[name], far[name]) == (HOLDS, FAILS)
    assert near[c.student_title(2)] == HOLDS
    assert verdicts(c.C4, planted(bad=0.9))[c.student_title(2)] == FAILS
