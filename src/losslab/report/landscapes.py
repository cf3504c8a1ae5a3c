"""Figures of slices of the landscape, and of paths through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from losslab.lecture.claim import Drawing
from losslab.lecture.figures import colour, figure, lines
from losslab.lecture.numbers import number
from losslab.lecture.scenes import SCALE, Panel, moving, planes
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
    drawings = [_contours(grid, name, ways) for name in grid.values]
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
        for (pair, method), path in paths.items():
            gap = pd.DataFrame({"place": [np.nan], name: [np.nan]})  # so that the next pair starts anew
            told = pd.concat([path.table[["place", name]], gap])
            rows.append(told.assign(method=method, pair=pair))
        table = pd.concat(rows)
        log = name.endswith("loss") and _logarithmic(table[name].to_numpy())
        drawn = figure(_title(name), "share of the length", _title(name).lower(), log_y=log)
        lines(drawn, table, "place", name, by="method")
        for trace in drawn.data:
            told = table[table.method == trace.name].pair
            trace.update(text=told.to_numpy(), hovertemplate="%{text}: %{y:.3g} at %{x:.0%}<extra></extra>")
        drawings.append(
            Drawing(
                drawn,
                f"{_title(name)} from end to end, one line a pair; at the ends stand the networks.",
            )
        )
    return drawings


def draw_settling(pair: str, path: Path) -> Drawing:
    """How an elastic band came down: a frame for each of its stages, with a slider and a button."""
    import pandas as pd

    rows = [
        pd.DataFrame({"place": stage.places.numpy(), "loss": stage.losses.numpy(), "step": stage.step})
        for stage in path.stages
    ]
    table = pd.concat(rows, ignore_index=True)
    table = table[np.isfinite(table.loss)]
    drawn = figure(
        f"The elastic band settles, {pair}", "share of the length", "loss", log_y=_logarithmic(table.loss)
    )
    moving(drawn, table, "place", "loss", "step", "steps")
    return Drawing(
        drawn,
        "Press play, or move the slider. At first the losses are those of the images alone, after each cycle "
        "also those between them. Dashed: the straight line; dotted: the last cycle.",
    )


def draw_ensembles(pair: str, path: Path, votes: Mapping[str, Tensor]) -> list[Drawing]:
    """The error of ensembles along a path, as `losslab.paths.ensemble_errors` gives it."""
    import pandas as pd

    sets = [name.removesuffix("so_far") for name in votes if name.endswith("so_far")]
    drawings = []
    for name in sets:
        title = _title(f"{name}error")
        drawn = figure(f"{title} of ensembles, {pair}", "share of the length", title.lower())
        told = {"the network alone": path[f"{name}error"], "with the start": votes[f"{name}with_start"]}
        told["all networks so far"] = votes[f"{name}so_far"]
        for label, values in told.items():
            table = pd.DataFrame({"place": path.places.numpy(), "error": values.numpy()})
            lines(drawn, table, "place", "error", name=label)
        drawings.append(
            Drawing(
                drawn,
                "Networks that average their class probabilities. Where the start gains from a partner, the "
                "two err on different examples.",
            )
        )
    return drawings


def _curves(grid: Grid) -> list[Drawing]:
    drawings = []
    across = grid.slice.names[0]
    for kind in dict.fromkeys(name.rpartition("_")[2] for name in grid.values):
        names = [name for name in grid.values if name.rpartition("_")[2] == kind]
        log = kind == "loss" and all(_logarithmic(grid[name].numpy()) for name in names)
        drawn = figure(kind.capitalize(), across, kind, log_y=log)
        for name in names:
            lines(drawn, grid.table, across, name, name=_title(name))
        for name in names:
            lines(drawn, grid.marked, across, name, mode="markers")
        for place, label in zip(grid.slice.marks[:, 0].tolist(), _labels(grid), strict=True):
            drawn.add_vline(place, line={"color": colour(5, 0.4), "width": 1, "dash": "dot"})
            at = {"x": place, "yref": "paper", "y": 0.98, "yanchor": "top", "xanchor": "left"}
            drawn.add_annotation(text=label, showarrow=False, align="left", font={"size": 11}, **at)
        drawings.append(
            Drawing(drawn, f"The {kind} along the line. Dots: where the networks stand that it goes through.")
        )
    return drawings


def _contours(grid: Grid, name: str, ways: Mapping[str, NDArray[np.float64]]) -> Drawing:
    x, y = (axis.numpy() for axis in grid.axes)
    marks = dict(zip(_labels(grid), grid.slice.marks.numpy(), strict=True))
    panel = Panel(x, y, grid[name].numpy().T, marks, ways)
    title = f"{_title(name)} on the plane"
    drawn = planes(title, [panel], _title(name).lower(), *grid.slice.names)
    return Drawing(
        drawn,
        "Dots: where the networks stand. Lines: equal heights, with their values. Both axes have the same "
        "scale; what is not finite is left open.",
    )


def _surface(grid: Grid, name: str, ways: Mapping[str, NDArray[np.float64]]) -> Drawing:
    import plotly.graph_objects as go

    every = max(1, -(-max(len(axis) for axis in grid.axes) // WIDEST))
    x, y = (axis.numpy()[::every] for axis in grid.axes)
    values = grid[name].numpy()
    log = _logarithmic(values)
    scaled = np.log10(values) if log else values
    finite = scaled[np.isfinite(scaled)]
    ceiling = float(np.quantile(finite, 0.99)) if finite.size else 1.0
    drawn = figure(f"{_title(name)}, as a surface", "", "")
    # What is infinite or beyond the view is drawn at its edge, what is NaN is a hole.
    heights = np.where(np.isnan(scaled), np.nan, np.minimum(scaled, ceiling))[::every, ::every]
    shown = np.where(np.isfinite(values), values, np.nan)[::every, ::every]
    relief = go.Surface(
        x=x, y=y, z=heights.T, customdata=shown.T, colorscale=SCALE, showscale=False, opacity=0.95,
        hovertemplate="%{customdata:.3g}<extra></extra>",
    )  # fmt: skip
    drawn.add_trace(relief)
    marks, at_marks = grid.slice.marks.numpy(), grid.at_marks[name].numpy()
    lifted = np.minimum(np.log10(at_marks) if log else at_marks, ceiling)
    drawn.add_trace(_scatter(marks, lifted, _labels(grid), "markers+text", colour(1)))
    for label, way in ways.items():
        drawn.add_trace(_scatter(way, _lifted(grid, way, scaled, ceiling), [label], "lines", colour(2)))
    title = _title(name).lower()
    axes: dict[str, Any] = {
        f"{a}axis": {"title": {"text": text}}
        for a, text in zip("xyz", (*grid.slice.names, title), strict=True)
    }
    if log and finite.size:
        span = ceiling - float(finite.min())
        ticks = np.arange(np.ceil(finite.min()), ceiling + 1e-9, max(1, round(span / 4)))
        if len(ticks) < 2:
            ticks = np.linspace(float(finite.min()), ceiling, 3)
        axes["zaxis"] |= {"tickvals": ticks, "ticktext": [number(float(10.0**t)) for t in ticks]}
    drawn.update_layout(
        height=520,
        showlegend=False,
        margin={"l": 0, "r": 0, "b": 0, "t": 0},
        scene=axes
        | {"aspectratio": {"x": 1, "y": 1, "z": 0.6}, "camera": {"eye": {"x": 1.3, "y": -1.5, "z": 0.9}}},
    )
    told = "The height is logarithmic. " if log else ""
    return Drawing(
        drawn, f"The same to turn around. {told}Values beyond the 99th percentile lie on the ceiling."
    )


def _scatter(at: NDArray[np.float64], height: Any, labels: Sequence[str], mode: str, shade: str) -> Any:
    import plotly.graph_objects as go

    return go.Scatter3d(
        x=at[:, 0], y=at[:, 1], z=height, mode=mode, text=list(labels), hoverinfo="text",
        textposition="top center", marker={"size": 6, "color": shade}, line={"width": 6, "color": shade},
    )  # fmt: skip


def _lifted(grid: Grid, way: NDArray[np.float64], scaled: NDArray[np.float64], ceiling: float) -> Any:
    """The height of the surface at points of the plane, that of the nearest grid point."""
    rows, columns = (
        np.abs(axis.numpy()[None, :] - way[:, [k]]).argmin(1) for k, axis in enumerate(grid.axes)
    )
    finite = scaled[np.isfinite(scaled)]
    above = 0.01 * np.ptp(finite) if finite.size else 0.0  # or the surface would hide half of it
    return np.minimum(scaled[rows, columns], ceiling) + above


def _labels(grid: Grid) -> list[str]:
    """What stands beside the marks: short first lines, the rest below."""
    return [label.replace(", ", "<br>", 1) for label in grid.slice.labels or ("the network",)]


def _logarithmic(values: Any) -> bool:
    """Whether positive values span so much that a linear scale would hide the lower ones."""
    finite = np.asarray(values)[np.isfinite(values)]
    return bool(finite.size and finite.min() > 0 and finite.max() > 10 * finite.min())


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


__all__ = ["draw_ensembles", "draw_grid", "draw_paths", "draw_settling"]
