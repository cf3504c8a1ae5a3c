"""Figures of slices and paths: what is drawn, and what is not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.paths.cases import at, bent, bent_task, trained

from losslab.paths import (
    Cycle,
    Landscape,
    Slopes,
    auto_bands,
    connect,
    ensemble_errors,
    measure_slice,
    random_slice,
    straight,
    through,
)
from losslab.report.landscapes import draw_ensembles, draw_grid, draw_paths, draw_settling
from losslab.report.parts import embed


def test_a_line_is_drawn_with_its_networks():
    population = trained()
    line = through(population, [0, 1])
    grid = measure_slice(Landscape.of(population), line, torch.linspace(0, 1, 7))
    loss, error = draw_grid(grid)
    assert [trace.name for trace in loss.figure.data][:2] == ["Train loss", "Test loss"]
    np.testing.assert_allclose(loss.figure.data[0].y, grid["train_loss"].numpy())
    assert len(loss.figure.data[2].x) == 2  # the networks, as dots
    assert error.figure.layout.title.text == "Error"


@pytest.mark.parametrize(
    "slice_of", [lambda p: through(p, [0, 1, 2]), lambda p: random_slice(p.points.select([0]))]
)
def test_a_plane_is_drawn_as_contours_and_as_a_surface(slice_of):
    population = trained()
    grid = measure_slice(Landscape.of(population), slice_of(population), *[torch.linspace(-9, 9, 5)] * 2)
    drawings = draw_grid(grid, torch.zeros(3, 2, dtype=torch.float64))
    assert len(drawings) == len(grid.values) + 1
    kinds = [trace.type for trace in drawings[0].figure.data]
    assert kinds[0] == "heatmap"
    assert drawings[0].figure.layout.coloraxis.colorbar.title.text == "train loss"
    surface = drawings[-1].figure.data[0]
    assert surface.type == "surface"
    assert np.asarray(surface.z).shape == (5, 5)
    assert all(embed(drawing)["json"] for drawing in drawings)


def test_the_surface_has_its_axes_the_right_way_round():
    plane = through(at((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)))  # x and y themselves
    x, y = torch.linspace(-1, 1, 4), torch.linspace(0, 2, 3)
    grid = measure_slice(Landscape(bent_task()), plane, x, y)
    contours, surface = draw_grid(grid)
    wanted = [[float(bent.f(torch.tensor([a, b]))) for a in x] for b in y]
    np.testing.assert_allclose(contours.figure.data[0].customdata, wanted, rtol=1e-5)
    assert {trace.type for trace in contours.figure.data[1:]} >= {"contour"}
    top = np.quantile(wanted, 0.99)
    np.testing.assert_allclose(surface.figure.data[0].z, np.minimum(wanted, top), rtol=1e-5)


def test_what_is_not_finite_leaves_holes():
    plane = through(at((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)))
    axis = torch.tensor([0.0, 1.0, float("nan"), 1e200], dtype=torch.float64)
    grid = measure_slice(Landscape(bent_task()), plane, axis, axis)
    contours, surface = draw_grid(grid)
    assert np.isnan(np.asarray(contours.figure.data[0].z, dtype=float)).sum() > 0
    heights = np.asarray(surface.figure.data[0].z, dtype=float)
    assert np.isnan(heights[2]).all()
    assert np.isfinite(heights[0, 3])  # infinite, at the ceiling


def test_paths_have_one_colour_a_method():
    population = trained()
    landscape = Landscape.of(population)
    found = {}
    for method in ("linear", "bezier"):
        paths = connect(population, [(0, 1), (0, 2)], method=method, steps=5, count=9)
        found |= {(pair, method): path for pair, path in zip(("0 to 1", "0 to 2"), paths, strict=True)}
    drawings = draw_paths(found)
    assert len(drawings) == 4
    assert [trace.name for trace in drawings[0].figure.data] == ["linear", "bezier"]
    assert len(drawings[0].figure.data[0].x) == 2 * (9 + 1)
    (line,) = straight(landscape, population.points, [(0, 1)], 9)
    np.testing.assert_allclose(drawings[0].figure.data[0].y[:9], line["train_loss"].numpy())


def test_the_band_settles_frame_by_frame():
    task = bent_task()
    (path,) = auto_bands(
        Slopes(task), Landscape(task), at(*bent.minima), [(0, 1)], cycles=[Cycle(20, 0.01)] * 2, looks=(0, 5)
    )
    drawn = draw_settling("0 to 1", path).figure
    assert len(drawn.frames) == 4
    np.testing.assert_allclose(drawn.frames[-1].data[0].y, path.stages[-1].losses)
    assert len(drawn.layout.sliders[0].steps) == 4


def test_ensembles_are_drawn_beside_the_networks_alone():
    landscape = Landscape.of(trained(), ["test"])
    (path,) = straight(landscape, trained().points, [(0, 1)], 5)
    (drawing,) = draw_ensembles("0 to 1", path, ensemble_errors(landscape, path))
    assert drawing.figure.data[0].name == "the network alone"
    np.testing.assert_allclose(drawing.figure.data[0].y, path["test_error"])
