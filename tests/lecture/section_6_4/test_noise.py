"""C48 and C49: planted evidence of every outcome, and the experiments in miniature."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tests.lecture.evidence import FAILS, HOLDS, MIXED, UNDECIDED, Draw, Stored, Tables, overall, verdicts

from losslab.layers import he
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_4 import noise
from losslab.lecture.section_6_4.noise import ARMS, BETTER, C48, C49, EVALUATED, TRAINING
from losslab.lecture.section_6_4.runs import FEW, NOISY, NORMALISED, STANDARD, Setting
from losslab.tasks import mlp

NAMES = [arm.name for arm in ARMS]


def seeds_of(arm: str, seeds: int) -> range:
    return range(min(seeds, FEW) if arm in NAMES[3:] else seeds)


# -- C48 ------------------------------------------------------------------------------------------------


def drifts(values: list[float], seeds: int = 10) -> Tables:
    """Mean drift of the standard network, of batch norm, and of batch norm with noise x1, x2, x4."""
    rows = [
        {"network": "net", "arm": arm, "seed": seed, "layer": layer, "epoch": epoch, "least": 10, "note": ""}
        | {"drift": np.nan if epoch < 1 else value * (1 + seed / 100)}
        for arm, value in zip(NAMES, values, strict=True)
        for seed in seeds_of(arm, seeds)
        for layer in (1, 2)
        for epoch in (0.125, 1.125, 2.125)
    ]
    table = pd.DataFrame(rows)
    kept = table[table["seed"] == 0].drop(columns=["drift", "seed"])
    return {"looks": table, "samples": pd.concat([kept.assign(value=v) for v in np.linspace(-2, 2, 20)])}


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.05, 0.01, 0.20, 0.30, 0.40], HOLDS),
        ([0.05, 0.01, 0.20, 0.01, 0.01], HOLDS),  # the multiples are context
        ([0.50, 0.01, 0.20, 0.90, 0.90], MIXED),  # the standard network drifts more
        ([0.05, 0.10, 0.20, 0.90, 0.90], MIXED),  # twice batch norm's
        ([0.50, 0.10, 0.20, 0.90, 0.90], FAILS),
    ],
)
def test_c48(values: list[float], verdict: str, stored: Stored, draw: Draw) -> None:
    tables = stored(drifts(values))
    assert overall(C48, tables) is verdict
    draw(C48, tables)


def test_c48_estimates_are_ratios_of_the_same_seeds() -> None:
    findings = C48.judge(drifts([0.05, 0.01, 0.20, 0.30, 0.40]))
    estimates = np.exp2([finding.estimate for finding in findings])
    assert estimates == pytest.approx([20, 4, 30, 6, 40, 8])
    assert [finding.n for finding in findings] == [10, 10, 5, 5, 5, 5]


def test_c48_few_seeds_are_undecided_and_divergence_is_drift() -> None:
    assert overall(C48, drifts([0.05, 0.01, 0.20, 0.30, 0.40], seeds=9)) is UNDECIDED
    tables = drifts([0.05, 0.01, 0.20, 0.30, 0.40])
    standard = (tables["looks"]["arm"] == STANDARD.name) & (tables["looks"]["epoch"] > 1)
    tables["looks"].loc[standard, "drift"] = np.nan  # has diverged
    assert overall(C48, tables) is MIXED


# -- C49 ------------------------------------------------------------------------------------------------


def accuracies(values: list[float], evaluated: list[float] | None = None, seeds: int = 10) -> Tables:
    """Mean accuracy of the standard network, of batch norm, and of batch norm with noise x1, x2, x4."""
    rows = [
        {"network": "net", "mode": mode, "arm": arm, "seed": seed, "step": 8 * epoch, "epoch": float(epoch)}
        | {"accuracy": 0.1 if epoch == 0 else value - seed / 1000, "least": 10, "note": ""}
        for mode, of_arms in ((TRAINING, values), (EVALUATED, evaluated or values))
        for arm, value in zip(NAMES, of_arms, strict=True)
        for seed in seeds_of(arm, seeds)
        for epoch in range(4)
    ]
    return {"accuracies": pd.DataFrame(rows)}


@pytest.mark.parametrize(
    ("values", "evaluated", "verdict"),
    [
        ([0.80, 0.96, 0.95, 0.94, 0.90], None, HOLDS),
        ([0.80, 0.96, 0.95, 0.20, 0.10], None, HOLDS),  # the multiples are context
        ([0.80, 0.96, 0.90, 0.90, 0.90], None, MIXED),  # better than standard, but not almost as good
        ([0.80, 0.96, 0.70, 0.70, 0.70], None, FAILS),
        ([0.80, 0.96, 0.95, 0.94, 0.90], [0.80, 0.96, 0.70, 0.70, 0.70], MIXED),  # the modes disagree
        ([0.95, 0.96, 0.96, 0.96, 0.96], None, UNDECIDED),  # batch norm gains one point
    ],
)
def test_c49(
    values: list[float], evaluated: list[float] | None, verdict: str, stored: Stored, draw: Draw
) -> None:
    tables = stored(accuracies(values, evaluated))
    assert overall(C49, tables) is verdict
    draw(C49, tables)


def test_c49_says_when_it_cannot_be_tested_and_needs_every_seed() -> None:
    assert "not testable here" in C49.judge(accuracies([0.95, 0.96, 0.96, 0.96, 0.96]))[0].note
    tables = accuracies([0.80, 0.96, 0.95, 0.94, 0.90])
    table = tables["accuracies"]
    one = (table["arm"] == NOISY[0].name) & (table["seed"] == 3) & (table["mode"] == TRAINING)
    table.loc[one, "accuracy"] = np.nan  # has diverged
    found = verdicts(C49, tables)
    assert found[f"{NOISY[0].name}: {BETTER}, net, {TRAINING}"] is FAILS
    assert found[f"{NOISY[0].name}: {BETTER}, net, {EVALUATED}"] is HOLDS
    assert overall(C49, accuracies([0.80, 0.96, 0.95, 0.94, 0.90], seeds=6)) is UNDECIDED


def test_c48_and_c49_in_miniature(monkeypatch: pytest.MonkeyPatch, stored: Stored, draw: Draw) -> None:
    tiny = Setting("tiny", he().on(mlp(64, 8, 6, 10)), "digits", None, 3, 4, 3, 10, 40, 300)
    monkeypatch.setattr(noise, "settings", lambda lab: [tiny])
    for claim in (C48, C49):
        tables = stored(claim.experiment(Lab()))
        assert len(claim.judge(tables)) == (6 if claim is C48 else 8)
        draw(claim, tables)
    modes = tables["accuracies"].groupby("mode")["epoch"].max()
    assert modes.to_dict() == {TRAINING: pytest.approx(2 + 1 / 3), EVALUATED: 3.0}
    assert set(tables["accuracies"]["arm"]) == set(NAMES)
    assert NORMALISED.name in NAMES
