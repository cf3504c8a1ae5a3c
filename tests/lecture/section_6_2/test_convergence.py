"""C11: the race and the floor at small sizes, and the judge on planted evidence."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from losslab.lecture.claim import Lab
from losslab.lecture.section_6_2 import convergence as c
from losslab.lecture.section_6_2 import race as r
from losslab.lecture.section_6_2.noise_floor import RATES, excess_under_noise
from losslab.tasks import digits

HOLDS, FAILS = "holds", "does not hold"


@pytest.fixture(scope="module")
def problem():
    return r.Problem.of(digits().train.head(60))


def test_the_minimum_is_one(problem):
    assert problem.gap < 1e-12
    weight, bias = (problem.weights[name].clone().requires_grad_() for name in ("weight", "bias"))
    x, y = problem.task.train.to(dtype=torch.float64).all()
    f = F.cross_entropy(x @ weight.T + bias, y) + r.DECAY / 2 * (weight.square().sum() + bias.square().sum())
    assert f.item() == pytest.approx(problem.minimum, rel=1e-12)
    slope = torch.autograd.grad(f, [weight, bias])
    assert max(float(g.abs().max()) for g in slope) < 1e-6


def test_smoothness_bounds_the_hessian(problem):
    x, y = problem.task.train.to(dtype=torch.float64).all()

    def loss(w):
        return F.cross_entropy(x @ w[:640].view(10, 64).T + w[640:], y) + r.DECAY / 2 * w.square().sum()

    w = torch.zeros(650, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(w), w, create_graph=True)
    v = torch.randn(650, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(30):
        v = v / v.norm()
        (v,) = torch.autograd.grad(slope, w, v, retain_graph=True)
    assert r.DECAY < float(v.norm()) <= problem.smoothness


def test_gradient_descent_falls_to_the_minimum_and_a_wild_rate_to_nothing(problem):
    rows = r.descend(problem, r.Arm(None, (), 300), [1.0, 1e9], [0, 0])
    tame, wild = rows[rows.member == 0], rows[rows.member == 1]
    assert tame.excess.iloc[0] == wild.excess.iloc[0] == 1
    assert 0 <= abs(tame.excess.iloc[-1]) < 1e-4
    assert r.reach(rows, 0.01).tolist() == [tame.step[tame.excess <= 0.01].min(), math.inf]
    assert wild.excess.iloc[-1] > 1


def test_a_target_out_of_reach_takes_the_rate_that_comes_nearest(problem):
    tuned = r.tuned_rates(problem, r.Arm(None, (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3), 3), [1e-9])
    assert tuned.lr[0] > 1.6e-3  # the grid was extended upwards


def test_the_race_in_small(verdicts):
    grid = (0.03, 0.09, 0.27, 0.81, 2.4)
    arms = {"GD": r.Arm(None, grid, 20), "SGD, B = 32": r.Arm(32, grid, 40)}
    tables = c.evidence(Lab(), seeds=2, arms=arms, redundant=arms, runs=3, steps=200)
    reached = tables["reached"]
    assert len(reached) == 2 * 2 * 3 + 2 * 2
    per_update = np.where(reached.arm == "GD", 1000, 32)
    assert (reached.samples == reached.updates * per_update).all()
    found = verdicts(c.C11, tables)
    assert found["a sample's step points less towards the minimum"] == "undecided"  # two seeds
    assert (tables["directions"].whole > tables["directions"]["sample"]).all()


def test_the_floor_of_many_runs_is_the_exact_one():
    floor, course = excess_under_noise([0.1, 0.2], runs=200, settle=300, steps=400)
    ratio = (floor.excess / floor.exact).groupby(floor.rate).mean()
    assert np.allclose(ratio, 1, rtol=0.05)
    assert np.allclose(course.excess, course.exact, rtol=0.2)


def planted(update=100.0, sample=0.3, copies=0.1, floor=1.0, size=1.0, cosine=0.8, seeds=10):
    """SGD takes so many times GD's updates or samples; the floor is size * rate^floor."""
    wiggle = 1 + 0.01 * np.cos(np.arange(seeds))
    rows = []
    for data, targets, factor in (("digits", r.TARGETS, sample), ("copies", [0.01], copies)):
        for target in targets:
            for arm in r.ARMS if data == "digits" else c.REDUNDANT:
                gd = arm == "GD"
                rows.append(
                    pd.DataFrame({"seed": range(seeds)}).assign(
                        data=data,
                        target=target,
                        arm=arm,
                        updates=10.0 if gd else 10 * update * wiggle,
                        samples=1e4 if gd else 1e4 * factor * wiggle,
                    )
                )
    runs = 8
    rate = np.repeat(RATES, runs)
    spread = 1 + 0.02 * np.cos(np.arange(len(rate)))
    curves = [
        {"arm": arm, "seed": seed, "step": step, "samples": step, "excess": 1 / (1 + step)}
        for arm in r.ARMS
        for seed in range(seeds)
        for step in (0, 1, 10)
    ]
    return {
        "reached": pd.concat(rows, ignore_index=True),
        "curves": pd.DataFrame(curves),
        "directions": pd.DataFrame({"seed": range(seeds), "whole": cosine, "sample": 0.1 * wiggle}),
        "floor": pd.DataFrame({"rate": rate, "excess": size * rate**floor * spread, "exact": rate}),
    }


def test_c11_judge_on_the_expected_picture(verdicts):
    found = verdicts(c.C11, planted())
    assert {v for name, v in found.items() if "samples" in name} == {FAILS}
    assert {v for name, v in found.items() if "samples" not in name and name != "all"} == {HOLDS}
    assert found["all"] == "mixed"


def test_c11_judge_when_sgd_is_slower_in_every_sense(verdicts):
    assert set(verdicts(c.C11, planted(sample=3.0, copies=3.0)).values()) == {HOLDS}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"update": 0.5}, "more updates"),
        ({"floor": 0.8}, "excess left by a constant rate ∝ η"),
        ({"size": 1.2}, "that excess over the exact recursion's"),
        ({"cosine": 0.15}, "a sample's step points less"),
    ],
)
def test_c11_judge_fails(verdicts, change, part):
    found = verdicts(c.C11, planted(sample=3.0, copies=3.0, **change))
    assert {verdict for name, verdict in found.items() if name.startswith(part)} == {FAILS}


def test_an_arm_that_never_arrives_counts_as_slowest(verdicts):
    tables = planted()
    never = (tables["reached"].arm == "SGD, B = 1") & (tables["reached"].target == 0.001)
    tables["reached"].loc[never, "updates"] = math.inf
    assert verdicts(c.C11, tables)["more updates to 0.1 % excess, SGD, B = 1"] == HOLDS
