"""Criteria: which weights are worth keeping, as a score of each weight; the lowest go first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from losslab.engine import Objective, Points, randomness
from losslab.engine.points import Stack
from losslab.errors import unknown
from losslab.tasks import Data, Task
from losslab.tasks.nest import leaves, map_nest
from losslab.tickets.prunable import Layers

EXAMPLES = 256
"""Training examples that SNIP's and GraSP's gradients are taken on."""


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at.

    Attributes:
        task: The task.
        module: A network of the task.
        layers: What may be pruned.
        start: The weights that training began from.
        end: The weights that it ended at.
        masks: What is still alive, name -> bool ``[N, *shape]``.
        seeds: One a member.
        level: The level to come, 1 for the first.
    """

    task: Task
    module: nn.Module
    layers: Layers
    start: Points
    end: Points
    masks: Stack
    seeds: list[int]
    level: int

    def alive(self) -> Points:
        """The starting weights that are alive."""
        weights = {n: w * self.masks[n] if n in self.masks else w for n, w in self.start.weights.items()}
        return Points(weights, self.start.buffers)


@dataclass(frozen=True)
class Criterion:
    """A score of each weight.

    Attributes:
        name: How plans call it.
        equation: The score; the lowest are pruned first.
        source: Where it comes from.
        score: The scores, name -> ``[N, *shape]``.
        trained: Whether it looks at trained weights; else pruning needs no training.
    """

    name: str
    equation: str
    source: str
    score: Callable[[Evidence], Stack]
    trained: bool = True


def _magnitude(at: Evidence) -> Stack:
    return {n: at.end[n].abs() for n in at.layers.sizes}


def _movement(at: Evidence) -> Stack:
    return {n: at.end[n].square() - at.start[n].square() for n in at.layers.sizes}


def _distance(at: Evidence) -> Stack:
    return {n: (at.end[n] - at.start[n]).abs() for n in at.layers.sizes}


def _random(at: Evidence) -> Stack:
    scores: Stack = {}
    for k, name in enumerate(at.layers.sizes):
        shape = at.start[name].shape[1:]
        rows = [
            torch.rand(shape, generator=randomness.generator(s, "pruned at random", at.level, k))
            for s in at.seeds
        ]
        scores[name] = torch.stack(rows)
    return scores


def _snip(at: Evidence) -> Stack:
    points = at.alive()
    _, slope = _objective(at).gradient(points)
    return {n: (slope[n] * points[n]).abs() for n in at.layers.sizes}


def _grasp(at: Evidence) -> Stack:
    points, objective = at.alive(), _objective(at)
    _, slope = objective.gradient(points)
    bent = objective.hvp(points, slope.weights)
    return {n: points[n] * bent[n] for n in at.layers.sizes}


def _synflow(at: Evidence) -> Stack:
    assert at.task.train is not None
    points = at.alive().to(dtype=torch.float64)
    inputs = leaves(at.task.train.head(1).all())[0].double()
    module = copy.deepcopy(at.module).double().eval()
    scores: dict[str, list[Tensor]] = {n: [] for n in at.layers.sizes}
    for i in range(points.members):
        values = {n: t[i].abs() if t.is_floating_point() else t[i] for n, t in points.items()}
        names = list(at.layers.sizes)
        leaf = {n: values[n].requires_grad_() for n in names}
        flow = functional_call(module, values | leaf, (torch.ones_like(inputs),)).sum()
        for name, slope in zip(names, torch.autograd.grad(flow, [leaf[n] for n in names]), strict=True):
            scores[name].append((slope * leaf[name]).detach())
    return {n: torch.stack(rows) for n, rows in scores.items()}


def _objective(at: Evidence) -> Objective:
    assert at.task.train is not None
    g = randomness.generator(0, "examples of a criterion")
    index = torch.randperm(len(at.task.train), generator=g)[:EXAMPLES]
    dtype = next(iter(at.start.weights.values())).dtype
    data = Data(map_nest(lambda t: t[index], at.task.train.all())).to(dtype=dtype)
    return Objective(at.task, data, execution="loop", module=at.module)


CRITERIA: dict[str, Criterion] = {
    c.name: c
    for c in (
        Criterion("magnitude", "|θ_T|", "Han et al. 2015; Frankle & Carbin 2019", _magnitude),
        Criterion(
            "movement",
            "θ_T² - θ_0²: how far it moved away from zero; under descent the sum of -2 lr g θ, "
            "to first order in lr",
            "Sanh, Wolf & Rush 2020; Zhou et al. 2019 (magnitude increase)",
            _movement,
        ),
        Criterion("distance", "|θ_T - θ_0|", "Zhou et al. 2019 (movement)", _distance),
        Criterion("random", "uniform", "the control of every other", _random, trained=False),
        Criterion("snip", "|g θ|", "Lee, Ajanthan & Torr 2019", _snip, trained=False),
        Criterion("grasp", "θ · H g", "Wang, Zhang & Grosse 2020, eq. 8, sign turned", _grasp, trained=False),
        Criterion(
            "synflow", "|θ| ∂R/∂|θ|, R = 1ᵀ Π|W| 1", "Tanaka et al. 2020, eq. 2", _synflow, trained=False
        ),
    )
}
"""Every criterion by name. SNIP, GraSP and SynFlow look at the starting weights; SynFlow is meant to be
iterated without training, GraSP and SNIP once."""


def criterion(name: str) -> Criterion:
    """A criterion by name.

    Raises:
        LosslabError: An unknown one.

    Example:
        >>> criterion("magnitude").equation
        '|θ_T|'
    """
    if name not in CRITERIA:
        raise unknown("criterion", name, CRITERIA)
    return CRITERIA[name]
