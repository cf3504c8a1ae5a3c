"""C36, C37, C44 and C46: the experiments in small, and the judges on planted evidence of each outcome."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.lecture.evidence import FAILS, HOLDS, MIXED, UNDECIDED, Draw, Stored, Tables, overall, verdicts

from losslab.layers import with_batchnorm
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_4 import affine, backward, forward, inference
from losslab.lecture.section_6_4.affine import C46
from losslab.lecture.section_6_4.backward import C37
from losslab.lecture.section_6_4.forward import C36
from losslab.lecture.section_6_4.inference import C44
from losslab.lecture.tuning import Tuning
from losslab.tasks import Data, Splits, mlp

SEEDS = range(10)


def small_splits() -> Splits:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=g)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    return Splits(*(Data((x[part], y[part])) for part in (slice(0, 120), slice(120, 150), slice(150, 200))))


def checks(names: Any, error: float = 1e-14, n: int = 120) -> pd.DataFrame:
    return pd.DataFrame({"instance": i, "check": c, "error": error} for i in range(n) for c in names)


def changed(table: pd.DataFrame, where: pd.Series, **values: Any) -> pd.DataFrame:
    table = table.copy()
    for column, value in values.items():
        table.loc[where, column] = value
    return table


# -- C36 -----------------------------------------------------------------------------------------------


def test_c36_on_its_own_experiment(stored: Stored, draw: Draw) -> None:
    rows = [{"instance": i, "check": c, "error": e} for i in range(6) for c, e in forward.errors(i).items()]
    tables = {"instances": pd.DataFrame(rows), "units": forward.hidden_units()}
    assert set(verdicts(C36, stored(tables)).values()) == {UNDECIDED}  # six instances, no counter-instance
    units = tables["units"]
    behind = units[units.stage == "behind batch norm"]
    assert behind["mean"].abs().max() < 1e-5
    assert np.allclose(behind.deviation, 1, atol=1e-3)
    draw(C36, tables)


def test_c36_rests_on_every_check() -> None:
    tables = {"instances": checks(forward.CHECKS)}
    assert overall(C36, tables) is HOLDS
    for check, name in forward.CHECKS.items():
        rows = tables["instances"]
        bad = changed(rows, (rows.check == check) & (rows.instance == 7), error=1e-8)
        found = verdicts(C36, {"instances": bad})
        assert [n for n, v in found.items() if v is FAILS] == [name]


def test_c36_sees_a_layer_that_uses_the_unbiased_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    def unbiased(layer: Any, x: Any) -> Any:
        axes = (0, *range(2, x.dim()))
        shape = (-1, *[1] * (x.dim() - 2))
        hat = (x - x.mean(axes, keepdim=True)) / (x.var(axes, keepdim=True) + layer.eps).sqrt()
        return layer.weight.reshape(shape) * hat + layer.bias.reshape(shape)

    monkeypatch.setattr(forward.BatchNorm, "forward", unbiased)
    found = forward.errors(0)
    assert min(found[check] for check in ("equation", "torch", "moments")) > 1e-3


# -- C37 -----------------------------------------------------------------------------------------------


def biased_runs(loss_ratio: float = 2.0, drift: float = 1.0) -> Tables:
    rows = [
        {"arm": name, "seed": seed, "step": step, "lr": 0.1, "loss": loss * (1 + 0.01 * seed), "drift": moved}
        for name, loss, moved in ((backward.WHOLE, 0.1, 1e-8), (backward.CONSTANT, 0.1 * loss_ratio, drift))
        for seed in SEEDS
        for step in (50, 90, 100)
    ]
    search = [{"arm": arm, "lr": 0.1, "score": 1.0, "chosen": 0.1, "at_edge": False}
              for arm in (backward.WHOLE, backward.CONSTANT)]  # fmt: skip
    runs, tuning = pd.DataFrame(rows), pd.DataFrame(search)
    return {"instances": checks(backward.CHECKS), "runs": runs, "tuning": tuning}


def test_c37_on_its_own_experiment(stored: Stored, draw: Draw) -> None:
    tables = backward.evidence(Lab(), 3, small_splits(), backward.Sizes(seeds=2, steps=20, batch=40))
    assert (tables["instances"].error < 1e-9).all()
    runs = tables["runs"]
    assert len(runs) == 2 * 2 * 2
    drift = runs[runs.step == 20].groupby("arm").drift.max()
    assert drift[backward.WHOLE] < 1e-5 < drift[backward.CONSTANT]
    assert np.isfinite(runs.loss).all()
    assert set(verdicts(C37, stored(tables)).values()) == {UNDECIDED}
    draw(C37, tables)


def test_c37_needs_the_identities_and_one_of_the_consequences(draw: Draw) -> None:
    assert overall(C37, biased_runs()) is HOLDS
    assert overall(C37, biased_runs(loss_ratio=0.5)) is HOLDS  # the drift is enough
    assert overall(C37, biased_runs(drift=1e-8)) is HOLDS  # the loss is enough
    assert overall(C37, biased_runs(loss_ratio=0.5, drift=1e-8)) is MIXED
    wrong = biased_runs()
    assert overall(C37, wrong | {"instances": checks(backward.CHECKS, error=1e-3)}) is MIXED
    draw(C37, biased_runs())


def test_c37_takes_divergence_for_a_higher_loss(stored: Stored, draw: Draw) -> None:
    tables = biased_runs()
    runs = tables["runs"]
    tables["runs"] = changed(runs, runs.arm == backward.CONSTANT, loss=math.inf, drift=math.inf)
    found = verdicts(C37, stored(tables))
    assert [found[name] for name in (backward.LOSS, backward.DRIFT)] == [HOLDS, HOLDS]
    draw(C37, tables)
    tables["runs"] = runs.assign(loss=math.inf)  # nobody wins where both diverge
    assert verdicts(C37, tables)[backward.LOSS] is not HOLDS


def test_c37_keeps_members_that_diverge(monkeypatch: pytest.MonkeyPatch) -> None:
    search = Tuning(1e30, False, pd.DataFrame({"lr": [1e30], "score": [1.0]}))
    monkeypatch.setattr(backward, "tune", lambda *args: search)
    runs, _ = backward.arm(backward.WHOLE, small_splits(), backward.Sizes(seeds=2, steps=20, batch=40))
    assert runs.seed.tolist() == [0, 1, 0, 1]
    assert (runs.loss == math.inf).all()
    assert (runs.drift == math.inf).all()


# -- C44 -----------------------------------------------------------------------------------------------


def at_test_time(gap: float = 0.0, averaged: float = 0.0) -> Tables:
    """Batches of 32 are ``gap`` points worse than the population's statistics, larger ones as good."""
    rows = []
    for seed in SEEDS:
        base = 0.95 + 0.001 * seed
        rows += [
            {"seed": seed, "statistics": name, "batch": 0, "accuracy": base - loss / 100}
            for name, loss in (("moving average", averaged), ("algorithm 2", 0.0), ("exact", 0.0))
        ]
        rows += [
            {"seed": seed, "statistics": "batch", "batch": b, "accuracy": base - loss / 100}
            for b, loss in ((2, 40.0), (16, 3.0), (32, gap), (500, 0.05))
        ]
    apart = pd.DataFrame({"seed": [0], "layer": [1], "mean": [0.01], "variance": [0.02]})
    return {"instances": checks(inference.CHECKS), "accuracy": pd.DataFrame(rows), "averages": apart}


