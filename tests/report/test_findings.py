"""Sentences about slices and paths: every number in them is one that was measured."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.paths.cases import at, bent, bent_task, trained

from losslab.paths import (
    Curve,
    Landscape,
    connect,
    measure_slice,
    random_slice,
    straight,
    through,
    walk_curves,
)
from losslab.report.findings import connected, of_grid, of_line, of_paths


def ways():
    """The straight line over the hill, and the chain over the pass, whose heights are known."""
    land, minima = Landscape(bent_task()), at(*bent.minima)
    (line,) = straight(land, minima, [(0, 1)])
    (path,) = walk_curves(land, [Curve("polychain", at((-1, 0), (-0.7, 0.51), (0, 1), (0.7, 0.51), (1, 0)))])
    return line, path


def test_a_pair_is_told_with_its_heights():
    line, path = ways()
    (told,) = of_paths({("0 to 1", "linear"): line, ("0 to 1", "polychain"): path}, "polychain")
    assert told.startswith("Networks 0 to 1: straight, the loss rises to 5 at 50 % of the way")
    assert "a barrier of" in told
    assert "in place of 5" in told
    assert not connected(line, path)  # 1 of 5 is left
    flat = dataclasses.replace(path, values={"loss": 0.05 * path["loss"]})
    assert connected(line, flat)
    (told,) = of_paths({("0 to 1", "linear"): line, ("0 to 1", "polychain"): flat}, "polychain")
    assert told.endswith("these minima are connected.")


@pytest.mark.parametrize(("found", "words"), [(True, "connected below the level"), (False, "proves nothing")])
def test_a_string_says_whether_it_was_found(found, words):
    line, path = ways()
    path = dataclasses.replace(path, found=found, note="why")
    (told,) = of_paths({("0 to 1", "linear"): line, ("0 to 1", "dss"): path}, "dss")
    assert words in told
    assert told.endswith("(why).")


def test_what_is_not_finite_or_falling_is_said():
    line, path = ways()
    lost = dataclasses.replace(path, values={"loss": path["loss"] * torch.nan}, note="diverged at step 3")
    (told,) = of_paths({("0 to 1", "linear"): line, ("0 to 1", "bezier"): lost}, "bezier")
    assert "not finite all along (diverged at step 3)" in told
    falling = dataclasses.replace(path, settled=False)
    (told,) = of_paths({("0 to 1", "linear"): line, ("0 to 1", "bezier"): falling}, "bezier")
    assert "still falling" in told


def test_many_pairs_are_summed_up():
    population = trained()
    found = {}
    for method in ("linear", "polychain"):
        pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
        paths = connect(population, pairs, method=method, steps=150, count=15)
        found |= {(f"{a} to {b}", method): p for (a, b), p in zip(pairs, paths, strict=True)}
    told = of_paths(found, "polychain")
    assert len(told) == 3
    count = sum(connected(found[p, "linear"], found[p, "polychain"]) for p, m in found if m == "linear")
    assert told[0].startswith(f"{count} of 6 pairs are connected")


def test_slices_tell_their_range_and_where_the_loss_doubles():
    axis = torch.linspace(-1, 1, 21)
    line = random_slice(at((1.0, 0.5)), 1, normalise="unit")
    grid = measure_slice(Landscape(bent_task()), line, axis)
    told = of_grid(grid)
    assert "has doubled" in told[-1]
    values = grid["loss"]
    far = axis[~(values <= 2 * values[10])].abs().min()
    assert f"at {float(far):.4g} along" in told[-1]
    plane = through(at((-1.0, 0.0), (1.0, 0.0), (0.0, 1.0)))
    holes = torch.tensor([0.0, 1.0, float("nan")])
    told = of_grid(measure_slice(Landscape(bent_task()), plane, holes, holes))
    assert told[0].startswith("5 of 9 points are not finite")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.1, 2.0, 0.2], "rises to 2 at 50 % of the way, 10 times the higher end (0.2)"),
        ([0.1, 0.15, 0.2], "nowhere above that of the ends (0.1 and 0.2)"),
        ([0.1, float("inf"), 0.2], "not finite"),
        ([0.0, 1.0, 0.0], "rises to 1 at 50 % of the way"),
    ],
)
def test_lines_in_words(values, words):
    assert (
        of_line("loss", torch.tensor(values), torch.linspace(0, 1, 3)).endswith(words)
        or words == "not finite"
    )
