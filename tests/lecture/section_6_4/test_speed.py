"""C39: planted times of every outcome, the very deep networks, and the experiment in miniature."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from tests.lecture.evidence import FAILS, HOLDS, MIXED, UNDECIDED, Draw, Stored, Tables, overall, verdicts
from torch import nn

from losslab.engine import randomness
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_4 import sigmoid_runs, speed
from losslab.lecture.section_6_4.sigmoid_runs import GAUSSIAN, NORMALISED, OWN, XAVIER
from losslab.lecture.section_6_4.speed import C39, DEEP, NAMES
from losslab.tasks import digits, supervised

Times = dict[tuple[str, str], float]


def planted(times: Times, seeds: int = 10, deep: tuple[float, float] = (0.3, 0.6), edge: str = "") -> Tables:
    """Accuracy curves that reach 0.9 at given steps, a little later with every seed."""
    rows = [
        {"network": network, "rated": rated, "lr": 0.1, "seed": seed, "member": seed, "step": step}
        | {"test_accuracy": 0.95 if step >= time + 10 * seed else 0.5, "test_loss": 1.0, "loss": 1.0}
        for (network, rated), time in times.items()
        for seed in range(seeds)
        for step in range(0, 2001, 10)
    ]
    curves = pd.DataFrame(rows).assign(data="digits", target=0.9, least=10)
    networks = [GAUSSIAN, XAVIER, NORMALISED]
    tuning = pd.DataFrame({"network": networks, "lr": 0.1, "score": 1.0})
    tuning["at_edge"] = tuning["network"] == edge
    ends = [
        {"network": name, "seed": seed, "accuracy": accuracy + seed / 1000, "lr": 0.1, "at_edge": False}
        for name, accuracy in zip(("standard", NORMALISED), deep, strict=True)
        for seed in range(5)
    ]
    start = [
        {"network": name, "seed": seed, "layer": layer, "gradient": 2.0 ** (3 - layer)}
        for name in ("standard", NORMALISED)
        for seed in range(5)
        for layer in (1, 2, 3)
    ]
    deep_table = pd.DataFrame(ends).assign(steps=200)
    return {"curves": curves, "tuning": tuning, "deep": deep_table, "start": pd.DataFrame(start)}


FAST: Times = {
    (GAUSSIAN, OWN): 1000, (XAVIER, OWN): 600, (NORMALISED, OWN): 100,
    (NORMALISED, GAUSSIAN): 200, (NORMALISED, XAVIER): 100,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, HOLDS),
        ({(NORMALISED, XAVIER): 550}, MIXED),
        (dict.fromkeys(FAST, 500), FAILS),
        (
            {(NORMALISED, OWN): math.inf, (NORMALISED, GAUSSIAN): math.inf, (NORMALISED, XAVIER): math.inf},
            FAILS,
        ),
        ({(GAUSSIAN, OWN): math.inf, (XAVIER, OWN): math.inf}, HOLDS),  # the baselines never arrive
        (dict.fromkeys(FAST, math.inf), UNDECIDED),  # nobody does
    ],
)
def test_c39(changes: Times, verdict: str, stored: Stored) -> None:
    assert overall(C39, stored(planted(FAST | changes))) is verdict


def test_c39_names_each_comparison_and_draws(draw: Draw) -> None:
    tables = planted(FAST | {(NORMALISED, XAVIER): 550})
    found = verdicts(C39, tables)
    assert found[NAMES[XAVIER, XAVIER]] is FAILS
    assert found[NAMES[GAUSSIAN, OWN]] is HOLDS
    headline = C39.judge(tables)[0]
    assert headline.estimate == pytest.approx(
        np.median([math.log2((1000 + d) / (100 + d)) for d in range(0, 100, 10)])
    )
    draw(C39, tables)


def test_c39_few_seeds_are_undecided_and_edges_are_told() -> None:
    assert overall(C39, planted(FAST, seeds=6)) is UNDECIDED
    note = C39.judge(planted(FAST, edge=XAVIER))[0].note
    assert f"rate at the edge of its grid: {XAVIER}" in note


@pytest.mark.parametrize(("deep", "verdict"), [((0.3, 0.6), HOLDS), ((0.6, 0.3), FAILS), ((0.3, 0.3), MIXED)])
def test_c39_very_deep_networks_are_context(deep: tuple[float, float], verdict: str) -> None:
    tables = planted(FAST, deep=deep)
    assert verdicts(C39, tables)[DEEP] is verdict
    assert overall(C39, tables) is HOLDS


def test_gradients_at_the_start_are_those_of_the_networks_drawn() -> None:
    data = digits()
    model = speed.he().on(speed.mlp(64, 6, 5, 4, 10))
    task = supervised(model, data.train, data.test)
    table = speed.gradients_at_start(task, 2)
    with randomness.seeded(1, "init"):
        network = model().double()
    x, y = data.test.head(speed.DEEP_BATCH).all()
    flow, outputs = x.double(), []
    for layer in network:
        flow = layer(flow)
        if isinstance(layer, nn.Linear):
            flow.retain_grad()
            outputs.append(flow)
    nn.functional.cross_entropy(flow, y).backward()
    norms = [float(out.grad.norm()) for out in outputs[:3]]
    found = table[table["seed"] == 1].sort_values("layer")["gradient"].to_numpy()
    assert found == pytest.approx(np.array(norms) / norms[-1], rel=1e-9)


def test_c39_in_miniature(monkeypatch: pytest.MonkeyPatch, stored: Stored, draw: Draw) -> None:
    tiny = sigmoid_runs.Setting("digits", 64, 0.3, 60, 40, 10, 2, 10)
    monkeypatch.setattr(sigmoid_runs, "setting_of", lambda lab: tiny)
    monkeypatch.setattr(speed, "DEPTH", 3)
    monkeypatch.setattr(speed, "WIDTH", 8)
    monkeypatch.setattr(speed, "DEEP_SEEDS", 2)
    monkeypatch.setattr(Lab, "pick", lambda self, quick, full=None, paper=None: 5)
    tables = stored(speed.experiment(Lab()))
    assert set(tables["start"]["layer"]) == {1, 2, 3}
    assert overall(C39, tables) is UNDECIDED
    draw(C39, tables)
