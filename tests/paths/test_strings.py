"""Dynamic String Sampling: certificates that hold, and failures that say so."""

from __future__ import annotations

import math

import pytest
import torch
from tests.paths.cases import at, bent, bent_task, trained

from losslab.errors import LosslabError
from losslab.paths import Landscape, Slopes, straight, strings
from losslab.rules import make
from losslab.tasks import Task, function_task, rosenbrock


def rosenbrock_task() -> Task:
    return function_task(rosenbrock, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("split", ["top", "middle"])
def test_it_follows_the_valley_of_rosenbrock(split):
    task = rosenbrock_task()
    ends = at((-1.0, 1.0), (1.0, 1.0))
    (line,) = straight(Landscape(task), ends, [(0, 1)])
    assert float(line.barrier().highest) > 100
    rule = make("sgd", lr=1e-3)
    (path,) = strings(
        Slopes(task), Landscape(task), ends, [(0, 1)], level=6.0, rule=rule, split=split, steps=2000
    )
    assert path.found
    assert float(path["loss"].max()) <= 6.0
    x = path.frame["x"]
    assert torch.allclose(x[:, 1], x[:, 0] ** 2, atol=0.3)
    assert path.normalised_length > 1.2
    assert f"{len(x) - 2} beads" in path.note
    assert f"{len(path.t)} points" in path.note


def test_a_level_below_the_pass_is_not_found_and_one_above_is():
    slopes, landscape = Slopes(bent_task()), Landscape(bent_task())
    options = {"rule": make("sgd", lr=0.01), "steps": 400}
    for level, wanted in ((0.7, False), (1.3, True)):
        (path,) = strings(slopes, landscape, at(*bent.minima), [(0, 1)], level=level, **options)
        assert path.found is wanted
        assert (float(path["loss"].max()) <= level) is wanted
        assert path.note.startswith("not found") is not wanted


def test_a_finer_look_at_the_certificate_agrees():
    slopes, landscape = Slopes(bent_task()), Landscape(bent_task())
    (path,) = strings(slopes, landscape, at(*bent.minima), [(0, 1)], level=1.3, rule=make("sgd", lr=0.01))
    beads = path.frame["x"]
    for i in range(len(beads) - 1):
        t = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None]
        assert float(bent.f((1 - t) * beads[i] + t * beads[i + 1]).max()) < 1.35
    assert path.length == pytest.approx(
        sum(math.dist(*beads[i : i + 2].tolist()) for i in range(len(beads) - 1))
    )


def test_networks_are_connected_many_pairs_together():
    population = trained()
    landscape = Landscape.of(population, ["train"])
    pairs = [(0, 1), (2, 3), (0, 2)]
    slopes = Slopes(population.task, execution="stacked")
    options = {"level": [0.2, 0.2, 0.15], "rule": make("sgd", lr=0.3), "steps": 400}
    paths = strings(slopes, landscape, population.points, pairs, **options)
    lines = straight(landscape, population.points, pairs)
    for path, line, level in zip(paths, lines, options["level"], strict=True):
        assert path.found
        assert float(path["train_loss"].max()) <= level < float(line["train_loss"].max())
        assert torch.equal(path.points.matrix()[[0, -1]], line.points.matrix()[[0, -1]])
    (alone,) = strings(slopes, landscape, population.points, [(2, 3)], **options | {"level": 0.2})
    torch.testing.assert_close(alone.frame.matrix(), paths[1].frame.matrix(), rtol=1e-9, atol=1e-11)


def test_a_bead_that_does_not_get_down_is_told():
    population = trained()
    slopes, landscape = Slopes(population.task), Landscape.of(population)
    (path,) = strings(
        slopes, landscape, population.points, [(0, 1)], level=0.2, rule=make("sgd", lr=1e-6), steps=20
    )
    assert not path.found
    assert "did not get down" in path.note
    (path,) = strings(slopes, landscape, population.points, [(0, 1)], level=0.2, depth=0)
    assert "halved 0 times" in path.note


def test_an_end_that_is_lost():
    points = at((-1.0, 0.0), (float("nan"), 0.0), (1.0, 0.0))
    options = {"level": 1.3, "rule": make("sgd", lr=0.01)}
    lost, good = strings(Slopes(bent_task()), Landscape(bent_task()), points, [(0, 1), (0, 2)], **options)
    assert (lost.found, good.found) == (False, True)
    assert "not finite" in lost.note


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"level": -1.0}, "above the level"),
        ({"level": [1.0, 2.0]}, "2 levels"),
        ({"alpha": 1.0}, "alpha"),
        ({"split": "bottom"}, "split"),
        ({"pairs": [(0, 5)]}, "names no two"),
    ],
)
def test_bad_input(options, told):
    settings = {"pairs": [(0, 1)], **options}
    with pytest.raises(LosslabError, match=told):
        strings(Slopes(bent_task()), Landscape(bent_task()), at(*bent.minima), **settings)
