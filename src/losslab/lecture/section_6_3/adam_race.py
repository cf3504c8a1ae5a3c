"""Comparisons of rules on a task: each rule at its own best rate, on the same fresh seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from losslab.engine import Population, cross, train
from losslab.engine.history import When
from losslab.lecture.claim import Drawing, Lab, Tables
from losslab.lecture.figures import figure, lines
from losslab.lecture.tuning import tune
from losslab.rules import Rule
from losslab.tasks import Batch, Task, digits_task, mnist_task

if TYPE_CHECKING:
    import pandas as pd

Model = Callable[[], nn.Module]

MEASURES = ("validation", "training")
"""What a rate may be chosen by. A rate that is best for one loss is off the optimum of the other, where the
other is steep: a quarter of a decade then moves the training loss by tens of per cent. Hence both."""

FIRST_TUNING_SEED = 1000
"""Searches use the seeds from here on, verdicts 0, 1, ..."""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a rule for any rates, one a member, and the grid of its search."""

    name: str
    make: Callable[[list[float]], Rule]
    grid: Sequence[float]


class Budget(NamedTuple):
    """How long every member of a comparison trains."""

    epochs: int
    batch_size: int


class Bench(NamedTuple):
    """The data of a comparison that the papers made on MNIST, and the sizes that fit."""

    name: str
    inputs: int
    least: int
    tuning_seeds: int
    task: Callable[[Model], Task]
    note: str


def bench(lab: Lab) -> Bench:
    """MNIST in the profiles full and paper when its folder is given, the digits otherwise."""
    if lab.profile != "quick" and lab.data is not None:
        return Bench("MNIST", 784, 5, 1, lambda model: ridged(mnist_task(model, lab.data)), "")
    return Bench("digits", 64, 10, 3, digits, "the digits stand in for MNIST")


def digits(model: Model | None = None) -> Task:
    """The digits with a ridge."""
    return ridged(digits_task(model))


def ridged(task: Task) -> Task:
    """The task with ``|w|^2 / (2n)`` added to its loss, n the number of training examples.

    Without it the loss of separable data has no minimum but 0 at infinity: the larger a rate, the smaller the
    loss, over orders of magnitude. The papers' logistic regression has an L2 penalty too.
    """
    assert task.train is not None
    plain, half = task.loss, 0.5 / len(task.train)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return plain(model, batch) + half * sum(w.square().sum() for w in model.parameters())

    return task.replace(loss=loss)


