"""C6: the certified saddles, the detour by an idle unit, a small run, and the judge on planted evidence."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.engine import Objective
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_1 import saddles as c
from losslab.lecture.section_6_1 import walls

HOLDS, FAILS = "holds", "does not hold"
SMALL = c.Sizes((2,), 1, 5, 300, 40, 40, walls.Effort(6, 2, 8, 10, 5))
THREE, FOUR, BITS, MORE = walls.networks()


@pytest.fixture(scope="module")
def pair():
    task = c.task_of(2, 21)
    found = c.minimum_of(task, SMALL, 1)
    assert found is not None
    return task, found[0]


def test_the_targets_are_those_of_a_network_of_this_size(pair):
    task, minimum = pair
    x, y = task.train.all()
    assert x.shape == (100, 2)
    assert float(y.mean()) == pytest.approx(0, abs=1e-12)
    assert float(y.std()) == pytest.approx(1)
    assert float(Objective(task).value(minimum)) < 1e-12


def test_a_saddle_is_a_saddle(pair):
    """No gradient, a way down, higher than the minimum, no higher than the band, and away from both ends."""
    task, minimum = pair
    rows = c.saddles(task, minimum, SMALL._replace(band=150, climb=100))
    assert len(rows) == 1
    row = rows.iloc[0]
    assert row.saddle
    assert row.gradient < c.ARRIVED
    assert row.barrier == row["value"] - row.minimum > 10 * c.TOLERANCE
    assert row.barrier <= row.top - row.minimum + 1e-3
    assert row.away > 0.1


def test_an_idle_unit_lets_units_change_places_for_nothing(pair):
    task, minimum = pair
    wider = c.widened(minimum)
    assert wider["0.weight"].shape == (1, 3, 2)
    x, _ = task.train.all()
    h = torch.tanh(x @ wider["0.weight"][0].T + wider["0.bias"][0])
    own = torch.tanh(x @ minimum["0.weight"][0].T + minimum["0.bias"][0])
    said = h @ wider["2.weight"][0].T, own @ minimum["2.weight"][0].T
    assert torch.equal(*(s.round(decimals=12) for s in said))
    (rise,) = c.detours(task, minimum).rise
    assert rise < c.LEVEL


def test_small_run(verdicts):
    found = verdicts(c.C6, c.evidence(Lab(), SMALL))
    assert found[walls.wall_title(THREE)] != FAILS
    assert found[walls.side_title(BITS)] != FAILS
    assert c.DETOURS in found


def planted(certified=40, rise=1e-16, connected=0, apart=1.0, barrier=0.01, gradient=1e-3):
    pairs = np.arange(40)
    good = pairs < certified
    saddles = pd.DataFrame(
        {
            "units": 2 + pairs % 3,
            "teacher": pairs % 4,
            "saddle": good,
            "gradient": np.where(good, 1e-10, gradient),
            "negative": np.where(good, 1 + pairs % 2, 0),
            "barrier": barrier,
        }
    )
    walled, courses = [], []
    for name, height, sides in ((THREE, 1 / 12, apart), (FOUR, 1 / 12, np.nan), (BITS, 1 / 16, apart)):
        free = np.isnan(sides)
        some = pd.DataFrame({"network": name, "pair": range(10), "height": height, "apart": sides})
        reached = np.arange(10) < (10 if free else connected)
        walled.append(some.assign(connected=reached, highest=0.0 if free else 2 * height))
        for i in range(10):
            loss = [0.0, 0.0 if free else 2 * height, 0.0]
            courses.append(
                pd.DataFrame({"place": [0, 0.5, 1], "loss": loss, "pair": i, "network": name})
            )  # fmt: skip
    x, y = (a.flatten() for a in np.meshgrid(np.linspace(0, 1, 4), np.linspace(0, 1, 4)))
    grid = pd.DataFrame({"x": x, "y": y, "train_loss": 0.1 + x * y, "wall": x - 0.5, "kind": "grid"})
    band = pd.DataFrame({"x": [0, 0.5, 1], "y": [0.5, 0.8, 0.5], "kind": "band"})
    return {
        "saddles": saddles,
        "detours": pd.DataFrame({"rise": np.full(40, rise), "length": 9.0}),
        "walls": pd.concat(walled, ignore_index=True),
        "courses": pd.concat(courses, ignore_index=True),
        "plane": pd.concat([grid, band], ignore_index=True),
    }


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, HOLDS),
        ({"certified": 36}, "undecided"),
        ({"certified": 20}, "undecided"),  # the others did not settle
        ({"certified": 20, "gradient": 1e-10}, FAILS),
        ({"barrier": 1e-6}, FAILS),
    ],
)
def test_judge(verdicts, change, verdict):
    assert verdicts(c.C6, planted(**change))["all"] == verdict


def test_judge_on_a_detour_that_climbs(verdicts):
    found = verdicts(c.C6, planted(rise=1e-3))
    assert (found[c.DETOURS], found["all"]) == (FAILS, HOLDS)


def test_judge_on_a_wall_that_is_passed(verdicts):
    found = verdicts(c.C6, planted(connected=9, apart=0.0))
    assert found[walls.wall_title(THREE)] == found[walls.side_title(THREE)] == FAILS
    assert found[walls.wall_title(FOUR)] == HOLDS
    found = verdicts(c.C6, planted())
    assert found[walls.wall_title(THREE)] == found[walls.side_title(BITS)] == HOLDS
