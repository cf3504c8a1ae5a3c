"""C11: SGD converges more slowly than gradient descent: per update, per sample, and down to which level."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from losslab.engine import Points, Population, train
from losslab.errors import LosslabError
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables
from losslab.lecture.figures import figure, lines
from losslab.lecture.section_6_2.noise_floor import RATES, excess_under_noise
from losslab.lecture.section_6_2.samples import batch_gradient, sample_gradients
from losslab.lecture.section_6_2.theory import predicted
from losslab.lecture.statistics import bootstrap_interval, fit_power_law
from losslab.lecture.tuning import rates, tune
from losslab.lecture.verdicts import law, paired, paired_family
from losslab.rules import GD, SGD
from losslab.tasks import Batch, Data, Task, digits, logistic_regression, supervised

if TYPE_CHECKING:
    import pandas as pd

DECAY = 0.01
"""The weight of the L2 term, which is the strong convexity mu."""

TARGETS = (0.1, 0.01, 0.001)
"""Excess loss to reach, in units of the excess at the start."""

TUNING_SEEDS = (1000, 1001, 1002)


class Arm(NamedTuple):
    """A way of taking the gradient.

    Attributes:
        batch_size: Samples an update; None for all.
        grid: Learning rates to choose from.
        updates: What a run may take; a target not reached by then counts as never reached.
    """

    batch_size: int | None
    grid: tuple[float, ...]
    updates: int

    def samples(self, examples: int) -> int:
        """Samples an update processes."""
        return examples if self.batch_size is None else self.batch_size


ARMS = {
    "GD": Arm(None, tuple(rates(0.1, 10.0)), 200),
    "SGD, B = 32": Arm(32, tuple(rates(0.01, 1.0)), 3000),
    "SGD, B = 1": Arm(1, tuple(rates(0.001, 0.1)), 20000),
}


@dataclass(frozen=True)
class Problem:
    """L2-regularised softmax regression with its minimum known.

    Attributes:
        task: Its loss is the cross-entropy and its metric ``penalty`` the L2 term; the rules get the latter's
            gradient as weight decay.
        minimum: The least value of the two together.
        weights: Where it is, name -> float64.
        gap: A bound on how far above the true minimum ``minimum`` may be: |gradient|^2 / (2 mu).
        smoothness: A bound on the largest eigenvalue of the Hessian.
    """

    task: Task
    minimum: float
    weights: Mapping[str, Tensor]
    gap: float
    smoothness: float

    @staticmethod
    def of(data: Data) -> Problem:
        """Finds the minimum by L-BFGS in float64."""
        from scipy.optimize import minimize

        x, y = data.to(dtype=torch.float64).all()
        classes, inputs = int(y.max()) + 1, x.shape[1]
        task = supervised(logistic_regression(inputs, classes), data).replace(metrics=penalty, name="softmax")
        split = classes * inputs

        def height(flat: np.ndarray) -> tuple[float, np.ndarray]:
            w = torch.from_numpy(flat).requires_grad_()
            output = x @ w[:split].view(classes, inputs).T + w[split:]
            f = nn.functional.cross_entropy(output, y) + DECAY / 2 * w.square().sum()
            return f.item(), torch.autograd.grad(f, w)[0].numpy()

        options = {"maxiter": 5000, "gtol": 1e-9, "ftol": 0.0}
        found = minimize(
            height, np.zeros(split + classes), jac=True, method="L-BFGS-B", options=options
        )
        best = torch.from_numpy(found.x)
        inputs_and_one = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
        return Problem(
            task,
            float(found.fun),
            {"weight": best[:split].view(classes, inputs), "bias": best[split:]},
            float(np.square(found.jac).sum() / (2 * DECAY)),
            float(torch.linalg.matrix_norm(inputs_and_one, 2).square() / (2 * len(x)) + DECAY),
        )

    def relative_excess(self, history: pd.DataFrame) -> pd.DataFrame:
        """The evaluated rows of a history with ``excess``, 1 at each member's start; infinite for failure."""
        rows = history.dropna(subset="epoch").copy()
        above = (rows.train_loss + rows.train_penalty - self.minimum).fillna(math.inf)
        start = above[rows.step == 0].set_axis(rows.member[rows.step == 0])
        rows["excess"] = above / rows.member.map(start)
        return rows


def penalty(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The L2 term of the loss."""
    squares = model.weight.square().sum() + model.bias.square().sum()  # type: ignore[operator,union-attr]
    return {"penalty": DECAY / 2 * squares}


def descend(problem: Problem, arm: Arm, learning_rates: Sequence[float], seeds: Sequence[int]) -> pd.DataFrame:
    """Trains one member for each (rate, seed) given in parallel; the evaluated rows with ``excess``."""
    looks = np.unique(np.r_[0, np.geomspace(1, arm.updates, 24 * math.ceil(math.log10(arm.updates))).round()])
    rule = (GD if arm.batch_size is None else SGD)(lr=list(learning_rates), weight_decay=DECAY)
    population = train(
        problem.task,
        rule,
        seeds=list(seeds),
        steps=arm.updates,
        batch_size=arm.batch_size,
        evaluate=looks.astype(int).tolist(),
        evaluate_on=["train"],
        record=[0],
        progress=False,
    )
    return problem.relative_excess(population.history)


def reach(rows: pd.DataFrame, target: float) -> pd.Series:
    """The first evaluated step of each member with an excess at most ``target``; infinite for never."""
    first = rows[rows.excess <= target].groupby("member").step.min()
    return first.reindex(range(int(rows.member.max()) + 1)).astype(float).fillna(math.inf)


def tuned_rates(problem: Problem, arm: Arm, targets: Sequence[float]) -> pd.DataFrame:
    """The rate with which each target is reached first, found on the tuning seeds.

    Returns:
        One row a target: ``target``, ``lr``, ``at_edge``.
    """
    import pandas as pd

    @functools.cache
    def scores(lrs: tuple[float, ...], seeds: tuple[int, ...]) -> Tensor:
        rows = descend(problem, arm, lrs, seeds)
        last = rows[rows.step == arm.updates].excess.to_numpy()
        columns = []
        for target in targets:
            steps = np.log10(np.maximum(reach(rows, target), 1))
            # Where no rate arrives the one that comes nearest is best.
            columns.append(np.where(np.isfinite(steps), steps, math.log10(arm.updates) + np.log10(last / target)))
        return torch.from_numpy(np.stack(columns))

    found = []
    for row, target in enumerate(targets):
        best = tune(lambda lrs, seeds, row=row: scores(tuple(lrs), tuple(seeds))[row], arm.grid, TUNING_SEEDS)
        found.append({"target": target, "lr": best.lr, "at_edge": best.at_edge})
    return pd.DataFrame(found)
