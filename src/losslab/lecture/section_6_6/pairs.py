"""Pairs of minima on digits and what lies between them, as the tables of C62 and C63."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from losslab.engine import Points, Population
from losslab.lecture.scenes import Panel
from losslab.lecture.training import trained
from losslab.paths import (
    Landscape,
    Path,
    connect,
    ensemble_errors,
    joined,
    match_weights,
    measure_slice,
    permutation_spec,
    straight,
    through,
)
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


def ensembles(landscape: Landscape, paths: Sequence[Path]) -> pd.DataFrame:
    """Errors of ensembles along the paths: of the start and a point, and of all points up to it."""
    import pandas as pd

    rows = []
    for i, path in enumerate(paths):
        told = {name: values.numpy() for name, values in ensemble_errors(landscape, path).items()}
        rows.append(pd.DataFrame({"t": path.t.numpy(), "place": path.places.numpy(), **told, "pair": i}))
    return pd.concat(rows, ignore_index=True)


def plane_of(landscape: Landscape, path: Path, side: int) -> pd.DataFrame:
    """The plane through the ends and the bend of a path with one bend, with the same margin on all sides.

    Returns:
        ``x``, ``y``, the measurements, and ``kind``: ``grid``, or ``mark`` for first end, second end, bend.
    """
    import pandas as pd

    where = through(path.frame.select([0, 2, 1]))
    low, high = (getattr(where.marks, name)(0).values for name in ("min", "max"))
    margin = 0.3 * float(high[0] - low[0])
    axes = [
        torch.linspace(float(a) - margin, float(b) + margin, side) for a, b in zip(low, high, strict=True)
    ]
    grid = measure_slice(landscape, where, *axes)
    plane = grid.table.set_axis(["x", "y", *grid.values], axis=1).assign(kind="grid")
    marks = grid.marked.drop(columns="label").set_axis(["x", "y", *grid.at_marks], axis=1)
    return pd.concat([plane, marks.assign(kind="mark")], ignore_index=True)


def measured(plane: pd.DataFrame) -> Panel:
    """The table of `plane_of` as a panel, with the straight way and the bent one."""
    cells, marks = plane[plane.kind == "grid"], plane[plane.kind == "mark"][["x", "y"]].to_numpy()
    table = cells.pivot_table(index="y", columns="x", values="train_loss", dropna=False)
    named = dict(zip(("first minimum", "second minimum", "bend"), marks, strict=True))
    ways = {"straight": marks[[0, 1]], "one bend": marks[[0, 2, 1]]}
    return Panel(
        table.columns.to_numpy(), table.index.to_numpy(), table.to_numpy(), named, ways, "as measured"
    )


def labelled(rows: pd.DataFrame, width: int, network: str, least: int = 10, note: str = "") -> pd.DataFrame:
    """A table with what a judge must know of the network: its width, its name, the pairs needed, a note."""
    return rows.assign(width=width, network=network, least=least, note=note)
