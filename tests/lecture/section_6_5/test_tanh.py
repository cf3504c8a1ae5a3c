"""C56 and C57: exact numbers, and the judges on planted ones."""

from __future__ import annotations

import math

import pytest

from losslab.lecture.claim import Lab
from losslab.lecture.section_6_5 import tanh as t


def test_c56_on_its_own_experiment(verdicts) -> None:
    tables = t.C56.experiment(Lab())
    found = verdicts(t.C56, tables)
    assert found["all"] == "holds"
    assert found[t.MASS] == found[t.MEAN] == "does not hold"
    value = tables["averages"].set_index("quantity").value
    assert value["share with slope above 0.9"] == pytest.approx(math.erf(t.EDGE / math.sqrt(2)))
    assert round(value["E tanh′"], 3) == 0.606
    assert 1 - math.tanh(t.EDGE) ** 2 == pytest.approx(t.STEEP)


@pytest.mark.parametrize("column", ["error", "edge"])
def test_judge_56_on_a_counter_instance(verdicts, column) -> None:
    tables = t.C56.experiment(Lab())
    tables["slopes"].loc[3, column] = 1.0
    assert verdicts(t.C56, tables)["all"] == "mixed"


def test_c57_on_its_own_experiment(verdicts) -> None:
    found = verdicts(t.C57, t.C57.experiment(Lab()))
    assert found["all"] == found[t.CLAIMED] == "does not hold"
    assert found["normal draws agree with the quadrature"] == "holds"


@pytest.mark.parametrize(("variance", "overall"), [(0.95, "holds"), (1.2, "does not hold")])
def test_judge_57_on_planted_variances(verdicts, variance, overall) -> None:
    tables = t.C57.experiment(Lab())
    tables["averages"].loc[tables["averages"].quantity == "Var tanh", "value"] = variance
    assert verdicts(t.C57, tables)["all"] == overall
