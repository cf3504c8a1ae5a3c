"""C58: small networks against the recursion, and the judge on planted evidence."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.lecture.section_6_5 import depth as d
from losslab.lecture.section_6_5.networks import digit_rows
from losslab.signals import mean_field


def test_small_networks(verdicts) -> None:
    table = pd.concat([d.moments(width, depth=5, draws=6) for width in (300, 60)], ignore_index=True)
    found = verdicts(d.C58, {"moments": table})
    assert found["tanh: the variance is 1 within 10 % in the last layer"] == "does not hold"
    assert found[d.CENTRED] == "holds"
    ratios = table[table.width == 300].groupby(["arm", "layer"])[["variance", "theory"]].mean()
    assert np.allclose(ratios.variance, ratios.theory, rtol=0.12)
    first = table[(table.layer == 1) & (table.arm == "tanh") & (table.width == 300)]
    assert first.linear.mean() == pytest.approx(0.257, abs=0.02)
    assert table[table.arm == "1.7159 tanh(2x/3)"].linear.isna().all()


def test_draws_are_functions_of_the_width_and_the_draw_alone() -> None:
    one, two = d.moments(20, 3, 1), d.moments(20, 3, 2)
    assert one.equals(two[two.draw == 0].reset_index(drop=True))


def test_theory_on_digits_averages_over_examples() -> None:
    x = digit_rows(4)
    found = d.theory(d.ARMS["tanh on digits"], x, 3)
    each = [mean_field.recursion("tanh", 3, inputs=p).variance for p in x.double().square().mean(1).tolist()]
    assert found == pytest.approx(np.mean(each, axis=0))
    same = d.theory(d.ARMS["tanh on digits"], torch.ones(4, 64), 3)
    assert same == pytest.approx(mean_field.recursion("tanh", 3).variance)


def planted(last=0.017, mean=0.0, linear=0.98, ratio=1.0):
    rows = []
    for arm in d.ARMS:
        for draw, wiggle in enumerate(np.linspace(-0.004, 0.004, 20)):
            for layer, variance in ((1, 1.0), (30, last)):
                told = {"arm": arm, "draw": draw, "layer": layer, "width": 1000, "mean": mean + wiggle}
                theory = variance / ratio
                linears = np.nan if arm.startswith("1.7") else (linear if layer == 30 else 0.257)
                rows.append(told | {"variance": variance * (1 + wiggle), "theory": theory, "linear": linears})
    table = pd.DataFrame(rows)
    return {"moments": pd.concat([table, table.assign(width=100)], ignore_index=True)}


RECURSION = "tanh: the recursion predicts every layer's variance"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, {d.VARIANCE: "does not hold", d.CENTRED: "holds", d.LINEAR: "holds", "all": "mixed"}),
        ({"last": 1.0}, {d.VARIANCE: "holds", "all": "holds"}),
        ({"mean": 0.2}, {d.CENTRED: "does not hold"}),
        ({"mean": 0.2, "linear": 0.3}, {d.LINEAR: "does not hold", "all": "does not hold"}),
        ({"ratio": 1.2}, {RECURSION: "does not hold", "all": "mixed"}),
        ({"ratio": 1.02}, {RECURSION: "holds"}),
    ],
)
def test_judge(verdicts, change, wanted) -> None:
    found = verdicts(d.C58, planted(**change))
    assert {name: found[name] for name in wanted} == wanted
