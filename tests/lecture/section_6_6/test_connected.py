"""C62: a small run, and the judge on planted paths."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from losslab.lecture.claim import Lab
from losslab.lecture.section_6_6 import connected as c
from losslab.lecture.section_6_6 import pairs as p

HOLDS, FAILS = "holds", "does not hold"


def test_pairs_share_no_network():
    assert sorted(i for pair in p.couples(5) for i in pair) == list(range(10))


def test_alignment_keeps_the_networks():
    run = p.minima(6, 1, 10)
    told = p.landscape_of(run)
    own, moved = told(run.points), told(p.aligned(run, [(0, 1)]))
    assert np.allclose(own["train_loss"], moved["train_loss"], rtol=1e-5)


def test_small_run(verdicts, monkeypatch):
    monkeypatch.setattr(c, "WIDTH", 6)
    sizes = c.Sizes(widths=(2, 6), pairs=2, training=20, curve=5, few=1, band=14, string=10, grid=5)
    tables = c.evidence(Lab(), sizes)
    assert set(verdicts(c.C62, tables)) >= {
        *c.names("width 6", "bezier"),
        *c.names("width 2", "polychain"),
    }
    rows = tables["band"].groupby("step").loss
    assert set(rows.max().index) == set(c.LOOKS)
    assert rows.max()[100] < rows.max()[0]


def planted(barrier=0.001, highest=0.005, drop=0.0, found=True):
    pairs = np.arange(10)
    rows = []
    for width in (2, c.WIDTH):
        for method in c.METHODS if width == c.WIDTH else c.METHODS[:2]:
            bent = method != "straight"
            table = pd.DataFrame({"pair": pairs, "method": method, "found": found})
            table = p.labelled(table, width, f"width {width}")
            rows.append(
                table.assign(
                    train_loss_barrier=barrier if bent else 1.0,
                    train_loss_start=0.004,
                    train_loss_end=0.005,
                    train_loss_highest=highest if bent else 1.0,
                    train_loss_place=0.5,
                    test_error_barrier=drop,
                    test_error_place=0.5,
                    test_error_start=0.03,
                    test_error_end=0.03,
                    test_error_highest=0.03 + drop,
                )
            )
    t = np.linspace(0, 1, 5)
    ways = [
        pd.DataFrame({"t": t, "train_loss": 0.01, "pair": i, "method": m}) for m in c.METHODS for i in pairs
    ]
    x, y = (a.flatten() for a in np.meshgrid(t, t))
    grid = pd.DataFrame({"x": x, "y": y, "train_loss": 0.1 + x**2 + y, "kind": "grid"})
    marks = pd.DataFrame({"x": [0, 0.5, 1], "y": [0, 0.5, 0], "train_loss": 0.1, "kind": "mark"})
    band = [pd.DataFrame({"place": t, "loss": 0.1, "step": step}) for step in c.LOOKS]
    return {
        "paths": pd.concat(rows, ignore_index=True),
        "courses": pd.concat(ways, ignore_index=True),
        "plane": pd.concat([grid, marks], ignore_index=True),
        "band": pd.concat(band, ignore_index=True),
    }


def test_judge_on_flat_paths(verdicts):
    found = verdicts(c.C62, planted())
    assert set(found.values()) == {HOLDS}


@pytest.mark.parametrize(
    ("change", "which"), [({"barrier": 0.2}, 0), ({"highest": 0.1}, 1), ({"drop": 0.05}, 2)]
)
def test_judge_on_paths_that_are_not_flat(verdicts, change, which):
    found = verdicts(c.C62, planted(**change))
    assert found["all"] == "mixed"
    for method in c.CURVES:
        assert [found[name] == FAILS for name in c.names(f"width {c.WIDTH}", method)] == [
            i == which for i in range(3)
        ]


def test_judge_on_strings_that_were_not_found(verdicts):
    found = verdicts(c.C62, planted(found=False))
    assert FAILS in found.values()
    assert found["all"] == HOLDS


def voting(saved=0.02, pairs=5):
    """Tables of one network with bands and ensembles, as the paper profile has them."""
    tables = planted()
    rows = tables["paths"]
    rows = rows[(rows.width == c.WIDTH) & (rows.method != "dss") & (rows.pair < pairs)]
    ways = tables["courses"][tables["courses"].pair < pairs]
    votes = ways[ways.method != "dss"].assign(test_so_far=lambda t: 0.03 - saved * t.t)
    paper = {"paths": p.labelled(rows, 8, "a net", 5, "small"), "courses": ways, "ensembles": votes}
    return paper | {"plane": tables["plane"]}


def test_judge_on_ensembles_and_bands(verdicts):
    found = verdicts(c.C62, voting())
    assert set(found.values()) == {HOLDS}
    assert set(found) >= {
        *c.names("a net", "autoneb"),
        "a net, Bezier: test error that the ensemble along it saves",
    }
    worse = verdicts(c.C62, voting(saved=-0.02))
    assert worse["a net, Bezier: test error that the ensemble along it saves"] == FAILS
    assert worse["all"] == HOLDS
    few = verdicts(c.C62, voting(pairs=4))
    assert few["all"] == "undecided"


def test_notes_tell_the_reduction_and_the_places():
    first, *_ = c.judge(voting())
    assert "straight 1 at 0.5 of the length" in first.note
    assert "small" in first.note
