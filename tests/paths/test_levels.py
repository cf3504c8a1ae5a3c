"""Walks on levels: round a ring, out of a bowl, many together, and what is told of them."""

from __future__ import annotations

import math

import pytest
import torch
from tests.paths.cases import at

from losslab.engine import Points
from losslab.errors import LosslabError
from losslab.paths import Landscape, walk_level
from losslab.tasks import Function, function_task


def _ring(x):
    return (x.square().sum(-1) - 1).square() * 50


def _bowl(x):
    return (x * x * torch.tensor([1.0, 100.0], dtype=x.dtype)).sum(-1) / 2


def landscape(f) -> Landscape:
    box = ((-2.0, 2.0), (-2.0, 2.0))
    function = Function("f", f, 2, (1.0, 0.0), box, ((1.0, 0.0),), (), "tests")
    return Landscape(function_task(function, torch.zeros(2, dtype=torch.float64)))


def heading(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_it_follows_a_ring_to_the_other_side():
    (path,) = walk_level(landscape(_ring), at((1.0, 0.0)), heading((0.0, 3.0)), rise=1e-3, reach=1.95)
    assert path.found
    assert float(path["loss"].max()) <= 1e-3
    x = path.points["x"]
    assert torch.allclose(x.norm(dim=1), torch.ones(len(x), dtype=torch.float64), atol=5e-3)
    assert float((x[-1] - x[0]).norm()) >= 1.95
    assert path.length == pytest.approx(2 * math.asin(1.95 / 2), rel=0.05)
    assert path.points["x"][0].tolist() == [1.0, 0.0]


def test_a_bowl_is_not_left():
    (path,) = walk_level(landscape(_bowl), at((0.0, 0.0)), heading((1.0, 0.0)), rise=0.02, reach=1.0)
    assert not path.found
    assert "stopped short" in path.note
    assert float(path["loss"].max()) <= 0.02 * (1 + 1e-6)
    away = float(path.points["x"].norm(dim=1).max())
    assert 0.9 * math.sqrt(0.04) < away <= math.sqrt(0.04) + 1e-9


def test_walkers_do_not_feel_each_other():
    starts, ways = at((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)), heading((0.0, 1.0), (1.0, 0.0), (0.0, -1.0))
    where = landscape(_ring)
    options = {"rise": 1e-3, "steps": 60}
    together = walk_level(where, starts, ways, reach=[0.5, 1.5, 1.0], **options)
    (alone,) = walk_level(where, starts.select([1]), ways[[1]], reach=1.5, **options)
    torch.testing.assert_close(alone.frame["x"], together[1].frame["x"], rtol=1e-12, atol=1e-12)
    assert [path.found for path in together] == [True] * 3
    assert together[0].length < together[2].length < together[1].length


@pytest.mark.parametrize("low", [-1e6, -1e3, 1e6])
def test_the_level_is_kept_to_the_rise_and_not_to_the_loss(low):
    options = {"rise": 1e-3, "reach": 1.95}
    ring = landscape(lambda x: _ring(x) + low)
    (path,) = walk_level(ring, at((1.0, 0.0)), heading((0.0, 3.0)), **options)
    assert path.found
    ridge = landscape(lambda x: low + 0.5 * torch.exp(-((x[..., 0] - 1.03) / 0.002).square()))
    (path,) = walk_level(ridge, at((1.0, 0.0)), heading((1.0, 0.0)), rise=1e-3, reach=0.5, between=30)
    assert float(path["loss"].max()) - low > 0.3
    assert not path.found
    assert "above the level" in path.note


def test_few_strides_are_told():
    (path,) = walk_level(landscape(_ring), at((1.0, 0.0)), heading((0.0, 1.0)), rise=1e-3, reach=1.9, steps=3)
    assert not path.found
    assert path.note.startswith("3 strides")


def test_the_points_given_stay_where_they_are():
    points = at((1.0, 0.0))
    walk_level(landscape(_ring), points, heading((0.0, 1.0)), rise=1e-3, reach=0.5)
    assert points["x"].tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"headings": torch.zeros(1, 2)}, "zero or not finite"),
        ({"headings": torch.ones(2, 2)}, "shape"),
        ({"rise": 0.0}, "rise"),
        ({"reach": -1.0}, "reach"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_input(change, told):
    settings = {"headings": heading((0.0, 1.0)), "rise": 0.1, "reach": 1.0} | change
    with pytest.raises(LosslabError, match=told):
        walk_level(landscape(_ring), Points({"x": heading((1.0, 0.0))}, {}), **settings)
