"""C10: the ledger of an epoch, and the judge on planted departures."""

from __future__ import annotations

import pytest
import torch

from losslab.engine import Batches
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_2 import epochs as e


def test_the_ledger_shows_the_batches_of_the_training_loop():
    shape = e.Shape(7, 3)
    used, batches = e.ledger(shape, 2), Batches(7, 3, [0, 1])
    assert used.shape == (6, 2, 7)
    for step, sizes in enumerate(2 * shape.sizes):
        for seed in (0, 1):
            wanted = torch.zeros(7, dtype=torch.float64)
            wanted[batches.at(step)[seed]] = 1 / sizes
            assert torch.allclose(used[step, seed], wanted, atol=1e-12)


def test_sizes_of_an_uneven_epoch():
    assert e.Shape(17, 5).sizes == [5, 5, 5, 2]
    assert e.Shape(17, 5, drop_last=True).sizes == [5, 5, 5]
    assert e.Shape(8, 8).sizes == [8]


def test_draws_with_replacement_do_not_pass_for_an_epoch():
    table = e.accounts(e.Shape(20, 2, replacement=True), seeds=3)
    assert (table.unused > 0).all()
    assert (table.repeated > 0).any()


@pytest.fixture(scope="module")
def tables():
    return e.experiment_c10(Lab())


def test_c10_holds_as_run(verdicts, tables):
    assert set(verdicts(e.C10, tables).values()) == {"holds"}


@pytest.mark.parametrize("column", ["updates", "repeated", "unused", "wrong_size"])
def test_one_irregular_epoch_decides_against_c10(verdicts, tables, column):
    planted = tables["epochs"].copy()
    place = planted.index[~planted.drop_last][5]
    planted.loc[place, column] += 1
    found = verdicts(e.C10, tables | {"epochs": planted})
    assert found[e.ONCE] == "does not hold"
    assert found["all"] == "mixed"


def test_c10_contrast(verdicts, tables):
    uses = tables["uses"]
    same = uses.assign(share=uses.share.where(~uses.replacement, 0.1))
    found = verdicts(e.C10, tables | {"uses": same})
    assert [name for name, verdict in found.items() if verdict == "does not hold"] == [
        "as many draws with replacement leave (1 − 1/N)ᴺ of the examples out"
    ]
    assert found["all"] == "holds"
