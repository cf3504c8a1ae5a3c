"""What a run records, when it stops, where it starts, and what it leaves alone."""

from __future__ import annotations

import copy
import math
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.engine.cases import NAMED, classified, task_of
from torch import Tensor, nn

from losslab import EarlyStopping, LosslabError, Points, Population, Task, cross, supervised, train
from losslab.engine import Batches
from losslab.engine.randomness import seeded
from losslab.rules import SGD, Adam
from losslab.tasks import mlp

G = torch.Generator().manual_seed(0)
TRAIN, VALIDATION, TEST = (classified(4)(G, n) for n in (17, 9, 11))
TASK = supervised(mlp(4, 6, 3, activation="tanh"), TRAIN, test=TEST, validation=VALIDATION)


def run(rule: Any = "adam", task: Task = TASK, **options: Any) -> Population:
    settings = {"seeds": 2, "steps": 8, "batch_size": 5, "dtype": "float64", "execution": "stacked"}
    if {"epochs", "steps"} & options.keys():
        del settings["steps"]
    return train(task, rule, **{**settings, **options})


def double(batch: Any) -> Any:
    return batch[0].double(), batch[1]


def steps(population: Population, column: str) -> list[int]:
    """The steps at which a column was measured, of member 0."""
    table = population.history.query("member == 0")
    return table.step[table[column].notna()].tolist()


# -- history -------------------------------------------------------------------------------------------


def test_a_row_speaks_of_the_weights_after_as_many_updates() -> None:
    population = run(SGD(lr=[0.1, 0.3]), record=1, evaluate=1, evaluate_on=("train", "validation", "test"))
    table, batches = population.history, Batches(17, 5, [0, 1])
    x, y = double(TRAIN)
    for i, rate in enumerate((0.1, 0.3)):
        with seeded(i, "init"):
            module = TASK.model().double()
        rows = table[table.member == i].set_index("step")
        assert rows.index.tolist() == list(range(9))
        for step in range(8):
            index = batches.at(step)[i]
            module.zero_grad()
            loss = F.cross_entropy(module(x[index]), y[index])
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in module.parameters()])  # type: ignore[union-attr]
            accuracy = (module(x[index]).argmax(-1) == y[index]).double().mean()
            norm = gradient.norm()
            wanted = {"loss": loss.detach(), "accuracy": accuracy, "gradient_norm": norm, "lr": rate,
                      "seed": i, "update_norm": rate * norm, "epoch": step / 4}  # fmt: skip
            for name, data in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
                z, label = module(data[0].double()).detach(), data[1]
                wanted[f"{name}_loss"] = F.cross_entropy(z, label)
                wanted[f"{name}_accuracy"] = (z.argmax(-1) == label).double().mean()
            for column, value in wanted.items():
                near = 1e-7 if "accuracy" in column else 1e-10  # a mean in float32
                assert rows[column][step] == pytest.approx(float(value), abs=near), (column, step)
            with torch.no_grad():
                for p in module.parameters():
                    p -= rate * p.grad  # type: ignore[operator]
        assert math.isnan(rows.loss[8])
        assert rows.test_loss[8] == pytest.approx(F.cross_entropy(module(double(TEST)[0]), TEST[1]).item())


def test_the_columns_of_the_table() -> None:
    told = run(Adam(lr=[0.1, 0.2])).history
    assert list(told)[:5] == ["step", "epoch", "member", "seed", "lr"]
    assert set(list(told)[5:]) == {"loss", "accuracy", "gradient_norm", "update_norm", "validation_loss",
                                   "validation_accuracy", "test_loss", "test_accuracy"}  # fmt: skip
    summary = run(Adam(lr=[0.1, 0.2])).summary()
    assert summary.ended.tolist() == ["step 8", "step 8"]
    assert summary.loss.tolist() == told.query("step == 7").loss.tolist()


SCHEDULES: list[tuple[Any, list[int], list[int]]] = [  # 10 steps of 4 an epoch: when, recorded, evaluated
    (3, [0, 3, 6, 9], [0, 3, 6, 9, 10]),
    (1, list(range(10)), list(range(11))),
    (100, [0], [0, 10]),
    ("epoch", [0, 4, 8], [0, 4, 8, 10]),
    ([2, 5, 10, 99], [2, 5], [2, 5, 10]),
    (range(0, 9, 4), [0, 4, 8], [0, 4, 8]),
    (lambda step: step % 7 == 2, [2, 9], [2, 9]),
]


