"""C5: the symmetries as they are applied, a small run, and the judge on planted losses."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.engine import Points
from losslab.lecture.section_6_1 import permutations as c
from losslab.paths import permutation_spec

HOLDS, FAILS = "holds", "does not hold"


def test_incoming_leaves_what_goes_out():
    task = c.task_of("tanh")
    spec = permutation_spec(task)
    points = Points.from_modules([task.model()])
    order = spec.random(1, ["0"])
    moved = c.incoming(spec).permute(points, order)
    assert torch.equal(moved["0.weight"], points["0.weight"][:, order["0"]])
    assert torch.equal(moved["0.bias"], points["0.bias"][:, order["0"]])
    assert torch.equal(moved["2.weight"], points["2.weight"])


def test_the_number_of_copies():
    rows = c.copies((3, 5))
    assert np.allclose(10**rows.decades, [6, 120, 6 * 2**3, 120 * 2**5])
    assert math.isclose(c.copies((1,)).decades[0], 0, abs_tol=1e-12)


def test_small_run(verdicts):
    found = verdicts(c.C5, c.evidence(3))
    assert FAILS not in [found[c.title(name)] for name in c.NETWORKS]


def planted(change=1e-15, control=0.1):
    rows = [
        pd.DataFrame({"network": name, "before": np.full(100, 2.0)}).assign(
            **{c.WHOLE: 2 * (1 + change), c.INCOMING: 2 * (1 + control)}
        )
        for name in c.NETWORKS
    ]
    return {"instances": pd.concat(rows, ignore_index=True), "copies": c.copies()}


@pytest.mark.parametrize(("change", "verdict"), [(0.0, HOLDS), (1e-13, HOLDS), (1e-10, FAILS)])
def test_judge(verdicts, change, verdict):
    assert verdicts(c.C5, planted(change))["all"] == verdict


def test_judge_on_a_control_that_changes_nothing(verdicts):
    found = verdicts(c.C5, planted(control=1e-14))
    assert found["incoming weights alone: networks whose loss changes"] == FAILS
    assert found["all"] == HOLDS
