"""C7: what is averaged, a small run, and the judge on planted barriers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.lecture.claim import Lab
from losslab.lecture.section_6_1 import averages as c
from losslab.lecture.training import trained
from losslab.paths import permutation_spec
from losslab.rules import Adam
from losslab.tasks import digits_task, mlp

HOLDS, FAILS = "holds", "does not hold"


@pytest.fixture(scope="module")
def run():
    return trained(digits_task(mlp(64, 6, 10)), Adam(lr=0.01), seeds=2, steps=40, batch_size=100)


def test_barriers_are_those_of_the_averages(run):
    spec = permutation_spec(run)
    rows = c.barriers(run, spec, 3)
    own = run.points.select([1])
    copy = c.permuted(spec, own, c.ALL, range(1002, 1003))
    network, middle = (p.load_into(run[0], 0) for p in (own, own.at((own.matrix() + copy.matrix()) / 2)))
    x, y = run.task.train.all()
    with torch.no_grad():
        high = torch.nn.functional.cross_entropy(middle(x), y)
        low = torch.nn.functional.cross_entropy(own.load_into(network, 0)(x), y)
    found = rows[(rows.network == 1) & (rows.kind == c.ALL)].barrier.iloc[2]
    assert found == pytest.approx(float(high - low), rel=1e-4)


def test_two_units_change_places(run):
    spec = permutation_spec(run)
    for seed in range(5):
        ((group, order),) = c.exchanged(spec, seed).items()
        assert (order != torch.arange(spec.groups[group])).sum() == 2


def test_small_run(verdicts):
    tasks = {4: digits_task(mlp(64, 4, 4, 10))}
    tables = c.evidence(tasks, c.Sizes(2, {4: 5}, 30, 100), Lab())
    assert c.title(4) in verdicts(c.C7, tables)
    ends = tables["segments"][tables["segments"].t.isin([0.0, 1.0])]
    assert np.allclose(ends[ends.t == 0].loss, ends[ends.t == 1].loss, rtol=1e-5)


def planted(full=1.0, two=0.01):
    nets = np.repeat(np.arange(10), 50)
    rows = [
        pd.DataFrame({"barrier": height, "loss": 0.1, "network": nets, "kind": kind, "width": width})
        for width in (16, 64)
        for kind, height in ((c.ALL, full), (c.TWO, two))
    ]
    line = [
        pd.DataFrame({"t": [0.0, 0.5, 1.0], "loss": [0.1, 0.1 + full, 0.1]}).assign(
            network=net, kind=kind, width=width
        )
        for width in (16, 64)
        for kind in (c.ALL, c.TWO)
        for net in range(3)
    ]
    return {"averages": pd.concat(rows), "segments": pd.concat(line)}


@pytest.mark.parametrize(("full", "two", "verdict"), [(1.0, -0.1, HOLDS), (0.05, 1.0, FAILS)])
def test_judge(verdicts, full, two, verdict):
    assert verdicts(c.C7, planted(full, two))["all"] == verdict
