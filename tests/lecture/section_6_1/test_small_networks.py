"""C3: the published bad minimum, the closed form, a small run, and the judge on planted ends."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.curvature.critical import examine
from losslab.engine import Objective, Points
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_1 import small_networks as c
from losslab.lecture.section_6_1 import students

HOLDS, FAILS = "holds", "does not hold"


def spurious():
    """The bad minimum for seven students of seven units that Safran, Yehudai and Shamir (2021) publish."""
    w = torch.full((7, 7), -0.0350801559, dtype=torch.float64)
    w.fill_diagonal_(0.9969227988)
    w[:, 0] = 0.2616910758
    w[0] = 0.1859910463
    w[0, 0] = -0.6327039049
    return w


def test_the_published_point_is_a_bad_minimum():
    objective = Objective(students.student_task(7, 7))
    points = Points({"weight": spurious()[None]}, {})
    value, gradient = objective.gradient(points)
    assert value.item() == pytest.approx(0.023203, abs=1e-6)
    assert gradient.matrix().abs().max() < 1e-10
    found = examine(objective, points)
    assert found.kinds == ["minimum"]
    assert found.smallest[0] > 0.01
    turned = Points({"weight": spurious().T[None]}, {})  # neurons in columns: no critical point
    assert objective.gradient(turned)[1].matrix().abs().max() > 0.1


def test_the_closed_form_is_the_expectation():
    generator = torch.Generator().manual_seed(0)
    model = students.Students(4, 3)
    with torch.no_grad():
        model.weight.normal_(generator=generator)
    x = torch.randn(400_000, 3, generator=generator, dtype=torch.float64)
    apart = (x @ model.weight.T).relu().sum(1) - x.relu().sum(1)
    losses = apart.square() / 2
    assert float(model()) == pytest.approx(float(losses.mean()), abs=5 * float(losses.std()) / 400_000**0.5)


def test_the_teacher_is_a_minimum_with_loss_and_gradient_zero():
    objective = Objective(students.student_task(5, 5))
    found = examine(objective, Points({"weight": torch.eye(5, dtype=torch.float64)[None]}, {}))
    assert found.values.abs().max() < 1e-14
    assert found.gradient_norms.max() < 1e-14
    assert found.kinds == ["minimum"]


@pytest.fixture(scope="module")
def tables():
    sizes = c.Sizes((4,), 4, 200, 40, {c.PENALTY: (2,)}, 4, 600, 3)
    return c.evidence(Lab(), sizes)


def test_small_run(tables, stored):
    kept = stored(tables)
    assert kept["students"].certified.all()
    assert (kept["students"].value >= -1e-12).all()
    assert kept["digits"].certified.any()
    assert set(kept["xor"].activation) == {"sigmoid", "tanh", "relu"}


def planted(share=0.3, digits=0.3, certified=1.0):
    runs = np.arange(200)
    ends = [
        pd.DataFrame({"k": k, "certified": True, "bad": runs < share * 200}).assign(
            value=np.where(runs < share * 200, 0.02, 0.0)
        )
        for k in (6, 10, 12)
    ]
    small = [
        pd.DataFrame({"penalty": c.PENALTY, "width": w, "certified": runs < certified * 200}).assign(
            value=np.where(runs < digits * 200, 0.4, 0.3)
        )
        for w in c.WIDTHS
    ]
    spectra = pd.DataFrame(
        {"k": 12, "kind": ["bad", "global"] * 5, "minimum": 0, "eigenvalue": np.linspace(0.1, 3, 10)}
    )
    xor = pd.DataFrame({"activation": "relu", "certified": True, "value": 0.1}, index=runs)
    return {
        "students": pd.concat(ends, ignore_index=True),
        "digits": pd.concat(small, ignore_index=True),
        "spectra": spectra,
        "xor": xor,
    }


@pytest.mark.parametrize(
    ("change", "overall"),
    [
        ({}, HOLDS),
        ({"share": 0.0}, "mixed"),
        ({"digits": 0.0}, "mixed"),
        ({"share": 0.0, "digits": 0.0}, FAILS),
        ({"certified": 0.1, "digits": 0.0}, "undecided"),
    ],
)
def test_judge(verdicts, change, overall):
    found = verdicts(c.C3, planted(**change))
    assert found["all"] == overall
    assert next(iter(found)) == c.student_title(10)
