"""Planes show what was measured, at the right levels; a moving line has a frame for each look."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from losslab.lecture.claim import Drawing
from losslab.lecture.figures import figure
from losslab.lecture.scenes import Panel, moving, planes
from losslab.report.parts import embed

X, Y = np.linspace(-1, 2, 7), np.linspace(0, 1, 4)
HEIGHTS = 10.0 ** (X[None] + 0 * Y[:, None])


def traces(drawn, kind):
    return [trace for trace in drawn.data if trace.type == kind]


def test_colours_are_logarithmic_where_values_span_decades_and_labels_are_the_values():
    drawn = planes("p", [Panel(X, Y, HEIGHTS)], "loss")
    (relief,) = traces(drawn, "heatmap")
    np.testing.assert_allclose(relief.z, np.log10(HEIGHTS), atol=1e-6)
    np.testing.assert_allclose(relief.customdata, HEIGHTS, rtol=1e-6)
    bar = drawn.layout.coloraxis
    assert (bar.cmin, bar.cmax) == (-1, 2)
    assert list(bar.colorbar.ticktext) == ["0.1", "0.3", "1", "3", "10", "30", "100"]
    lines = traces(drawn, "contour")
    # At the lowest and the highest value there is no line to draw.
    assert [line.contours.start for line in lines] == pytest.approx([0.3, 1, 3, 10, 30])
    assert all(line.contours.showlabels and line.contours.coloring == "none" for line in lines)
    np.testing.assert_allclose(lines[0].z, HEIGHTS, rtol=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "levels"),
    [(0.0, 6.0, range(7)), (-3.0, 3.0, range(-3, 4)), (2.0, 3.1, np.arange(2, 3.1, 0.2))],
)
def test_other_values_have_round_even_levels(low, high, levels):
    heights = np.linspace(low, high, 28).reshape(4, 7)
    bar = planes("p", [Panel(X, Y, heights)], "loss").layout.coloraxis.colorbar
    np.testing.assert_allclose(bar.tickvals, list(levels), atol=1e-12)


def test_what_is_not_finite_is_left_open_and_a_flat_plane_is_drawn():
    heights = HEIGHTS.copy()
    heights[0, :2] = np.inf, np.nan
    (relief,) = traces(planes("p", [Panel(X, Y, heights)], "loss"), "heatmap")
    assert np.isnan(np.asarray(relief.z, dtype=float)).sum() == 2
    drawn = planes("p", [Panel(X, Y, np.ones((4, 7)))], "loss")
    assert len(traces(drawn, "heatmap")) == 1
    assert not traces(drawn, "contour")
    planes("p", [Panel(X, Y, np.full((4, 7), np.nan))], "loss")


def test_places_and_ways_are_named_once():
    panel = Panel(X, Y, HEIGHTS, {"start": (0, 0), "end": (1, 1)}, {"way": [[0, 0], [1, 1]]}, "measured")
    drawn = planes("p", [panel._replace(ways={}, title="imagined"), panel], "loss")
    texts = [note.text for note in drawn.layout.annotations]
    assert texts.count("start") == texts.count("end") == 2
    assert {"imagined", "measured"} <= set(texts)
    twice = planes("p", [panel, panel], "loss")
    assert all([t.name for t in d.data if t.showlegend] == ["way"] for d in (drawn, twice))
    domains = [drawn.layout[axis].domain for axis in ("yaxis", "yaxis2")]
    assert domains[0][0] > domains[1][1]
    assert drawn.layout.yaxis2.scaleanchor == "x2"
    assert json.loads(embed(Drawing(drawn, "c"))["json"])["layout"]["coloraxis"]


def test_a_line_moves_through_all_frames_within_a_fixed_view():
    place = np.tile(np.linspace(0, 1, 3), 3)
    table = pd.DataFrame(
        {"place": place, "loss": [1, 9, 1, 1, 5, 1, 1, 2, 1], "step": np.repeat([10, 0, 2], 3)}
    )
    drawn = figure("band", "place", "loss", log_y=True)
    moving(drawn, table, "place", "loss", "step", "steps")
    assert [frame.name for frame in drawn.frames] == ["0", "2", "10"]
    assert [frame.data[0].y.tolist() for frame in drawn.frames] == [[1, 5, 1], [1, 2, 1], [1, 9, 1]]
    first, last, now = drawn.data
    assert (first.name, last.name) == ("after 0 steps", "after 10 steps")
    assert now.y.tolist() == first.y.tolist() == [1, 5, 1]
    assert all(list(frame.traces) == [2] for frame in drawn.frames)
    low, high = drawn.layout.yaxis.range
    assert low < 0 < np.log10(9) < high
    slider = drawn.layout.sliders[0]
    assert [step.args[0][0] for step in slider.steps] == [frame.name for frame in drawn.frames]
    assert len(json.loads(embed(Drawing(drawn, "c"))["json"])["frames"]) == 3


def test_a_flat_plane_leaves_no_white_space() -> None:
    heights = {}
    for flat in (0.01, 0.4, 1.0, 3.0):
        x, y = np.linspace(-1, 1, 5), np.linspace(-flat, flat, 5)
        drawn = planes("flat", [Panel(x, y, 1 + np.add.outer(y**2, x**2))], "loss")
        assert drawn.layout.yaxis.constraintoward == "top"  # next to its colour bar
        heights[flat] = drawn.layout.height
    assert heights[0.01] < heights[0.4] < heights[1.0] == heights[3.0]
