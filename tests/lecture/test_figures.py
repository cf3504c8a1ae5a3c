"""The shapes figures take: what they show, how they thin, and that every series has its own look."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from losslab.lecture import figures


def long_table(points: int, series: int = 1) -> pd.DataFrame:
    steps = np.tile(np.arange(1, points + 1), series)
    loss = 1 / np.sqrt(steps)
    rule = np.repeat([f"rule {index}" for index in range(series)], points)
    return pd.DataFrame({"step": steps, "loss": loss, "low": loss / 2, "high": loss * 2, "rule": rule})


def test_every_series_has_its_own_look_and_its_band_the_same_colour() -> None:
    drawn = figures.figure("loss", "step", "loss", log_y=True)
    figures.lines(drawn, long_table(3, series=9), "step", "loss", by="rule", band=("low", "high"))
    named = [trace for trace in drawn.data if trace.name]
    assert [trace.name for trace in named] == [f"rule {index}" for index in range(9)]
    assert len({(trace.line.color, trace.line.dash) for trace in named}) == 9
    bands = [trace for trace in drawn.data if trace.fill == "toself"]
    assert [band.fillcolor for band in bands[:2]] == [figures.colour(0, 0.18), figures.colour(1, 0.18)]
    assert bands[0].y.tolist() == pytest.approx([2, 2 / 2**0.5, 2 / 3**0.5, 0.5 / 3**0.5, 0.5 / 2**0.5, 0.5])
    assert drawn.layout.yaxis.type == "log"


@pytest.mark.parametrize("log_x", [False, True])
def test_thin_keeps_ends_spikes_and_gaps(log_x: bool) -> None:
    table = long_table(100_000)
    table.loc[54_321, "loss"] = 50.0
    table.loc[77_777, "loss"] = -50.0
    table.loc[20_000:21_000, "loss"] = np.nan
    drawn = figures.figure("loss", "step", "loss", log_x=log_x)
    figures.lines(drawn, table, "step", "loss", band=("low", "high"))
    figures.thin(drawn)
    line = drawn.data[-1]
    assert all(len(trace.y) == len(trace.x) <= figures.POINTS for trace in drawn.data)
    assert (line.x[0], line.x[-1]) == (1, 100_000)
    assert (np.nanmax(line.y), np.nanmin(line.y)) == (50.0, -50.0)
    assert (np.diff(line.x) > 0).all()
    assert np.isnan(line.y[(line.x > 20_001) & (line.x < 21_001)]).any()
    early = (line.x <= 100).sum()
    assert early > 50 if log_x else early < 20


def test_thin_leaves_short_lines_alone() -> None:
    drawn = figures.figure("loss", "step", "loss")
    figures.lines(drawn, long_table(figures.POINTS), "step", "loss")
    assert len(figures.thin(drawn).data[0].y) == figures.POINTS


def test_contours_show_the_grid_and_every_path() -> None:
    x, y = np.linspace(-2, 2, 201), np.linspace(-1, 1, 101)
    heights = x[None] ** 2 - y[:, None] ** 2
    path = np.array([[1.0, 0.5], [0.5, 0.2], [np.nan, np.nan]])
    drawn = figures.contours_with_paths("saddle", x, y, heights, {"GD": path, "SGD": path[:1]})
    contour, *traces = drawn.data
    assert contour.z.size <= figures.POINTS
    assert contour.z.shape == (contour.y.size, contour.x.size)
    column = np.flatnonzero(x == contour.x[3])[0]
    assert contour.z[2, 3] == heights[np.flatnonzero(y == contour.y[2])[0], column]
    assert list(drawn.layout.xaxis.range) == [-2, 2]
    assert [trace.name for trace in traces if trace.name] == ["GD", "SGD"]
    start, end = traces[1], traces[2]
    assert (start.x[0], start.y[0], end.x[0], end.y[0]) == (1.0, 0.5, 0.5, 0.2)


def test_contours_of_a_wide_range_are_logarithmic() -> None:
    grid = np.linspace(-1, 1, 11)
    heights = 10.0 ** np.add.outer(grid, grid)
    drawn = figures.contours_with_paths("valley", grid, grid, heights, {}, log=True)
    assert np.isfinite(drawn.data[0].z).all()
    assert drawn.data[0].z.max() == pytest.approx(np.log10(heights.max() - heights.min()))


def test_intervals_reach_from_low_to_high() -> None:
    drawn = figures.figure("times", "steps", "rule")
    figures.intervals(drawn, ["a", "b"], [2.0, 5.0], [1.0, 3.0], [4.0, 9.0])
    (trace,) = drawn.data
    assert (trace.x - trace.error_x.arrayminus).tolist() == [1.0, 3.0]
    assert (trace.x + trace.error_x.array).tolist() == [4.0, 9.0]


@pytest.mark.parametrize(("axis", "log", "at"), [("y", False, 100), ("y", True, 2), ("x", True, 2)])
def test_reference_puts_line_and_label_at_the_value(axis: str, log: bool, at: float) -> None:
    drawn = figures.figure("loss", "step", "loss", log_x=log, log_y=log)
    figures.reference(drawn, 100, "limit", axis)
    assert drawn.layout.shapes[0][f"{axis}0"] == 100
    assert drawn.layout.annotations[0][axis] == at


def test_ridgelines_stand_on_their_level_in_their_panel() -> None:
    rng = np.random.default_rng(0)
    rows = [
        pd.DataFrame(
            {"value": rng.normal(epoch if arm == "b" else 0.0, 1.0, 400), "epoch": epoch, "arm": arm}
        )
        for arm in ("a", "b")
        for epoch in (1, 5)
    ]
    table = pd.concat([*rows, pd.DataFrame({"value": [np.inf], "epoch": 1, "arm": "a"})])
    drawn = figures.ridgelines("drift", table, "value", "epoch", "arm", "input", "epoch")
    ridges = {trace.name: trace for trace in drawn.data}
    assert list(ridges) == ["a, 5", "a, 1", "b, 5", "b, 1"]  # the lower ridge is drawn last, in front
    assert {name: trace.xaxis for name, trace in ridges.items()} == {
        "a, 5": "x", "a, 1": "x", "b, 5": "x2", "b, 1": "x2"
    }  # fmt: skip
    assert drawn.layout.xaxis.domain[1] < drawn.layout.xaxis2.domain[0]
    assert list(drawn.layout.yaxis.ticktext) == ["1", "5"]
    for name, peak in (("a, 1", 0.0), ("a, 5", 0.0), ("b, 1", 1.0), ("b, 5", 5.0)):
        trace = ridges[name]
        level = 0 if name.endswith("1") else 1
        assert trace.y.min() == level
        assert trace.x[np.argmax(trace.y)] == pytest.approx(peak, abs=0.4)
        half = trace.x.size // 2
        area = np.trapezoid(trace.y[:half] - level, trace.x[:half])
        assert area / (trace.y.max() - level) == pytest.approx(np.sqrt(2 * np.pi), rel=0.2)  # of a normal


def test_bars_stand_side_by_side() -> None:
    drawn = figures.figure("share", "rule", "share")
    figures.bars(drawn, ["a", "b"], [1, 2], name="first")
    figures.bars(drawn, ["a", "b"], [2, 1], name="second")
    assert [bar.marker.color for bar in drawn.data] == list(figures.PALETTE[:2])


def luminance(code: str) -> float:
    channels = np.array([int(code[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("code", figures.PALETTE)
def test_palette_is_legible_on_light_and_dark(code: str) -> None:
    assert 1.05 / (luminance(code) + 0.05) > 2.8
    assert (luminance(code) + 0.05) / (luminance("#14171b") + 0.05) > 2.8
