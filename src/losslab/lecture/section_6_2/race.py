"""Gradient descent and SGD raced down one convex loss whose minimum is known."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from losslab.engine import Points, Population
from losslab.lecture.section_6_2.samples import batch_gradient, sample_gradients
from losslab.lecture.training import arrival, trained
from losslab.lecture.tuning import rates, tune
from losslab.rules import GD, SGD
from losslab.tasks import Batch, Data, Task, logistic_regression, supervised

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
        found = minimize(  # type: ignore[call-overload]
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


def penalty(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The L2 term of the loss."""
    squares = model.weight.square().sum() + model.bias.square().sum()  # type: ignore[operator]
    return {"penalty": DECAY / 2 * squares}


def descend(
    problem: Problem, arm: Arm, learning_rates: Sequence[float], seeds: Sequence[int]
) -> pd.DataFrame:
    """Trains one member for each pair of a rate and a seed.

    Returns:
        One row a (step, member) that was evaluated: ``step``, ``member``, ``lr``, ``seed``, ``excess`` (1 at
        the member's own start, infinite once it has diverged).
    """
    looks = np.unique(np.geomspace(1, arm.updates, math.ceil(24 * math.log10(arm.updates))).round()).astype(
        int
    )
    rule = (GD if arm.batch_size is None else SGD)(lr=list(learning_rates), weight_decay=DECAY)
    population = trained(
        problem.task,
        rule,
        seeds=list(seeds),
        steps=arm.updates,
        batch_size=arm.batch_size,
        evaluate=[0, *looks.tolist()],
        evaluate_on=["train"],
    )
    rows = population.history
    above = rows.train_loss + rows.train_penalty - problem.minimum
    start = above[rows.step == 0].set_axis(rows.member[rows.step == 0])
    lost = rows.member.map(dict(enumerate((population.diverged >= 0).tolist()))) & (rows.step > 0)
    rows["excess"] = (above / rows.member.map(start)).mask(lost | above.isna(), math.inf)
    return rows[["step", "member", "lr", "seed", "excess"]]


def reach(rows: pd.DataFrame, target: float) -> pd.Series:
    """The first evaluated step of each member with an excess at most ``target``; infinite for never."""
    return arrival(rows, "excess", target)


def tuned_rates(problem: Problem, arm: Arm, targets: Sequence[float]) -> pd.DataFrame:
    """The rate that reaches each target first, found on the tuning seeds.

    Returns:
        One row a target: ``target``, ``lr``, ``at_edge``.
    """
    import pandas as pd

    @functools.cache
    def scores(lrs: tuple[float, ...], seeds: tuple[int, ...]) -> list[Tensor]:
        rows = descend(problem, arm, lrs, seeds)
        last = rows.groupby("member").excess.last()
        # Where no rate arrives, the one that comes nearest is best.
        missed = [math.log10(arm.updates) + np.log10(last / target) for target in targets]
        steps = [np.log10(reach(rows, target).clip(lower=1)) for target in targets]
        return [
            torch.tensor(step.where(step < math.inf, miss).to_numpy())
            for step, miss in zip(steps, missed, strict=True)
        ]

    def score(row: int, lrs: list[float], seeds: list[int]) -> Tensor:
        return scores(tuple(lrs), tuple(seeds))[row]

    found = [tune(functools.partial(score, row), arm.grid, TUNING_SEEDS) for row in range(len(targets))]
    edges = [best.at_edge for best in found]
    return pd.DataFrame({"target": targets, "lr": [best.lr for best in found], "at_edge": edges})


def race(
    problem: Problem, arms: Mapping[str, Arm], targets: Sequence[float], seeds: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every arm with the rate that is best for it and the target, on seeds that no rate was chosen on.

    Returns:
        ``reached``, one row a (arm, target, seed): ``lr``, ``at_edge``, ``updates`` and ``samples`` until the
        target; and ``curves``, the excess along the way with the rate tuned for the last target.
    """
    import pandas as pd

    examples = len(problem.task.train or ())
    reached, curves = [], []
    for name, arm in arms.items():
        tuned = tuned_rates(problem, arm, targets)
        members = [(lr, seed) for lr in tuned.lr.unique() for seed in range(seeds)]
        rows = descend(problem, arm, [lr for lr, _ in members], [seed for _, seed in members])
        per_update = arm.batch_size or examples
        for target, lr, at_edge in tuned.itertuples(index=False):
            updates = reach(rows, target)[[member[0] == lr for member in members]]
            table = pd.DataFrame({"seed": range(seeds), "updates": updates.to_numpy()})
            table["samples"] = table.updates * per_update
            reached.append(table.assign(arm=name, target=target, lr=lr, at_edge=at_edge))
        last = rows[rows.lr == tuned.lr.iloc[-1]].drop(columns="member")
        curves.append(last.assign(arm=name, samples=last.step * per_update))
    return pd.concat(reached, ignore_index=True), pd.concat(curves, ignore_index=True)


def directions(
    problem: Problem, lr: float, seeds: int, looks: Sequence[int] = (1, 3, 10, 30)
) -> pd.DataFrame:
    """How well steps point at the minimum along gradient descent: the gradient's and single samples'.

    Returns:
        One row a (seed, step): the cosine between the direction to the minimum and minus the gradient
        (``whole``), minus a sample's gradient in the mean over the samples (``sample``), and the share of
        samples whose step points away (``away``).
    """
    import pandas as pd

    kept: dict[int, Points] = {}

    def keep(population: Population) -> None:
        kept[population.step] = population.points.clone()

    population = trained(
        problem.task,
        GD(lr=lr, weight_decay=DECAY),
        seeds=seeds,
        steps=max(looks),
        record=[step - 1 for step in looks],
        watch=keep,
    )
    best = torch.cat([problem.weights[name].flatten() for name in population.points.weights])
    rows = []
    for step, points in kept.items():
        for seed in range(seeds):
            module = points.load_into(population[seed], seed).double()
            here = torch.cat([w.detach().flatten() for w in module.parameters()])
            pull = DECAY * here
            steps = -torch.cat(
                [batch_gradient(problem.task, module)[None], sample_gradients(problem.task, module)]
            )
            cosines = nn.functional.cosine_similarity(steps - pull, (best - here)[None])
            whole, single = float(cosines[0]), cosines[1:]
            away = float((single < 0).double().mean())
            rows.append(
                {"seed": seed, "step": step, "whole": whole, "sample": float(single.mean()), "away": away}
            )
    return pd.DataFrame(rows)
