"""Planes of weight space with what is known of them, and curves that move.

`planes` draws a loss on one plane or on several, one below the other: the height as a colour with a bar that
tells it, contour lines with their values, named places, and ways through it. `moving` adds a line that
changes from frame to frame, with a slider and a button to play it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from losslab.lecture.figures import NEUTRAL, colour, figure
from losslab.lecture.numbers import number

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike, NDArray
    from plotly.graph_objects import Figure

SCALE = [[0, "#23395d"], [0.5, "#7f9bc4"], [1, "#f1e9d8"]]
"""From low to high; as light grows in one direction, it reads without colours too."""

CARD = 450
"""Pixels that a plane is wide on a wide page."""

DARK, PALE = "#10151c", "rgba(255,255,255,0.8)"


class Panel(NamedTuple):
    """One plane.

    Attributes:
        x: The grid's first coordinate, ``(m,)``.
        y: The grid's second coordinate, ``(k,)``.
        values: The height, ``(k, m)``; what is not finite is left open.
        marks: Name -> place ``(2,)``.
        ways: Legend entry -> points in order, ``(T, 2)``.
        title: What stands above the panel, where there are several.
    """

    x: ArrayLike
    y: ArrayLike
    values: ArrayLike
    marks: Mapping[str, ArrayLike] = {}
    ways: Mapping[str, ArrayLike] = {}
    title: str = ""


def planes(title: str, panels: Sequence[Panel], value: str, x_title: str = "x", y_title: str = "y") -> Figure:
    """Heights on planes, with one colour scale for all of them.

    The scale is logarithmic where the heights are positive and span more than a factor of ten. Both axes of a
    panel have the same scale.

    Args:
        title: A few words.
        panels: From top to bottom, so that they can be read on a narrow page too.
        value: What the heights are, for the colour bar.
        x_title: The name of the first coordinate.
        y_title: The name of the second coordinate.

    Example:
        >>> axis = np.linspace(-1, 1, 5)
        >>> drawn = planes("bowl", [Panel(axis, axis, 1 + 20 * np.add.outer(axis**2, axis**2))], "loss")
        >>> drawn.layout.coloraxis.colorbar.ticktext
        ('1', '3', '10', '30')
    """
    heights = [_finite(panel.values) for panel in panels]
    known = np.concatenate([z[~np.isnan(z)] for z in heights])
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    log = low > 0 and high > 10 * low
    levels = _levels(low, high, log)
    drawn = figure(title, x_title, y_title)
    for index, (panel, z) in enumerate(zip(panels, heights, strict=True)):
        axes = {name: f"{name[0]}{index + 1 if index else ''}" for name in ("xaxis", "yaxis")}
        _relief(drawn, panel, z, levels, log, axes)
        _ways(drawn, panel, axes)
        _marks(drawn, panel, axes)
        _place(drawn, panel, index, len(panels), x_title, y_title)
    ends = np.log10([low, high]) if log else np.array([low, high])
    told: dict[str, Any] = {"tickvals": np.log10(levels) if log else levels, "tickangle": 0}
    told |= {"ticktext": [number(level) for level in levels], "title": {"text": value, "side": "top"}}
    place = {
        "orientation": "h",
        "x": 0.5,
        "y": 1.0,
        "ypad": 8,
        "yanchor": "bottom",
        "thickness": 10,
        "ticks": "outside",
    }
    height = 160 + (300 * len(panels) if len(panels) > 1 else _tall(panels[0]))
    drawn.update_layout(
        coloraxis={"colorscale": SCALE, "cmin": ends[0], "cmax": ends[1], "colorbar": told | place},
        legend={"y": -58 / (height - 150), "yanchor": "top"},
        height=height,
        margin={"t": 12, "b": 76},
    )
    return drawn


def _tall(panel: Panel) -> int:
    """Pixels for a plane alone: a flat one is as wide as its card, and would leave the rest white."""
    long, high = np.ptp(panel.x), np.ptp(panel.y)
    return int(np.clip(CARD * high / long, 120, 300)) if 0 < high < long else 300


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    z = np.array(values, dtype=np.float64)
    z[~np.isfinite(z)] = np.nan
    return z


def _levels(low: float, high: float, log: bool) -> NDArray[np.float64]:
    """About half a dozen round values between two."""
    if not high > low:
        return np.array([low])
    if log:
        decades = float(np.log10(high / low))
        digits = (1.0, 2.0, 5.0) if decades < 1.5 else (1.0, 3.0) if decades < 4 else (1.0,)
        powers = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
        found = np.sort(np.multiply.outer(10.0**powers, digits).ravel())
    else:
        rough = (high - low) / 6
        unit = 10.0 ** np.floor(np.log10(rough))
        step = unit * min((1, 2, 5, 10), key=lambda factor: abs(factor * unit - rough))
        found = step * np.arange(np.ceil(low / step), np.floor(high / step) + 1)
    return found[(found >= low) & (found <= high)]


def _relief(
    drawn: Figure, panel: Panel, z: NDArray[np.float64], levels: NDArray[np.float64], log: bool, axes: Any
) -> None:
    where = {"x": np.asarray(panel.x, np.float64), "y": np.asarray(panel.y, np.float64), **axes}
    shown = np.log10(z) if log else z
    drawn.add_heatmap(
        z=shown.astype(np.float32), customdata=z.astype(np.float32), zsmooth="best", coloraxis="coloraxis",
        hovertemplate="%{customdata:.3g}<extra></extra>", **where,
    )  # fmt: skip
    for level in levels:
        if np.nanmin(z, initial=np.inf) < level < np.nanmax(z, initial=-np.inf):
            # One trace a level: a trace's levels are even, and its labels are its own values.
            drawn.add_contour(
                z=z.astype(np.float32),
                contours={
                    "start": level,
                    "end": level,
                    "size": 1,
                    "coloring": "none",
                    "showlabels": True,
                    "labelformat": ".1g" if log else ".3~g",
                    "labelfont": {"size": 10, "color": DARK},
                },
                line={"color": DARK, "width": 0.8},
                showlegend=False,
                showscale=False,
                hoverinfo="skip",
                **where,
            )


def _ways(drawn: Figure, panel: Panel, axes: Any) -> None:
    for index, (name, way) in enumerate(panel.ways.items()):
        points = np.asarray(way, dtype=np.float64)
        known = any(trace.showlegend and trace.name == name for trace in drawn.data)
        for shade, width in (("#ffffff", 5.0), (colour(index + 1), 2.5)):
            drawn.add_scatter(
                x=points[:, 0],
                y=points[:, 1],
                mode="lines",
                name=name,
                legendgroup=name,
                showlegend=not known and shade != "#ffffff",
                hoverinfo="name",
                line={"color": shade, "width": width},
                **axes,
            )


def _marks(drawn: Figure, panel: Panel, axes: Any) -> None:
    if not panel.marks:
        return
    places = np.array([np.asarray(place, dtype=np.float64) for place in panel.marks.values()])
    drawn.add_scatter(
        x=places[:, 0],
        y=places[:, 1],
        mode="markers",
        text=list(panel.marks),
        hoverinfo="text",
        showlegend=False,
        marker={"size": 10, "color": "#ffffff", "line": {"color": DARK, "width": 2}},
        **axes,
    )
    middle = float(np.mean([np.min(panel.y), np.max(panel.y)]))
    for name, (x, y) in zip(panel.marks, places, strict=True):
        drawn.add_annotation(
            x=x, y=y, xref=axes["xaxis"], yref=axes["yaxis"], text=name, showarrow=False,
            yshift=17 if y > middle else -17, bgcolor=PALE, font={"color": DARK, "size": 12}, borderpad=1,
        )  # fmt: skip


def _place(drawn: Figure, panel: Panel, index: int, count: int, x_title: str, y_title: str) -> None:
    nth = index + 1 if index else ""
    top = 1 - index / count
    bottom, last = top - 1 / count + 0.09 * (count > 1), index == count - 1
    shared = {"showgrid": False, "zeroline": False, "constrain": "domain"}
    x = {"range": [np.min(panel.x), np.max(panel.x)], "anchor": f"y{nth}", "title": {"text": x_title}}
    y = {"range": [np.min(panel.y), np.max(panel.y)], "anchor": f"x{nth}", "title": {"text": y_title}}
    y |= {
        "scaleanchor": f"x{nth}",
        "constraintoward": "top",
        "domain": [bottom - 0.09 * (last and count > 1), top - 0.06 * (count > 1)],
    }
    drawn.update_layout({f"xaxis{nth}": shared | x, f"yaxis{nth}": shared | y})
    if count > 1:
        where = {"xref": "paper", "yref": "paper", "yanchor": "top"}
        drawn.add_annotation(text=panel.title, x=0.5, y=top, showarrow=False, **where)


def moving(figure: Figure, table: pd.DataFrame, x: str, y: str, by: str, unit: str) -> None:
    """Add a line that moves from frame to frame; where it begins and ends is drawn as well.

    Args:
        figure: What to draw on.
        table: One row a (frame, point).
        x: A column of ``table``.
        y: A column of ``table``.
        by: The column of numbers that says which frame; frames come in ascending order.
        unit: What these numbers count, such as steps.
    """
    import plotly.graph_objects as go

    frames = [
        (f"{at:g}", rows[x].to_numpy(), rows[y].to_numpy()) for at, rows in table.groupby(by, sort=True)
    ]
    for (name, across, up), dash in zip((frames[0], frames[-1]), ("dash", "dot"), strict=True):
        line = {"color": NEUTRAL, "dash": dash, "width": 1.5}
        figure.add_scatter(x=across, y=up, mode="lines", name=f"after {name} {unit}", line=line)
    own, (_, across, up) = len(figure.data), frames[0]
    figure.add_scatter(x=across, y=up, mode="lines", name="now", line={"color": colour(0), "width": 2.5})
    figure.frames = [
        go.Frame(name=name, traces=[own], data=[go.Scatter(x=across, y=up)]) for name, across, up in frames
    ]
    _view(figure, table[x], "xaxis", 0.0)
    _view(figure, table[y], "yaxis", 0.05)
    figure.update_layout(height=540, **_controls([name for name, _, _ in frames], unit))


def _view(figure: Figure, values: pd.Series, axis: str, margin: float) -> None:
    """Fixes an axis so that all frames fit."""
    known = values[np.isfinite(values)].to_numpy()
    if figure.layout[axis].type == "log":
        known = np.log10(known[known > 0])
    room = margin * float(np.ptp(known))
    figure.update_layout({axis: {"range": [float(known.min()) - room, float(known.max()) + room]}})


def _controls(names: Sequence[str], unit: str) -> dict[str, Any]:
    """Two buttons below the figure, and below them the slider, so that both fit a narrow page."""

    def to(frames: list[str] | list[None] | None, pause: int) -> list[Any]:
        glide = {"duration": pause // 2, "easing": "linear"}
        timing = {"frame": {"duration": pause, "redraw": False}, "transition": glide, "mode": "immediate"}
        return [frames, timing | ({"fromcurrent": True} if frames is None else {})]

    quiet = {"bgcolor": "rgba(127,127,127,0.12)", "bordercolor": NEUTRAL, "borderwidth": 1}
    slider = {
        "steps": [{"label": name, "method": "animate", "args": to([name], 0)} for name in names],
        "pad": {"t": 80},
        "currentvalue": {"prefix": "after ", "suffix": f" {unit}", "xanchor": "right"},
    }
    buttons = [
        {"label": "play", "method": "animate", "args": to(None, 500)},
        {"label": "stop", "method": "animate", "args": to([None], 0)},
    ]
    place = {"x": 0, "xanchor": "left", "y": 0, "yanchor": "top", "pad": {"t": 56}}
    menu = {"type": "buttons", "direction": "left", "showactive": False, "buttons": buttons}
    return {"sliders": [slider | quiet], "updatemenus": [menu | place | quiet]}
