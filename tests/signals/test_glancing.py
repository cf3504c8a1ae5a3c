"""Looks at chains while they run: the instrument's own numbers, by machine code and by operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from losslab import train
from losslab.engine import Population, compiled
from losslab.rules import SGD
from losslab.signals import Recorder, describe, flow, glancing, update_ratio
from losslab.signals.glancing import Glanced
from losslab.tasks import Task, mlp, supervised

machine = pytest.mark.skipif(compiled.machine_code() is None, reason="needs numba and vectors of 512 bits")
BY = [pytest.param("machine code", marks=machine), "operations"]


def unbiased() -> nn.Module:
    middle = [nn.Linear(12, 9, bias=False), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 9), nn.BatchNorm1d(9)]
    return nn.Sequential(nn.Flatten(), *middle, nn.Linear(9, 3, bias=False))


def inplace() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(inplace=True), nn.Sequential(nn.Linear(9, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "normalised": mlp(12, 20, 17, 3, batch_norm=True),
    "plain": mlp(12, 20, 17, 3),
    "unbiased": unbiased,
    "in place": inplace,
    "wide": mlp(12, 130, 33, 3, batch_norm=True),
}
CURVED = {kind: mlp(12, 20, 17, 3, activation=kind) for kind in ("tanh", "sigmoid", "silu", "softsign")}


def task_of(make: Callable[[], nn.Module], scale: float = 1.0) -> Task:
    g = torch.Generator().manual_seed(0)
    x = scale * torch.randn(90, 12, generator=g)
    return supervised(make, (x, torch.randint(3, (90,), generator=g)))


def trained(task: Task, steps: int, watch: Recorder | None = None) -> Population:
    when = 1 if watch is None else watch.when
    return train(task, "sgd", seeds=3, steps=steps, batch_size=30, evaluate=None, watch=watch, record=when)


def by(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "operations":
        for place in (compiled, glancing):
            monkeypatch.setattr(place, "machine_code", lambda: None)


def compare(recorder: Recorder, k: int, there: Population, before: Population) -> None:
    """All numbers of a look against those of the instrument for any network."""
    seen = flow(there, batch=recorder.batch)
    ratios = update_ratio(before.points.weights, there.points.weights)
    compared = 0
    for (layer, direction), told in describe(seen, sample=50).items():
        spread = told.get("std", torch.zeros(3)) + told["mean"].abs()
        for statistic, values in told.items():
            if direction == "backward" and statistic.startswith("p"):
                continue
            mine = recorder.statistic(layer, statistic, direction)[k]
            scale = torch.maximum(spread, values.abs().nan_to_num()).double()
            close = (mine - values).abs() <= 3e-5 * scale
            assert bool((close | (mine.isnan() & values.isnan())).all()), (layer, direction, statistic)
            compared += 1
        if direction == "weight":
            weight = seen.layers[layer].weights[0]
            mine = recorder.statistic(layer, "update_ratio", "weight")[k]
            torch.testing.assert_close(mine, ratios[weight].double(), rtol=1e-4, atol=0)
    assert compared >= 15 * len(seen.outputs)
    torch.testing.assert_close(recorder.losses[k], seen.losses)


@pytest.mark.parametrize("how", BY)
@pytest.mark.parametrize("probe", [7, 32])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_glance_tells_what_the_instrument_tells(
    name: str, probe: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by(how, monkeypatch)
    task, recorder = task_of(NETWORKS[name]), Recorder(probe, every=4, sample=50)
    trained(task, 9, recorder)
    assert [isinstance(look, Glanced) for look in recorder.waiting] == [how == "machine code"] * 3
    assert recorder.instrument is None
    for k, step in list(enumerate(recorder.steps))[1:]:
        compare(recorder, k, trained(task, step), trained(task, step - 1))
    assert bool(recorder.statistic(*first_weight(recorder))[0].isnan().all())


def first_weight(recorder: Recorder) -> tuple[str, str, str]:
    return next(iter(recorder.main)), "update_ratio", "weight"


@pytest.mark.parametrize("name", CURVED)
def test_activations_that_saturate(name: str) -> None:
    recorder, task = Recorder(every=4, sample=50), task_of(CURVED[name], scale=5)
    trained(task, 9, recorder)
    assert recorder.instrument is None
    compare(recorder, 2, trained(task, 9), trained(task, 8))
    assert bool((recorder.statistic("1", "saturated")[2] > 0).all())


@pytest.mark.parametrize("how", BY)
def test_a_glance_moves_nothing_and_the_columns_are_the_same(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by(how, monkeypatch)
    task, recorder, other = task_of(NETWORKS["normalised"]), Recorder(every=2), Recorder(every=2)
    plain, watched = trained(task, 9), trained(task, 9, recorder)
    for name, value in plain.points.items():
        assert torch.equal(watched.points[name], value)
    monkeypatch.setattr("losslab.signals.recorder.Glancer.of", lambda *_: None)
    trained(task, 9, other)
    assert other.instrument is not None
    assert list(recorder.table.columns) == list(other.table.columns)
    for mine, theirs in zip(recorder.rows[1:], other.rows[1:], strict=True):
        assert list(mine) == list(theirs)
        assert all({*told} == {*theirs[place]} for place, told in mine.items())
        for place, told in mine.items():
            assert {v.dtype for v in told.values()} == {v.dtype for v in theirs[place].values()}
    assert {*recorder.updates} == {*other.updates}


def test_some_layers_only() -> None:
    recorder = Recorder(every=2, layers=["1", "6"])
    trained(task_of(NETWORKS["normalised"]), 5, recorder)
    assert recorder.instrument is None
    assert recorder.table.layer.unique().tolist() == ["1", "6"]


def twice() -> nn.Module:
    gate = nn.ReLU()
    return nn.Sequential(nn.Linear(12, 8), gate, nn.Linear(8, 8), gate, nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (NETWORKS["plain"], {"training": False}),
        (NETWORKS["plain"], {"gradients": False}),
        (unbiased, {"layers": ["0"]}),
        (mlp(12, 20, 3, dropout=0.2), {}),
        (lambda: nn.Sequential(nn.Tanh(), nn.Linear(12, 3)), {}),
        (lambda: nn.Linear(12, 3), {}),
        (twice, {}),
    ],
    ids=["evaluation", "no gradients", "an input", "dropout", "before weights", "a layer", "called twice"],
)
def test_what_is_no_such_chain_is_looked_at_by_the_instrument(
    make: Callable[[], nn.Module], options: dict[str, object]
) -> None:
    recorder = Recorder(every=2, **options)  # type: ignore[arg-type]
    trained(task_of(make), 5, recorder)
    assert recorder.instrument is not None
    assert len(recorder.rows) == 3


@pytest.mark.parametrize("how", BY)
def test_a_member_that_diverges_is_nan_and_the_others_are_not(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by(how, monkeypatch)
    task, recorder = task_of(mlp(12, 8, 3)), Recorder(every=5)
    rule, when = SGD(lr=[0.01, 1e30]), recorder.when
    train(task, rule, seeds=1, steps=11, batch_size=30, evaluate=None, watch=recorder, record=when)
    assert recorder.instrument is None
    for place in (("2", "p50"), ("1", "dead"), ("2", "constant"), ("2", "std", "backward")):
        told = recorder.statistic(*place)[-1]
        assert bool(told[0].isfinite()), place
        assert bool(told[1].isnan()), place
