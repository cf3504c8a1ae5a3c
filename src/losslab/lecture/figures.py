"""How the lecture's figures look, and the few shapes they take.

Every helper draws with one palette, colour-blind safe and legible on light and dark pages; a seventh series
starts the palette again with dashes. Titles stay short: the report prints them as text above the figure.

Example:
    >>> import pandas as pd
    >>> table = pd.DataFrame({"step": [1, 2, 1, 2], "loss": [4, 2, 4, 3], "rule": ["a", "a", "b", "b"]})
    >>> loss = figure("Training loss", "step", "loss", log_y=True)
    >>> lines(loss, table, "step", "loss", by="rule")
    >>> [trace.name for trace in loss.data]
    ['a', 'b']
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike, NDArray
    from plotly.graph_objects import Figure
    from plotly.graph_objects.layout import Template

PALETTE = ("#2b5bd2", "#d87d1c", "#02a29e", "#aa75f8", "#934a72", "#6d6b01")
DASHES = ("solid", "dash", "dot", "dashdot")
NEUTRAL = "#7b838c"
POINTS = 5000
"""The most points a trace may hold, and the most cells a grid may."""


def colour(index: int, opacity: float = 1.0) -> str:
    """The colour of a figure's series number ``index``, from 0.

    Example:
        >>> colour(0, 0.5)
        'rgba(43,91,210,0.5)'
    """
    code = PALETTE[index % len(PALETTE)]
    if opacity == 1.0:
        return code
    red, green, blue = (int(code[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


def template(dark: bool = False) -> Template:
    """The plotly template of all figures, for a light or a dark page; the background is the page's."""
    import plotly.graph_objects as go

    text, grid, line = ("#d5d9de", "#2d333b", "#59626d") if dark else ("#2a2f36", "#e6e8eb", "#9aa2ab")
    axis = {
        "gridcolor": grid,
        "linecolor": line,
        "tickcolor": line,
        "zerolinecolor": grid,
        "showline": True,
        "ticks": "outside",
        "automargin": True,
        "exponentformat": "power",
        "title": {"standoff": 8},
    }
    layout = {
        "font": {
            "family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
            "size": 13,
            "color": text,
        },
        "colorway": PALETTE,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": axis,
        "yaxis": axis,
        "margin": {"l": 48, "r": 16, "t": 24, "b": 44},
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": line, "activecolor": text},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
    }
    return go.layout.Template(layout=layout)


def figure(title: str, x_title: str, y_title: str, log_x: bool = False, log_y: bool = False) -> Figure:
    """An empty figure in the house style."""
    import plotly.graph_objects as go

    empty = go.Figure(layout={"template": template(), "title": {"text": title}, "height": 380})
    empty.update_xaxes(title_text=x_title, type="log" if log_x else "-")
    empty.update_yaxes(title_text=y_title, type="log" if log_y else "-")
    return empty


def lines(
    figure: Figure,
    table: pd.DataFrame,
    x: str,
    y: str,
    by: str | None = None,
    band: tuple[str, str] | None = None,
    mode: str = "lines",
    name: str | None = None,
) -> None:
    """Add one line for each value of the column ``by``, in order of appearance.

    Args:
        figure: What to draw on.
        table: The numbers.
        x: A column of ``table``.
        y: A column of ``table``.
        by: The column that names the series; without it there is one, called ``name``.
        band: The columns of the lower and the upper end of a shaded band.
        mode: ``"lines"``, ``"markers"`` or ``"lines+markers"``.
        name: The legend entry when there is no ``by``; without one the line has no entry.
    """
    groups = [(name, table)] if by is None else list(table.groupby(by, sort=False))
    for label, group in groups:
        index = _series(figure)
        if band is not None:
            _band(figure, group[[x, *band]].dropna(), x, band, index)
        figure.add_scatter(
            x=group[x].to_numpy(),
            y=group[y].to_numpy(),
            mode=mode,
            name="" if label is None else str(label),
            showlegend=label is not None,
            meta="series",
            line={"color": colour(index), "dash": _dash(index), "width": 2},
            marker={"color": colour(index), "size": 6},
        )


def bars(figure: Figure, labels: Sequence[str], values: ArrayLike, name: str | None = None) -> None:
    """Add one bar for each label; several calls stand side by side."""
    index = _series(figure)
    figure.add_bar(
        x=list(labels),
        y=np.asarray(values, dtype=np.float64),
        name=name or "",
        showlegend=name is not None,
        meta="series",
        marker={"color": colour(index)},
    )


