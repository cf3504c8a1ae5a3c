"""Figures of the loss along its gradient, through training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from losslab.lecture.claim import Drawing
from losslab.lecture.figures import figure, lines, spread

if TYPE_CHECKING:
    import pandas as pd

SPREAD = "Medians and 80 % of the members."

PANELS = (
    (
        "raw",
        "variation",
        "Variation of the loss",
        "range of the loss",
        "The range of the loss over raw steps, rate times gradient.",
    ),
    (
        "relative",
        "variation",
        "Variation over relative steps",
        "range of the loss",
        "The same over steps measured by the length of the weights, which do not see their scale.",
    ),
    (
        "raw",
        "first_order_error",
        "Error of the first-order model",
        "relative error",
        "How wrong the slope is about the loss after a raw step, in units of the decrease it promises; "
        "from 1 on it promises nothing.",
    ),
    (
        "raw",
        "beta",
        "Effective smoothness",
        "max ‖Δg‖ / ‖Δθ‖",
        "The largest change of the gradient per distance: along this line, plain gradient descent with a "
        "rate above 2 over this number may overshoot.",
    ),
)


def draw_smoothness(summary: pd.DataFrame) -> list[Drawing]:
    """The figures of a recorded run.

    Args:
        summary: As `SmoothnessRecorder.summary` gives it, with a column ``arm``.
    """
    trained = summary[summary["mode"] == "batch"]
    drawings = [_along(trained[trained["kind"] == "raw"])]
    for kind, column, title, axis, caption in PANELS:
        rows = trained[trained["kind"] == kind]
        drawings.append(_panel(rows, column, title, axis, f"{caption} {SPREAD}"))
    return drawings


def _along(rows: pd.DataFrame) -> Drawing:
    drawn = figure("Loss along the gradient", "updates", "loss")
    for arm, mine in rows.groupby("arm", sort=False):
        middle = mine.groupby("updates")[["loss", "low", "high"]].median().reset_index()
        finite = middle[np.isfinite(middle.to_numpy()).all(axis=1)]
        lines(drawn, finite, "updates", "loss", band=("low", "high"), name=str(arm))
    return Drawing(
        drawn,
        "The loss of the probed batch (line), and the lowest and the highest value on the way down its own "
        "gradient (band; medians over members).",
    )


def _panel(rows: pd.DataFrame, column: str, title: str, axis: str, caption: str) -> Drawing:
    drawn = figure(title, "updates", axis, log_y=True)
    for arm, mine in rows.groupby("arm", sort=False):
        sound = mine[np.isfinite(mine[column]) & (mine[column] > 0)]
        if len(sound):
            shown = spread(sound, ["updates"], column)
            mode = "lines" if len(shown) > 1 else "markers"
            lines(drawn, shown, "updates", "middle", band=("low", "high"), mode=mode, name=str(arm))
    return Drawing(drawn, caption)


__all__ = ["draw_smoothness"]
