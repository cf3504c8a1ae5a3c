"""C63: a common start, a small run, and the judge on planted barriers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.lecture.claim import Lab
from losslab.lecture.section_6_6 import isolated as c
from losslab.lecture.section_6_6 import pairs as p

HOLDS, FAILS = "holds", "does not hold"


def test_pairs_start_alike_and_part():
    run = p.minima(4, 2, 0)
    start, later = (c.spawned(run, 2, steps).points.matrix() for steps in (0, 3))
    assert torch.equal(start[0], start[1])
    assert torch.equal(start[0], run.points.matrix()[0])
    assert not torch.equal(start[1], start[2])
    assert not torch.equal(later[0], later[1])


def test_small_run(verdicts, monkeypatch):
    monkeypatch.setattr(c, "WIDTH", 4)
    tables = c.evidence(Lab(), c.Sizes((4, 5), 2, 10, 5, 5))
    assert c.looks_isolated("width 4") in verdicts(c.C63, tables)
    assert set(tables["paths"].arm) == {c.APART, c.TOGETHER, c.ORDERED, c.BENT}


def planted(line=1.0, bent=0.001, lost=0):
    pairs = np.arange(10)
    heights = {c.APART: line, c.TOGETHER: 0.01, c.ORDERED: 0.2, c.BENT: bent}
    rows = []
    for width in (16, c.WIDTH):
        for arm, height in heights.items():
            table = pd.DataFrame({"pair": pairs, "arm": arm, "test_error_barrier": 0.001})
            table = p.labelled(table, width, f"width {width}").assign(train_loss_place=0.5)
            low = (arm == c.APART) & (pairs < lost)
            rows.append(table.assign(train_loss_barrier=np.where(low, 0.1, height)))
    ways = [
        pd.DataFrame({"t": [0, 0.5, 1], "train_loss": [0.0, height, 0.0], "pair": i, "arm": arm})
        for arm, height in heights.items()
        for i in pairs
    ]
    x, y = (a.flatten() for a in np.meshgrid(np.linspace(0, 1, 5), np.linspace(0, 1, 5)))
    grid = pd.DataFrame({"x": x, "y": y, "train_loss": 0.01 + (x - 0.5) ** 2, "kind": "grid"})
    marks = pd.DataFrame({"x": [0, 1, 0.5], "y": [0, 0, 0.8], "train_loss": 0.1, "kind": "mark"})
    return {
        "paths": pd.concat(rows, ignore_index=True),
        "courses": pd.concat(ways, ignore_index=True),
        "plane": pd.concat([grid, marks], ignore_index=True),
    }


@pytest.mark.parametrize(
    ("change", "verdict"),
    [({}, HOLDS), ({"lost": 1}, "undecided"), ({"line": 0.1}, FAILS), ({"bent": 0.5}, FAILS)],
)
def test_judge(verdicts, change, verdict):
    assert verdicts(c.C63, planted(**change))["all"] == verdict


@pytest.mark.parametrize(("lost", "verdict"), [(0, HOLDS), (1, "mixed"), (5, FAILS)])
def test_five_pairs_are_compared_pair_by_pair(verdicts, lost, verdict):
    tables = planted(lost=lost)
    rows = tables["paths"]
    rows = p.labelled(rows[(rows.width == c.WIDTH) & (rows.pair < 5)], 8, "a net", 5, "small")
    assert verdicts(c.C63, tables | {"paths": rows})["all"] == verdict


def test_the_imagined_picture_has_holes_where_the_networks_stand():
    seen = p.measured(planted()["plane"])
    drawn = c.imagined(seen)
    known, made = np.asarray(seen.values), np.asarray(drawn.values)
    assert made[0, 0] == pytest.approx(known.min(), rel=0.01)
    assert made[0, 2] > 10 * made[0, 0]
    assert made.max() <= np.quantile(known, 0.95) * (1 + 1e-12)
    assert not drawn.ways