@pytest.mark.parametrize(("when", "recorded", "evaluated"), SCHEDULES, ids=str)
def test_schedules(when: Any, recorded: list[int], evaluated: list[int]) -> None:
    population = run(steps=10, record=when, evaluate=when)
    assert steps(population, "loss") == recorded
    assert steps(population, "test_loss") == evaluated


def test_by_default_about_a_hundred_rows_and_an_evaluation_an_epoch() -> None:
    population = run(steps=410, record=None)
    assert steps(population, "loss") == list(range(0, 410, 4))
    assert steps(population, "test_loss") == [*range(0, 410, 4), 410]
    assert "test_loss" not in run(evaluate=None).history
    assert "validation_loss" not in run(evaluate_on=["test"]).history


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"record": "batch"}, r"record is 'batch': pass a number of steps"),
        ({"evaluate": 0}, r"evaluate is 0: pass at least 1 step, or None"),
        ({"record": 2.5}, r"record is 2.5: pass a number of steps"),
        ({"evaluate_on": ["tset"]}, r"no 'tset' data: evaluate_on may name train, validation, test"),
        ({"steps": 3, "epochs": 1}, r"both of steps= and epochs= given"),
        ({"steps": None}, r"neither of steps= and epochs= given"),
        ({"steps": -1}, r"steps is -1: pass 0 or more"),
        ({"steps": 1.5}, r"steps is 1.5: pass 0 or more, a whole number"),
        ({"batch_size": 2.5}, r"batch_size is 2.5: pass at least 1, or None for all .* in whole numbers"),
        ({"epochs": float("nan")}, r"epochs is nan: pass 0 or more"),
        ({"batch_size": 0}, r"batch_size is 0: pass at least 1"),
        ({"batch_size": 18, "drop_last": True}, r"batch_size is 18 of 17 examples: nothing is left"),
        ({"seeds": 0}, r"seeds is 0: pass the number of members"),
        ({"seeds": []}, r"seeds is \[\]: pass the number"),
        ({"seeds": "ab"}, r"seeds is 'ab': pass the number of members, at least 1, or a list of whole"),
        ({"dtype": "flaot32"}, r"no dtype is named 'flaot32': did you mean 'float32'"),
        ({"dtype": torch.int64}, r"dtype is torch.int64: pass a floating dtype"),
        ({"device": "gpu"}, r"device 'gpu' cannot be used"),
        ({"execution": "vmap"}, r"no execution is named 'vmap'"),
        ({"resume": True}, r"resume was asked for without a folder: pass out="),
        ({"stop": EarlyStopping("val_loss"), "evaluate": 1}, r"early stopping watches 'val_loss' and"),
        ({"start": nn.Linear(4, 3)}, r"start differs from the task's model at '0.bias'"),
        ({"start": mlp(4, 7, 3)()}, r"start differs from the task's model at"),
        ({"start": Points.from_modules([mlp(4, 6, 3)() for _ in range(3)])}, r"3 members, the population 2"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(options: dict[str, Any], told: str) -> None:
    with pytest.raises(LosslabError, match=told) as caught:
        run(**options)
    assert "\n" not in str(caught.value)


def test_a_last_batch_that_the_network_cannot_take_is_found_at_the_start() -> None:
    task = task_of(NAMED["bn1d"])
    with pytest.raises(
        LosslabError,
        match=r"last batch has 1 example and .*no variance\): leave that batch out with drop_last",
    ):
        run(task=task, batch_size=4, epochs=2)
    assert run(task=task, batch_size=4, epochs=2, drop_last=True).step == 8
    assert run(task=task, batch_size=4, steps=3).step == 3


def test_patience_is_at_least_one() -> None:
    with pytest.raises(LosslabError, match="patience is 0: pass at least 1 evaluation"):
        EarlyStopping(patience=0)


# -- batches of a run ----------------------------------------------------------------------------------


def seen(**options: Any) -> list[list[float]]:
    """The examples of each training batch of one member, which are numbered from 0 to 16."""
    batches: list[list[float]] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if model.training:
            batches.append(batch.flatten().tolist())
        return model(batch).mean()

    task = Task(lambda: nn.Linear(1, 1), loss, torch.arange(17.0)[:, None])
    population = train(task, "sgd", seeds=[4], **{"evaluate": None, **options})
    return batches[-population.step :] if population.step else []


def test_full_batches_fractions_of_epochs_and_what_is_left_out() -> None:
    everything = list(range(17))
    assert seen(steps=3, batch_size=17) == [everything] * 3
    assert [len(b) for b in seen(epochs=2, batch_size=5)] == [5, 5, 5, 2] * 2
    assert [len(b) for b in seen(epochs=2, batch_size=5, drop_last=True)] == [5, 5, 5] * 2
    assert len(seen(epochs=1.5, batch_size=5)) == 6
    assert len(seen(epochs=0.3, batch_size=5)) == 2
    assert seen(epochs=0) == []
    first = seen(epochs=2, batch_size=5)
    assert sorted(chain(*first[:4])) == sorted(chain(*first[4:])) == everything
    assert first[:4] != first[4:]
    drawn = seen(epochs=50, batch_size=17, replacement=True)
    assert any(len(set(batch)) < 17 for batch in drawn)
    assert set(chain(*drawn)) == set(everything)
    private = Batches(17, 5, [4])
    assert first == [private.at(k).tolist() for k in range(8)]


def test_descent_takes_all_data_unless_told_otherwise() -> None:
    assert run("gd", batch_size=None).plan.batch_size is None
    assert run("gd", batch_size=None).per_epoch == 1
    assert run("sgd", batch_size=None).plan.batch_size == 32
    assert run("gd", batch_size=5).per_epoch == 4


# -- early stopping ------------------------------------------------------------------------------------


def test_members_stop_by_themselves_and_get_their_best_weights_back() -> None:
    rule = SGD(lr=[0.001, 2.0, 12.0])
    options: dict[str, Any] = {"seeds": 3, "steps": 40, "evaluate": 1, "record": 1}
    free = run(rule, **options)
    stopped = run(rule, **options, stop=EarlyStopping(patience=3))
    expected = []
    for i in range(3):
        losses = free.history.query("member == @i").validation_loss.tolist()
        best, end = 0, 40
        for step, loss in enumerate(losses):
            if loss < losses[best]:
                best = step
            if step - best >= 3:
                end = step
                break
        expected.append((best, end))
        rows = stopped.history.query("member == @i")
        assert rows.validation_loss.tolist()[: end + 1] == pytest.approx(losses[: end + 1], abs=1e-9)
        assert rows.validation_loss[rows.step > end].isna().all()
        x, y = double(VALIDATION)
        assert F.cross_entropy(stopped[i](x), y).item() == pytest.approx(losses[best], abs=1e-10)
    ends = [end for _, end in expected]
    assert stopped.stopped.tolist() == [end if end < 40 else -1 for end in ends]
    assert len(set(ends)) > 1
    assert min(ends) < 40
    kept = run(rule, **options, stop=EarlyStopping(patience=3, restore=False))
    i = ends.index(min(ends))
    last = run(rule.select([i]), **{**options, "seeds": [i], "steps": ends[i]})
    torch.testing.assert_close(kept.points["0.weight"][i], last.points["0.weight"][0], rtol=1e-10, atol=1e-10)


def test_a_metric_may_be_maximised_and_small_gains_ignored() -> None:
    options: dict[str, Any] = {"steps": 30, "evaluate": 1}
    up = run(**options, stop=EarlyStopping("test_accuracy", patience=2, minimise=False))
    table = up.history.query("member == 0").test_accuracy.dropna().tolist()
    best = int(np.argmax(table))
    assert up.stopped[0] == best + 2
    assert run(**options, stop=EarlyStopping(patience=4, least=1e9)).stopped.tolist() == [4, 4]


# -- where a run starts, what it leaves alone ----------------------------------------------------------


def test_a_run_starts_from_points_a_module_or_a_population() -> None:
    module = mlp(4, 6, 3, activation="tanh")()
    first = run(start=module, steps=0)
    assert torch.equal(first.points["0.weight"], module[0].weight.detach().double().expand(2, 6, 4))  # type: ignore[index]
    trained = run(steps=5)
    again = run(start=trained, steps=0)
    assert torch.equal(again.points.matrix(), trained.points.matrix())
    before = trained.points.clone()
    moved = run(start=trained.points, steps=3)
    assert torch.equal(trained.points.matrix(), before.matrix())
    assert not torch.equal(moved.points.matrix(), before.matrix())
    assert len(run(start=trained.points.select([1]), seeds=3, steps=1)) == 3


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", torch.float16])
@pytest.mark.parametrize(("name", "rule"), [("mlp-relu", "nesterov"), ("bn1d", "sgd"), ("conv", "momentum")])
def test_dtypes(dtype: Any, name: str, rule: str) -> None:
    population = run(rule, task_of(NAMED[name]), dtype=dtype, batch_size=6)
    exact = run(rule, task_of(NAMED[name]), batch_size=6)
    moved = exact.points.matrix() - run(task=task_of(NAMED[name]), steps=0).points.matrix()
    error = population.points.matrix().double() - exact.points.matrix()
    assert (error.norm(dim=1) < 0.6 * moved.norm(dim=1)).all()
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {w.dtype for w in population.points.weights.values()} == {wanted}
    assert {t.dtype for slot in population.state.values() for t in slot.values()} <= {wanted}
    assert np.isfinite(population.history.loss.dropna()).all()
    assert {p.dtype for p in population[0].parameters()} == {wanted}


def test_data_in_another_dtype_than_the_weights_are_converted() -> None:
    x, y = TRAIN
    assert len(train(supervised(TASK.model, (x.double().numpy(), y)), "sgd", steps=1)) == 1


def test_a_member_is_an_ordinary_module_of_its_own() -> None:
    population = run(task=task_of(NAMED["bn1d"]), batch_size=6)
    module, kept = population[1], population.points.clone()
    assert not module.training
    assert type(module) is type(NAMED["bn1d"].make())
    for name, tensor in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
        assert torch.equal(tensor, population.points[name][1])
        assert tensor.is_leaf
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.add_(1)
    assert all(torch.equal(population.points[n], kept[n]) for n in kept)
    assert all(torch.equal(population[1].state_dict()[n], kept[n][1]) for n in kept)
    assert torch.equal(next(population[-1].parameters()), next(population[1].parameters()))
    assert len(list(population)) == 2
    with pytest.raises(IndexError, match="member 2 of 2: pass 0 to 1"):
        population[2]
    tied = run(task=task_of(NAMED["tied"]))[0]
    assert tied[0].weight is tied[2].weight  # type: ignore[index]


def test_the_callers_modules_data_and_random_numbers_are_left_alone() -> None:
    kept = NAMED["dropout-bn"].make()
    before = copy.deepcopy(kept.state_dict())
    data = tuple(t.clone() for t in TRAIN)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    population = train(supervised(lambda: kept, data, test=TEST), "adam", seeds=2, steps=3, dtype="float64")
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in kept.state_dict().items())
    assert {p.dtype for p in kept.parameters()} == {torch.float32}
    assert kept.training
    assert all(p.grad is None for p in kept.parameters())
    assert all(torch.equal(a, b) for a, b in zip(data, TRAIN, strict=True))
    assert population.points["0.weight"].dtype == torch.float64


def test_watch_sees_every_recorded_step_with_the_weights_after_it() -> None:
    told: list[tuple[int, float]] = []
    population = run(record=[0, 4], watch=lambda p: told.append((p.step, float(p.points.matrix().norm()))))
    assert [step for step, _ in told] == [1, 5]
    assert told[1][1] == pytest.approx(float(run(steps=5).points.matrix().norm()), abs=1e-12)
    assert len(population) == 2


def test_cross_gives_every_combination() -> None:
    seeds, hyper = cross([7, 8], lr=[0.1, 0.2], beta1=[0.5, 0.9])
    rows = list(zip(seeds, hyper["lr"], hyper["beta1"], strict=True))
    assert rows == [(s, r, b) for r in (0.1, 0.2) for b in (0.5, 0.9) for s in (7, 8)]
    assert len(run(Adam(**hyper), seeds=seeds)) == 8  # type: ignore[arg-type]
