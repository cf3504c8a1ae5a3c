"""A loss of two weights as a surface in space, with the paths of descents on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from losslab.lecture.figures import colour, figure

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from plotly.graph_objects import Figure


def surface(
    title: str,
    x: ArrayLike,
    y: ArrayLike,
    heights: ArrayLike,
    paths: Mapping[str, ArrayLike],
    names: tuple[str, str, str],
    top: float,
) -> Figure:
    """A relief with paths on it.

    Args:
        title: A few words.
        x: The grid's first coordinate, ``(m,)``.
        y: The grid's second coordinate, ``(k,)``.
        heights: The function, ``(k, m)``.
        paths: For each legend entry the points visited with their heights, ``(T, 3)``; a dot marks the end.
        names: Of the three axes.
        top: Heights above are cut off.
    """
    drawn = figure(title, names[0], names[1])
    relief = np.asarray(heights, dtype=np.float64)
    drawn.add_surface(
        x=np.asarray(x),
        y=np.asarray(y),
        z=np.where(relief > top, np.nan, relief),
        colorscale=[[0, "#5f7fb5"], [1, "#e6d9c2"]],
        opacity=0.85,
        showscale=False,
        hoverinfo="skip",
        contours={"z": {"show": True, "start": 0, "end": top, "size": top / 18, "color": "#9aa2ab"}},
    )
    for index, (name, path) in enumerate(paths.items()):
        points = np.asarray(path, dtype=np.float64)
        lifted = points[:, 2] + 0.02 * top  # in front of the surface, not inside of it
        line = {"color": colour(index + 1), "width": 6}
        drawn.add_scatter3d(
            x=points[:, 0], y=points[:, 1], z=lifted, mode="lines", name=name, legendgroup=name, line=line
        )
        drawn.add_scatter3d(
            x=points[-1:, 0],
            y=points[-1:, 1],
            z=lifted[-1:],
            mode="markers",
            legendgroup=name,
            showlegend=False,
            marker={"color": colour(index + 1), "size": 5},
        )
    axes = {
        axis: {"title": {"text": name}} for axis, name in zip(("xaxis", "yaxis", "zaxis"), names, strict=True)
    }
    scene = {
        **axes,
        "camera": {"eye": {"x": 1.4, "y": -1.5, "z": 1.0}},
        "aspectratio": {"x": 1, "y": 1, "z": 0.6},
    }
    return drawn.update_layout(scene=scene, height=520)
