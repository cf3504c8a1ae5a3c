"""C43: the statistics of units, a small run, and the judge on planted evidence."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.layers import population_statistics
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_4 import frozen as f
from losslab.lecture.section_6_4 import units
from losslab.lecture.section_6_4.units import Units
from losslab.lecture.training import trained
from losslab.rules import SGD
from losslab.tasks import Data, digits

HOLDS, FAILS, MIXED, UNDECIDED = "holds", "does not hold", "mixed", "undecided"


def setting(seeds=2, epochs=2):
    x, y = digits().train.head(60).all()
    return f.Setting(Data((x, y)), (64, 6, 5, 10), epochs, 20, seeds)


def test_arms_start_from_the_same_weights():
    starts = {
        arm: trained(setting().task(arm), SGD(), seeds=2, steps=0).points
        for arm in (f.NORMALISED, f.AT_START, f.LATER, f.INPUTS)
    }
    for points in starts.values():
        weights = [w for w in points.weights.values() if w.dim() == 3]
        reference = [w for w in starts[f.INPUTS].weights.values() if w.dim() == 3]
        assert all(torch.equal(a, b) for a, b in zip(weights, reference, strict=True))


def test_frozen_statistics_are_those_of_each_member_alone():
    task = setting().task(f.NORMALISED)
    population = trained(task, SGD(lr=0.5), seeds=3, steps=4, batch_size=20, dtype="float64")
    seen = Units(task.replace(train=task.train.to(dtype=torch.float64)))
    before = population.points.clone()
    frozen = seen.freeze(population.points)
    for member, network in enumerate(population):
        alone = population_statistics(network, seen.data.all()[0], exact=True)
        for name, buffer in alone.named_buffers():
            if "running" in name:
                assert torch.allclose(frozen[name][member], buffer, rtol=1e-9)
    assert all(torch.equal(before[n], population.points[n]) for n in before)  # nobody was touched


def test_pieces_make_no_difference(monkeypatch):
    task = setting().task(f.NORMALISED)
    points = trained(task, SGD(), seeds=5, steps=0).points
    whole = Units(task).moments(points)
    monkeypatch.setattr(units, "ROOM", 2 * len(task.train))
    for name, moments in Units(task).moments(points).items():
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(moments, whole[name], strict=True))


def test_there_is_no_drift_where_the_statistics_were_frozen():
    task = setting().task(f.AT_START)
    seen = Units(task)
    points = seen.freeze(trained(setting().task(f.NORMALISED), SGD(), seeds=2, steps=0).points)
    shift, width = seen.drift(points)
    assert shift.shape == width.shape == (2, 11)
    assert shift.max() < 1e-4
    assert torch.allclose(width, torch.ones_like(width), atol=1e-3)


def test_drift_is_in_frozen_deviations():
    task = setting().task(f.AT_START)
    seen = Units(task)
    points = seen.freeze(trained(setting().task(f.NORMALISED), SGD(), seeds=1, steps=0).points)
    name = seen.norms[0]
    points.buffers[f"{name}.running_mean"] += 2 * points[f"{name}.running_var"].sqrt()
    points.buffers[f"{seen.norms[1]}.running_var"] *= 4
    shift, width = seen.drift(points)
    assert torch.allclose(shift[0, :6], torch.full((6,), 2.0), atol=1e-3)
    moments = seen.moments(points)[seen.norms[1]][1].sqrt()
    assert torch.allclose(width[0, 6:], (moments / points[f"{seen.norms[1]}.running_var"].sqrt())[0])


def test_frozen_layers_stay_frozen():
    task = setting().task(f.AT_START)
    start = Units(task).freeze(trained(setting().task(f.NORMALISED), SGD(), seeds=2, steps=0).points)
    after = trained(task, SGD(lr=0.1), seeds=2, steps=5, batch_size=20, start=start).points
    assert all(torch.equal(start.buffers[n], after.buffers[n]) for n in start.buffers)
    assert not torch.equal(start["0.weight"], after["0.weight"])


def test_small_run(verdicts, monkeypatch, stored):
    monkeypatch.setattr(f, "RATES", (0.1, 1e6))
    tables = f.evidence(Lab(), setting())
    runs, drift = (stored(tables)[name] for name in ("runs", "drift"))
    assert len(runs) == 4 * 2 * 2
    wild = runs[(runs.lr == 1e6) & (runs.arm == f.INPUTS)]
    assert np.isinf(wild.loss).all()
    assert wild.accuracy.isna().all()
    assert drift.groupby(["arm", "lr", "seed"]).epoch.max().to_dict() == {
        (arm, lr, seed): epochs
        for arm, epochs in ((f.AT_START, 2), (f.LATER, 1))
        for lr in (0.1, 1e6)
        for seed in (0, 1)
    }
    assert drift[drift.lr == 0.1].share.between(0, 1).all()
    assert drift[(drift.lr == 1e6) & (drift.arm == f.AT_START)].share.isna().all()
    found = verdicts(f.C43, tables)
    assert found["all"] in (UNDECIDED, MIXED, FAILS)  # two seeds prove nothing


def planted(share=0.8, largest=None, seeds=10):
    """Runs that work up to the given rate, and units of which the given share drift away."""
    limits = {f.NORMALISED: 3.2, f.AT_START: 0.8, f.LATER: 0.8, f.INPUTS: 0.8} | (largest or {})
    runs = [
        {"arm": arm, "lr": lr, "seed": seed, "loss": 0.1, "least": 10}
        | {"accuracy": 0.95 if lr <= limit * (1 + 1e-9) else np.nan if lr > 4 else 0.3}
        for arm, limit in limits.items()
        for lr in f.RATES
        for seed in range(seeds)
    ]
    drift = [
        {"arm": arm, "lr": lr, "seed": seed, "epoch": epoch, "shift": 0.3 * epoch, "width": 1.2}
        | {"share": share * epoch / 5}
        for arm in f.FROZEN
        for lr in f.RATES
        for seed in range(seeds)
        for epoch in range(1, 6)
    ]
    return {"runs": pd.DataFrame(runs), "drift": pd.DataFrame(drift)}


@pytest.mark.parametrize(
    ("change", "drifted", "rate", "overall"),
    [
        ({}, HOLDS, HOLDS, HOLDS),
        ({"share": 0.3}, FAILS, HOLDS, MIXED),
        ({"largest": {f.AT_START: 3.2}}, HOLDS, FAILS, MIXED),
        ({"largest": {f.AT_START: 0.0}}, HOLDS, HOLDS, HOLDS),
        ({"share": 0.3, "largest": {f.AT_START: 3.2}}, FAILS, FAILS, FAILS),
        ({"largest": {f.LATER: 3.2, f.INPUTS: 3.2}}, HOLDS, HOLDS, HOLDS),
        ({"seeds": 5}, UNDECIDED, UNDECIDED, UNDECIDED),
    ],
)
def test_judge(verdicts, change, drifted, rate, overall):
    found = verdicts(f.C43, planted(**change))
    assert (found[f.moved(f.AT_START)], found[f.slower(f.AT_START)], found["all"]) == (drifted, rate, overall)


def test_the_largest_rate_is_that_of_each_seed():
    tables = planted()
    runs = tables["runs"]
    runs.loc[(runs.seed == 3) & (runs.arm == f.NORMALISED) & (runs.lr > 1), "accuracy"] = 0.5
    largest = f.largest_rates(runs)
    assert largest.loc[3, f.NORMALISED] == pytest.approx(0.8)
    assert largest.loc[2, f.NORMALISED] == pytest.approx(3.2)
