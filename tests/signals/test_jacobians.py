"""Singular values between layers: against numpy on diag(f') W, and against torch's own Jacobian."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from losslab.engine import train
from losslab.errors import LosslabError
from losslab.signals import singular_values
from losslab.tasks import mlp, supervised


def mean(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_an_mlp_by_hand() -> None:
    torch.manual_seed(0)
    net = mlp(4, 6, 5, 3, activation="tanh")().double()
    x = inputs(7, 4)
    found = singular_values(net, mean, x, examples=3)
    assert list(found) == [("1", "3"), ("3", "4")]
    for e in range(3):
        z = torch.tanh(net[2](torch.tanh(net[0](x[e])))).detach().numpy()
        w = net[2].weight.detach().numpy()
        wanted = np.linalg.svd(np.diag(1 - z**2) @ w, compute_uv=False)
        np.testing.assert_allclose(found["1", "3"][0, e], wanted, rtol=1e-10)
        np.testing.assert_allclose(
            found["3", "4"][0, e], np.linalg.svd(net[4].weight.detach().numpy(), compute_uv=False), rtol=1e-10
        )


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_part_of_the_function(training: bool) -> None:
    torch.manual_seed(1)
    net = mlp(4, 6, 5, 3, batch_norm=True)().double().train(training)
    x = inputs(7, 4)
    found = singular_values(net, mean, x, examples=2, training=training)["2", "5"]
    before = torch.relu(net[1](net[0](x))).detach()
    for e in range(2):

        def after(own: Tensor, e: int = e) -> Tensor:
            rows = [own if k == e else before[k] for k in range(len(before))]
            return torch.relu(net[4](net[3](torch.stack(rows))))[e]

        jacobian = torch.autograd.functional.jacobian(after, before[e])
        torch.testing.assert_close(found[0, e], torch.linalg.svdvals(jacobian), rtol=1e-9, atol=1e-12)


def test_members_layers_and_convolutions() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
        )

    x, y = inputs(9, 1, 6, 6), torch.arange(9) % 3
    population = train(supervised(make, (x, y)), "sgd", seeds=3, steps=2, batch_size=3, dtype="float64")
    found = singular_values(population, batch=(x, y), layers=["0", "2", "4"], examples=2)
    assert {k: v.shape for k, v in found.items()} == {("0", "2"): (3, 2, 8), ("2", "4"): (3, 2, 3)}
    # Max-pooling of a ReLU copies each positive maximum: singular values are 0 or 1.
    assert set(found["0", "2"].unique().tolist()) <= {0.0, 1.0}
    for i in range(3):
        alone = singular_values(population[i].train(), population.task.loss, (x, y), ["0", "2", "4"], 2)
        for pair, values in found.items():
            torch.testing.assert_close(values[i], alone[pair][0], rtol=1e-9, atol=1e-12)
    few = singular_values(population, batch=(x, y), layers=["0", "2", "4"], largest=30)
    assert list(few) == [("2", "4")]


def test_diverged_members_and_errors() -> None:
    x, y = inputs(9, 4), torch.arange(9) % 3
    population = train(supervised(mlp(4, 5, 3), (x, y)), "sgd", seeds=2, steps=1, dtype="float64")
    population.points.weights["0.weight"][1] = torch.nan
    found = singular_values(population, batch=(x, y))["1", "2"]
    assert found.isfinite().all(2).all(1).tolist() == [True, True]  # the last layer is linear
    population.points.weights["2.weight"][1] = torch.nan
    assert singular_values(population, batch=(x, y))["1", "2"].isnan().all(2).all(1).tolist() == [False, True]
    with pytest.raises(LosslabError, match="at least two are needed"):
        singular_values(nn.Linear(2, 2), mean, torch.ones(3, 2))
