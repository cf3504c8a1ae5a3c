"""Elastic bands: tangents and spacing against loops, analytic saddles, many bands together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.paths.cases import at, bent, bent_task, trained

from losslab.engine import Points
from losslab.errors import LosslabError
from losslab.paths import Cycle, Landscape, Slopes, auto_bands, relax, straight, stretched, walk_bands
from losslab.paths.auto_band import DRAXLER, gaps_to_fill
from losslab.paths.bands import Band, Chain
from losslab.rules import make

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def tangent_by_hand(before, here, after, v_before, v_here, v_after):
    """Henkelman and Jonsson (2000), equations 8 to 11."""
    ahead, behind = after - here, here - before
    if v_after > v_here > v_before:
        found = ahead
    elif v_after < v_here < v_before:
        found = behind
    else:
        large = max(abs(v_after - v_here), abs(v_before - v_here))
        small = min(abs(v_after - v_here), abs(v_before - v_here))
        found = ahead * large + behind * small if v_after > v_before else ahead * small + behind * large
    return found / found.norm()


@pytest.mark.parametrize("seed", range(10))
def test_tangents_and_spacing_against_loops(seed):
    g = torch.Generator().manual_seed(seed)
    counts = [3, 6, 4]
    chain = Chain(counts)
    theta = torch.randn(sum(counts), 5, generator=g, dtype=torch.float64)
    losses = torch.randn(sum(counts), generator=g, dtype=torch.float64)
    wanted = torch.cat([torch.linspace(0, 1, n, dtype=torch.float64) ** 1.5 for n in counts])
    moves, moved = theta[1:] - theta[:-1], theta.clone()
    ahead, behind = (torch.from_numpy(part)[:, None] for part in chain.leanings(losses.numpy()))
    tangents = ahead * chain.inner_of(moves) + behind * chain.inner_of(moves, -1)
    tangents = tangents / tangents.norm(dim=1, keepdim=True)
    chain.put(moved, chain.spread(theta, wanted.numpy()))
    row = start = 0
    for n in counts:
        own, v, targets = (
            theta[start : start + n],
            losses[start : start + n].tolist(),
            wanted[start : start + n],
        )
        lengths = [0.0]
        for i in range(n - 1):
            lengths.append(lengths[-1] + float((own[i + 1] - own[i]).norm()))
        for i in range(1, n - 1):
            by_hand = tangent_by_hand(own[i - 1], own[i], own[i + 1], v[i - 1], v[i], v[i + 1])
            torch.testing.assert_close(tangents[row], by_hand, **EXACT)
            row += 1
            goal = float(targets[i]) * lengths[-1]
            k = max(j for j in range(n - 1) if lengths[j] <= goal)
            share = (goal - lengths[k]) / (lengths[k + 1] - lengths[k])
            torch.testing.assert_close(moved[start + i], (1 - share) * own[k] + share * own[k + 1], **EXACT)
        assert torch.equal(moved[[start, start + n - 1]], own[[0, -1]])
        start += n


def test_spreading_settles_at_the_places_wanted():
    chain, g = Chain([9, 5]), torch.Generator().manual_seed(0)
    theta = torch.randn(14, 3, generator=g, dtype=torch.float64)
    wanted = torch.cat([torch.linspace(0, 1, 9), torch.linspace(0, 1, 5)]).double()
    for _ in range(60):
        chain.put(theta, chain.spread(theta, wanted.numpy()))
    places = chain.places(chain.steps(theta[1:] - theta[:-1]))
    np.testing.assert_allclose(places, wanted, rtol=0, atol=0.02)


def descent_from(x: float, y: float) -> torch.Tensor:
    """The way of steepest descent from a point, in small steps: half of the lowest pass."""
    point, way = torch.tensor([x, y], dtype=torch.float64), []
    for _ in range(6000):
        at_point = point.clone().requires_grad_()
        (slope,) = torch.autograd.grad(bent.f(at_point), at_point)
        point = point - 1e-3 * slope
        way.append(point)
    return torch.stack(way[::20])


@pytest.mark.parametrize("spring", [None, 1.0])
def test_a_band_finds_the_lowest_pass_of_a_double_well(spring):
    slopes, bands = Slopes(bent_task()), stretched(at(*bent.minima), [(0, 1)], 15)
    (band,) = relax(slopes, bands, rule=make("gd", lr=0.02), steps=400, spring=spring)
    (path,) = walk_bands(Landscape(bent_task()), [band])
    x = band.images["x"]
    half = descent_from(1e-3, 1.0)
    way = torch.cat([half, half * torch.tensor([-1.0, 1.0]), torch.tensor([[0.0, 1.0]])])
    assert float(torch.cdist(x, way).min(1).values.max()) < 0.03
    assert float(path.barrier().highest) == pytest.approx(1.0, abs=0.03)
    (line,) = straight(Landscape(bent_task()), at(*bent.minima), [(0, 1)])
    assert float(line.barrier().highest) == pytest.approx(5.0)
    gaps = (x[1:] - x[:-1]).norm(dim=1)
    assert float(gaps.max() / gaps.min()) < 1.2


@pytest.mark.parametrize("spring", [None, 1.0])
@pytest.mark.parametrize("images", [4, 8, 15])  # with an even number none starts on the saddle
def test_the_climbing_image_ends_at_the_saddle(spring, images):
    slopes, bands = Slopes(bent_task()), stretched(at(*bent.minima), [(0, 1)], images)
    bands = relax(slopes, bands, rule=make("gd", lr=0.02), steps=100, spring=spring)
    (band,) = relax(slopes, bands, rule=make("gd", lr=0.02), steps=700, climb=True, spring=spring)
    top = band.images["x"][int(band.losses.argmax())]
    assert torch.allclose(top, torch.tensor(bent.saddles[0]).double(), atol=1e-5)


def test_bands_together_are_the_bands_alone():
    population = trained(True)
    slopes = Slopes(population.task, 32, seed=2, execution="stacked")
    bands = [*stretched(population.points, [(0, 1)], 4), *stretched(population.points, [(1, 2), (0, 3)], 6)]
    options = {"rule": make("momentum", lr=0.05), "steps": 5}
    together = relax(slopes, bands, **options)
    for band, found in zip(bands, together, strict=True):
        (alone,) = relax(slopes, [band], **options)
        torch.testing.assert_close(found.images.matrix(), alone.images.matrix(), **EXACT)
        torch.testing.assert_close(found.losses, alone.losses, **EXACT)
        assert all(torch.equal(found.images[n][[0, -1]], band.images[n][[0, -1]]) for n in band.images)


def test_a_lost_band_disturbs_no_other():
    population = trained()
    points = population.points.clone()
    points.weights["0.bias"][1] = float("nan")
    slopes = Slopes(population.task, 32, execution="stacked")
    lost, good = relax(slopes, stretched(points, [(0, 1), (0, 2)], 5), steps=3)
    (alone,) = relax(slopes, stretched(points, [(0, 2)], 5), steps=3)
    assert lost.images.matrix()[1:-1].isnan().all()
    torch.testing.assert_close(good.images.matrix(), alone.images.matrix(), **EXACT)
    (path, _) = walk_bands(Landscape.of(population), [lost, good], 1)
    assert path.barrier().highest.isnan()


def test_watching_sees_the_band_settle():
    seen: list[Band] = []
    relax(
        Slopes(bent_task()), stretched(at(*bent.minima), [(0, 1)], 5), rule=make("gd", lr=0.02), steps=30,
        watch=lambda step, bands: seen.append(bands[0]),
    )  # fmt: skip
    tops = [float(band.losses.max()) for band in seen[1:]]
    assert len(seen) == 30
    assert tops[-1] < tops[0]
    assert not torch.equal(seen[0].images.matrix(), seen[-1].images.matrix())


def test_auto_bands_insert_where_the_loss_is_high_and_keep_the_best_cycle():
    slopes, landscape = Slopes(bent_task()), Landscape(bent_task())
    cycles = [Cycle(60, 0.01)] * 6
    rule = lambda lr: make("gd", lr=lr)
    (path,) = auto_bands(slopes, landscape, at(*bent.minima), [(0, 1)], cycles=cycles, rule=rule)
    assert float(path.barrier().highest) == pytest.approx(1.0, abs=0.05)
    assert 5 < path.frame.members <= 5 + 2 * 5
    heights = [float(h) for h in path.note.split(": ")[1].split(", ")]
    assert len(heights) == 6
    assert float(path.barrier().highest) == pytest.approx(min(heights), rel=1e-3)


def test_auto_bands_of_networks_go_around_the_barrier():
    population = trained()
    landscape, pairs = Landscape.of(population, ["train"]), [(0, 1), (2, 3)]
    slopes = Slopes(population.task, 32)
    paths = auto_bands(slopes, landscape, population.points, pairs, cycles=[Cycle(60, 0.05)] * 3)
    for line, path in zip(straight(landscape, population.points, pairs), paths, strict=True):
        assert path.barrier().over_chord < 0.5 * line.barrier().over_chord
        assert path.method == "AutoNEB"


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [
        ([0, 0.5, 1, 0.5, 0], []),  # chords fit
        ([0, 2, 0, 3, 0, 1, 0], []),  # no range to compare with: see below
        ([0, 2, 1, 3, 0, 1, 0], [1, 3]),  # the two highest of three
        ([0, 0.55, 1, 0.5, 0], []),  # an excess below the threshold
    ],
)
def test_where_images_are_missing(losses, wanted):
    if max(losses[::2]) == min(losses[::2]):  # any excess is more than a tenth of nothing
        wanted = [1, 3]
    assert gaps_to_fill(torch.tensor(losses, dtype=torch.float64), 2, 0.1, 1) == wanted


def test_the_paper_s_cycles():
    assert len(DRAXLER) == 14
    assert sum(c.steps for c in DRAXLER) == 16_000
    assert math.isclose(DRAXLER[-1].lr, 0.001)


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (lambda s, p: stretched(p, [(0, 1)], 2), "at least 3"),
        (lambda s, p: relax(s, [Band(p, torch.tensor([0.0, 1.0]))], steps=1), "insert images"),
        (lambda s, p: relax(s, stretched(p, [(0, 1)], 3), spring=0.0), "positive"),
        (lambda s, p: auto_bands(s, Landscape(bent_task()), p, [(0, 1)], cycles=[]), "cycles"),
        (lambda s, p: stretched(p, [(0, 2)], 3), "names no two"),
    ],
)
def test_bad_input(run, told):
    points: Points = at(*bent.minima)
    with pytest.raises(LosslabError, match=told):
        run(Slopes(bent_task()), points)
