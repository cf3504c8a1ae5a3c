"""C50: the shift in miniature, and the judge on planted evidence."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tests.lecture.evidence import FAILS, HOLDS, MIXED, UNDECIDED

from losslab.layers import he
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_4 import covariate_shift as c
from losslab.lecture.section_6_4.probes import ARMS
from losslab.lecture.tuning import rates
from losslab.tasks import linear_net, mlp

NETWORK = "net"
RATE, LOSS = f"{c.AT_RATE}, {NETWORK}", f"{c.AT_LOSS}, {NETWORK}"


def small(lab: Lab) -> list[c.Setting]:
    relu, linear = c.settings(lab)
    short = {"steps": 6, "every": 3, "batch": 16}
    grid = tuple(rates(0.01, 1.0))
    return [
        replace(relu, factory=he().on(mlp(64, 5, 5, 10)), grid=grid, **short),
        replace(linear, factory=linear_net(32, 32, 32), grid=grid, **short),
    ]


@pytest.fixture(scope="module")
def tables():
    with pytest.MonkeyPatch.context() as patch:
        settings = small(Lab(seeds=2))
        patch.setattr(c, "settings", lambda lab: settings)
        return c.experiment(Lab(seeds=2))


def test_miniature_run(verdicts, tables):
    assert verdicts(c.C50, tables)["all"] == UNDECIDED  # two seeds
    rows = tables["shifts"]
    # Three layers, then two; the first has nothing below it.
    assert rows.groupby(["network", "arm", "seed", "updates"]).size().unique().tolist() == [2, 1]
    assert rows["updates"].unique().tolist() == [0, 3, 6]
    assert rows.groupby("network")["lr"].nunique().eq(1).all()
    assert np.isfinite(rows.drop(columns=["network", "arm"])).all(axis=None)


def test_the_shift_is_that_of_two_gradients_by_hand(tables):
    setting = small(Lab(seeds=2))[0]
    rows = tables["shifts"]
    mine = rows[(rows["network"] == setting.name) & (rows["arm"] == "standard") & (rows["updates"] == 0)]
    task = setting.task(ARMS[0])
    module = setting.train(task, [1.0], [1], 0)[0].train()
    x, y = setting.batch_at(task, "shift", 0)
    weights = list(module.parameters())

    def gradients():
        return torch.autograd.grad(torch.nn.functional.cross_entropy(module(x), y), weights)

    before, lr = gradients(), float(mine["lr"].iloc[0])
    with torch.no_grad():
        for w, g in list(zip(weights, before, strict=True))[:2]:
            w.sub_(lr * g)
    after = gradients()
    g, h = (torch.cat([t.flatten() for t in grads[2:4]]) for grads in (before, after))
    row = mine[(mine["depth"] == 2) & (mine["seed"] == 1)].iloc[0]
    assert row["difference"] == pytest.approx(float((g - h).norm()), rel=1e-4)
    assert row["relative"] == pytest.approx(float((g - h).norm() / g.norm()), rel=1e-4)
    assert row["cosine"] == pytest.approx(float((g @ h) / (g.norm() * h.norm())), rel=1e-4)


def planted(ratio=1.2, seeds=10, lost=(), reduced=0):
    """Shifts with batch norm that are so many times those without; some seeds' are halved."""
    rows = []
    for seed in range(seeds):
        for updates in (0, 20, 40):
            for arm in ("standard", "batch norm"):
                for depth in (2, 3):
                    share = 0.5 if seed < reduced else ratio
                    shift = 0.3 * depth * (share if arm == "batch norm" else 1.0) * (1 + 0.01 * seed)
                    gone = arm == "standard" and seed in lost and updates > 0
                    loss = math.exp(-updates / 20)
                    row = {"relative": shift, "difference": shift, "cosine": 0.5, "norm": 1.0}
                    row = {name: math.nan if gone else value for name, value in row.items()}
                    row |= {"network": NETWORK, "arm": arm, "seed": seed, "updates": updates, "depth": depth}
                    rows.append(row | {"lr": 0.1, "train_loss": math.nan if gone else loss})
    tuning = pd.DataFrame({"network": [NETWORK], "arm": "standard", "lr": 0.1, "score": 1.0})
    return {"shifts": pd.DataFrame(rows), "tuning": tuning.assign(at_edge=False, chosen=True)}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, HOLDS),
        ({"ratio": 0.95}, HOLDS),
        ({"ratio": 0.8}, MIXED),
        ({"ratio": 0.6}, FAILS),
        ({"ratio": 1.2, "reduced": 5}, MIXED),
        ({"ratio": 0.95, "reduced": 9}, FAILS),
        ({"seeds": 9}, UNDECIDED),
    ],
)
def test_judge(verdicts, change, wanted):
    found = verdicts(c.C50, planted(**change))
    assert found == {RATE: wanted, LOSS: wanted, "all": wanted}


def test_a_standard_network_that_diverges_counts_as_shifted_without_end(verdicts):
    assert verdicts(c.C50, planted(lost=range(9)))[RATE] == FAILS
    assert verdicts(c.C50, planted(lost=range(3)))[RATE] == MIXED


def test_the_estimate_is_the_ratio_itself():
    found = c.C50.judge(planted(ratio=0.8))[0]
    assert found.estimate == pytest.approx(math.log(0.8))
    assert found.interval == pytest.approx((math.log(0.8), math.log(0.8)))
    assert "0% of the seeds" in found.note
