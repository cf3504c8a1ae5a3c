"""The recorder: the one-moment instrument at each look, exact update ratios, and an undisturbed training."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import nn

from losslab.engine import Population, train
from losslab.errors import LosslabError
from losslab.rules import SGD
from losslab.signals import Recorder, describe, flow, update_ratio
from losslab.tasks import Task, mlp, supervised


@pytest.fixture(scope="module")
def task() -> Task:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=g)
    return supervised(
        mlp(5, 8, 8, 3, batch_norm=True, dropout=0.1), (x, torch.randint(3, (60,), generator=g))
    )


def trained(task: Task, steps: int, recorder: Recorder | None = None, **options: object) -> Population:
    plan = {"seeds": 3, "steps": steps, "batch_size": 15, "dtype": "float64", "evaluate": None, **options}
    if recorder is not None:
        plan = {"watch": recorder, "record": recorder.when, **plan}
    return train(task, "sgd", **plan)


@pytest.mark.parametrize("training", [True, False])
def test_each_look_is_the_instrument_at_that_moment(task: Task, training: bool) -> None:
    recorder = Recorder(20, every=4, training=training, sample=50)
    trained(task, 10, recorder)
    assert recorder.steps == [1, 5, 9]
    for k, step in enumerate(recorder.steps):
        there = trained(task, step)
        seen = flow(there, batch=recorder.batch, training=training)
        wanted = describe(seen, sample=50)
        before = trained(task, step - 1)
        ratios = update_ratio(before.points.weights, there.points.weights)
        for (layer, direction), told in wanted.items():
            for name, values in told.items():
                if direction == "backward" and name.startswith("p"):
                    continue
                ours = recorder.statistic(layer, name, direction)[k]
                torch.testing.assert_close(ours, values, rtol=1e-9, atol=1e-12, equal_nan=True)
            if direction == "weight" and k:
                ratio = recorder.statistic(layer, "update_ratio", "weight")
                torch.testing.assert_close(ratio[k], ratios[f"{layer}.weight"], rtol=1e-9, atol=1e-12)
                assert bool(ratio[0].isnan().all())
        torch.testing.assert_close(recorder.losses[k], seen.losses)


def test_training_is_not_disturbed(task: Task) -> None:
    watched, plain = trained(task, 9, Recorder(every=2)), trained(task, 9)
    for name, weight in plain.points.items():
        assert torch.equal(watched.points[name], weight)


def test_any_schedule_of_records(task: Task) -> None:
    every = Recorder(every=4)
    population = trained(task, 12, every, record=1)
    assert every.steps == [1, 5, 9]
    rare = Recorder(every=1)
    trained(task, 12, rare, record=5)
    assert rare.steps == [1, 6, 11]
    before, after = trained(task, 6), trained(task, 11)
    spanning = update_ratio(before.points.weights, after.points.weights, 5)["0.weight"]
    torch.testing.assert_close(rare.statistic("0", "update_ratio", "weight")[2], spanning)
    assert len(population) == 3


def test_statistics_are_the_same_whenever_they_are_finished(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, early = Recorder(every=2), Recorder(every=2)
    trained(task, 15, late)
    assert len(late.waiting) == len(late.steps) == 8
    monkeypatch.setattr("losslab.signals.recorder.HELD", 2 * late.held)
    trained(task, 15, early)
    assert len(early.waiting) == 2  # of 3 that may wait
    pd.testing.assert_frame_equal(late.table, early.table)
    assert not late.waiting


def test_the_table(task: Task) -> None:
    recorder = Recorder(task.train, every=3, layers=["0", "2"], gradients=False)
    assert recorder.table.empty
    trained(task, 5, recorder)
    table = recorder.table
    assert table.step.unique().tolist() == [1, 4]
    assert sorted(table.layer.unique()) == ["0", "2"]
    assert sorted(table.direction.unique()) == ["forward", "weight"]
    one = table.query("step == 4 and layer == '2' and direction == 'forward' and member == 1")
    assert one["std"].item() == recorder.statistic("2", "std")[1, 1].item()


def test_a_member_that_diverges_is_nan_and_the_others_are_not() -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    net = lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    recorder, alone = Recorder(every=10), Recorder(every=10)
    for rates, watch in (([0.01, 1e6], recorder), ([0.01], alone)):
        task = supervised(net, (x, x[:, :1]), criterion=nn.MSELoss())
        population = train(
            task, SGD(lr=rates), seeds=1, steps=31, evaluate=None, watch=watch, record=watch.when
        )
        assert len(population) == len(rates)
    assert recorder.steps == [1, 11, 21, 31]
    for direction, name in (("forward", "p50"), ("backward", "std"), ("weight", "update_ratio")):
        told = recorder.statistic("1", name, direction)
        assert bool(told[-1, 1].isnan())
        torch.testing.assert_close(told[:, :1], alone.statistic("1", name, direction), equal_nan=True)


def test_errors(task: Task) -> None:
    with pytest.raises(LosslabError, match="every is 0"):
        Recorder(every=0)
    with pytest.raises(LosslabError, match="from 0 to 100"):
        Recorder(percentiles=(50, 101))
    with pytest.raises(LosslabError, match="0 examples to look at"):
        trained(task, 1, Recorder(0))
    recorder = Recorder(every=2)
    with pytest.raises(LosslabError, match="no step was recorded"):
        recorder.statistic("0", "std")
    trained(task, 3, recorder)
    with pytest.raises(LosslabError, match="no 'std' of layer '00', forward, was recorded"):
        recorder.statistic("00", "std")