def test_c44_on_its_own_experiment(stored: Stored, draw: Draw) -> None:
    sizes = inference.Sizes(seeds=2, steps=10, draws=2, batch=40)
    tables = inference.evidence(Lab(), 4, small_splits(), sizes)
    assert (tables["instances"].error < 1e-9).all()
    table = tables["accuracy"]
    assert len(table) == 2 * (3 + len(inference.SIZES))
    assert table.accuracy.between(0, 1).all()
    verdicts(C44, stored(tables))
    draw(C44, tables)


def test_c44_judges_large_batches_only(draw: Draw) -> None:
    assert overall(C44, at_test_time()) is HOLDS
    found = verdicts(C44, at_test_time(gap=1.0))
    assert [n for n, v in found.items() if v is FAILS] == [
        "batches of 32 do as well as the population's statistics"
    ]
    assert overall(C44, at_test_time(gap=1.0)) is MIXED
    assert verdicts(C44, at_test_time(averaged=2.0))[inference.AVERAGES] is FAILS
    assert overall(C44, at_test_time(averaged=2.0)) is HOLDS  # context
    broken = at_test_time() | {"instances": checks(inference.CHECKS, error=1e-3)}
    assert overall(C44, broken) is MIXED
    draw(C44, at_test_time())


def test_c44_batches_are_normalised_by_themselves() -> None:
    g = torch.Generator().manual_seed(0)
    model = with_batchnorm(mlp(4, 8, 3)()).train()
    x, y = torch.randn(12, 4, generator=g), torch.arange(12) % 3
    found = inference.by_batches(model, x, y, 12, 5, 0)
    assert found == inference.accuracy(model(x), y)
    halves = inference.by_batches(model, x, y, 6, 3, 0)
    wanted = []
    for draw_ in range(3):
        order = torch.randperm(12, generator=inference.generator(0, "test batches", draw_))
        outputs = torch.cat([model(x[part]) for part in order.split(6)])
        wanted.append(inference.accuracy(outputs, y[order]))
    assert halves == pytest.approx(np.mean(wanted))


