"""Pairs of minima on digits and what lies between them, as the tables of C62 and C63."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from losslab.engine import Points, Population
from losslab.lecture.training import trained
from losslab.paths import Landscape, Path, connect, joined, match_weights, permutation_spec, straight
from losslab.rules import Adam
from losslab.tasks import digits_task, mlp

if TYPE_CHECKING:
    import pandas as pd

RATE = 0.003
BATCH = 100
Pair = tuple[int, int]


def minima(width: int, pairs: int, steps: int) -> Population:
    """Twice as many independent networks 64-width-width-10, trained on digits by Adam."""
    task = digits_task(mlp(64, width, width, 10))
    return trained(task, Adam(lr=RATE), seeds=2 * pairs, steps=steps, batch_size=BATCH)


def couples(count: int) -> list[Pair]:
    """Networks two by two, so that no network is in two pairs.

    Example:
        >>> couples(2)
        [(0, 1), (2, 3)]
    """
    return [(2 * i, 2 * i + 1) for i in range(count)]


def landscape_of(run: Population) -> Landscape:
    """Losses and errors of the networks' own task, always as one program."""
    return Landscape.of(run, execution="stacked")


def between(
    landscape: Landscape, points: Points, pairs: Sequence[Pair], method: str, steps: int | None = None
) -> list[Path]:
    """The straight ways, or the paths of a method of `losslab.paths.connect`."""
    if method == "straight":
        return straight(landscape, points, pairs)
    return connect(landscape, pairs, points=points, method=method, steps=steps)


def aligned(run: Population, pairs: Sequence[Pair]) -> Points:
    """The second network of each pair with its units in the order in which it looks most like the first."""
    spec = permutation_spec(run)
    parts = []
    for a, b in pairs:
        first = run.points.select([a])
        parts += [first, match_weights(spec, first, run.points.select([b]), restarts=2).points]
    return joined(*parts)


def summaries(paths: Sequence[Path]) -> pd.DataFrame:
    """One row a pair: ends, maximum and barriers of all measurements, and whether the method arrived."""
    import pandas as pd

    return pd.DataFrame([path.summary for path in paths]).assign(pair=range(len(paths)))


def courses(paths: Sequence[Path]) -> pd.DataFrame:
    """Losses and errors along the paths: one row a (pair, point)."""
    import pandas as pd

    return pd.concat([path.table.assign(pair=i) for i, path in enumerate(paths)], ignore_index=True)
