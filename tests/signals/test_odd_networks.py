"""Networks that are not layers in a row, each with one output: several outputs, branches, compiled code."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from losslab.engine import train
from losslab.errors import LosslabError
from losslab.signals import flow, signals, singular_values
from losslab.tasks import function_task, mlp, rosenbrock, supervised

X = torch.randn(9, 5, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(9) % 3


def entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Recurrent(nn.Module):
    """A head on the outputs of an LSTM, or on its last state alone."""

    def __init__(self, state: bool) -> None:
        super().__init__()
        self.state, self.cells, self.head = state, nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, (last, _) = self.cells(x)
        return self.head(last[-1] if self.state else outputs[:, -1])


def test_the_first_output_has_a_gradient_where_the_loss_uses_it() -> None:
    torch.manual_seed(0)
    used, other = Recurrent(False), Recurrent(True)
    other.load_state_dict(used.state_dict())
    both = [flow(network, entropy, (X, Y)) for network in (used, other)]
    assert torch.equal(*(seen.outputs["cells"] for seen in both))
    assert list(both[0].gradients) == ["cells", "head"]
    assert list(both[1].gradients) == ["head"]  # not zeros: the loss depends on the layer by its state
    for name in both[0].weight_gradients:
        torch.testing.assert_close(*(seen.weight_gradients[name] for seen in both))
    assert list(singular_values(used, entropy, (X, Y))) == [("cells", "head")]
    assert singular_values(other, entropy, (X, Y)) == {}
    table = signals(other, entropy, (X, Y)).table
    assert table[table.layer == "cells"].direction.tolist() == ["forward", "weight"]


class Halves(nn.Module):
    """One layer with two outputs, and whichever of them is wanted."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which, self.halves, self.head = which, Split(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.halves(x)[self.which])
        return out


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ self.weight
        return y[:, :3], y[:, 3:]


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("which", [0, 1])
def test_several_outputs_in_a_population(which: int, members: int) -> None:
    task = supervised(lambda: Halves(which), (X[:, 0], Y))
    seen = flow(train(task, "sgd", seeds=members, steps=1, evaluate=None))
    assert ("halves" in seen.gradients) is (which == 0)
    assert seen.outputs["halves"].shape == (members, 9, 3)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.left(x).relu() * self.right(x).tanh())


def test_branches_have_no_jacobian_between_them() -> None:
    found = singular_values(Branches(), entropy, (X[:, 0], Y))
    assert list(found) == [("tanh()", "head")]


def compiled_whole() -> nn.Module:
    whole: nn.Module = torch.compile(mlp(4, 5, 3)(), backend="eager")  # type: ignore[assignment]
    return whole


def compiled_in_place() -> nn.Module:
    network = mlp(4, 5, 3)()
    network.compile(backend="eager")
    return network


@pytest.mark.parametrize("make", [compiled_whole, compiled_in_place])
def test_compiled_networks_are_looked_at_as_they_were_written(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = make()
    seen = flow(network, entropy, (X[:, 0], Y))
    with torch.no_grad():
        torch.testing.assert_close([*seen.outputs.values()][-1][0], network(X[:, 0]))
    assert [layer.kind for layer in seen.layers.values()] == ["Linear", "ReLU", "Linear"]


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.first, self.body = reentrant, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.body, self.first(x), use_reentrant=self.reentrant)
        return out


@pytest.mark.parametrize(
    ("reentrant", "told"),
    [
        (False, "runs parts of its forward pass again .* switch activation checkpointing off"),
        (True, "the backward pass raised RuntimeError: When use_reentrant=True"),
    ],
)
def test_recomputed_activations_are_refused(reentrant: bool, told: str) -> None:
    with pytest.raises(LosslabError, match=told):
        flow(Recomputed(reentrant), entropy, (X[:, 0], Y))
    with pytest.raises(
        LosslabError, match=r"switch activation checkpointing off|the backward pass of the loss"
    ):
        train(supervised(lambda: Recomputed(reentrant), (X[:, 0], Y)), "sgd", seeds=2, steps=1)


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it outdated
        module: nn.Module = torch.jit.trace(nn.Linear(4, 3), X[:, 0])
    return module


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (traced, "has parts compiled by torch.jit"),
        (lambda: nn.LazyLinear(3), "lazy layers without weights yet"),
    ],
)
def test_networks_whose_weights_cannot_be_moved(make: Callable[[], nn.Module], told: str) -> None:
    with pytest.raises(LosslabError, match=told):
        signals(make(), entropy, (X[:, 0], Y))


def test_nothing_to_look_at_is_told() -> None:
    with pytest.raises(LosslabError, match="the loss calls no layer with an output to look at"):
        signals(function_task(rosenbrock))
    with pytest.raises(LosslabError, match="no layers were named: name at least one, or pass None"):
        signals(mlp(4, 5, 3)(), entropy, (X[:, 0], Y), layers=[])
    population = train(supervised(mlp(4, 5, 3), (X[:, 0], Y)), "sgd", seeds=2, steps=1)
    population.diverged[:] = 0
    with pytest.raises(LosslabError, match="all 2 members have diverged by step 1, so nothing flows"):
        signals(population)
