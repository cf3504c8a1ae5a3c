"""Figures of a spectrum: eigenvalues, density, layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from losslab.lecture.claim import Drawing
from losslab.lecture.figures import colour, figure, intervals

if TYPE_CHECKING:
    import pandas as pd

    from losslab.curvature import Density

FLOOR = 1e-7
"""Densities below this share of the highest are not drawn."""


def draw_curvature(
    eigenvalues: pd.DataFrame, density: Density | None = None, layers: pd.DataFrame | None = None
) -> list[Drawing]:
    """The figures of one look.

    Args:
        eigenvalues: Columns ``end``, ``eigenvalue``, ``error``.
        density: Its density is drawn where given.
        layers: The table of `losslab.curvature.by_layer`.
    """
    drawings = [_ends(eigenvalues)]
    if density is not None:
        drawings.append(_density(density, eigenvalues))
    if layers is not None:
        drawings.append(_layers(layers))
    return drawings


def _ends(eigenvalues: pd.DataFrame) -> Drawing:
    drawn = figure("Ends of the spectrum", "eigenvalue", "")
    for end, rows in eigenvalues.groupby("end", sort=False):
        names = [f"{end} {i + 1}" for i in range(len(rows))]
        values, errors = rows["eigenvalue"].to_numpy(), rows["error"].to_numpy()
        intervals(drawn, names, values, values - errors, values + errors, name=str(end))
    return Drawing(
        drawn, "The eigenvalues that were sought, with bars where their errors are wide enough to be seen."
    )


def _density(density: Density, eigenvalues: pd.DataFrame) -> Drawing:
    grid, curve = density()
    x = grid.numpy()
    value, low, high = (t.numpy() for t in (curve.value, curve.low, curve.high))
    floor = FLOOR * value.max()
    drawn = figure("Spectral density", "eigenvalue", "density", log_y=True)
    drawn.add_scatter(
        x=np.r_[x, x[::-1]],
        y=np.maximum(np.r_[high, low[::-1]], floor),
        fill="toself",
        fillcolor=colour(0, 0.18),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
    )
    drawn.add_scatter(
        x=x, y=np.maximum(value, floor), mode="lines", name="density", line={"color": colour(0), "width": 2}
    )
    found = eigenvalues["eigenvalue"].to_numpy()
    drawn.add_scatter(
        x=found,
        y=np.full(found.size, floor),
        mode="markers",
        name="eigenvalues found",
        marker={"symbol": "line-ns-open", "size": 14, "color": colour(1), "line": {"width": 2}},
    )
    drawn.update_yaxes(range=[float(np.log10(floor)), float(np.log10(high.max() * 2))])
    return Drawing(
        drawn,
        f"Density of all {density.size} eigenvalues, smoothed by 1 % of its width, with its "
        f"{density.level:.0%} interval over {density.nodes.shape[-2]} random probes. Most lie near zero; the "
        "few on the right set the largest stable learning rate.",
    )


def _layers(layers: pd.DataFrame) -> Drawing:
    drawn = figure("Curvature of each layer", "largest eigenvalue of the layer's own block", "")
    names = layers["layer"].tolist()
    values, errors = layers["largest"].to_numpy(), layers["largest_error"].to_numpy()
    intervals(drawn, names, values, values - errors, values + errors)
    drawn.update_layout(height=max(300, 26 * len(names) + 120))
    return Drawing(drawn, "The largest eigenvalue of each parameter's own block, the others held.")
