"""C2: the bound, the counterexample, and the judge on planted evidence."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.engine import Points
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_1 import residual_networks as c

HOLDS, FAILS = "holds", "does not hold"


@pytest.fixture(scope="module")
def tables():
    return c.evidence(Lab(), c.Sizes(30, 6, (2,), 2, 60, 60))


def test_small_run(verdicts, tables):
    found = verdicts(c.C2, tables)
    assert found[c.ANYWHERE] == FAILS
    assert found[c.BOUND] == HOLDS
    assert (tables["counterexample"].gradient == 0).all()


def test_the_gradient_is_that_of_the_paper():
    """Lemma 2.4: df/dA_i = 2 P' E Sigma Q', P and Q the factors above and below."""
    depth, told = 3, c.problems(1, seed=2)
    a = c.inside(depth, 1, 3, 0.8)
    ours = c.objective(depth).gradient(Points({"A": a}, told))[1]["A"][0]
    factors = [torch.eye(5, dtype=torch.float64) + m for m in a[0]]
    error = (factors[2] @ factors[1] @ factors[0] - told["R"][0]) @ told["root"][0] @ told["root"][0].T
    wanted = 2 * (factors[2] @ factors[1]).T @ error
    torch.testing.assert_close(ours[0], wanted, rtol=1e-9, atol=1e-12)


def test_the_printed_bound_is_violated_and_the_corrected_one_met_with_equality():
    model = c.Residual(4, dimension=1)
    with torch.no_grad():
        model.A.fill_(-0.5)
    (gradient,) = torch.autograd.grad(c.excess(model, None), model.A)
    value = float(c.excess(model, None))
    squared = float(gradient.square().sum())
    assert squared == pytest.approx(4 * 4 * 0.5**6 * value)
    assert squared < 4 * 4 * 0.5**3 * value


def test_problems_have_the_determinants_asked_for():
    for turned in (False, True):
        for near in (False, True):
            assert ((torch.linalg.det(c.problems(9, 1, near, turned)["R"]) < 0) == turned).all()


def planted(violated=False, bad=0, at_one=1.0, stall=0.25, reached=1.0):
    runs = np.arange(400)
    bounds = pd.DataFrame({"depth": 4, "tau": 0.5, "gradient": 2.0, "bound": 1.0}, index=runs)
    if violated:
        bounds.loc[3, "bound"] = 2.1
    searches = pd.DataFrame(
        {"depth": 2, "gradient": 1e-9, "tau": 0.5, "excess": np.where(runs < bad, 0.2, 1e-12)}
    )
    descents = [
        pd.DataFrame(
            {"arm": arm, "depth": depth, "kind": ["near I", "κ ≤ 10"] * 10, "tau": 0.6 * 2 / depth}
            | {"excess": np.where(np.arange(20) < reached * 20, 1e-12, 0.5)}
        )
        for arm in ("from 0", "from 0, det R < 0", "from outside")
        for depth in (2, 4, 8, 16)
    ]
    return {
        "bounds": bounds,
        "counterexample": pd.DataFrame({"depth": 2, "gradient": 0.0, "excess": at_one}, index=runs),
        "searches": searches,
        "descents": pd.concat(descents, ignore_index=True),
        "reflection": pd.DataFrame({"depth": [2, 4], "excess": [stall, stall]}),
    }


@pytest.mark.parametrize(
    ("change", "failing", "overall"),
    [
        ({}, {c.ANYWHERE}, "mixed"),
        ({"at_one": 0.0}, set(), HOLDS),
        ({"violated": True}, {c.ANYWHERE, c.BOUND}, "mixed"),
        ({"bad": 100}, {c.ANYWHERE, c.INSIDE}, "mixed"),
        ({"violated": True, "bad": 400}, {c.ANYWHERE, c.BOUND, c.INSIDE}, FAILS),
        ({"stall": 1e-9}, {c.ANYWHERE, c.STALLED}, "mixed"),
    ],
)
def test_judge(verdicts, change, failing, overall):
    found = verdicts(c.C2, planted(**change))
    assert {name for name, verdict in found.items() if verdict == FAILS and name != "all"} == failing
    assert found["all"] == overall
