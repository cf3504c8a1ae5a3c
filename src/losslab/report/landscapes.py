"""Figures of slices of the landscape, and of paths through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from losslab.lecture.claim import Drawing
from losslab.lecture.figures import colour, contours_with_paths, figure, lines
from losslab.paths import Grid, Path

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

WIDEST = 71
"""Points a side of the surface; finer grids are thinned."""


def draw_grid(grid: Grid, way: Tensor | None = None, label: str = "trajectory") -> list[Drawing]:
    """Curves of a line; contours and a surface of a plane, with its checkpoints and a way on it.

    Args:
        grid: Of one or two dimensions.
        way: Coordinates ``[T, K]`` of points in order, such as a trajectory.
        label: What the way is called.
    """
    if grid.slice.dimensions == 1:
        return _curves(grid)
    ways = {} if way is None else {label: way.numpy()}
    drawings = []
    for name in grid.values:
        drawings.append(_contours(grid, name, ways))
    return [*drawings, _surface(grid, next(iter(grid.values)), ways)]


def draw_paths(paths: Mapping[tuple[str, str], Path]) -> list[Drawing]:
    """Each measurement along paths, by the share of their length: one colour a method, a line a pair.

    Args:
        paths: (pair, method) -> path.
    """
    import pandas as pd

    drawings = []
    for name in next(iter(paths.values())).values:
        rows = []
        for (_, method), path in paths.items():
            gap = pd.DataFrame({"place": [np.nan], name: [np.nan]})  # so that the next pair starts anew
            rows.append(pd.concat([path.table[["place", name]], gap]).assign(method=method))
        table = pd.concat(rows)
        shown = table[name].to_numpy()
        log = name.endswith("loss") and _logarithmic(shown)
        drawn = figure(_title(name), "share of the length", _title(name), log_y=log)
        lines(drawn, table, "place", name, by="method")
        told = "one line a pair; at the ends stand the networks themselves, aligned or not"
        drawings.append(Drawing(drawn, f"{_title(name)} from end to end, {told}."))
    return drawings


def _curves(grid: Grid) -> list[Drawing]:
    drawings = []
    for kind in dict.fromkeys(name.rpartition("_")[2] for name in grid.values):
        names = [name for name in grid.values if name.rpartition("_")[2] == kind]
        drawn = figure(kind.capitalize(), grid.slice.names[0], kind)
        for name in names:
            lines(drawn, grid.table, grid.slice.names[0], name, name=_title(name))
        for name in names:
            lines(drawn, grid.marked, grid.slice.names[0], name, mode="markers")
        drawings.append(
            Drawing(drawn, f"The {kind} along the line. Dots: where the networks stand that it goes through.")
        )
    return drawings


def _contours(grid: Grid, name: str, ways: Mapping[str, NDArray[np.float64]]) -> Drawing:
    heights = _shown(grid[name].numpy())
    marks = {
        label: grid.slice.marks[[i]].numpy() for i, label in enumerate(grid.slice.labels or ("the network",))
    }
    x, y = (axis.numpy() for axis in grid.axes)
    log = name.endswith("loss") and _logarithmic(heights)
    across, up = grid.slice.names
    title = f"{_title(name)} on the plane"
    drawn = contours_with_paths(title, x, y, heights.T, {**ways, **marks}, across, up, log)
    drawn.update_yaxes(scaleanchor="x")
    told = "Contours are even in the logarithm above the lowest value. " if log else ""
    return Drawing(drawn, f"Dots: where the networks stand. {told}Both axes have the same scale.")


def _surface(grid: Grid, name: str, ways: Mapping[str, NDArray[np.float64]]) -> Drawing:
    import plotly.graph_objects as go

    every = max(1, -(-max(len(axis) for axis in grid.axes) // WIDEST))
    x, y = (axis.numpy()[::every] for axis in grid.axes)
    values = grid[name].numpy()
    log = _logarithmic(_shown(values))
    scaled = np.log10(values) if log else values
    finite = scaled[np.isfinite(scaled)]
    ceiling = np.quantile(finite, 0.99) if finite.size else 1.0
    drawn = figure(f"{_title(name)}, as a surface", "", "")
    # What is infinite or beyond the view is drawn at its edge, what is NaN is a hole.
    heights = np.where(np.isnan(scaled), np.nan, np.minimum(scaled, ceiling))[::every, ::every]
    drawn.add_trace(go.Surface(x=x, y=y, z=heights.T, colorscale="Cividis", showscale=False, opacity=0.95))
    marks, at_marks = grid.slice.marks.numpy(), grid.at_marks[name].numpy()
    labels = list(grid.slice.labels or ("the network",))
    lifted = np.minimum(np.log10(at_marks) if log else at_marks, ceiling)
    drawn.add_trace(_scatter(marks, lifted, labels, "markers", colour(1)))
    for label, way in ways.items():
        drawn.add_trace(_scatter(way, _lifted(grid, way, scaled, ceiling), [label], "lines", colour(1)))
    title = f"log10 {_title(name).lower()}" if log else _title(name).lower()
    titles = dict(zip("xyz", (*grid.slice.names, title), strict=True))
    drawn.update_layout(
        height=520,
        showlegend=False,
        margin={"l": 0, "r": 0, "b": 0, "t": 0},
        scene={f"{a}axis": {"title": {"text": text}} for a, text in titles.items()},
    )
    return Drawing(drawn, "The same to turn around. Values beyond the 99th percentile lie on the ceiling.")


def _scatter(at: NDArray[np.float64], height: Any, labels: Sequence[str], mode: str, shade: str) -> Any:
    import plotly.graph_objects as go

    return go.Scatter3d(
        x=at[:, 0], y=at[:, 1], z=height, mode=mode, text=list(labels), hoverinfo="text",
        marker={"size": 6, "color": shade}, line={"width": 5, "color": shade},
    )  # fmt: skip


def _lifted(grid: Grid, way: NDArray[np.float64], scaled: NDArray[np.float64], ceiling: float) -> Any:
    """The height of the surface at points of the plane, that of the nearest grid point."""
    rows, columns = (
        np.abs(axis.numpy()[None, :] - way[:, [k]]).argmin(1) for k, axis in enumerate(grid.axes)
    )
    finite = scaled[np.isfinite(scaled)]
    above = 0.01 * np.ptp(finite) if finite.size else 0.0  # or the surface would hide half of it
    return np.minimum(scaled[rows, columns], ceiling) + above


def _shown(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Contours cannot be drawn at infinity: such points become holes, as NaN is."""
    return np.where(np.isfinite(values), values, np.nan)


def _logarithmic(values: NDArray[np.float64]) -> bool:
    """Whether positive values span so much that a linear scale would hide the lower ones."""
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.min() > 0 and finite.max() > 10 * finite.min())


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


__all__ = ["draw_grid", "draw_paths"]
