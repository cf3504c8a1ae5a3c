"""ResNet-20s on CIFAR-10: the papers' settings, the reduction in miniature, no stage done twice."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

from losslab.lecture.claim import Lab
from losslab.lecture.section_6_6 import cifar_pairs as c
from losslab.lecture.section_6_6.connected import C62
from losslab.lecture.section_6_6.isolated import C63
from losslab.paths import DRAXLER, Cycle
from losslab.tasks import resnet20, supervised

TINY = replace(
    c.REDUCED, width=2, batch=8, steps=2, curve_steps=2, cycles=(Cycle(1, 0.1), Cycle(1, 0.01)), band_batch=8,
    between=1, stations=4, side=3, pairs=2,
)  # fmt: skip


def images(count, seed):
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(count) % 10


def small_task(where, data=None):
    return supervised(resnet20(width=where.width), images(16, 0), images(10, 1), name=where.name)


@pytest.fixture
def small(monkeypatch):
    """Stages of the reduction on a few random images."""
    monkeypatch.setattr(c, "REDUCED", TINY)
    monkeypatch.setattr(c, "task_of", small_task)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    c._bench.cache_clear()
    yield
    c._bench.cache_clear()


def test_the_settings_are_the_papers():
    paper = c.Setting()
    assert (paper.width, paper.steps, paper.batch, paper.cycles) == (16, 64_000, 128, DRAXLER)
    assert (paper.band_batch, paper.band_decay, paper.between, paper.stations) == (512, 1e-4, 9, 61)
    assert sum(cycle.steps for cycle in paper.cycles) == 16_000
    assert 2 * paper.pairs == 10
    assert paper.curve_steps == 200 * 352  # epochs of 45,000 images in batches of 128
    assert (c.RATE, c.CURVE_RATE, c.MOMENTUM) == (0.1, 0.03, 0.9)


def test_every_number_of_the_reduction_is_told():
    note, small = c.REDUCED.note, c.REDUCED
    told = [
        small.examples,
        small.tests,
        small.batch,
        small.steps,
        small.curve_steps,
        small.stations,
        small.width,
    ]
    told += [32 // small.pooled, len(small.cycles), sum(cycle.steps for cycle in small.cycles)]
    assert all(str(number) in note for number in told)


def test_only_the_paper_profile_with_data_has_such_networks(tmp_path):
    assert c.bench(Lab("paper")) is None
    assert c.bench(Lab("full", data=tmp_path)) is None


def test_both_claims_run_and_resume_without_doing_a_stage_twice(small, tmp_path, verdicts):
    stages = []
    lab = Lab("paper", data=tmp_path, folder=tmp_path / "stages", progress=stages.append)
    first = {claim.id: claim.experiment(lab) for claim in (C62, C63)}
    assert [stage.rpartition(" ")[2] for stage in stages[:4]] == list(c.VOTING)
    assert len(stages) == 6
    c._bench.cache_clear()
    for claim in (C62, C63):
        again = claim.experiment(lab)
        assert all(table.equals(again[name]) for name, table in first[claim.id].items())
        told = verdicts(claim, first[claim.id])
        assert set(told) > {"all"}
        assert any(name.startswith(TINY.name) for name in told)
        assert set(first[claim.id]["paths"].note) == {TINY.note}
    assert len(stages) == 6
    (tmp_path / "stages" / "cifar" / "bezier-paths.parquet").unlink()
    c._bench.cache_clear()
    again = C62.experiment(lab)
    pd.testing.assert_frame_equal(again["paths"], first["C62"]["paths"])
    assert [stage.rpartition(" ")[2] for stage in stages[6:]] == ["bezier"]


def test_ends_and_siblings(small):
    bench = c.Bench(small_task(TINY), TINY, 2, None, print)
    points = bench._siblings()
    own = bench.run.points.matrix()
    assert torch.equal(points.matrix()[[0, 2]], own[[0, 2]])
    assert not torch.equal(points.matrix()[[1, 3]], own[[1, 3]])
    rows = bench.table("polychain", "courses")
    line = bench.table("straight", "courses")
    for t in (0.0, 1.0):  # a curve begins and ends at the networks, batch norm included
        there, wanted = (some[some.t == t].train_loss.to_numpy() for some in (rows, line))
        assert there == pytest.approx(wanted, rel=1e-6)
    votes = bench.table("straight", "ensembles")
    alone = votes[votes.t == 0].test_so_far.to_numpy()
    assert alone == pytest.approx(line[line.t == 0].test_error.to_numpy())
