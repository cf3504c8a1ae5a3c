"""Looks at chains while they run: the instrument's own numbers, by machine code and by operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from losslab import train
from losslab.engine import Population, compiled
from losslab.errors import LosslabError
from losslab.rules import SGD
from losslab.signals import Recorder, describe, flow, update_ratio
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
        monkeypatch.setattr(compiled, "machine_code", lambda: None)


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


@pytest.mark.parametrize("how", BY)
@pytest.mark.parametrize("name", ["normalised", "narrow", "narrow tanh"])
def test_layers_of_which_every_value_is_ranked(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by(how, monkeypatch)
    narrow = {"narrow": mlp(12, 1, 3), "narrow tanh": mlp(12, 1, 3, activation="tanh")}
    task = task_of({**narrow, **NETWORKS}[name])
    recorder = Recorder(8, every=4, sample=4096)
    trained(task, 9, recorder)
    seen = describe(flow(trained(task, 9), batch=recorder.batch), sample=4096)
    for layer in recorder.table.layer.unique():
        for p in ("p2", "p50", "p98"):
            mine = recorder.statistic(layer, p)[2]
            torch.testing.assert_close(mine, seen[layer, "forward"][p].double(), rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("how", BY)
def test_a_recorder_of_several_trainings_takes_new_aim(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by(how, monkeypatch)
    task, recorder = task_of(NETWORKS["normalised"]), Recorder(every=2)
    first = trained(task, 5, recorder)
    wider = train(
        task_of(mlp(12, 40, 33, 3, batch_norm=True)),
        "sgd",
        seeds=4,
        steps=13,
        batch_size=30,
        evaluate=None,
        watch=recorder,
        record=recorder.when,
    )
    assert recorder.steps == [1, 3, 5, 7, 9, 11, 13]
    assert [len(losses) for losses in recorder.losses] == [3, 3, 3, 4, 4, 4, 4]
    torch.testing.assert_close(recorder.losses[2], flow(first, batch=recorder.batch).losses)
    torch.testing.assert_close(recorder.losses[-1], flow(wider, batch=recorder.batch).losses)
    assert recorder.rows[-1]["0", "weight"]["update_ratio"].shape == (4,)
    assert bool(recorder.updates["0.weight"].isfinite().all())


class Changing(nn.Module):
    """Calls one layer more as its weights move."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = torch.tanh(self.a(x))
        return self.c(self.b(x) if self.calls > 12 else x)


def test_layers_that_come_and_go() -> None:
    recorder = Recorder(every=2)
    trained(task_of(mlp(12, 8, 3)), 1, recorder)
    trained(task_of(Changing), 10, recorder)  # remembers weights before it has looked at any
    assert recorder.steps == [1, 3, 5, 7, 9]
    assert len(recorder.rows) == 5


@pytest.mark.parametrize("how", BY)
@pytest.mark.parametrize("labels", [range(8), [7] * 16, [0] * 32])
def test_probes_that_do_not_fit_are_told(
    labels: list[int], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by(how, monkeypatch)
    with pytest.raises(LosslabError, match="mend the network, the loss or the batch"):
        trained(task_of(mlp(12, 8, 3)), 3, Recorder((torch.randn(16, 12), torch.tensor([*labels]))))


def test_a_sample_of_nothing_is_refused() -> None:
    with pytest.raises(LosslabError, match="sample is 0: pass at least 1 value"):
        Recorder(sample=0)
    recorder = Recorder(every=2, sample=None)
    trained(task_of(mlp(12, 8, 3)), 3, recorder)
    assert bool(recorder.statistic("1", "p50").isfinite().all())


def test_a_batch_of_another_kind_goes_to_the_instrument() -> None:
    task = task_of(mlp(12, 8, 3))
    x, y = task.train.head(16).all()
    recorder = Recorder((x, y, y), every=2)
    loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    trained(task.replace(loss=loss), 3, recorder)
    assert len(recorder.rows) == 2
    recorder = Recorder((x[:, :5], y), every=2)
    with pytest.raises(LosslabError, match="layer '0' raised"):
        trained(task, 3, recorder)


@pytest.mark.parametrize("how", BY)
def test_what_overflows_is_not_called_constant(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by(how, monkeypatch)
    task = task_of(mlp(12, 8, 3))
    x, y = task.train.head(16).all()
    recorder, other = Recorder((1e25 * x, y), every=1), Recorder((1e25 * x, y), every=1)
    trained(task, 1, recorder)
    assert recorder.instrument is None
    monkeypatch.setattr("losslab.signals.recorder.Glancer.of", lambda *_: None)
    trained(task, 1, other)
    told = recorder.statistic("0", "constant")
    assert bool(told.isnan().all())
    torch.testing.assert_close(told, other.statistic("0", "constant"), equal_nan=True)
