"""C13: sharpness against a dense Hessian, a small run, and the judge on planted sharpness."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.curvature import Hessian
from losslab.engine import Objective, Points
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_2 import sharpness as s
from losslab.lecture.section_6_2.matched import Problem

HOLDS, FAILS = "holds", "does not hold"


def test_sharpness_is_the_largest_eigenvalue():
    task = Problem(30, 0.0, 5, 0.1).task()
    points = Points.from_modules([task.model().double() for _ in range(3)])
    objective = Objective(task)
    values, vectors = s.sharpness(objective, points)
    dense = torch.linalg.eigvalsh(Hessian(objective, points).dense())[:, -1]
    np.testing.assert_allclose(values, dense.numpy(), rtol=1e-3)
    again, _ = s.sharpness(objective, points, vectors)
    np.testing.assert_allclose(again, values, rtol=1e-3)


def test_small_run(stored):
    sizes = s.Sizes(Problem(40, 0.0, 8, 0.5), 2, 100, 40, (0.1, 0.2), 30, 6)
    kept = stored(s.evidence(Lab(), sizes))
    runs = kept["runs"]
    assert len(runs) == 3 * len(s.RATES) * 2
    arrived = runs[np.isfinite(runs.updates)]
    assert len(arrived)
    assert (arrived.sharpness > 0).all()
    assert runs[np.isinf(runs.updates)].sharpness.isna().all()
    edge = kept["edge"]
    assert edge.groupby("lr").step.max().tolist() == [30, 30]
    assert (edge.sharpness > 0).all()
    spectra = kept["spectra"]
    assert 2 <= spectra.step.nunique() <= s.RIDGES
    first = spectra[spectra.step == spectra.step.min()]
    assert np.trapezoid(first.density, first.eigenvalue) == pytest.approx(64 * 6 + 6 + 42 + 70, rel=0.01)


def planted(change=-0.4, hot=None, ratio=1.0, lost=0):
    seeds, rows = np.arange(12), []
    for lr in s.RATES:
        for name, batch in (("GD", 200), ("B = 32", 32), ("B = 8", 8)):
            here = 0.0 if name == "GD" else change if hot is None or lr == s.RATES[-1] else hot
            height = 10 * np.exp(here * (2 if batch == 8 else 1) - 0.2 * np.log(lr) + 0.001 * seeds)
            table = pd.DataFrame({"seed": seeds, "lr": lr, "arm": name, "batch": batch, "updates": 50.0})
            table = table.assign(temperature=lr / batch, sharpness=height)
            if name == "B = 8":
                table.loc[: lost - 1, ["updates", "sharpness"]] = [np.inf, np.nan]
            rows.append(table)
    steps = np.arange(0, 101, 10)
    edge = [
        pd.DataFrame({"lr": lr, "step": steps, "loss": 0.1, "sharpness": ratio * 2 / lr}) for lr in (0.1, 0.2)
    ]
    x = np.linspace(-2.0, 24.0, 53)
    spectra = [
        pd.DataFrame({"eigenvalue": x, "density": np.exp(-(x**2)), "step": at, "lr": 0.1}) for at in (1, 100)
    ]
    return {
        "runs": pd.concat(rows, ignore_index=True),
        "edge": pd.concat(edge, ignore_index=True),
        "spectra": pd.concat(spectra, ignore_index=True),
    }


@pytest.mark.parametrize(
    ("change", "overall"),
    [({}, HOLDS), ({"change": 0.4}, FAILS), ({"hot": 0.0}, "mixed"), ({"lost": 5}, "undecided")],
)
def test_judge(verdicts, change, overall):
    found = verdicts(s.C13, planted(**change))
    assert found["all"] == overall
    assert found[s.EDGE] == HOLDS


def test_the_edge_of_stability_is_a_control(verdicts):
    found = verdicts(s.C13, planted(ratio=0.5))
    assert (found[s.EDGE], found["all"]) == (FAILS, HOLDS)
