"""Alignment: planted permutations come back, against all orders, and what REPAIR restores."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from tests.paths.cases import trained
from tests.paths.networks import NETWORKS
from torch import nn

from losslab.engine import Points
from losslab.engine.randomness import seeded
from losslab.errors import LosslabError
from losslab.paths import (
    Landscape,
    Slopes,
    combine,
    match_activations,
    match_straight_through,
    match_weights,
    permutation_spec,
    repair,
    reset_batch_norm,
    straight,
)
from losslab.paths.curves import hats
from losslab.paths.matching import _Pair, gains
from losslab.rules import make
from losslab.tasks import mlp

HEADS = ("attention", "fast attention", "encoder")
MIXED = ("attention", "grouped", "joined")
FOUND = [n for n in NETWORKS if n.name not in ("single", "tied")]


def pair_of(network, seed: int = 1):
    with seeded(seed, "matching"):
        module = network.make().double()
    points = Points.from_modules([module])
    spec = permutation_spec(module, network.inputs())
    planted = spec.random(7)
    return module, spec, points, spec.permute(points, planted)


@pytest.mark.parametrize("network", FOUND, ids=str)
def test_planted_permutations_come_back(network):
    _, spec, points, moved = pair_of(network)
    found = match_weights(spec, points, moved, restarts=12)
    assert all(torch.equal(found.points[n], points[n]) for n in points), found.starts
    assert found.similarity[1] == pytest.approx(1.0)
    assert found.converged
    assert found.similarity[0] < found.similarity[1]


@pytest.mark.parametrize("network", [n for n in FOUND if n.name not in HEADS], ids=str)
def test_activations_find_them_too(network):
    """But not the units within heads, which no layer reads; and units that are dead can be anywhere."""
    module, spec, points, moved = pair_of(network)
    found = match_activations(spec, points, moved, module, network.inputs(40))
    x = network.inputs(9)
    a, b = (p.load_into(copy.deepcopy(module), 0).eval()(x) for p in (points, found.points))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert found.similarity[1] == pytest.approx(1.0)
    assert found.similarity[1] > found.similarity[0]


@pytest.mark.parametrize("seed", range(4))
def test_one_group_against_all_orders(seed):
    spec = permutation_spec(mlp(3, 5, 2)(), torch.randn(4, 3))
    with seeded(seed, "matching"):
        a, b = (Points.from_modules([mlp(3, 5, 2)().double()]) for _ in range(2))
    found = match_weights(spec, a, b)
    everything = []
    for order in itertools.permutations(range(5)):
        moved = spec.permute(b, {"0": torch.tensor(order)}).matrix()
        everything.append((float((a.matrix() * moved).sum()), float((a.matrix() - moved).norm())))
    best = float((a.matrix() * found.points.matrix()).sum())
    assert best == pytest.approx(max(e[0] for e in everything))
    assert float((a.matrix() - found.points.matrix()).norm()) == pytest.approx(min(e[1] for e in everything))
    assert len(found.table) == 1


@pytest.mark.parametrize("network", [n for n in FOUND if n.name in MIXED], ids=str)
def test_the_gain_of_a_swap_is_what_the_table_of_gains_says(network):
    """For groups inside products and sums, with the other groups in any order."""
    _, spec, a, _ = pair_of(network)
    _, _, b, _ = pair_of(network, seed=2)
    pairs = [_Pair(a[n][0], b[n][0], axes) for n, axes in spec.axes.items() if n in a.weights]

    def similarity(order):
        return sum(float((p.a * p.moved(order)).sum()) for p in pairs)

    order = spec.random(3)
    for group, n in spec.groups.items():
        own = [p for p in pairs if group in p.groups()]
        twice = any(sum(group in axis.groups() for axis in p.axes) > 1 for p in own)
        if twice:
            continue
        table = gains(own, order, group)
        other = order | {group: torch.arange(n).roll(1)}
        change = table[torch.arange(n), other[group]].sum() - table[torch.arange(n), order[group]].sum()
        assert similarity(other) - similarity(order) == pytest.approx(float(change), abs=1e-10)


def test_restarts_never_make_it_worse_and_are_reported():
    network = next(n for n in NETWORKS if n.name == "resnet20")
    _, spec, points, moved = pair_of(network)
    one, many = (match_weights(spec, points, moved, restarts=k) for k in (1, 6))
    assert len(many.starts) == 6
    assert many.starts[0] == pytest.approx(one.starts[0])
    assert many.similarity[1] == pytest.approx(max(many.starts))
    assert list(many.table.columns) == ["group", "units", "moved", "before", "after"]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_alignment_lowers_the_barrier_of_trained_networks(batch_norm):
    population = trained(batch_norm, width=48)
    landscape, points = Landscape.of(population, ["train"]), population.points
    spec = permutation_spec(population)
    a, b = points.select([0]), points.select([1])
    x = population.task.train.to(dtype=torch.float64).all()[0]
    found = {
        "weights": match_weights(spec, a, b),
        "activations": match_activations(spec, a, b, population.template, x),
    }
    before = {n: b.clone()[n] for n in b}
    (line,) = straight(landscape, points, [(0, 1)], 25)
    for aligned in found.values():
        both = Points(*({n: torch.cat([s[n], t[n]]) for n in s} for s, t in _parts(a, aligned.points)))
        (path,) = straight(landscape, both, [(0, 1)], 25)
        assert path.barrier().over_chord < line.barrier().over_chord
        assert float(path["train_loss"][-1]) == pytest.approx(float(line["train_loss"][-1]), rel=1e-9)
        assert aligned.similarity[1] > aligned.similarity[0]
    assert all(torch.equal(b[n], before[n]) for n in b)


def _parts(a: Points, b: Points):
    return ((a.weights, b.weights), (a.buffers, b.buffers))


def test_the_straight_through_estimator_lowers_the_midpoint():
    population = trained(width=48)
    spec, points = permutation_spec(population), population.points
    a, b = points.select([0]), points.select([1])
    slopes = Slopes(population.task)
    close = match_weights(spec, a, b)
    found = match_straight_through(spec, slopes, a, b, steps=15, rule=make("adam", lr=0.02))

    def middle(points):
        return float(slopes.losses(a, 0.5 * (a.matrix() + points.matrix()))[0])

    assert len(found.history) == 15
    assert middle(found.points) <= middle(close.points) + 1e-9
    assert middle(found.points) == pytest.approx(float(found.history.min()), rel=1e-6)
    assert middle(found.points) < 0.7 * middle(b)


def test_repair_gives_back_means_and_deviations():
    population = trained(width=48)
    spec, points = permutation_spec(population), population.points
    a = points.select([0])
    b = match_weights(spec, a, points.select([1])).points
    both = Points({n: torch.cat([a.weights[n], b.weights[n]]) for n in a.weights}, {})
    x = population.task.train.to(dtype=torch.float64).all()[0]
    share = 0.3
    between = combine(both, hats(torch.tensor([share], dtype=torch.float64), 2))
    fixed = repair(spec, a, b, between, population.template, x, share=share)

    def seen(p):
        module, found = p.load_into(copy.deepcopy(population.template), 0), []
        for layer in module:
            x_in = x if not found else found[-1][1]
            found.append((layer, layer(x_in).detach()))
        return [y for layer, y in found if isinstance(layer, nn.Linear)][:-1]

    for ya, yb, y in zip(seen(a), seen(b), seen(fixed), strict=True):
        torch.testing.assert_close(y.mean(0), (1 - share) * ya.mean(0) + share * yb.mean(0))
        torch.testing.assert_close(y.std(0), (1 - share) * ya.std(0) + share * yb.std(0))
    for end, own in ((0.0, a), (1.0, b)):  # the ends need no repair
        same = repair(spec, a, b, own, population.template, x, share=end)
        torch.testing.assert_close(same.matrix(), own.matrix(), rtol=1e-9, atol=1e-9)


def test_reset_batch_norm_gives_the_statistics_of_the_data():
    population = trained(True)
    task, points = population.task, population.points
    middle = combine(points, torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=torch.float64))
    found = reset_batch_norm(task, middle)
    module = middle.load_into(copy.deepcopy(population.template), 0)
    x = module[0](task.train.to(dtype=torch.float64).all()[0])
    torch.testing.assert_close(found["1.running_mean"][0], x.mean(0))
    torch.testing.assert_close(found["1.running_var"][0], x.var(0))
    with pytest.raises(LosslabError, match="no batch norm"):
        reset_batch_norm(trained().task, trained().points)


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (lambda s, p, t: match_weights(s, p, p.select([0])), "networks were given"),
        (lambda s, p, t: match_weights(s, p.select([0]), p.select([1]), restarts=0), "restarts"),
        (lambda s, p, t: match_weights(s, p.select([0]), Points.from_modules([mlp(2, 5, 3)()])), "differ"),
        (lambda s, p, t: match_weights(s, p.select([0]), _lost(p.select([1]))), "not finite"),
        (lambda s, p, t: repair(s, p, p, p, trained(True).template, None), "batch norm"),
    ],
)
def test_bad_input(run, told):
    population = trained()
    with pytest.raises(LosslabError, match=told):
        run(permutation_spec(population), population.points, population.task)


def _lost(points):
    points.weights["0.bias"][0, 0] = float("nan")
    return points