def intervals(
    figure: Figure,
    labels: Sequence[str],
    estimates: ArrayLike,
    lows: ArrayLike,
    highs: ArrayLike,
    name: str | None = None,
) -> None:
    """Add a row for each label, top down: a dot at the estimate and a bar from low to high."""
    index = _series(figure)
    middle, low, high = (np.asarray(values, dtype=np.float64) for values in (estimates, lows, highs))
    figure.add_scatter(
        x=middle,
        y=list(labels),
        mode="markers",
        name=name or "",
        showlegend=name is not None,
        meta="series",
        marker={"color": colour(index), "size": 9},
        error_x={"array": high - middle, "arrayminus": middle - low, "color": colour(index), "thickness": 2},
    )
    figure.update_yaxes(autorange="reversed", type="category")


def reference(figure: Figure, value: float, label: str, axis: str = "y") -> None:
    """Draw a dashed line at a threshold or a theoretical value of the x or the y axis."""
    add = figure.add_hline if axis == "y" else figure.add_vline
    place = figure.layout.yaxis if axis == "y" else figure.layout.xaxis
    # Plotly takes shapes in data units but annotations of log axes in powers of ten, so the line has no
    # annotation of its own.
    add(value, line={"color": NEUTRAL, "dash": "dash", "width": 1.5})
    at = float(np.log10(value)) if place.type == "log" else value
    ends = {"xref": "paper", "x": 1, "yref": "y", "y": at, "xanchor": "right", "yanchor": "bottom"}
    tops = {"yref": "paper", "y": 1, "xref": "x", "x": at, "xanchor": "left", "yanchor": "top"}
    figure.add_annotation(
        text=label, showarrow=False, font={"color": NEUTRAL, "size": 12}, **(ends if axis == "y" else tops)
    )


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


def contours_with_paths(
    title: str,
    x: ArrayLike,
    y: ArrayLike,
    values: ArrayLike,
    paths: Mapping[str, ArrayLike],
    x_title: str = "x",
    y_title: str = "y",
    log: bool = False,
) -> Figure:
    """Trajectories on the contour lines of a function of two variables.

    Args:
        title: A few words.
        x: The grid's first coordinate, shape (m,).
        y: The grid's second coordinate, shape (k,).
        values: The function, shape (k, m).
        paths: For each legend entry the points visited, shape (T, 2); a ring marks the start, a dot the end.
        x_title: The name of the first coordinate.
        y_title: The name of the second coordinate.
        log: Draw the contours of log10 of the function above its minimum on the grid.

    Returns:
        The figure; its view is the grid, whatever the paths do.
    """
    across, up = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    heights = np.asarray(values, dtype=np.float64)
    if log:
        above = heights - np.nanmin(heights)
        heights = np.log10(np.maximum(above, 1e-6 * np.nanmax(above)))
    every = max(1, int(np.ceil(np.sqrt(heights.size / POINTS))))
    drawn = figure(title, x_title, y_title)
    drawn.add_contour(
        x=across[::every],
        y=up[::every],
        z=heights[::every, ::every],
        contours={"coloring": "lines"},
        ncontours=24,
        line={"width": 1},
        colorscale=[[0, "#5f7fb5"], [1, "#b9a48c"]],
        showscale=False,
        hoverinfo="skip",
    )
    for name, path in paths.items():
        _path(drawn, name, np.asarray(path, dtype=np.float64))
    drawn.update_xaxes(range=[across.min(), across.max()], showgrid=False)
    drawn.update_yaxes(range=[up.min(), up.max()], showgrid=False)
    return drawn.update_layout(height=460)


def ridgelines(
    title: str, table: pd.DataFrame, value: str, level: str, by: str, x_title: str, y_title: str
) -> Figure:
    """Densities one above the other, one for each level, in a panel for each value of the column ``by``.

    The densities are Gaussian kernel estimates with Scott's width, scaled alike within a panel; the view
    holds 98 % of all values. The lowest ridge is the first level in the table's order.

    Args:
        title: A few words.
        table: One row a sample; samples that are not finite are left out.
        value: The column of samples.
        level: The column that says which ridge.
        by: The column that says which panel.
        x_title: What the samples are.
        y_title: What the levels are.
    """
    drawn = figure(title, x_title, y_title)
    table = table[np.isfinite(table[value])]
    low, high = np.percentile(table[value], [1, 99])
    grid = np.linspace(low - 0.1 * (high - low), high + 0.1 * (high - low), 121)
    levels, panels = list(dict.fromkeys(table[level])), list(table.groupby(by, sort=False))
    for index, (name, panel) in enumerate(panels):
        start, width = index / len(panels), 1 / len(panels) - 0.02
        axis = {"domain": [start, start + width], "title": {"text": x_title}, "range": [grid[0], grid[-1]]}
        drawn.update_layout({f"xaxis{index + 1 if index else ''}": axis | {"zeroline": False}})
        heights = {at: _density(ridge[value].to_numpy(), grid) for at, ridge in panel.groupby(level)}
        top = max(height.max() for height in heights.values())
        for place, at in reversed(list(enumerate(levels))):  # the lower ones stand before the higher
            if at in heights:
                drawn.add_scatter(
                    x=np.r_[grid, grid[::-1]],
                    y=np.r_[place + 1.6 * heights[at] / top, np.full(grid.size, place)],
                    xaxis=f"x{index + 1 if index else ''}",
                    fill="toself",
                    fillcolor=colour(index, 0.45),
                    line={"color": colour(index), "width": 1},
                    mode="lines",
                    name=f"{name}, {at:g}",
                    showlegend=False,
                    hoverinfo="name",
                )
        centre = {"x": start + width / 2, "y": 1, "xref": "paper", "yref": "paper", "yanchor": "bottom"}
        font = {"color": colour(index), "size": 11}
        drawn.add_annotation(text=str(name), showarrow=False, font=font, **centre)
    drawn.update_yaxes(tickvals=list(range(len(levels))), ticktext=[f"{at:g}" for at in levels])
    return drawn.update_layout(height=460, margin={"t": 32})


