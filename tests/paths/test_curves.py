"""Curves: their ends, their bases, one alone and many together, and what lies along them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tests.paths.cases import at, bent_task, blobs, trained

from losslab.engine import Points
from losslab.errors import LosslabError
from losslab.paths import Landscape, Slopes, straight, train_curves, walk_curves
from losslab.paths.curves import BASES, Curve, _keys, _strata
from losslab.rules import make
from losslab.tasks import double_well, function_task

EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_bases_are_shares_and_end_at_the_ends(kind, count):
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    basis = BASES[kind](t, count)
    torch.testing.assert_close(basis.sum(1), torch.ones(33, dtype=torch.float64), **EXACT)
    assert (basis >= 0).all()
    for row, place in ((0, 0), (-1, count - 1)):
        assert basis[row].tolist() == [float(j == place) for j in range(count)]
    for i, s in enumerate(t.tolist()):
        if kind == "bezier":
            wanted = [math.comb(count - 1, j) * s**j * (1 - s) ** (count - 1 - j) for j in range(count)]
        else:
            wanted = [max(0.0, 1 - abs(s * (count - 1) - j)) for j in range(count)]
        assert basis[i].tolist() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("bends", [1, 3])
def test_the_ends_of_a_curve_are_its_minima_bit_for_bit(kind, bends, batch_norm):
    population = trained(batch_norm)
    slopes = Slopes(population.task, batch_size=32)
    (curve,) = train_curves(slopes, population.points, [(2, 0)], kind=kind, bends=bends, steps=3)
    ends = curve.at(torch.tensor([0.0, 1.0]))
    for name, tensor in population.points.items():
        assert torch.equal(ends[name], tensor[[2, 0]]), name
    for policy in ("re-estimate", "running"):
        landscape = Landscape.of(population, batch_norm=policy)
        (path,) = walk_curves(landscape, [curve], 5)
        wanted = landscape(population.points)
        for name in path.values:
            assert path[name][[0, -1]].tolist() == pytest.approx(wanted[name][[2, 0]].tolist(), rel=1e-9)


def test_running_statistics_of_the_ends_give_the_trained_networks_own_numbers():
    population = trained(True)
    (path,) = straight(
        Landscape.of(population, ["test"], batch_norm="running"), population.points, [(0, 3)], 3
    )
    x, y = population.task.test.to(dtype=torch.float64).all()
    for place, member in ((0, 0), (-1, 3)):
        with torch.no_grad():
            loss = F.cross_entropy(population[member](x), y)
        assert float(path["test_loss"][place]) == pytest.approx(float(loss), rel=1e-9)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_pairs_trained_together_are_those_trained_alone(kind, batch_norm):
    population = trained(batch_norm)
    options = {"kind": kind, "bends": 2, "steps": 5, "samples": 3, "seed": 4}
    pairs = [(0, 1), (1, 2), (0, 3)]

    def curves(pairs):
        slopes = Slopes(population.task, 32, seed=1, weight_decay=0.01, execution="stacked")
        return train_curves(slopes, population.points, pairs, rule=make("sgd", lr=0.1), **options)

    together = curves(pairs)
    for pair, curve in zip(pairs, together, strict=True):
        (alone,) = curves([pair])
        torch.testing.assert_close(curve.control.matrix(), alone.control.matrix(), **EXACT)
        torch.testing.assert_close(curve.history, alone.history, **EXACT)


def test_one_step_against_a_loop():
    population = trained()
    task, points = population.task, population.points
    slopes = Slopes(task, 16, seed=2, weight_decay=0.1)
    (curve,) = train_curves(
        slopes, points, [(0, 1)], bends=2, rule=make("sgd", lr=1.0), steps=1, samples=4, seed=9
    )
    t = _strata(_keys(9, [(0, 1)]), 0, 4)[0]
    assert [int(4 * s) for s in t] == [0, 1, 2, 3]  # one in each quarter
    index = slopes.batches.at(0)
    x, y = task.train.to(dtype=torch.float64).take(index)
    ends = points.matrix()[:2]
    theta = [((1 - s) * ends[0] + s * ends[1]).requires_grad_() for s in (1 / 3, 2 / 3)]
    total = 0.0
    for s in t.tolist():
        weights = [max(0.0, 1 - abs(3 * s - j)) for j in range(4)]
        control = [ends[0], *theta, ends[1]]
        here = sum(w * c for w, c in zip(weights, control, strict=True))
        named = {n: w[0] for n, w in points.at(here[None]).weights.items()}
        module = copy.deepcopy(population[0])
        z = torch.func.functional_call(module, named, (x,))
        total = total + (F.cross_entropy(z, y) + 0.05 * here.square().sum()) / 4
    total.backward()
    for k, bend in enumerate(theta):
        torch.testing.assert_close(curve.control.matrix()[1 + k], bend.detach() - bend.grad, **EXACT)


def test_a_trained_curve_goes_around_the_barrier():
    population = trained()
    landscape = Landscape.of(population)
    pairs = [(0, 1), (2, 3)]
    lines = straight(landscape, population.points, pairs)
    slopes = Slopes(population.task, 32)
    for kind in BASES:
        rule = make("adam", lr=0.02)
        curves = train_curves(slopes, population.points, pairs, kind=kind, rule=rule, steps=200)
        for line, path in zip(lines, walk_curves(landscape, curves), strict=True):
            assert path.barrier("train_loss").over_chord < 0.3 * line.barrier("train_loss").over_chord
            assert path.normalised_length > 1.02
            assert line.normalised_length == pytest.approx(1.0)


def test_lengths_barriers_and_tables_of_a_path():
    landscape = Landscape(bent_task())
    control = at((-1.0, 0.0), (0.0, 1.0), (1.0, 0.0))
    (path,) = walk_curves(landscape, [Curve("polychain", control)], 5)
    assert path.length == pytest.approx(2 * math.sqrt(2))
    assert path.normalised_length == pytest.approx(math.sqrt(2))
    assert path.places.tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert float(path.barrier().over_chord) == pytest.approx(1.0)
    assert float(path.barrier().chord_place) == pytest.approx(0.5)
    assert path.summary["loss_barrier"] == path.summary["loss_over_mean"] == pytest.approx(1.0)
    assert list(path.table.columns) == ["t", "place", "loss"]
    torch.testing.assert_close(path.points["x"][2], torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_a_path_through_nan_says_so_and_disturbs_no_other():
    population = trained()
    points = population.points.clone()
    points.weights["0.bias"][1] = float("nan")
    landscape = Landscape.of(population)
    broken, whole = straight(landscape, points, [(0, 1), (0, 2)], 5)
    assert broken["train_loss"].isnan().tolist() == [False, True, True, True, True]
    assert broken.barrier().over_chord.isnan()
    assert torch.isfinite(whole["train_loss"]).all()
    slopes = Slopes(population.task, 32)
    lost, good = train_curves(slopes, points, [(0, 1), (0, 2)], steps=3)
    (alone,) = train_curves(slopes, points, [(0, 2)], steps=3)
    assert lost.history.isnan().all()
    torch.testing.assert_close(good.control.matrix(), alone.control.matrix(), **EXACT)


def test_a_curve_of_a_task_without_data():
    task = function_task(double_well)
    minima = Points({"x": torch.tensor([[-1.0, 0.0], [1.0, 0.0]])}, {})
    (curve,) = train_curves(Slopes(task), minima, [(0, 1)], rule=make("sgd", lr=0.01), steps=20)
    (path,) = walk_curves(Landscape(task), [curve], 11)
    assert float(path.barrier().highest) > 0.98  # no way between the wells is lower than the saddle


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kind": "spline"}, "curve is named"),
        ({"bends": 0}, "0 bends"),
        ({"samples": 0}, "0 samples"),
        ({"pairs": [(0, 0)]}, "names no two"),
        ({"pairs": [(0, 4)]}, "names no two"),
        ({"pairs": []}, "no pair"),
        ({"rule": "newton"}, "curvature"),
        ({"rule": make("sgd", lr=[0.1, 0.2])}, "members"),
    ],
)
def test_bad_input(options, told):
    settings = {"pairs": [(0, 1)], "steps": 1, **options}
    with pytest.raises(LosslabError, match=told):
        train_curves(Slopes(blobs(), 32), trained().points, **settings)
    with pytest.raises(LosslabError, match="one network"):
        train_curves(Slopes(blobs(), 32), trained().points.select([0]), [(0, 1)])
    with pytest.raises(LosslabError, match="2 ends"):
        straight(Landscape(blobs()), trained().points, [(0, 1)], 1)
