"""C53: a small sweep, and the judge on planted losses."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.lecture.section_6_5 import gains as g


def test_starts_are_the_seeds_weights_times_the_gain() -> None:
    task = g.task_of(g.ARMS["SGD with batch norm"])
    points = g.scaled(task, [1.0, 0.5, 1.0], [4, 4, 5])
    for name, weight in points.weights.items():
        if weight.dim() == 3:
            assert torch.equal(weight[1], 0.5 * weight[0])
            assert not torch.equal(weight[2], weight[0])
        elif name.endswith("weight"):
            assert (weight == 1).all()  # gamma keeps its start


def test_layers_at_start() -> None:
    rows = g.layers_at_start((0.01, 1.0, 100.0), seeds=3, examples=50).groupby("gain")
    active = rows.active.mean()
    assert active[0.01] == 1.0
    assert 0.6 < active[1.0] < 0.98
    assert active[100.0] < 0.05
    assert rows["layer"].max().tolist() == [g.HIDDEN] * 3
    small = rows.get_group(0.01).groupby("layer")["std"].mean()
    assert small.iloc[-1] / small.iloc[-2] == pytest.approx(0.01, rel=0.15)


@pytest.mark.parametrize("arm", g.ARMS)
def test_a_small_sweep(verdicts, monkeypatch, arm) -> None:
    grid = g.ARMS[arm].grid
    monkeypatch.setitem(g.ARMS, arm, g.ARMS[arm]._replace(grid=grid[:5]))
    runs, tuning = g.sweep(arm, (0.1, 1.0), seeds=2, steps=12)
    assert runs.groupby("gain").seed.nunique().tolist() == [2, 2]
    assert np.isfinite(runs.train_loss).all()
    assert set(tuning.columns) == {"lr", "score", "gain", "at_edge", "arm"}
    assert tuning.groupby("gain").lr.count().min() >= 5
    if arm == "SGD":
        start = g.layers_at_start((0.1, 1.0), seeds=2, examples=20)
        verdicts(g.C53, {"start": start, "runs": runs, "tuning": tuning})


def planted(best=1.0, worse=10.0):
    """Losses least at one gain, rising to ``worse`` times that at both ends; active shares falling."""
    active = dict(zip(g.GAINS, (1, 1, 0.99, 0.95, 0.85, 0.6, 0.45, 0.3, 0.15, 0.1), strict=True))
    layers = [
        pd.DataFrame({"gain": gain, "seed": range(10), "layer": layer, "std": 0.5, "active": share})
        for gain, share in active.items()
        for layer in (1, 2)
    ]
    runs = [
        pd.DataFrame({"gain": gain, "seed": range(10), "arm": "SGD", "lr": 0.1}).assign(
            train_loss=(1.0 if gain == best else worse if not 0.1 < gain < 5 else 2.0)
            * (1 + 0.01 * np.arange(10))
        )
        for gain in g.GAINS
    ]
    tuning = pd.DataFrame({"arm": "SGD", "gain": g.GAINS, "lr": 0.1, "score": 1.0, "at_edge": False})
    return {"start": pd.concat(layers), "runs": pd.concat(runs), "tuning": tuning}


WHERE = "the least training loss starts from a gain with 50 to 98 % of the units active"
LARGE = "gain 10 ends 3 times worse"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, {WHERE: "holds", LARGE: "holds", "all": "holds"}),
        ({"best": 2.0}, {WHERE: "does not hold", "all": "mixed"}),
        ({"worse": 1.5}, {LARGE: "does not hold", "all": "mixed"}),
        ({"worse": math.inf}, {LARGE: "holds", "all": "holds"}),
        ({"best": 0.1, "worse": 1.5}, {WHERE: "does not hold", "all": "does not hold"}),
    ],
)
def test_judge(verdicts, change, wanted) -> None:
    found = verdicts(g.C53, planted(**change))
    assert {name: found[name] for name in wanted} == wanted


def test_rates_at_the_edge_are_told() -> None:
    tables = planted()
    tables["tuning"].loc[0, "at_edge"] = True
    assert "at the edge of the search for gain 0.03" in g.judge(tables)[1].note
