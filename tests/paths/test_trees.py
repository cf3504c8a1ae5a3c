"""Spanning trees against all subsets of edges, and the search that need not try all pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.paths.cases import at, bent, bent_task

from losslab.errors import LosslabError
from losslab.paths import Landscape, explore, straight
from losslab.paths.path import Path
from losslab.paths.trees import lowest_passes, spanning_edges


def connected(count, edges):
    part = {0}
    for _ in range(count):
        part |= {b for a, b in [*edges, *((b, a) for a, b in edges)] if a in part}
    return len(part) == count


@pytest.mark.parametrize("seed", range(10))
def test_the_tree_is_the_cheapest_of_all_trees(seed):
    g = torch.Generator().manual_seed(seed)
    pairs = list(itertools.combinations(range(5), 2))
    heights = dict(zip(pairs, torch.rand(len(pairs), generator=g).tolist(), strict=True))
    found = spanning_edges(5, heights)
    trees = [t for t in itertools.combinations(pairs, 4) if connected(5, t)]
    assert sum(heights[e] for e in found) == pytest.approx(min(sum(heights[e] for e in t) for t in trees))
    assert [heights[e] for e in found] == sorted(heights[e] for e in found)
    passes = lowest_passes(torch.zeros(5), dict.fromkeys(found, 0.0) | {e: heights[e] for e in found})
    for a, b in pairs:  # through the tree it is as low as through all edges
        ways = [
            max(heights[min(p, q), max(p, q)] for p, q in itertools.pairwise([a, *middle, b]))
            for k in range(4)
            for middle in itertools.permutations(set(range(5)) - {a, b}, k)
        ]
        assert float(passes[a, b]) == pytest.approx(min(ways))


def test_what_is_not_connected_stays_apart():
    assert spanning_edges(4, {(0, 1): 1.0, (2, 3): math.inf}) == ((0, 1),)
    assert lowest_passes(torch.zeros(3), {(0, 1): 1.0})[0].tolist() == [0.0, 1.0, math.inf]


def made(height: float, a: float, b: float) -> Path:
    values = torch.tensor([a, height, b], dtype=torch.float64)
    rows = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    return Path(at((0.0, 0.0), (1.0, 0.0)), rows, torch.tensor([0.0, 0.5, 1.0]), {"loss": values}, "made")


@pytest.mark.parametrize("seed", range(8))
def test_exploring_finds_the_tree_of_all_pairs(seed):
    g = torch.Generator().manual_seed(seed)
    losses = 0.1 * torch.rand(6, generator=g, dtype=torch.float64)
    heights = {p: 0.1 + float(torch.rand((), generator=g)) for p in itertools.combinations(range(6), 2)}
    tried = []

    def connect(pairs):
        tried.extend(pairs)
        return [made(heights[p], float(losses[p[0]]), float(losses[p[1]])) for p in pairs]

    tree = explore(losses, connect)
    assert sorted(tree.edges) == sorted(spanning_edges(6, heights))
    assert len(set(tried)) == len(tried) <= 15
    assert tree.saddles.tolist() == pytest.approx(sorted(heights[e] for e in tree.edges))
    assert torch.equal(tree.passes.diagonal(), losses)
    few = explore(losses, connect, budget=5)
    assert len(few.paths) == 5
    assert int(losses.argmin()) in set.intersection(*map(set, few.edges))
    assert tree.table.in_tree.sum() == 5


def test_a_path_that_failed_is_gone_around():
    losses = torch.zeros(3, dtype=torch.float64)
    heights = {(0, 1): math.nan, (0, 2): 1.0, (1, 2): 2.0}
    tree = explore(losses, lambda pairs: [made(heights[p], 0.0, 0.0) for p in pairs])
    assert set(tree.edges) == {(0, 2), (1, 2)}
    assert float(tree.passes[0, 1]) == 2.0


def test_a_tree_of_real_paths():
    landscape, points = Landscape(bent_task()), at(*bent.minima, (0.0, 1.0))
    tree = explore(landscape.loss(points), lambda pairs: straight(landscape, points, pairs))
    assert set(tree.edges) == {(0, 2), (1, 2)}  # over the saddle, not along the straight way
    with pytest.raises(LosslabError, match="cannot connect"):
        explore(torch.zeros(3), lambda pairs: [], budget=1)
    with pytest.raises(LosslabError, match="finite"):
        explore(torch.tensor([0.0, math.nan]), lambda pairs: [])
