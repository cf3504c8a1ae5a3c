"""C54 and C55: the experiments at small sizes, the judges on planted evidence."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from losslab.lecture.claim import Lab
from losslab.lecture.section_6_5 import moments as m
from losslab.lecture.section_6_5.networks import BLOCKS

WIGGLE = 0.002 * np.linspace(-1, 1, BLOCKS)


def test_c54_on_its_own_experiment(verdicts) -> None:
    tables = m.C54.experiment(Lab())
    found = verdicts(m.C54, tables)
    assert found.pop(m.FIXED) == "does not hold"
    assert set(found.values()) == {"holds"}
    digits = tables["digits"]
    unit = digits[digits.kind == "unit"]
    assert np.allclose(unit.variance, unit.theory, rtol=1e-9)


def planted_54(variance=1.0, mean=0.0, fixed=1.0):
    cells = [
        pd.DataFrame(
            {
                "distribution": d,
                "n": n,
                "block": range(BLOCKS),
                "mean": mean + WIGGLE,
                "variance": variance + WIGGLE,
            }
        )
        for d in m.LECUN
        for n in (4, 64)
    ]
    examples = [
        pd.DataFrame(
            {"kind": "example", "index": range(3), "block": b, "variance": variance + w, "theory": 1.0}
        )
        for b, w in enumerate(WIGGLE)
    ]
    units = pd.DataFrame({"kind": "unit", "index": range(3), "block": 0, "variance": fixed, "theory": fixed})
    return {"units": pd.concat(cells), "digits": pd.concat([*examples, units])}


@pytest.mark.parametrize(
    ("change", "overall"),
    [
        ({}, "holds"),
        ({"fixed": 2.0}, "holds"),
        ({"variance": 1.1}, "mixed"),
        ({"mean": 0.3}, "mixed"),
        ({"variance": 0.5, "mean": 1.0}, "does not hold"),
    ],
)
def test_judge_54(verdicts, change, overall) -> None:
    found = verdicts(m.C54, planted_54(**change))
    assert found["all"] == overall
    assert found[m.FIXED] == ("does not hold" if "fixed" in change else "holds")


def test_c55_on_its_own_experiment(verdicts) -> None:
    tables = m.C55.experiment(Lab())
    found = verdicts(m.C55, tables)
    assert found.pop(m.BIASED) == "does not hold"
    assert set(found.values()) == {"holds"}


@pytest.mark.parametrize("name", m.SAMPLES)
def test_samples_have_the_moments_they_are_said_to(name) -> None:
    import torch

    draw, mean, variance = m.SAMPLES[name]
    x = draw(torch.Generator().manual_seed(0), (200_000, 2)).double()
    assert float(x.mean()) == pytest.approx(mean, abs=0.01)
    assert float(x.var()) == pytest.approx(variance, rel=0.02)


def planted_55(product=1.0, centred=1.0, shifted=8.0, rectified=1.0):
    def cell(ratio, **told):
        return pd.DataFrame({"block": range(BLOCKS), "ratio": ratio + WIGGLE}).assign(**told)

    sums = [
        cell(centred, w="N(0, 1)", x="equal", theory=1.0, mean_w=0.0),
        cell(1.0, w="N(2, 1)", x="N(0, 1)", theory=1.0, mean_w=2.0),
        cell(shifted, w="N(2, 1)", x="equal", theory=8.0, mean_w=2.0),
    ]
    return {
        "products": pd.concat([cell(product, w="N(0, 1)", x="U[0, 1]"), cell(1.0, w="U[0, 1]", x="U[0, 1]")]),
        "sums": pd.concat(sums),
        "rectified": pd.concat([cell(rectified, init=name) for name in ("LeCun", "He")]),
    }


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, {m.BIASED}),
        ({"product": 1.3}, {m.BIASED, "Var(wx) is the sum of the three terms"}),
        (
            {"rectified": 0.5},
            {m.BIASED, "ReLU inputs: half the variance under 1/fan-in, all of it under 2/fan-in"},
        ),
        ({"shifted": 1.0}, {"otherwise the covariances (E w)² Cov(xⱼ, xₖ) come in"}),
    ],
)
def test_judge_55(verdicts, change, failing) -> None:
    found = verdicts(m.C55, planted_55(**change))
    overall = found.pop("all")
    assert {name for name, verdict in found.items() if verdict == "does not hold"} == failing
    assert overall == ("holds" if failing == {m.BIASED} else "mixed")
