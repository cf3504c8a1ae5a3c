"""C59 and C60: the experiments at small sizes, the judges on planted evidence."""

from __future__ import annotations

import numpy as np
import pytest

from losslab.lecture.section_6_5 import xavier as x


@pytest.fixture(scope="module")
def tables_59():
    return {"linear": x.linear_factors(20, examples=64), "tanh": x.tanh_factors(200, 4, 20, examples=16)}


def test_c59_on_its_own_experiment(verdicts, tables_59) -> None:
    found = verdicts(x.C59, tables_59)
    assert found.pop(x.COMPROMISE) == "does not hold"
    assert set(found.values()) == {"holds"}


def test_factors_multiply_to_the_variances(tables_59) -> None:
    rows = tables_59["linear"].groupby(["network", "scheme", "draw"])
    for _, group in rows:
        assert np.allclose(group.forward.cumprod(), group.variance, rtol=1e-6)
        assert np.isclose(group.gradient.iloc[0], group.backward.iloc[1:].prod(), rtol=1e-6)


def test_theory_of_the_factors(tables_59) -> None:
    rows = tables_59["linear"]
    wide = rows[(rows.scheme == "Xavier") & (rows.network != "square")]
    assert (wide.forward_theory * wide.backward_theory < 1).all()
    assert np.allclose(wide.forward_theory + wide.backward_theory, 2)
    square = rows[rows.network == "square"]
    assert np.allclose(square[["forward_theory", "backward_theory"]], 1)


@pytest.mark.parametrize(
    ("scheme", "column", "finding"),
    [
        ("fan-out", "backward", "gradients keep their variance under 1/fan-out"),
        ("LeCun", "forward", "signals keep their variance under 1/fan-in"),
        ("Xavier", "backward", "Xavier: gradients change by 2 fan-out/(fan-in + fan-out)"),
    ],
)
def test_judge_59_on_a_layer_that_differs(verdicts, tables_59, scheme, column, finding) -> None:
    rows = tables_59["linear"].copy()
    rows.loc[(rows.scheme == scheme) & (rows.layer == 3), column] *= 1.3
    found = verdicts(x.C59, {**tables_59, "linear": rows})
    assert found[finding] == "does not hold"
    assert found["all"] == "mixed"


def test_judge_59_on_square_networks_alone_keeps_the_compromise(verdicts, tables_59) -> None:
    rows = tables_59["linear"].copy()
    rows[["forward", "backward"]] = (
        rows[["forward", "backward"]].to_numpy() / rows[["forward_theory", "backward_theory"]].to_numpy()
    )
    assert verdicts(x.C59, {**tables_59, "linear": rows})[x.COMPROMISE] == "holds"


def test_c60_on_its_own_experiment(verdicts) -> None:
    table = x.draws_60(400_000)
    found = verdicts(x.C60, {"draws": table})
    assert found["all"] == "holds"
    assert (table.error == 0).all()
    flipped = table.copy()
    flipped.loc[flipped.source == "losslab", "variance"] *= 0.5  # the variance taken for a deviation
    assert (
        verdicts(x.C60, {"draws": flipped})["normal (losslab): variance 2/(fan-in + fan-out)"]
        == "does not hold"
    )
    short = table.assign(largest=0.7)
    told = "the uniform weights fill the symmetric interval ±√6/√(fan-in + fan-out)"
    assert verdicts(x.C60, {"draws": short})[told] == "does not hold"
