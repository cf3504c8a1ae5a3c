"""Newton's method and gradient descent on softmax regression of the digits, for C19."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from losslab.lecture.claim import Finding
from losslab.lecture.driving import drive
from losslab.lecture.figures import figure, lines, reference
from losslab.lecture.section_6_3.landscapes import Softmax
from losslab.lecture.tuning import rates, tune
from losslab.lecture.verdicts import bound
from losslab.rules import GD, Newton, Rule
from losslab.tasks import digits

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

RIDGE = 1e-3
"""1/n for 1000 digits."""

DONE = 1e-10
"""The excess over the least value, as a share of the first excess, at which a run counts as done."""

MOST, FEW = 15, 1000
"""Newton's method is to need at most 15 iterations, gradient descent at least 1000."""

SHARE = 0.8  # of the training digits in each replicate
FULL, SEARCHED, DESCENT = "Newton, η = 1", "Newton, η by backtracking", "gradient descent"
ZERO, RANDOM = "from zero", "from random weights"


def digits_problem(seed: int, share: float = SHARE) -> tuple[Softmax, Tensor]:
    """Softmax regression on a random part of the training digits, and two starts: zero and random weights."""
    x, y = digits().train.all()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(y), generator=generator)[: int(share * len(y))]
    problem = Softmax.of(x[rows], y[rows], RIDGE)
    width = problem.inputs.shape[1] - 1
    weights = (2 * torch.rand(problem.parameters, generator=generator, dtype=torch.float64) - 1) / width**0.5
    return problem, torch.stack([torch.zeros_like(weights), weights])


def backtracked(problem: Softmax, start: Tensor, steps: int) -> list[Tensor]:
    """Newton's path ``[N, P]`` with rates halved until f falls by 1e-4 of what the gradient promises."""
    path = [start]
    for step in range(steps):
        x, g, hessian = path[-1], problem.gradient(path[-1]), problem.hessian(path[-1])
        value = problem.value(x)
        rate = torch.ones(len(x), dtype=torch.float64)
        for _ in range(30):
            (move,) = drive(Newton(lr=rate), lambda x, t: g, x, 1, lambda x: hessian, first=step)  # noqa: B023
            enough = problem.value(move.after) <= value + 1e-4 * (g * (move.after - x)).sum(1) + 1e-15
            if bool(enough.all()):
                break
            rate = torch.where(enough, rate, rate / 2)
        path.append(move.after)
        if float(problem.gradient(move.after).abs().max()) < 1e-13:
            break
    return path


def runs_on_digits(
    seeds: Sequence[int], limit: int, tuning_steps: int = 200, share: float = SHARE
) -> dict[str, pd.DataFrame]:
    """Excess over the least value against iterations, for Newton's method and tuned gradient descent."""
    import pandas as pd

    tuning = tune(
        partial(_descent_score, tuning_steps, share), rates(0.05, 5.0, per_decade=4), seeds=[1000, 1001]
    )
    rows = []
    for seed in seeds:
        problem, starts = digits_problem(seed, share)
        zero, weights = starts[:1], starts[1:]
        searched = backtracked(problem, weights, 40)
        least = float(problem.value(searched[-1]))
        runs = [
            (SEARCHED, RANDOM, iter(searched)),
            (FULL, ZERO, _visited(problem, Newton(), zero, MOST)),
            (FULL, RANDOM, _visited(problem, Newton(), weights, MOST)),
            (DESCENT, RANDOM, _visited(problem, GD(lr=tuning.lr), weights, limit)),
        ]
        for method, start, points in runs:
            table = _excess(problem, points, least)
            rows.append(table.assign(method=method, start=start, seed=seed))
    return {
        "softmax": pd.concat(rows, ignore_index=True),
        "softmax_tuning": tuning.table.assign(chosen=tuning.lr, at_edge=tuning.at_edge),
    }


def _visited(problem: Softmax, rule: Rule, start: Tensor, steps: int) -> Iterator[Tensor]:
    """The points of a run, the start first."""
    hessian = problem.hessian if rule.needs_curvature else None
    yield start
    for move in drive(rule, problem.gradient, start, steps, hessian):
        yield move.after


def _excess(problem: Softmax, points: Iterator[Tensor], least: float) -> pd.DataFrame:
    """The excess until it is done, as a share of the first; every 20th point after the first hundred."""
    import pandas as pd

    rows: list[tuple[int, float]] = []
    first = None
    for iteration, x in enumerate(points):
        above = float(problem.value(x)) - least
        first = above if first is None else first
        done = above / first <= DONE / 100
        if iteration < 100 or iteration % 20 == 0 or done:
            rows.append((iteration, above / first))
        if done:
            break
    return pd.DataFrame(rows, columns=["iteration", "excess"])


def _descent_score(steps: int, share: float, lrs: list[float], seeds: list[int]) -> Tensor:
    """The objective after some steps of gradient descent from random weights."""
    scores = torch.full((len(lrs),), torch.nan, dtype=torch.float64)
    for seed in set(seeds):
        rows = [i for i, s in enumerate(seeds) if s == seed]
        problem, starts = digits_problem(seed, share)
        rule = GD(lr=[lrs[i] for i in rows])
        for move in drive(rule, problem.gradient, starts[1:].expand(len(rows), -1), steps):
            last = move.after
        scores[rows] = problem.value(last)
    return scores


def findings(runs: pd.DataFrame) -> list[Finding]:
    """Iterations of each method until it is done, against 15 for Newton's and 1000 for descent."""
    told = []
    for (method, start), group in runs.groupby(["method", "start"], sort=False):
        needed = [
            float(rows.iteration[rows.excess <= DONE].min()) if (rows.excess <= DONE).any() else np.inf
            for _, rows in group.groupby("seed")
        ]
        least, most = (FEW, None) if method == DESCENT else (None, MOST)
        told.append(
            bound(
                f"digits, iterations of {method}, {start}",
                float(np.quantile(needed, 0.5, method="higher")),
                (min(needed), max(needed)),
                len(needed),
                f"median and range of iterations to {DONE:g} of the first excess",
                at_least=least,
                at_most=most,
                note="∞: not reached" if np.isinf(needed).any() else "",
            )
        )
    return told


def curves(runs: pd.DataFrame) -> Figure:
    """The excess against the iteration, one replicate."""
    drawn = figure("Digits", "iteration", "excess, share of the first", log_x=True, log_y=True)
    runs = runs[(runs.seed == runs.seed.min()) & (runs.excess > 0)]
    named = runs.assign(
        iteration=runs.iteration + 1,  # the start must have a place on the logarithmic axis
        run=[f"{method}, {start}" for method, start in zip(runs.method, runs.start, strict=True)],
    )
    lines(drawn, named, "iteration", "excess", by="run")
    reference(drawn, DONE, "done")
    drawn.update_yaxes(range=[-14, 4])
    return drawn.update_xaxes(title_text="iteration + 1")
