"""Slopes against the objective, on every batch of an epoch, whatever runs them."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.paths.cases import at, bent, bent_task, trained

from losslab.engine import Objective
from losslab.errors import LosslabError
from losslab.paths import Slopes

EXACT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("batch_size", [None, 28, 96])  # of 96 examples: 28 + 28 + 28 + 12
@pytest.mark.parametrize("execution", ["stacked", "loop", "auto"])
def test_losses_and_gradients_are_those_of_the_objective(batch_norm, batch_size, execution):
    population = trained(batch_norm)
    points, task = population.points, population.task
    slopes = Slopes(task, batch_size, seed=3, weight_decay=0.5, execution=execution)
    before = {n: t.clone() for n, t in points.items()}
    seen = []
    for step in range(5):
        index = slopes.batches.at(step)
        seen += index.tolist() if step < slopes.batches.per_epoch else []
        objective = Objective(task, task.train.take(index), execution="loop")
        values, gradients = objective.gradient(points)
        theta = points.matrix()
        found, slope = slopes(points.select([0]), theta, step)
        torch.testing.assert_close(found, values, **EXACT)
        torch.testing.assert_close(slope, gradients.matrix() + 0.5 * theta, **EXACT)
    assert sorted(seen) == list(range(96))
    assert all(torch.equal(points[n], t) for n, t in before.items())


def test_the_callers_network_and_the_random_state_stay_as_they_are():
    population = trained(True)
    module, state = copy.deepcopy(population.template), torch.get_rng_state()
    before = copy.deepcopy(module.state_dict())
    Slopes(population.task, 28, module=module)(population.points.select([0]), population.points.matrix(), 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_a_task_without_data():
    values, slope = Slopes(bent_task())(at((0.0, 0.0)), at((0.5, 0.0), (0.0, 1.0)).matrix(), 7)
    x = torch.tensor([[0.5, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    wanted = bent.f(x)
    wanted.sum().backward()
    torch.testing.assert_close(values, wanted.detach(), **EXACT)
    torch.testing.assert_close(slope, x.grad, **EXACT)
    with pytest.raises(LosslabError, match="weight_decay"):
        Slopes(bent_task(), weight_decay=-1.0)
