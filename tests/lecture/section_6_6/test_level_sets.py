"""C64: the flattest direction, the tables against an oracle, a small run, the judge on planted walks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.lecture.claim import Lab
from losslab.lecture.section_6_6 import level_sets as c

HOLDS, FAILS = "holds", "does not hold"
TINY, SIZES = c.Arm(3, 20, 0.0), c.Sizes(2, 1500, 40)


@pytest.fixture(scope="module")
def tables():
    return c.of_arm(TINY, SIZES)


def test_the_inputs_leave_no_direction_without_examples():
    x, y = c.task_of(TINY).train.all()
    assert x.shape == (20, 20)
    assert set(y.flatten().tolist()) == {-1.0, 1.0}
    x, _ = c.task_of(c.SPARE).train.all()
    joint = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    values = torch.linalg.svdvals(joint)
    assert values[-1] > 0.05 * values[0]


def test_of_a_kernel_a_direction_is_drawn_and_else_the_lowest_taken():
    values = torch.tensor([1e-9, -1e-10, 1.0, 2.0], dtype=torch.float64)
    heading = c.flattest(values, torch.eye(4, dtype=torch.float64), 0)
    assert heading[2:].abs().max() == 0
    assert (heading[:2].abs() > 1e-3).all()
    assert float(heading.norm()) == pytest.approx(1)
    turned = torch.eye(4, dtype=torch.float64)[:, [1, 0, 2, 3]]
    torch.testing.assert_close(c.flattest(values, turned, 0).abs(), heading.abs())
    assert c.flattest(torch.tensor([0.5, 1.0]), torch.eye(2), 0).abs().tolist() == [1.0, 0.0]


def test_walk_and_spectrum_against_the_formulas(tables):
    """Loss and Hessian of the first minimum's numbers, by central differences of a closed form."""
    task = c.task_of(TINY)
    points = c.minima(task, SIZES)
    x, y = (t.numpy() for t in task.train.all())

    def loss(theta):
        w, b, v, a = np.split(theta, [60, 63, 66])
        out = np.tanh(x @ w.reshape(3, 20).T + b) @ v + a
        return float(((out - y[:, 0]) ** 2).mean() / 2)

    theta = points.matrix()[0].numpy()
    row = tables["minima"].iloc[0]
    assert row.loss == pytest.approx(loss(theta), abs=1e-15)
    rng = np.random.default_rng(0)
    v = rng.standard_normal(len(theta))
    v /= np.linalg.norm(v)
    numeric = (loss(theta + 1e-3 * v) - 2 * loss(theta) + loss(theta - 1e-3 * v)) / 1e-6
    values = tables["spectra"].eigenvalue[:67] * row.largest
    assert -1e-6 <= numeric <= values.max() * 1.01
    trace = sum(
        (loss(theta + e) - 2 * loss(theta) + loss(theta - e)) / 1e-6 for e in 1e-3 * np.eye(len(theta))
    )
    assert values.sum() == pytest.approx(trace, rel=1e-3)
    assert row.parameters == 67 == TINY.parameters


def test_a_small_walk_stays_below_its_ceiling(tables):
    rows, walks = tables["minima"], tables["walks"]
    assert (rows.gradient <= c.ARRIVED).all()
    assert (rows.flat > 0.5).all()  # 67 weights, 20 examples
    assert walks.rise.max() <= c.RISE * (1 + 1e-9)
    assert (walks.groupby("seed").distance.max() == rows.set_index("seed").distance).all()
    straight = tables["straight"].groupby("distance").rise.median()
    assert straight.iloc[0] == 0 < straight.iloc[-1]


def test_small_run(verdicts, monkeypatch):
    monkeypatch.setattr(c, "SPARE", TINY)
    monkeypatch.setattr(c, "SCARCE", c.Arm(2, 60, 1e-2))
    tables = c.evidence(Lab(), (c.SPARE, c.SCARCE), SIZES._replace(strides=10))
    claim = c.C64.__class__(**{**vars(c.C64), "combine": lambda findings: "any"})
    assert {c.title(c.SPARE), c.title(c.SCARCE)} <= set(verdicts(claim, tables))


def planted(flat=0.6, distance=1.0, gradient=1e-9, short=0, control=0.1):
    seeds = np.arange(10)
    rows, walks, straight, spectra = [], [], [], []
    for arm in (c.SPARE, c.SCARCE):
        wide = arm == c.SPARE
        far = np.where(seeds < short, 0.1, distance) if wide else np.full(10, control)
        rows.append(
            pd.DataFrame(
                {
                    "seed": seeds,
                    "arm": arm.name,
                    "flat": flat if wide else control,
                    "distance": far,
                    "gradient": gradient,
                    "highest": 1e-4,
                    "loss": 1e-15 if wide else 0.05,
                    "change": 0.3,
                }
            )
        )
        for seed in seeds:
            way = pd.DataFrame({"distance": [0, far[seed]], "rise": [0, 1e-4], "seed": seed, "arm": arm.name})
            walks.append(way)
            straight.append(way.assign(rise=[0, 1.0]))
            spectra.append(pd.DataFrame({"rank": [0.1, 0.9], "eigenvalue": [0, 1.0], "arm": arm.name}))
    parts = {"minima": rows, "walks": walks, "straight": straight, "spectra": spectra}
    return {name: pd.concat(some, ignore_index=True) for name, some in parts.items()}


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, HOLDS),
        ({"short": 1}, "undecided"),
        ({"flat": 0.4}, FAILS),
        ({"distance": 0.4}, FAILS),
        ({"gradient": 1e-6}, FAILS),
    ],
)
def test_judge(verdicts, change, verdict):
    assert verdicts(c.C64, planted(**change))["all"] == verdict


def test_judge_on_a_control_that_is_flat_too(verdicts):
    assert verdicts(c.C64, planted())[c.title(c.SCARCE)] == HOLDS
    found = verdicts(c.C64, planted(control=0.9))
    assert (found[c.title(c.SCARCE)], found["all"]) == (FAILS, HOLDS)