# -- C46 -----------------------------------------------------------------------------------------------


def moved(more: int, gain: float = 2.0) -> Tables:
    """γ and β put more inputs into the linear regime in ``more`` of ten seeds."""
    placed = [
        {"activation": a, "seed": s, "layer": 1, "linear_before": 0.26, "active_before": 0.5}
        | {"linear_after": 0.3 if s < more else 0.2, "active_after": 0.5, "weight": 1.5, "bias": 0.5}
        for a in affine.LOWER
        for s in SEEDS
    ]
    ends, search = [], []
    for a in affine.LOWER:
        for with_affine, loss in ((True, 0.1), (False, 0.1 * gain)):
            named = {"arm": f"{a} {with_affine}", "activation": a, "affine": with_affine}
            ends += [
                {"seed": s, "train_loss": loss * (1 + s / 100), "test_accuracy": 0.9} | named for s in SEEDS
            ]
            search += [{"lr": lr, "score": 1.0, "chosen": 0.1, "at_edge": False} | named for lr in (0.1, 1.0)]
    density = [
        {"activation": "sigmoid", "layer": 1, "stage": stage, "s": s, "density": 0.1}
        for stage in ("before", "after")
        for s in (-1.0, 0.0, 1.0)
    ]
    tables = {"ends": ends, "tuning": search, "places": placed, "densities": density}
    instances = pd.DataFrame({"instance": range(120), "error": 1e-15})
    return {"instances": instances} | {n: pd.DataFrame(rows) for n, rows in tables.items()}


def test_c46_on_its_own_experiment(stored: Stored, draw: Draw) -> None:
    tables = affine.evidence(Lab(), 4, small_splits(), affine.Sizes(seeds=2, steps=10, batch=40))
    assert (tables["instances"].error < 1e-12).all()
    places = tables["places"]
    assert len(places) == 2 * 2 * 2
    assert places.linear_before.between(0.1, 0.5).all()
    sums = tables["densities"].groupby(["activation", "layer", "stage"]).density.sum()
    assert np.allclose(sums, 1)
    assert len(tables["ends"]) == 2 * 2 * 2
    verdicts(C46, stored(tables))
    draw(C46, tables)


@pytest.mark.parametrize(("more", "wanted"), [(10, HOLDS), (8, HOLDS), (7, UNDECIDED), (0, FAILS)])
def test_c46_counts_the_seeds_of_the_notes_direction(more: int, wanted: str) -> None:
    assert verdicts(C46, moved(more))[affine.TOWARDS] is wanted


def test_c46_needs_the_identity_and_the_direction(draw: Draw) -> None:
    assert overall(C46, moved(10)) is HOLDS
    assert overall(C46, moved(0)) is MIXED
    worse = moved(10, gain=0.5)
    assert verdicts(C46, worse)[affine.LOWER["sigmoid"]] is FAILS
    assert overall(C46, worse) is HOLDS  # context
    off = moved(10)
    assert overall(C46, off | {"instances": off["instances"].assign(error=1e-6)}) is MIXED
    draw(C46, moved(0))


def test_c46_counts_a_diverged_arm_as_the_worse() -> None:
    tables = moved(10)
    ends = tables["ends"]
    tables["ends"] = changed(ends, ~ends.affine, train_loss=math.nan)
    assert verdicts(C46, tables)[affine.LOWER["relu"]] is HOLDS
    tables["ends"] = ends.assign(train_loss=math.nan)
    assert verdicts(C46, tables)[affine.LOWER["relu"]] is not HOLDS
