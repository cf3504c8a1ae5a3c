"""Figures of what flows through a network: by depth, by value, through training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from losslab.lecture.claim import Drawing
from losslab.lecture.figures import NEUTRAL, bars, colour, figure, lines, reference, spread
from losslab.signals import Histogram, Recorder, SignalTable

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

LEAST = 0.005
"""The smallest share that is drawn."""

RIDGES = 16
"""The most layers whose distributions are drawn."""


def draw_signals(seen: SignalTable, recorder: Recorder | None = None) -> list[Drawing]:
    """The figures of one look, and of the way there if it was recorded."""
    table = seen.by_member
    drawings = [_forward(seen, table), *_backward(seen, table)]
    drawings.append(_ridges("Distribution of each layer's outputs", seen, "forward", "output"))
    drawings += [*_jacobians(seen), *_silent(table)]
    if recorder is not None and len(recorder.steps) > 1:
        drawings += _through_training(recorder)
    return drawings


def _forward(seen: SignalTable, table: pd.DataFrame) -> Drawing:
    drawn = figure("Signals by depth", "layer", "standard deviation", log_y=True)
    rows = table[(table.direction == "forward") & (table.layer != "input")]
    _by_depth(drawn, rows.assign(kind="all values"), "std")
    _by_depth(drawn, rows[rows.unit_std > 0].assign(kind="a unit, over examples"), "unit_std")
    return Drawing(
        drawn,
        "Standard deviation of each layer's outputs. Where a unit's own variation over examples falls far "
        f"below that of all values, examples can no longer be told apart.{_theory(drawn, seen, 'forward')}",
    )


def _backward(seen: SignalTable, table: pd.DataFrame) -> list[Drawing]:
    rows = table[table.direction == "backward"]
    if rows.empty:
        return []
    drawn = figure("Gradients by depth", "layer", "standard deviation", log_y=True)
    _by_depth(drawn, rows[rows["std"] > 0].assign(kind="d loss / d output"), "std")
    told = _theory(drawn, seen, "backward")
    return [
        Drawing(
            drawn,
            "Standard deviation of the gradient with respect to each layer's outputs. A line that falls "
            f"towards the left means first layers that hardly learn.{told}",
        )
    ]


def _by_depth(drawn: Figure, rows: pd.DataFrame, value: str) -> None:
    if rows.empty:
        return
    told = spread(rows, ["kind", "layer"], value)
    many = rows.member.nunique() > 1
    band = ("low", "high") if many else None
    lines(drawn, told, "layer", "middle", by="kind", band=band, mode="lines+markers")
    drawn.update_xaxes(type="category")


def _theory(drawn: Figure, seen: SignalTable, direction: str) -> str:
    if seen.prediction is None:
        return ""
    told = {layer: std for (layer, way), std in seen.prediction.std.items() if way == direction and std > 0}
    order = [layer for layer in seen.layers if layer in told]
    if not order:
        return ""
    drawn.add_scatter(
        x=order,
        y=[told[layer] for layer in order],
        mode="lines",
        name="mean field",
        line={"color": NEUTRAL, "dash": "dash", "width": 1.5},
    )
    return " Dashes: mean-field theory for random weights of these variances."


def _ridges(title: str, seen: SignalTable, direction: str, x_title: str) -> Drawing:
    found = {layer: h for (layer, way), h in seen.histograms.items() if way == direction}
    kept = dict(list(found.items())[:RIDGES])
    drawn = figure(title, x_title, "layer")
    low, high = _view(kept)
    for place, (layer, histogram) in reversed(list(enumerate(kept.items()))):
        middles = (histogram.edges[1:] + histogram.edges[:-1]).cpu().numpy() / 2
        density = histogram.density.double().nanmean(0).cpu().numpy()
        inside = (middles >= low) & (middles <= high)
        if not inside.any():
            continue
        x, height = middles[inside], np.sqrt(density[inside])  # a spike would hide everything else
        top = height.max() or 1.0
        drawn.add_scatter(
            x=np.r_[x, x[::-1]],
            y=np.r_[place + 0.95 * height / top, np.full(x.size, place)],
            fill="toself",
            fillcolor=colour(0, 0.35),
            line={"color": colour(0), "width": 1},
            mode="lines",
            name=f"{layer} ({seen.layers[layer].kind})",
            showlegend=False,
            hoverinfo="name",
        )
    names = [f"{layer} {seen.layers[layer].kind}" for layer in kept]
    drawn.update_yaxes(tickvals=list(range(len(kept))), ticktext=names, range=[-0.2, len(kept) + 0.1])
    drawn.update_xaxes(range=[low, high], zeroline=True)
    drawn.update_layout(height=max(380, 40 * len(kept) + 120))
    left_out = f" The first {RIDGES} of {len(found)} layers." if len(found) > RIDGES else ""
    return Drawing(
        drawn,
        "From the first layer (below) to the last: the square root of the density of all outputs, each ridge "
        f"scaled to its own height.{left_out}",
    )


def _view(histograms: Mapping[str, Histogram]) -> tuple[float, float]:
    """Where 99 % of the values of each layer lie; of a layer 20 times as wide as usual, a part."""
    ends = []
    for histogram in histograms.values():
        share = histogram.counts.double().sum(0).cumsum(0)
        reached = (share / share[-1].clamp(min=1)).cpu().numpy()
        edges = histogram.edges.cpu().numpy()
        last = min(int(np.searchsorted(reached, 0.995)) + 1, len(edges) - 1)
        ends.append((edges[int(np.searchsorted(reached, 0.005))], edges[last]))
    lows, highs = np.array(ends).T
    low, high = float(lows.min()), float(highs.max())
    if high - low > 20 * float(np.median(highs - lows)):
        low, high = float(np.quantile(lows, 0.25)), float(np.quantile(highs, 0.75))
    return (low, high) if high > low else (low - 1.0, high + 1.0)


def _jacobians(seen: SignalTable) -> list[Drawing]:
    if not seen.jacobians:
        return []
    drawn = figure("Layer Jacobians", "index of the singular value", "singular value", log_y=True)
    for index, ((source, target), values) in enumerate(seen.jacobians.items()):
        middle = values.flatten(0, 1).double().nanmedian(0).values.cpu().numpy()
        positive = middle > 0
        drawn.add_scatter(
            x=np.arange(1, middle.size + 1)[positive],
            y=middle[positive],
            mode="lines",
            name=f"{source} → {target}",
            showlegend=True,
            meta="series",
            line={"color": colour(index), "width": 2},
        )
    if max((values.shape[-1] for values in seen.jacobians.values()), default=0) <= 10:
        drawn.update_xaxes(dtick=1)
    reference(drawn, 1.0, "size kept")
    return [
        Drawing(
            drawn,
            "Singular values from each layer to the next, in the middle over members and a few examples. "
            "Directions above 1 are stretched, those below fade; a line that ends early has lost the rest.",
        )
    ]


def _silent(table: pd.DataFrame) -> list[Drawing]:
    rows = table[table.direction == "forward"].groupby("layer", sort=False)[["saturated", "dead"]].median()
    rows = rows[rows.dead.notna()]
    if rows.empty or not rows.max().max() > LEAST:
        return []
    drawn = figure("Saturated and dead", "layer", "share")
    if rows.saturated.notna().any():
        bars(drawn, list(rows.index), rows.saturated.fillna(0.0).to_numpy(), name="saturated values")
    bars(drawn, list(rows.index), rows.dead.to_numpy(), name="dead units")
    drawn.update_xaxes(type="category")
    drawn.update_yaxes(range=[0, 1])
    return [
        Drawing(
            drawn,
            "Saturated: values in the flat part of the activation. Dead: units that pass no gradient for any "
            "of the examples.",
        )
    ]


def _through_training(recorder: Recorder) -> list[Drawing]:
    table = recorder.table
    weights = table[(table.direction == "weight")]
    forward, backward = (table[table.direction == way] for way in ("forward", "backward"))
    chosen = weights.layer.unique()
    drawings = []
    for title, rows, value, y_title, told in (
        (
            "Signals through training",
            forward[forward.layer.isin(chosen)],
            "std",
            "standard deviation",
            "Outputs of the layers with weights; a drifting scale is what batch norm takes away.",
        ),
        (
            "Gradients through training",
            backward[backward.layer.isin(chosen)],
            "std",
            "standard deviation",
            "Gradients with respect to the outputs of the layers with weights.",
        ),
        (
            "Update-to-weight ratio",
            weights,
            "update_ratio",
            "||update|| / ||weight||",
            "How far one update moves each weight, relative to its size. Far below the dashes a layer hardly "
            "learns, far above it forgets.",
        ),
    ):
        if value not in rows or not (rows := rows[rows[value] > 0]).size:
            continue
        drawn = figure(title, "step", y_title, log_y=True)
        lines(drawn, spread(rows, ["layer", "step"], value), "step", "middle", by="layer")
        if value == "update_ratio":
            reference(drawn, 1e-3, "0.001")
        drawings.append(Drawing(drawn, told))
    return drawings