def _density(samples: NDArray[np.float64], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    width = max(float(samples.std()) * samples.size**-0.2, float(grid[1] - grid[0]) / 2)
    apart = (grid[:, None] - samples[None]) / width
    return np.exp(-(apart**2) / 2).sum(1) / (samples.size * width * np.sqrt(2 * np.pi))


def thin(figure: Figure, limit: int = POINTS) -> Figure:
    """Keep at most about ``limit`` points of every line, so that the picture stays the same; in place.

    The axis is cut into stretches of equal length on the screen, and each keeps its lowest and its highest
    point, so no spike is lost. Gaps (NaN) stay gaps.
    """
    for trace in figure.data:
        if trace.type in ("scatter", "scattergl") and trace.y is not None and len(trace.y) > limit:
            axis = figure.layout["xaxis" + (trace.xaxis or "x")[1:]]
            keep = _worth_drawing(trace, axis.type == "log", limit)
            for name in ("x", "text", "hovertext", "customdata", "y"):
                if isinstance(trace[name], np.ndarray | list | tuple):
                    trace[name] = np.asarray(trace[name])[keep]
    return figure


def _worth_drawing(trace: Any, log_x: bool, limit: int) -> NDArray[np.intp]:
    y = np.asarray(trace.y, dtype=np.float64)
    place = np.arange(y.size, dtype=np.float64)
    if log_x and trace.x is not None:
        place = np.log(np.maximum(np.asarray(trace.x, dtype=np.float64), 1e-300))
    stretch = (place - place.min()) / (np.ptp(place) or 1.0) * (limit // 2 - 1)
    stretch = stretch.astype(int)
    order = np.lexsort((y, stretch))  # within a stretch ascending, NaN last
    ends = np.flatnonzero(np.diff(stretch[order])) + 1
    firsts, lasts = np.r_[0, ends], np.r_[ends - 1, y.size - 1]
    return np.unique(np.r_[0, order[firsts], order[lasts], y.size - 1])


def _path(figure: Figure, name: str, points: NDArray[np.float64]) -> None:
    index = _series(figure)
    shared = {"legendgroup": name, "showlegend": False, "mode": "markers", "hoverinfo": "skip"}
    figure.add_scatter(
        x=points[:, 0],
        y=points[:, 1],
        mode="lines+markers" if len(points) <= 100 else "lines",
        name=name,
        legendgroup=name,
        meta="series",
        line={"color": colour(index), "dash": _dash(index), "width": 2},
        marker={"size": 4},
    )
    ring = {"symbol": "circle-open", "size": 11, "color": colour(index), "line": {"width": 2}}
    figure.add_scatter(x=points[:1, 0], y=points[:1, 1], marker=ring, **shared)
    finite = points[np.isfinite(points).all(axis=1)]
    figure.add_scatter(
        x=finite[-1:, 0], y=finite[-1:, 1], marker={"size": 11, "color": colour(index)}, **shared
    )


def _band(figure: Figure, rows: pd.DataFrame, x: str, band: tuple[str, str], index: int) -> None:
    there = rows[x].to_numpy()
    low, high = (rows[column].to_numpy() for column in band)
    figure.add_scatter(
        x=np.r_[there, there[::-1]],
        y=np.r_[high, low[::-1]],
        fill="toself",
        fillcolor=colour(index, 0.18),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
    )


def _series(figure: Figure) -> int:
    """The number of series drawn so far."""
    return sum(trace.meta == "series" for trace in figure.data)


def _dash(index: int) -> str:
    return DASHES[index // len(PALETTE) % len(DASHES)]
