"""The one-call entry, ensembles along a path, and aligned populations."""

from __future__ import annotations

import pytest
import torch
from tests.paths.cases import at, bent, bent_task, trained

from losslab.errors import LosslabError
from losslab.paths import METHODS, Landscape, Path, align, connect, ensemble_errors, straight
from losslab.rules import make


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_path_from_end_to_end(method, batch_norm):
    population = trained(batch_norm)
    options = {"level": 0.4, "rule": make("sgd", lr=0.3)} if method == "dss" else {}
    (path, other) = connect(population, [(0, 1), (3, 2)], method=method, steps=30, **options)
    assert isinstance(path, Path)
    for found, pair in ((path, [0, 1]), (other, [3, 2])):
        ends = found.points
        for name, tensor in population.points.items():
            assert torch.equal(ends[name][[0, -1]], tensor[pair])
        told = Landscape.of(population)(population.points)
        for name, values in found.values.items():
            assert values[[0, -1]].tolist() == pytest.approx(told[name][pair].tolist(), rel=1e-6, abs=1e-9)
        assert found.normalised_length >= 1 - 1e-9


def test_all_pairs_by_default_and_bad_input():
    population = trained()
    assert len(connect(population, method="linear", count=3)) == 6
    with pytest.raises(LosslabError, match="did you mean 'linear'"):
        connect(population, method="liner")
    with pytest.raises(LosslabError, match="without points"):
        connect(Landscape.of(population))
    with pytest.raises(LosslabError, match="no member 7"):
        align(population, 7)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_ensembles_along_a_path_against_votes_by_hand(batch_norm):
    population = trained(batch_norm)
    landscape = Landscape.of(population, ["test"], batch_norm="running" if batch_norm else "batch")
    (path,) = straight(landscape, population.points, [(0, 2)], 5)
    found = ensemble_errors(landscape, path)
    x, y = population.task.test.to(dtype=torch.float64).all()
    votes = []
    for i in range(5):
        module = path.points.load_into(population[0], i).eval()
        votes.append(torch.softmax(module(x).detach(), -1))
    for i in range(5):
        with_start = ((votes[0] + votes[i]).argmax(1) != y).double().mean()
        so_far = (sum(votes[: i + 1]).argmax(1) != y).double().mean()
        assert float(found["test_with_start"][i]) == pytest.approx(float(with_start))
        assert float(found["test_so_far"][i]) == pytest.approx(float(so_far))
    assert float(found["test_so_far"][0]) == pytest.approx(float(path["test_error"][0]), abs=1e-6)
    with pytest.raises(LosslabError, match="no classes"):
        ensemble_errors(
            Landscape(bent_task()), straight(Landscape(bent_task()), at(*bent.minima), [(0, 1)])[0]
        )


@pytest.mark.parametrize("batch_norm", [False, True])
def test_an_aligned_population_is_the_same_networks(batch_norm):
    population = trained(batch_norm)
    points, told = align(population, reference=1)
    assert len(told) == 3
    landscape = Landscape.of(population)
    before, after = landscape(population.points), landscape(points)
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=1e-9, atol=1e-9)
    assert torch.equal(points.matrix()[1], population.points.matrix()[1])
    distances = [
        (p.matrix() - population.points.matrix()[1]).norm(dim=1) for p in (population.points, points)
    ]
    assert (distances[1] <= distances[0] + 1e-9).all()
