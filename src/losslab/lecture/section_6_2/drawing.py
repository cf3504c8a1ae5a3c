"""How the section's figures show a prediction, and the spread of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from losslab.lecture.figures import NEUTRAL

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike
    from plotly.graph_objects import Figure


def spread(
    table: pd.DataFrame, by: Sequence[str], value: str, low: float = 0.1, high: float = 0.9
) -> pd.DataFrame:
    """Median and two quantiles of a column in each group: columns ``middle``, ``low`` and ``high``."""
    groups = table.groupby(list(by), sort=False)[value]
    ends = {"low": groups.quantile(low), "middle": groups.median(), "high": groups.quantile(high)}
    return groups.first().to_frame().drop(columns=value).assign(**ends).reset_index()


def predicted(figure: Figure, *curves: tuple[ArrayLike, ArrayLike], name: str) -> None:
    """Add grey dashed lines, under one legend entry, each given as (x, y)."""
    gap = [np.nan]
    figure.add_scatter(
        x=np.concatenate([np.r_[np.asarray(x, dtype=np.float64), gap] for x, _ in curves]),
        y=np.concatenate([np.r_[np.asarray(y, dtype=np.float64), gap] for _, y in curves]),
        mode="lines",
        name=name,
        line={"color": NEUTRAL, "dash": "dash", "width": 1.5},
    )
