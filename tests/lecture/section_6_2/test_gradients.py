"""C8 and C9: sample gradients against autograd, small experiments, the judges on planted evidence."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.lecture.section_6_2 import gradients as g
from losslab.lecture.section_6_2.samples import batch_gradient, sample_gradients
from losslab.tasks import digits_task, mlp

HOLDS, FAILS = "holds", "does not hold"


def test_sample_gradients_are_those_of_one_sample_batches():
    task = digits_task(mlp(64, 4, 10))
    task = task.replace(train=task.train.head(20))
    module = g.fresh(task)
    each = sample_gradients(task, module)
    alone = torch.stack([batch_gradient(task, module, torch.tensor([i])) for i in range(20)])
    assert torch.allclose(each, alone, rtol=1e-12, atol=1e-15)


def test_c8_small(verdicts):
    tables = g.evidence_c8(seeds=2, checkpoints=(1, 3), groups=20, draws=200)
    table = tables["gradients"]
    assert sorted(zip(table.seed, table.step, strict=True)) == sorted(
        2 * [(seed, step) for seed in (0, 1) for step in (1, 3)]
    )
    assert table.error.max() < 1e-12
    found = verdicts(g.C8, tables)
    assert found[g.EXACT] == "undecided"  # 8 instances are not 100
    assert found[g.CLOSE] == FAILS


@pytest.fixture
def planted_c8():
    rows = [
        {"model": "softmax", "seed": seed, "step": step, "error": 1e-15, "gradient": 1.0, "noise": 9.0}
        for seed in range(50)
        for step in (1, 10)
    ]
    draws = pd.DataFrame({"model": "softmax", "seed": range(50), "projection": 1 + 0.01 * np.cos(range(50))})
    return {"gradients": pd.DataFrame(rows), "draws": draws}


def test_c8_judge(verdicts, planted_c8):
    drawn = "softmax: random draws average to the gradient"
    assert verdicts(g.C8, planted_c8) == {g.EXACT: HOLDS, drawn: HOLDS, g.CLOSE: FAILS, "all": HOLDS}
    worse = planted_c8 | {"draws": planted_c8["draws"].assign(projection=lambda t: t.projection + 0.1)}
    assert verdicts(g.C8, worse)["all"] == "mixed"
    planted_c8["gradients"].loc[7, "error"] = 1e-11
    planted_c8["gradients"]["noise"] = 0.5
    planted_c8["draws"]["projection"] += 0.1
    assert verdicts(g.C8, planted_c8) == {g.EXACT: FAILS, drawn: FAILS, g.CLOSE: HOLDS, "all": FAILS}


def test_variance_of_all_samples_of_a_single_one_is_sigma_squared():
    table = g.squared_errors("softmax", [1, 1000], draws=400)
    drawn = table[table.replacement].groupby("size").ratio.mean()
    assert drawn[1] == pytest.approx(1, rel=0.15)
    assert drawn[1000] == pytest.approx(1 / 1000, rel=0.15)
    assert table[~table.replacement & (table["size"] == 1000)].ratio.max() < 1e-20


def test_c9_small(verdicts):
    tables = g.evidence_c9(["softmax"], [1, 30, 500, 1000], draws=300, instances=3)
    assert tables["steps"].error.max() < 1e-12
    epochs = tables["epochs"]
    assert epochs[~epochs.batch_norm].error.max() < 1e-12
    assert epochs[epochs.batch_norm].error.min() > 0.01
    assert verdicts(g.C9, tables)["softmax: factor (N − B)/(N − 1) without replacement, B = N"] == HOLDS


def planted_c9(slope=-1.0, half=1.0, rest=0.0, engine=0.0, norm=0.04):
    """Errors with a spread of 10 %, the same for every size, around the laws as they are told to be."""
    n, spread = 1000, 1 + 0.1 * np.cos(np.arange(200))
    rows = []
    for size in (1, 10, 100, 500, 1000):
        shrunk = {500: half * g.factor(500, n), 1000: rest}.get(size, g.factor(size, n))
        for replacement, mean in ((True, float(size) ** slope), (False, shrunk / size)):
            rows.append(
                pd.DataFrame(
                    {"replacement": replacement, "size": size, "examples": n, "ratio": mean * spread}
                ).assign(model="softmax")
            )
    seeds = range(100)
    epochs = [pd.DataFrame({"batch_norm": bn, "seed": seeds, "error": norm * bn}) for bn in (False, True)]
    return {
        "errors": pd.concat(rows, ignore_index=True),
        "steps": pd.DataFrame({"model": "softmax", "seed": seeds, "error": engine}),
        "epochs": pd.concat(epochs, ignore_index=True),
    }


def test_c9_judge_holds(verdicts):
    assert set(verdicts(g.C9, planted_c9()).values()) == {HOLDS}


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"slope": -0.8}, "softmax: variance ∝ 1/B with replacement"),
        ({"half": 1.2}, "softmax: factor (N − B)/(N − 1) without replacement, B = N/2"),
        ({"rest": 0.2}, "softmax: factor (N − B)/(N − 1) without replacement, B = N"),
        ({"engine": 1e-3}, "the engine's step is minus the mean over its batch"),
        ({"norm": 1e-9}, "with batch norm they do not"),
    ],
)
def test_c9_judge_fails(verdicts, change, finding):
    found = verdicts(g.C9, planted_c9(**change))
    assert [name for name, verdict in found.items() if verdict == FAILS] == [finding]
