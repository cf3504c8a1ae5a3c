"""The one-line instrument: what its table holds, what theory expects, what needs attention and what not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from losslab import layers
from losslab.engine import train
from losslab.signals import Recorder, SignalTable, describe, drifted, flow, mean_field, signals
from losslab.tasks import Task, mlp, supervised


def task_of(
    model: Callable[[], nn.Module], scale: float = 1.0, examples: int = 200, features: int = 30
) -> Task:
    g = torch.Generator().manual_seed(0)
    x = scale * torch.randn(examples, features, generator=g)
    return supervised(model, (x, torch.randint(10, (examples,), generator=g)), name="planted")


def kinds(seen: SignalTable) -> set[tuple[str, str]]:
    return {(note.layer, note.kind) for note in seen.attention}


def of_weights(
    change: Callable[[nn.Sequential], Any], *widths: int, **options: Any
) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        net = mlp(*widths, **options)()
        assert isinstance(net, nn.Sequential)
        with torch.no_grad():
            change(net)
        return net

    return build


# -- the numbers ---------------------------------------------------------------------------------------


def test_rows_are_those_of_the_flow() -> None:
    task = task_of(mlp(30, 20, 10, activation="tanh"))
    population = train(task, "sgd", seeds=3, steps=5, evaluate=None)
    seen = signals(population)
    wanted = describe(flow(population))
    for place, told in wanted.items():
        for name, values in told.items():
            torch.testing.assert_close(seen.rows[place][name], values, equal_nan=True)
    one = seen.table.query("layer == '1' and direction == 'forward'")
    assert one["std"].item() == pytest.approx(wanted["1", "forward"]["std"].median().item())
    assert len(seen.by_member) == 3 * len(seen.table)
    assert seen.histograms["1", "backward"].counts.shape == (3, 50)
    values = seen.jacobians["1", "2"]
    torch.testing.assert_close(seen.rows["2", "forward"]["jacobian_mean"], values.mean((1, 2)))
    assert "expected_std" in seen.table
    assert "nothing needs attention" in repr(seen)


def test_a_task_a_module_and_a_selection_of_layers() -> None:
    task = task_of(mlp(30, 20, 10))
    assert signals(task, seeds=2, jacobians=0).losses.shape == (2,)
    module = task.model()
    seen = signals(module, task, layers=["2"])
    assert [*seen.layers] == ["2"]
    assert not seen.jacobians
    evaluated = signals(module, task, training=False)
    assert [*evaluated.layers] == ["0", "1", "2"]


@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid"])
def test_theory_is_met_by_wide_random_networks(activation: str) -> None:
    start = layers.lecun(layers.gain_of(activation) if activation == "relu" else 1.0)
    make = start.on(mlp(300, 300, 300, 300, 10, activation=activation))
    seen = signals(task_of(make, features=300), seeds=4, jacobians=0)
    assert seen.prediction is not None
    assert seen.prediction.activation == activation
    rows = seen.by_member.groupby(["layer", "direction"])["std"].mean()
    assert len(seen.prediction.std) == 14
    for place, expected in seen.prediction.std.items():
        # Four members with ten outputs each know the scale of a layer beside the outputs to about a tenth.
        few = place[1] == "backward" or place[0] == "6"
        assert rows[place] == pytest.approx(expected, rel=0.3 if few else 0.06)


def test_theory_speaks_only_of_plain_networks() -> None:
    for model in (
        mlp(30, 20, 10, batch_norm=True),
        mlp(30, 10),
        lambda: nn.Sequential(nn.Linear(30, 9), nn.Tanh(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 10)),
    ):
        assert signals(task_of(model), jacobians=0).prediction is None
    assert mean_field.recursion("tanh", 2).variance[1] < 1


# -- what needs attention ------------------------------------------------------------------------------


def saturating(net: nn.Sequential) -> Any:
    net[0].weight.mul_(60)


def dying(net: nn.Sequential) -> Any:
    net[0].bias[:8] = -100.0


def fading(net: nn.Sequential) -> Any:
    for layer in net:
        if isinstance(layer, nn.Linear):
            layer.weight.mul_(0.05)
            layer.bias.zero_()


def growing(net: nn.Sequential) -> Any:
    for layer in net:
        if isinstance(layer, nn.Linear):
            layer.weight.mul_(60)


def emptying(net: nn.Sequential) -> Any:
    net[2].weight[:6] = 0.0
    net[2].bias[:6] = 1.0


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (mlp(30, 20, 20, 10), set()),
        (layers.xavier().on(mlp(30, 40, 40, 40, 10, activation="tanh")), set()),
        (layers.he().on(mlp(30, 40, 40, 40, 40, 40, 10)), set()),
        (mlp(30, 20, 20, 10, batch_norm=True), set()),
        (of_weights(saturating, 30, 20, 10, activation="tanh"), {("1", "saturated")}),
        (of_weights(saturating, 30, 20, 10, activation="sigmoid"), {("1", "saturated")}),
        (of_weights(dying, 30, 20, 10), {("1", "dead")}),
        (of_weights(emptying, 30, 20, 20, 10), {("2", "constant")}),
        (of_weights(fading, 30, 20, 20, 20, 10), {("", "vanishing")}),
        (of_weights(growing, 30, 20, 20, 20, 10), {("", "exploding")}),
    ],
    ids=["torch", "xavier", "he", "bn", "tanh", "sigmoid", "dead", "constant", "vanishing", "exploding"],
)
def test_planted_problems_are_found_and_nothing_else(make: Callable[[], nn.Module], wanted: set[Any]) -> None:
    seen = signals(task_of(make), seeds=2, jacobians=0)
    assert kinds(seen) == wanted
    for note in seen.attention:
        assert str(note).endswith(".")
        assert ": " in note.text
        assert "members" not in note.text  # all of them have it


def test_inputs_that_are_far_from_unit_scale_or_empty() -> None:
    wide = signals(task_of(mlp(30, 20, 10), scale=100.0))
    assert ("input", "inputs") in kinds(wide)
    task = task_of(mlp(30, 20, 10))
    assert task.train is not None
    task.train.all()[0][:, :10] = 0.0
    assert kinds(signals(task)) == {("input", "constant")}
    assert "33 % of the input features" in str(signals(task).attention[0])


def test_one_example_tells_nothing_of_dead_units() -> None:
    task = task_of(mlp(30, 20, 10), scale=100.0)
    module = task.model()
    assert task.train is not None
    alone, several = (signals(module, task, task.train.head(k)) for k in (1, 50))
    assert kinds(alone) == {("", "examples")}
    assert "more of them" in str(alone.attention[0])
    assert ("input", "inputs") in kinds(several)
    assert "examples" not in {kind for _, kind in kinds(several)}


def test_a_problem_of_some_members_tells_how_many() -> None:
    task = task_of(mlp(30, 20, 10))
    population = train(task, "sgd", seeds=4, steps=0, evaluate=None)
    population.points.weights["0.bias"][2, :8] = -100.0
    (note,) = signals(population).attention
    assert (note.layer, note.kind) == ("1", "dead")
    assert "40 % of its units are at zero for every example in 1 of 4 members" in note.text


def test_members_that_diverged_are_told_and_left_out() -> None:
    task = task_of(mlp(30, 20, 10))
    population = train(task, "sgd", seeds=3, steps=1, evaluate=None)
    for weight in population.points.weights.values():
        weight[1] = torch.nan
    population.diverged[1] = 1
    seen = signals(population)
    assert kinds(seen) == {("", "diverged")}
    assert "1 of 3 members" in str(seen.attention[0])
    assert seen.table.query("direction != 'weight'")["std"].notna().all()


def test_steps_that_are_too_small_or_too_large() -> None:
    task = task_of(mlp(30, 20, 10))
    population = train(task, "sgd", seeds=2, steps=1, evaluate=None)

    def told(*ratios: float) -> set[tuple[str, str]]:
        updates = {n: torch.tensor(ratios) for n in population.points.weights}
        return kinds(signals(population, updates=updates))

    assert told(1e-3, 1e-3) == set()
    assert told(1e-6, 1e-3) == {("0", "update"), ("2", "update")}
    assert told(1e-3, 0.1) == {("0", "update"), ("2", "update")}
    recorder = Recorder(every=1)
    population = train(task, "sgd", seeds=2, steps=3, watch=recorder, record=recorder.when)
    seen = signals(population, updates=recorder.updates)
    ratio = recorder.statistic("0", "update_ratio", "weight")[-1]
    torch.testing.assert_close(seen.rows["0", "weight"]["update_ratio"].double(), ratio)


def test_a_scale_that_drifts() -> None:
    def rows(scale: float) -> tuple[Any, Any]:
        seen = flow(of_weights(lambda net: net[2].weight.mul_(scale), 4, 6, 3)(), mean_loss, torch.ones(5, 4))
        return describe(seen), seen.layers

    first, told = rows(1.0)
    assert drifted(first, rows(2.0)[0], told) == ()
    (note,) = drifted(first, rows(500.0)[0], told)
    assert (note.layer, note.kind) == ("2", "drift")


def mean_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch * torch.arange(1, 6)[:, None]).mean()
