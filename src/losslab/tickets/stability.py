"""Instability analysis: do two runs from one point, on batches of other orders, end in one linear basin?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from losslab.engine import Branch, Objective, Points, randomness, train
from losslab.engine.masks import as_masks
from losslab.engine.updating import as_rule
from losslab.errors import LosslabError
from losslab.tasks import Task
from losslab.tickets.comparing import interval

if TYPE_CHECKING:
    import pandas as pd

STABLE = 0.02
"""Error barrier below which Frankle et al. (2020) call a network stable."""


def instability(
    task: Task,
    rule: Any = "sgd",
    *,
    at: Sequence[int] = (0,),
    steps: int,
    replicates: int = 3,
    batch_size: int | None = None,
    points: int = 30,
    masks: Mapping[str, Tensor] | None = None,
    start: Branch | None = None,
    data: str | None = None,
    execution: str = "stacked",
    batch_norm: str = "re-estimate",
) -> pd.DataFrame:
    """Trains to step k, copies, trains both copies on their own batches, and walks the segment between them.

    The instability is ``max_t E((1-t) a + t b) - (E(a) + E(b)) / 2`` over ``points`` values of t, with E the
    error, or the loss where the task has no accuracy (Frankle, Dziugaite, Roy & Carbin 2020, section 2).
    Copies take the rule's state and the schedule's place with them.

    Args:
        task: What is trained.
        rule: Update rule.
        at: The steps k at which runs are copied.
        steps: Updates of a whole run.
        replicates: Pairs for each k, from networks of seeds 0, 1, ...
        batch_size: As for `losslab.train`.
        points: Values of t, ends included.
        masks: Weights to prune, name -> ``[*shape]`` or ``[replicates, *shape]``.
        start: Where the runs begin, one a replicate, instead of initial weights at step 0.
        data: Which examples errors are of; by default test, or else validation, or else training.
        execution: As for `losslab.train`.
        batch_norm: Statistics along the segment, as for `losslab.Objective`.

    Returns:
        One row a (k, replicate, measure): ``instability``, ``where`` (t), both ends, and ``stable`` (below
        0.02; for errors).

    Raises:
        LosslabError: A step k before the start or beyond training, no pairs, or masks of another model.

    Example:
        >>> from losslab.tasks import digits_task, mlp
        >>> found = instability(digits_task(mlp(64, 8, 10)), at=[0, 20], steps=20, replicates=1, points=5)
        >>> found[found.measure == "error"].instability.tolist()[1]
        0.0
    """
    import pandas as pd

    rule = as_rule(rule)
    places = sorted(set(at))
    begun = 0 if start is None else start.step
    if not places or places[0] < begun or places[-1] > steps or steps < 1:
        raise LosslabError(
            f"runs are copied at {places}, start at {begun} and end at {steps}: train for at least 1 step, "
            "and copy between start and end"
        )
    if replicates < 1 or points < 3:
        raise LosslabError(f"{replicates} replicates and {points} points: pass at least 1 and 3")
    settings: dict[str, Any] = {"batch_size": batch_size, "execution": execution}
    settings |= {"evaluate": None, "record": [0], "progress": False}
    seeds = list(range(replicates))
    data = (
        next(n for n in ("test", "validation", "train") if getattr(task, n) is not None)
        if data is None
        else data
    )
    objective = Objective(task, data, batch_norm=batch_norm, execution=execution)
    found: list[dict[str, Any]] = []
    parent = train(task, rule, seeds=seeds, steps=begun, start=start, masks=masks, **settings)
    own = as_masks(masks or {}, parent.points.weights)
    twice = {n: torch.cat([m, m]) for n, m in own.items()}
    for k in places:
        if k > begun:
            parent = train(task, rule, seeds=seeds, steps=k, start=parent.branch(), masks=own, **settings)
        orders = [randomness.key(s, "order of a copy", k, copy) >> 1 for copy in (0, 1) for s in seeds]
        both = train(
            task, rule, seeds=orders, steps=steps, start=parent.branch(seeds * 2), masks=twice, **settings
        )
        found += _walked(objective, both.points, k, seeds, points)
    return pd.DataFrame(found)


def stability_summary(found: pd.DataFrame) -> pd.DataFrame:
    """One row a step k: pairs, the mean instability with its 95 % t interval, the ends' mean, stable pairs.

    Of the error where the task has one, else of the loss.

    Args:
        found: As `instability` gives it.
    """
    import pandas as pd

    measure = _measure(found)
    told = []
    for k, rows in found[found.measure == measure].groupby("k"):
        mean, low, high = interval(rows.instability.tolist())
        ends = float((rows["first"] + rows["second"]).mean() / 2)
        row = {"k": int(str(k)), "pairs": len(rows), f"{measure}_barrier": mean, "low": low, "high": high}
        told.append(row | {f"{measure}_at_the_ends": ends, "stable": int(rows.stable.sum())})
    return pd.DataFrame(told)


def stability_sentences(found: pd.DataFrame) -> list[str]:
    """From which step on training is stable to the order of its batches."""
    if _measure(found) == "loss":
        return [
            f"The task has no accuracy: stable means {100 * STABLE:.0f} % of error, which losses cannot tell."
        ]
    rows = stability_summary(found).set_index("k")
    every = rows.stable == rows.pairs
    steady = [k for k in rows.index if every.loc[k:].all()]
    first, last, limit = rows.index[0], rows.index[-1], f"{100 * STABLE:.0f} %"
    barriers = [f"{100 * v:.1f} % from step {k}" for k, v in rows.error_barrier.iloc[[0, -1]].items()]
    told = [f"Mean error barriers: {', '.join(barriers)}."] if len(rows) > 1 else []
    if not steady:
        count = f"{rows.stable[last]} of {rows.pairs[last]} pairs have an error barrier below {limit}"
        return [*told, f"Not stable, even from step {last}: {count}."]
    rule = f"every pair's error barrier is below {limit}"
    if steady[0] == first:
        return [*told, f"Stable from step {first}, the first asked for: {rule}."]
    before = [k for k in rows.index if k < steady[0]][-1]
    return [*told, f"Stable from step {steady[0]}, where {rule}; not yet from step {before}."]


def _measure(found: pd.DataFrame) -> str:
    return "error" if (found.measure == "error").any() else "loss"


def _walked(objective: Objective, ends: Points, k: int, seeds: list[int], count: int) -> list[dict[str, Any]]:
    """Errors and losses on the segment of each pair."""
    t = torch.linspace(0, 1, count, dtype=torch.float64)
    rows = []
    for i, seed in enumerate(seeds):
        a, b = ends.select([i]), ends.select([i + len(seeds)])
        like = t[:, None].to(a.matrix())
        line = a.at((1 - like) * a.matrix() + like * b.matrix())
        line.weights.update({n: w.contiguous() for n, w in line.weights.items()})
        told: dict[str, Tensor] = {"loss": objective.value(line)}
        if objective.task.metrics is not None and "accuracy" in (measured := objective.metrics(line)):
            told = {"error": 1 - measured["accuracy"]} | told
        for name, values in told.items():
            values = values.double()
            ends_at = (float(values[0]), float(values[-1]))
            barrier = float(values.max()) - sum(ends_at) / 2
            row = {"k": k, "replicate": seed, "measure": name, "instability": barrier}
            row |= {"where": float(t[values.argmax()]), "first": ends_at[0], "second": ends_at[1]}
            rows.append(row | {"stable": name == "error" and barrier < STABLE})
    return rows
