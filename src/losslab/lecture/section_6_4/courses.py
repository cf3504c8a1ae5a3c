"""Training at a tuned rate, looked at again and again on batches that are a function of the step alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losslab.engine import Population
from losslab.engine.randomness import generator
from losslab.lecture.training import trained
from losslab.lecture.tuning import Tuning, tune
from losslab.rules import SGD
from losslab.tasks import Factory, Task

TUNING_SEEDS = (1000, 1001)


@dataclass(frozen=True, kw_only=True)
class Course:
    """How a network is trained by plain stochastic gradient descent, and how often it is looked at.

    Attributes:
        name: For tables and figures.
        factory: The network without batch norm, with its start.
        grid: Rates of the search.
        steps: Updates of a run.
        every: Updates between two looks.
        batch: Examples of a training batch and of a look.
        seeds: Replicates.
        device: Where to train and to look.
        execution: As for `losslab.train`.
    """

    name: str
    factory: Factory
    grid: tuple[float, ...]
    steps: int
    every: int
    batch: int
    seeds: int
    device: str = "cpu"
    execution: str = "stacked"

    def train(
        self, task: Task, rates: list[float], seeds: list[int], steps: int, **options: Any
    ) -> Population:
        """A network for each rate and seed."""
        return trained(
            task,
            SGD(lr=list(rates)),
            seeds=list(seeds),
            steps=steps,
            batch_size=self.batch,
            device=self.device,
            execution=self.execution,
            **options,
        )

    def search(self, task: Task, steps: int) -> Tuning:
        """The rate with the lowest validation loss after so many updates."""

        def score(rates: list[float], seeds: list[int]) -> Tensor:
            population = self.train(task, rates, seeds, steps, evaluate=[steps], evaluate_on=["validation"])
            row = population.log.rows.get(steps, {})
            return row.get("validation_loss", torch.full((len(seeds),), torch.inf))

        return tune(score, self.grid, TUNING_SEEDS)

    def follow(self, task: Task, rate: float, look: Callable[[Population], None]) -> None:
        """Trains the replicates; ``look`` sees them before the first update and at every interval."""
        seeds = list(range(self.seeds))
        start = [rate] * len(seeds)
        look(self.train(task, start, seeds, 0))
        record = lambda step: (step + 1) % self.every == 0
        self.train(task, start, seeds, self.steps, record=record, watch=look)

    def batch_at(self, task: Task, purpose: str, step: int) -> Any:
        """The batch of a look: a function of the step alone, the same for every seed and arm."""
        assert task.train is not None
        order = torch.randperm(len(task.train), generator=generator(0, purpose, step))
        return task.train.take(order[: self.batch])
