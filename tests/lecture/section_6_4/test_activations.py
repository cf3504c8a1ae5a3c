"""C40, C41 and C47: planted looks of every outcome, and the experiments in miniature."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from tests.lecture.evidence import FAILS, HOLDS, MIXED, UNDECIDED, Draw, Stored, Tables, overall, verdicts

from losslab.layers import he
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_4 import activations, sigmoid_runs
from losslab.lecture.section_6_4.activations import ACTIVE, C40, C41, C47, EXACT, LINKED, OTHERS, STABLE
from losslab.lecture.section_6_4.runs import NORMALISED, STANDARD, Setting
from losslab.lecture.section_6_4.sigmoid_runs import GAUSSIAN, OWN, XAVIER
from losslab.lecture.section_6_4.sigmoid_runs import NORMALISED as NORM
from losslab.tasks import mlp

PAIRS = [(GAUSSIAN, OWN), (XAVIER, OWN), (NORM, OWN), (NORM, GAUSSIAN), (NORM, XAVIER)]


def looks(values: dict[tuple[str, str], float], column: str, seeds: int = 10) -> pd.DataFrame:
    """Looks in which one column has a given mean for each (network, whose rate); all others are alike."""
    rows = [
        {"network": network, "rated": rated, "seed": seed, "member": seed, "layer": layer, "step": step}
        | {"drift": 0.1, "drift_normalised": 0.1, "wasserstein": 0.1, "saturated": 0.1}
        | {"p15": -1.0, "p50": 0.0, "p85": 1.0, "mean": 0.2, "variance": 1.5}
        | {"mean_error": 1e-15, "variance_error": 2e-15, column: value * (1 + seed / 100)}
        for (network, rated), value in values.items()
        for seed, layer, step in itertools.product(range(seeds), (1, 2, 3), (1, 101, 201, 301))
    ]
    return pd.DataFrame(rows)


# -- C40 ------------------------------------------------------------------------------------------------


def saturation(
    gaussian: float, xavier: float, normalised: float, seeds: int = 10, link: float = -1.0
) -> Tables:
    """Saturated shares; without batch norm the next fall of the loss goes with them as ``link`` says."""
    table = looks(
        {(GAUSSIAN, OWN): gaussian, (XAVIER, OWN): xavier, (NORM, OWN): normalised}, "saturated", seeds
    )
    table["saturated"] *= table["step"].map({1: 1.0, 101: 0.9, 201: 1.1, 301: 1.0})
    falls = np.exp(-np.array([0.0, 2.0 + link, 4.0]))  # of the loss, to each look
    curves = [
        {"network": network, "seed": seed, "step": step, "loss": falls[k], "least": 10}
        for network in (GAUSSIAN, XAVIER, NORM)
        for seed in range(seeds)
        for k, step in enumerate((0, 100, 200))
    ]
    return {"looks": table, "curves": pd.DataFrame(curves)}


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [
        ((0.4, 0.2, 0.05), HOLDS),
        ((0.4, 0.2, 0.0), HOLDS),  # nothing is saturated with batch norm
        ((0.4, 0.06, 0.05), MIXED),
        ((0.06, 0.06, 0.05), FAILS),
        ((0.05, 0.05, 0.3), FAILS),
        ((0.0, 0.0, 0.0), UNDECIDED),
    ],
)
def test_c40(shares: tuple[float, float, float], verdict: str, stored: Stored) -> None:
    assert overall(C40, stored(saturation(*shares))) is verdict


def test_c40_names_estimates_and_draws(draw: Draw) -> None:
    tables = saturation(0.4, 0.06, 0.05)
    findings = {finding.name: finding for finding in C40.judge(tables)}
    assert findings[ACTIVE[GAUSSIAN]].estimate == pytest.approx(3.0)
    assert findings[ACTIVE[XAVIER]].verdict is FAILS
    assert overall(C40, saturation(0.4, 0.2, 0.05, seeds=6)) is UNDECIDED
    draw(C40, tables)


@pytest.mark.parametrize(("link", "verdict"), [(-1.0, HOLDS), (1.0, FAILS)])
def test_c40_progress_is_context(link: float, verdict: str) -> None:
    tables = saturation(0.4, 0.2, 0.05, link=link)
    assert verdicts(C40, tables)[LINKED] is verdict
    assert overall(C40, tables) is HOLDS


# -- C41 ------------------------------------------------------------------------------------------------


def drifting(values: list[float], column: str = "drift", seeds: int = 10) -> Tables:
    return {"looks": looks(dict(zip(PAIRS, values, strict=True)), column, seeds).assign(least=10)}


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.8, 0.4, 0.05, 0.1, 0.1], HOLDS),
        ([0.8, 0.4, 0.05, 0.1, 0.3], MIXED),  # at Xavier's rate not half
        ([0.1, 0.1, 0.1, 0.1, 0.1], MIXED),  # the identity alone
    ],
)
def test_c41_drift(values: list[float], verdict: str, stored: Stored, draw: Draw) -> None:
    tables = stored(drifting(values))
    assert overall(C41, tables) is verdict
    draw(C41, tables)


def test_c41_other_measures_are_context() -> None:
    for column, prefix in OTHERS.items():
        tables = drifting([0.8, 0.4, 0.05, 0.1, 0.1], column)
        tables["looks"].loc[tables["looks"]["network"] != NORM, "drift"] = 0.8
        found = verdicts(C41, tables)
        names = [prefix + name for name in STABLE.values()]
        # The standard networks have nothing before gamma and beta: their plain drift, 0.8, stands there.
        assert {found[name] for name in names} == {HOLDS}
        assert overall(C41, tables) is HOLDS


@pytest.mark.parametrize("column", ["mean_error", "variance_error"])
def test_c41_one_look_with_other_moments_is_enough(column: str) -> None:
    tables = drifting([0.8, 0.4, 0.05, 0.1, 0.1])
    here = tables["looks"].index[(tables["looks"]["network"] == NORM) & (tables["looks"]["rated"] == OWN)]
    tables["looks"].loc[here[7], column] = 1e-6
    assert verdicts(C41, tables)[EXACT] is FAILS
    assert overall(C41, tables) is MIXED


def test_c41_at_another_rate_compares_the_updates_that_both_have() -> None:
    tables = drifting([0.8, 0.4, 0.05, 0.1, 0.1])
    table = tables["looks"]
    late = (table["network"] == GAUSSIAN) & (table["step"] > 101)
    table.loc[late, "drift"] = 1e-9  # would halve the baseline's drift
    short = (table["network"] == NORM) & (table["rated"] == GAUSSIAN) & (table["step"] > 101)
    found = {finding.name: finding for finding in C41.judge({"looks": table[~short]})}
    assert found[STABLE[GAUSSIAN, GAUSSIAN]].estimate == pytest.approx(3.0)
    assert found[STABLE[GAUSSIAN, OWN]].estimate == pytest.approx(4.0 + np.log2(2 / 4))


def test_c40_and_c41_in_miniature(monkeypatch: pytest.MonkeyPatch, stored: Stored, draw: Draw) -> None:
    tiny = sigmoid_runs.Setting("digits", 64, 0.3, 40, 20, 10, 2, 10)
    monkeypatch.setattr(sigmoid_runs, "setting_of", lambda lab: tiny)
    monkeypatch.setattr(sigmoid_runs, "LOOK", 10)
    for claim in (C40, C41):
        tables = stored(claim.experiment(Lab()))
        assert overall(claim, tables) in (UNDECIDED, MIXED)  # two seeds
        draw(claim, tables)
    assert set(tables["looks"]["rated"]) == {OWN, GAUSSIAN, XAVIER}


# -- C47 ------------------------------------------------------------------------------------------------


def networks(ratios: dict[str, list[float]], seeds: int = 10) -> Tables:
    """Drift of layers 2, 3, ... without batch norm over that with it."""
    rows = [
        {
            "network": network,
            "arm": arm.name,
            "seed": seed,
            "layer": layer,
            "epoch": epoch,
            "least": 10,
            "note": "",
        }
        # Before the second epoch, and in the first layer, everything drifts; neither counts.
        | {"drift": 50.0 if epoch < 2 or layer == 1 else 0.01 * (ratio if arm is STANDARD else 1.0)}
        for network, of_layers in ratios.items()
        for arm in (STANDARD, NORMALISED)
        for seed in range(seeds)
        for layer, ratio in enumerate([100.0, *of_layers], start=1)
        for epoch in (0.125, 1.125, 2.125, 3.125)
    ]
    table = pd.DataFrame(rows)
    kept = table[table["seed"] == 0].drop(columns=["drift", "seed"])
    samples = pd.concat([kept.assign(value=value, step=1) for value in np.linspace(-2, 2, 20)])
    return {"looks": table, "samples": samples}


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.0, 1.5, 1.9, 9.0], HOLDS),
        ([0.1, 0.1, 0.1, 0.1], HOLDS),
        ([1.0, 1.5, 3.0, 4.0], MIXED),  # half of the layers are no majority
        ([6.0, 6.0, 6.0, 4.0], FAILS),
        ([6.0, 6.0, 4.0, 4.0], MIXED),
        ([np.nan, np.nan, np.nan, 1.0], FAILS),  # the standard network has diverged
    ],
)
def test_c47(ratios: list[float], verdict: str, stored: Stored, draw: Draw) -> None:
    tables = stored(networks({"net": ratios}))
    assert overall(C47, tables) is verdict
    draw(C47, tables)


def test_c47_networks_must_agree_and_seeds_suffice(draw: Draw) -> None:
    tables = networks({"mlp": [1.0, 1.0], "vgg": [9.0, 9.0]})
    assert list(verdicts(C47, tables).values()) == [HOLDS, FAILS]
    assert overall(C47, tables) is MIXED
    assert overall(C47, networks({"net": [1.0, 1.0]}, seeds=9)) is UNDECIDED
    draw(C47, tables)


def test_c47_in_miniature(monkeypatch: pytest.MonkeyPatch, stored: Stored, draw: Draw) -> None:
    tiny = Setting("tiny", he().on(mlp(64, 8, 6, 10)), "digits", None, 4, 8, 2, 10, 40, 300)
    monkeypatch.setattr(activations, "settings", lambda lab: [tiny])
    tables = stored(C47.experiment(Lab()))
    assert overall(C47, tables) is UNDECIDED
    draw(C47, tables)
