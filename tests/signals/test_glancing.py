"""Glances by machine code: the instrument's own numbers, and only where there is machine code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from losslab import train
from losslab.engine import Population, compiled
from losslab.rules import SGD
from losslab.signals import Recorder, describe, flow, update_ratio
from losslab.signals.glancing import Glanced
from losslab.tasks import Task, mlp, supervised

pytestmark = pytest.mark.skipif(compiled.machine_code() is None, reason="needs numba and vectors of 512 bits")


def unbiased() -> nn.Module:
    middle = [nn.Linear(12, 9, bias=False), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 9), nn.BatchNorm1d(9)]
    return nn.Sequential(nn.Flatten(), *middle, nn.Linear(9, 3, bias=False))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "normalised": mlp(12, 20, 17, 3, batch_norm=True),
    "plain": mlp(12, 20, 17, 3),
    "one layer": mlp(12, 3),
    "unbiased": unbiased,
    "wide": mlp(12, 130, 33, 3, batch_norm=True),
}


def task_of(make: Callable[[], nn.Module]) -> Task:
    g = torch.Generator().manual_seed(0)
    return supervised(make, (torch.randn(90, 12, generator=g), torch.randint(3, (90,), generator=g)))


def trained(task: Task, steps: int, watch: Recorder | None = None) -> Population:
    when = None if watch is None else watch.when
    return train(
        task, "sgd", seeds=3, steps=steps, batch_size=30, evaluate=None, watch=watch, record=when or 1
    )


def glances(recorder: Recorder) -> list[bool]:
    return [isinstance(look, Glanced) for look in recorder.waiting]


@pytest.mark.parametrize("probe", [7, 32])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_glance_tells_what_the_instrument_tells(name: str, probe: int) -> None:
    task, recorder = task_of(NETWORKS[name]), Recorder(probe, every=4, sample=50)
    trained(task, 9, recorder)
    assert glances(recorder) == [False, True, True]
    for k, step in list(enumerate(recorder.steps))[1:]:
        there = trained(task, step)
        before = trained(task, step - 1)
        seen = flow(there, batch=recorder.batch)
        ratios = update_ratio(before.points.weights, there.points.weights)
        for (layer, direction), told in describe(seen, sample=50).items():
            for statistic, values in told.items():
                if direction == "backward" and statistic.startswith("p"):
                    continue
                mine = recorder.statistic(layer, statistic, direction)[k]
                scale = values.abs().nan_to_num().max().double() + told.get("std", 0)
                close = (mine - values).abs() <= 2e-5 * scale
                assert bool((close | (mine.isnan() & values.isnan())).all()), (layer, direction, statistic)
            if direction == "weight":
                weight = seen.layers[layer].weights[0]
                mine = recorder.statistic(layer, "update_ratio", "weight")[k]
                torch.testing.assert_close(mine, ratios[weight].double(), rtol=1e-4, atol=0)
                torch.testing.assert_close(recorder.updates[weight].isfinite().all(), torch.tensor(True))
        torch.testing.assert_close(recorder.losses[k], seen.losses)


def test_a_glance_moves_nothing_and_the_columns_are_the_same() -> None:
    task = task_of(NETWORKS["normalised"])
    recorder, plain = Recorder(every=2), trained(task, 9)
    watched = trained(task, 9, recorder)
    assert sum(glances(recorder)) == 4
    for name, value in plain.points.items():
        assert torch.equal(watched.points[name], value)
    first, *others = recorder.rows
    for row in others:
        assert list(row) == list(first)
        for place, told in row.items():
            assert {*told} - {"update_ratio"} == {*first[place]}
            assert {v.dtype for v in told.values()} == {v.dtype for v in first[place].values()}


def test_some_layers_only() -> None:
    recorder = Recorder(every=2, layers=["1", "6"])
    trained(task_of(NETWORKS["normalised"]), 5, recorder)
    assert glances(recorder) == [False, True, True]
    assert recorder.table.layer.unique().tolist() == ["1", "6"]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (NETWORKS["plain"], {"training": False}),
        (NETWORKS["plain"], {"gradients": False}),
        (unbiased, {"layers": ["0"]}),
        (mlp(12, 20, 3, activation="tanh"), {}),
        (mlp(12, 20, 3, dropout=0.2), {}),
    ],
)
def test_what_there_is_no_machine_code_for_is_looked_at_as_before(
    make: Callable[[], nn.Module], options: dict[str, object]
) -> None:
    recorder = Recorder(every=2, **options)  # type: ignore[arg-type]
    trained(task_of(make), 5, recorder)
    assert glances(recorder) == [False] * 3


def test_a_module_called_twice_is_looked_at_as_before() -> None:
    gate = nn.ReLU()
    make = lambda: nn.Sequential(nn.Linear(12, 8), gate, nn.Linear(8, 8), gate, nn.Linear(8, 3))
    recorder = Recorder(every=2)
    trained(task_of(make), 5, recorder)
    assert glances(recorder) == [False] * 3


def test_a_member_that_diverges_is_nan_and_the_others_are_not() -> None:
    g = torch.Generator().manual_seed(0)
    data = (torch.randn(90, 12, generator=g), torch.randint(3, (90,), generator=g))
    recorder = Recorder(every=5)
    population = train(
        supervised(mlp(12, 8, 3), data),
        SGD(lr=[0.01, 1e30]),
        seeds=1,
        steps=11,
        batch_size=30,
        evaluate=None,
        watch=recorder,
        record=recorder.when,
    )
    assert len(population) == 2
    assert sum(glances(recorder)) == 2
    for layer, statistic, direction in (
        ("2", "p50", "forward"),
        ("1", "dead", "forward"),
        ("2", "std", "backward"),
    ):
        told = recorder.statistic(layer, statistic, direction)[-1]
        assert bool(told[0].isfinite()), (layer, statistic)
        assert bool(told[1].isnan()), (layer, statistic)