def race(
    task: Task, arms: Sequence[Arm], budget: Budget, seeds: int, tuning_seeds: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tunes each arm's rate, once by validation and once by training loss, and trains it from fresh seeds.

    A seed fixes the initial weights, the order of the data and dropout, so runs of one seed are paired.

    Returns:
        The runs, a row an epoch: arm, tuned (by which of `MEASURES`), lr, seed, epoch, train_loss (over all
        training data, without dropout; infinite once a run has diverged). And the searches: arm, tuned, lr,
        score, at_edge.
    """
    import numpy as np
    import pandas as pd

    runs, searches = [], []
    fresh = list(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + tuning_seeds))
    for arm in arms:
        score = _Score(task, arm, budget)
        tunings = {measure: tune(score.by(measure), arm.grid, fresh) for measure in MEASURES}
        members, grid = cross(seeds, lr=[tuning.lr for tuning in tunings.values()])
        history = trained(task, arm.make(grid["lr"]), members, budget, "epoch", ("train",)).history
        frame = history[["seed", "epoch", "train_loss"]].assign(arm=arm.name)
        frame["train_loss"] = frame["train_loss"].fillna(np.inf)
        frame["tuned"] = [MEASURES[member // seeds] for member in history["member"]]
        frame["lr"] = [tunings[measure].lr for measure in frame["tuned"]]
        runs.append(frame)
        searches += [
            tuning.table.assign(arm=arm.name, tuned=measure, at_edge=tuning.at_edge)
            for measure, tuning in tunings.items()
        ]
    return pd.concat(runs, ignore_index=True), pd.concat(searches, ignore_index=True)


def races(lab: Lab, networks: dict[str, tuple[Model, list[Arm], Budget]]) -> Tables:
    """One race a network, in two tables with a column ``network``: ``runs`` and ``tuning``."""
    import pandas as pd

    where = bench(lab)
    runs, searches = [], []
    for name, (model, arms, budget) in networks.items():
        lab.progress(f"{name} on {where.name}")
        seeds = lab.replicates(10, where.least)
        done, search = race(where.task(model), arms, budget, seeds, where.tuning_seeds)
        runs.append(done.assign(network=name, data=where.name, least=where.least, note=where.note))
        searches.append(search.assign(network=name))
    return {"runs": pd.concat(runs, ignore_index=True), "tuning": pd.concat(searches, ignore_index=True)}


class _Score:
    """Final losses of an arm's members; each (rate, seed) is trained once, whichever loss is asked for."""

    def __init__(self, task: Task, arm: Arm, budget: Budget) -> None:
        self.task, self.arm, self.budget = task, arm, budget
        self.known: dict[tuple[float, int], dict[str, float]] = {}

    def by(self, measure: str) -> Callable[[list[float], list[int]], Tensor]:
        """The score for `tune` that reads one of `MEASURES`."""

        def score(values: list[float], seeds: list[int]) -> Tensor:
            members = list(zip(values, seeds, strict=True))
            self._train([member for member in members if member not in self.known])
            return torch.tensor([self.known[member][measure] for member in members])

        return score

    def _train(self, members: list[tuple[float, int]]) -> None:
        if not members:
            return
        values, seeds = [lr for lr, _ in members], [seed for _, seed in members]
        ends = [0, _steps(self.task, self.budget)]
        population = trained(
            self.task, self.arm.make(values), seeds, self.budget, ends, ("validation", "train")
        )
        both = zip(last(population, "validation_loss"), last(population, "train_loss"), strict=True)
        for member, losses in zip(members, both, strict=True):
            self.known[member] = dict(zip(MEASURES, map(float, losses), strict=True))


def trained(
    task: Task, rule: Rule, seeds: list[int], budget: Budget, evaluate: When, on: tuple[str, ...]
) -> Population:
    """A population of a comparison."""
    return train(
        task,
        rule,
        seeds=seeds,
        steps=_steps(task, budget),
        batch_size=budget.batch_size,
        evaluate=evaluate,
        evaluate_on=on,
        record=(),
        progress=False,
    )


def _steps(task: Task, budget: Budget) -> int:
    assert task.train is not None
    return budget.epochs * math.ceil(len(task.train) / budget.batch_size)


def last(population: Population, column: str) -> Tensor:
    """A column of the history at the last step, one value a member; infinite for those that diverged."""
    table = population.history
    row = table[table["step"] == population.plan.steps].set_index("member")[column]
    values = torch.tensor(row.reindex(range(len(population))).to_numpy(copy=True))
    return values.nan_to_num(nan=math.inf)


def finals(runs: pd.DataFrame, tuned: str) -> dict[str, pd.Series[float]]:
    """Training loss after the last epoch by seed, for each arm, its rate chosen by one of `MEASURES`."""
    end = runs[(runs["epoch"] == runs["epoch"].max()) & (runs["tuned"] == tuned)]
    return {str(arm): group.set_index("seed")["train_loss"] for arm, group in end.groupby("arm", sort=False)}


def race_figures(runs: pd.DataFrame, tuned: str = "validation") -> list[Drawing]:
    """For each network the median training loss after each epoch with the range over seeds, a line an arm."""
    drawings = []
    chosen = runs[(runs["tuned"] == tuned) & (runs["epoch"] > 0)]
    for network, some in chosen.groupby("network", sort=False):
        table: Any = some.groupby(["arm", "epoch"], sort=False)["train_loss"].agg(["median", "min", "max"])
        drawn = figure(f"Training loss, {network}", "epoch", "training loss", log_y=True)
        lines(drawn, table.reset_index(), "epoch", "median", by="arm", band=("min", "max"))
        told = "; ".join(
            f"{arm}: {lr:.2g}" for arm, lr in some.groupby("arm", sort=False)["lr"].first().items()
        )
        data = some["data"].iloc[0]
        text = f"Median over seeds and range, {network} on {data}. Rates, chosen by {tuned} loss: {told}."
        drawings.append(Drawing(drawn, text))
    return drawings
