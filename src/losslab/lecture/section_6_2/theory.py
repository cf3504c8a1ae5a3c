"""How the section's figures show a prediction beside what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from losslab.lecture.figures import NEUTRAL

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from plotly.graph_objects import Figure


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
