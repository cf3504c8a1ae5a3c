"""Networks trained on few digits by batches of several sizes, read at the same training loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losslab.engine import EarlyStopping, Objective, Points, Population
from losslab.lecture.training import trained
from losslab.rules import GD, SGD, PerturbedGD, Rule
from losslab.tasks import Batch, Data, Task, digits, mlp, supervised

if TYPE_CHECKING:
    import pandas as pd

NOISY = 1e-2
"""Radius of the ball from which the noise of the noisy gradient descent is drawn, a step."""


@dataclass(frozen=True)
class Problem:
    """A part of the training digits, some of their labels wrong, and a network.

    Attributes:
        examples: Training images.
        noise: Share of the labels that are replaced by one drawn uniformly.
        hidden: Width of the two hidden layers.
        target: Training cross-entropy at which a run is read.
    """

    examples: int
    noise: float
    hidden: int
    target: float

    def __str__(self) -> str:
        return f"{self.examples} images, {100 * self.noise:g} % wrong labels"

    def task(self) -> Task:
        """The task; its metric ``left`` stops falling at the target."""
        splits = digits()
        x, y = splits.train.all()
        x, y = x[: self.examples], y[: self.examples].clone()
        generator = torch.Generator().manual_seed(12)
        wrong = torch.rand(self.examples, generator=generator) < self.noise
        y[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)
        model = mlp(64, self.hidden, self.hidden, 10)
        task = supervised(model, Data((x, y)), splits.test, splits.validation, name=str(self))

        def metrics(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
            out = network(batch[0])
            left = F.cross_entropy(out, batch[1]).clamp(min=self.target)
            return {"accuracy": (out.argmax(-1) == batch[1]).float().mean(), "left": left}

        return task.replace(metrics=metrics)


@dataclass(frozen=True)
class Arm:
    """A way of taking steps: ``size`` examples each, all of them where None."""

    name: str
    size: int | None

    def rule(self, lrs: Sequence[float]) -> Rule:
        """The rule at these rates."""
        if self.name == "GD + noise":
            return PerturbedGD(
                lr=list(lrs), radius=NOISY, threshold=1e30, wait=0.0, seed=list(range(len(lrs)))
            )
        return (GD if self.size is None else SGD)(lr=list(lrs))


GD_ARM = Arm("GD", None)
ARMS = {arm.name: arm for arm in (GD_ARM, Arm("B = 32", 32), Arm("B = 8", 8), Arm("GD + noise", None))}


def fitted(
    problem: Problem,
    arm: Arm,
    lrs: Sequence[float],
    seeds: Sequence[int],
    updates: int,
    every: int = 25,
    tested: bool = False,
) -> tuple[Population, pd.DataFrame]:
    """Trains one member for each pair of a rate and a seed until the training loss is at the target.

    Args:
        problem: Data and network.
        arm: How steps are taken.
        lrs: Rates, one a member.
        seeds: Seeds, one a member.
        updates: Updates at most.
        every: Updates between two looks at the training loss.
        tested: Whether the test set is measured at every look too, for `along`.

    Returns:
        The population, each member's weights those of its first look at or below the target (or of its
        lowest loss), and one row a member: ``seed``, ``lr``, ``updates`` to the target (infinite for never),
        ``train_loss``, ``test``, ``validation``: accuracies at those weights, in points.
    """
    import pandas as pd

    task = problem.task()
    run = trained(
        task,
        arm.rule(lrs),
        seeds=list(seeds),
        steps=updates,
        batch_size=arm.size or problem.examples,
        evaluate=every,
        evaluate_on=["train", "test"] if tested else ["train"],
        stop=EarlyStopping("train_left", patience=max(2, 300 // every), restore=True),
    )
    rows = run.history.dropna(subset="train_loss")
    first = rows[rows.train_loss <= problem.target].groupby("member").step.min()
    table = pd.DataFrame({"seed": run.seeds, "lr": list(lrs)})
    table["updates"] = first.reindex(range(len(run))).astype(float).fillna(np.inf).to_numpy()
    lost = (run.diverged >= 0).numpy()
    sound = Points({n: w.nan_to_num() for n, w in run.points.weights.items()}, run.points.buffers)
    for name in ("train", "test", "validation"):
        objective = Objective(task, name, execution="stacked", module=run.template)
        accuracy = 100 * objective.metrics(sound)["accuracy"].numpy()
        if name == "train":
            table["train_loss"] = np.where(lost, np.inf, objective.value(sound).numpy())
        else:
            table[name] = np.where(lost, 0.0, accuracy)
    return run, table


def along(run: Population) -> pd.DataFrame:
    """Test accuracy on the way: one row a (seed, step), in points."""
    rows = run.history.dropna(subset="test_accuracy")
    table: pd.DataFrame = rows[["seed", "step"]].assign(test=100 * rows.test_accuracy, loss=rows.train_loss)
    return table
