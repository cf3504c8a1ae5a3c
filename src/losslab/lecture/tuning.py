"""Tuning the learning rate of each arm of a comparison, by the rule of the verdicts.

Every arm gets its own search: at least 5 rates, a factor of at most sqrt(10) apart, on a validation measure;
a winner at the edge of the grid extends the grid. The seeds used here must not be used for the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from losslab.errors import LosslabError

if TYPE_CHECKING:
    import pandas as pd

    from losslab.lecture.claim import Tables

Score = Callable[[list[float], list[int]], Tensor]
"""Rates and seeds, one a member -> score of each member ``[N]``, lower is better; NaN and inf lose."""


@dataclass(frozen=True)
class Tuning:
    """The outcome of a search.

    Attributes:
        lr: The best rate.
        at_edge: Whether it still lay at the edge of the grid when the search gave up extending.
        table: Every rate tried with the median of its scores: columns ``lr``, ``score``.
    """

    lr: float
    at_edge: bool
    table: pd.DataFrame


def rates(low: float, high: float, per_decade: int = 2) -> list[float]:
    """Rates from ``low`` to at least ``high``, equally spaced in the logarithm; sqrt(10) apart by default."""
    count = math.ceil(per_decade * math.log10(high / low) - 1e-9) + 1
    return [low * 10 ** (k / per_decade) for k in range(count)]


def tune(score: Score, grid: Sequence[float], seeds: Sequence[int], extend: int = 3) -> Tuning:
    """Finds the rate with the smallest median score over seeds, all rates and seeds in one population.

    Args:
        score: Trains and measures.
        grid: Increasing rates.
        seeds: Seeds of the search.
        extend: How often a winner at the edge adds two rates beyond it.

    Raises:
        LosslabError: The grid has fewer than 5 rates or gaps above sqrt(10), or every rate failed.
    """
    import pandas as pd

    tried: dict[float, float] = {}
    ratios = [b / a for a, b in pairwise(grid)]
    if len(grid) < 5 or max(ratios) > math.sqrt(10) * (1 + 1e-9) or min(ratios) <= 1:
        raise LosslabError(
            f"a grid of {len(grid)} rates with gaps up to {max(ratios, default=0):.3g}: "
            "pass at least 5 increasing rates at most a factor sqrt(10) apart"
        )
    new, ratio = list(grid), ratios[0]
    for round_ in range(extend + 1):
        members = [(lr, s) for lr in new for s in seeds]
        scores = score([m[0] for m in members], [m[1] for m in members]).detach().double().cpu()
        scores = torch.where(torch.isfinite(scores), scores, math.inf).view(len(new), len(seeds))
        tried |= dict(zip(new, scores.quantile(0.5, dim=1, interpolation="higher").tolist(), strict=True))
        order = sorted(tried)
        best = min(order, key=lambda lr: tried[lr])
        if tried[best] == math.inf:
            raise LosslabError(f"every rate from {order[0]:g} to {order[-1]:g} failed: widen the grid")
        if best not in (order[0], order[-1]) or round_ == extend:
            break
        new = [best / ratio**2, best / ratio] if best == order[0] else [best * ratio, best * ratio**2]
    table = pd.DataFrame({"lr": order, "score": [tried[lr] for lr in order]})
    return Tuning(best, best in (order[0], order[-1]), table)


def at_edge(tables: Tables) -> str:
    """What a reader must know of searches whose winner lay at the edge of its grid; empty where none did.

    Reads every table with a column ``at_edge``, as `Tuning.at_edge` fills it.
    """
    found = []
    for name, table in tables.items():
        if "at_edge" in table and table["at_edge"].any():
            rows = table[table["at_edge"].astype(bool)]
            arms = [c for c in ("arm", "network", "target", "rule") if c in rows]
            told = sorted({" ".join(map(str, row)) for row in rows[arms].itertuples(index=False)})
            found.append(f"{name} ({', '.join(told)})" if any(told) else name)
    return f"a tuned rate lay at the edge of its grid: {'; '.join(found)}" if found else ""
