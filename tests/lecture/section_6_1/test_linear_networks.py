"""C1: Baldi and Hornik's minimum, a small run, and the judge on planted minima."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.lecture.claim import Lab
from losslab.lecture.section_6_1 import linear_networks as c

HOLDS, FAILS = "holds", "does not hold"


@pytest.fixture(scope="module")
def tables():
    return c.evidence(Lab(), c.Sizes((2, 3), 3, 2, 300, 30))


def test_small_run(verdicts, tables):
    found = verdicts(dataclasses.replace(c.C1, combine=lambda findings: findings[0].verdict), tables)
    assert found["W = 0 with three or more layers: largest |eigenvalue|"] == HOLDS
    minima = tables["minima"]
    assert minima.certified.mean() > 0.9
    assert minima[minima.certified].excess.abs().max() < 1e-9
    assert tables["origin"].kind.tolist() == ["strict saddle", "flat"]


def test_the_global_minimum_is_that_of_the_best_matrix_of_the_rank():
    x, y = c.regression()
    free = torch.linalg.lstsq(x, y).solution
    assert c.least(x, y, 5) == pytest.approx(float((x @ free - y).square().sum() / (2 * len(x))))
    rng = np.random.default_rng(0)
    for _ in range(20):
        left, right = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((8, 3), (3, 5)))
        best = left @ torch.linalg.lstsq(x @ left, y).solution
        assert c.least(x, y, 3) <= float((x @ best - y).square().sum() / (2 * len(x)))
        assert c.least(x, y, 3) <= float((x @ left @ right - y).square().sum() / (2 * len(x)))


def test_paths_end_in_both_valleys_and_at_the_saddle():
    ends = c.descents().groupby("path", sort=False).last()
    assert np.allclose((ends.a * ends.b).iloc[:2], 1, atol=0.01)
    assert np.allclose(ends.iloc[2][["a", "b"]].astype(float), 0, atol=0.01)


def planted(bad=0, bent=1.0, curvature=0.0):
    runs = np.arange(204)
    minima = [
        pd.DataFrame(
            {
                "depth": depth,
                "shape": "wide",
                "scale": 1.0,
                "certified": True,
                "smallest": 1e-12,
                "largest": 1.0,
            }
            | {"excess": np.where(runs < (bad if depth == 3 else 0), 0.1, 1e-12)}
        )
        for depth in (2, 3, 4)
    ]
    saddles = pd.DataFrame(
        {"depth": 2, "shape": "wide", "gradient": 1e-12, "excess": 0.5, "index": runs % 7}
    ).assign(kind=np.where(runs < bent * 204, "strict saddle", "minimum"))
    origin = pd.DataFrame(
        {"depth": [2, 3, 4], "gradient": 0.0, "curvature": [1.0, curvature, curvature], "kind": "flat"}
    )
    paths = pd.DataFrame({"path": "p", "a": [1.0, 0.5], "b": [1.0, 2.0]})
    return {
        "minima": pd.concat(minima, ignore_index=True),
        "saddles": saddles,
        "origin": origin,
        "paths": paths,
    }


@pytest.mark.parametrize(
    ("change", "failing", "overall"),
    [
        ({}, set(), HOLDS),
        ({"bad": 1}, {c.title(3)}, "mixed"),
        ({"bent": 0.2}, {"critical points above the global minimum have negative curvature"}, HOLDS),
        ({"curvature": 0.1}, {"W = 0 with three or more layers: largest |eigenvalue|"}, HOLDS),
    ],
)
def test_judge(verdicts, change, failing, overall):
    found = verdicts(c.C1, planted(**change))
    assert {name for name, verdict in found.items() if verdict == FAILS and name != "all"} == failing
    assert found["all"] == overall


def test_too_few_minima_decide_nothing(verdicts):
    tables = planted()
    tables["minima"] = tables["minima"].groupby("depth").head(50)
    assert verdicts(c.C1, tables)["all"] == "undecided"
