"""C28 to C30: the experiments at small sizes, the judges on planted evidence, the figures from parquet."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from tests.lecture.evidence import (
    FAILS,
    HOLDS,
    MIXED,
    UNDECIDED,
    Draw,
    Races,
    Stored,
    Tables,
    overall,
    verdicts,
)

from losslab.lecture.claim import Verdict
from losslab.lecture.section_6_3 import adam, adam_practice, adam_race
from losslab.lecture.section_6_3.adam_race import Arm, Budget
from losslab.rules import SGD, Adam
from losslab.tasks import digits_task, logistic_regression


def test_the_claims_come_in_order() -> None:
    assert [claim.id for claim in adam.CLAIMS] == ["C28", "C29", "C30", "C31", "C32"]
    assert all(claim.section == "6.3.3" and claim.caveats for claim in adam.CLAIMS)


# -- C28 -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(races: Races) -> Tables:
    practice = races({adam.WITH: 1.0, adam.WITHOUT: 2.0}, ("MLP",))
    return {
        "identities": adam.identities(instances=100, steps=12),
        "limit": adam.limit(instances=60, steps=20),
        "steps": adam.constant_gradient(instances=100, steps=40),
        "paths": adam.trajectories(steps=30),
        "grid": adam.correction_grid(seeds=1, budget=Budget(1, 500)),
        "printed": adam.printed_on_digits(2),
        **practice,
    }


def test_c28_on_its_own_experiment(parts: Tables, stored: Stored, draw: Draw) -> None:
    found = verdicts(adam.C28, stored(parts))
    failing = {adam.PRINTED, "the update as printed trains the digits"}
    assert {name for name, verdict in found.items() if verdict is FAILS} == failing
    assert set(found.values()) == {HOLDS, FAILS}
    assert overall(adam.C28, parts) is MIXED
    draw(adam.C28, parts)


def test_c28_holds_only_if_the_printed_update_were_adam(parts: Tables, races: Races) -> None:
    same = parts["identities"].assign(error=lambda t: t["error"].where(t["identity"] != adam.PRINTED, 0.0))
    alive = parts["printed"].assign(diverged=-1)
    fixed = parts | {"identities": same, "printed": pd.concat([alive, alive])}
    assert overall(adam.C28, fixed) is HOLDS
    worse = races({adam.WITH: 2.0, adam.WITHOUT: 1.0}, ("MLP",))
    assert overall(adam.C28, fixed | worse) is HOLDS, "practice has no part in the verdict"


@pytest.mark.parametrize("name", [adam.PARTS, adam.TORCH, adam.NO_MOMENTUM, adam.ADAGRAD])
def test_c28_one_counter_instance_is_enough(parts: Tables, name: str) -> None:
    broken = parts["identities"].copy()
    broken.loc[broken.index[broken["identity"] == name][7], "error"] = 1e-6
    assert verdicts(adam.C28, parts | {"identities": broken})[name] is FAILS


def test_c28_a_limit_of_another_order_does_not_hold(parts: Tables) -> None:
    slower = parts["limit"].assign(error=lambda t: np.sqrt(t["error"]))
    found = verdicts(adam.C28, parts | {"limit": slower})
    assert found["as β₂ → 1 it nears AdaGrad like 1 − β₂ (β₁ = 0, α/√t)"] is FAILS


def test_the_printed_step_has_its_known_sizes() -> None:
    steps = adam.constant_gradient(instances=3, steps=1000).set_index("step")["printed"]
    sizes = [round(steps[t], 2) for t in (1.0, 12.0, 100.0, 1000.0)]
    assert sizes == [3.16, 6.57, 3.24, 1.26]
    assert steps.idxmax() == 12


def test_every_path_stays_in_the_picture_and_descends() -> None:
    for _, path in adam.trajectories(steps=60).groupby("rule"):
        assert len(path) == 61
        assert path["x"].between(-2, 2).all()
        assert path["y"].between(-1, 3).all()
        assert path["f"].iloc[-1] < path["f"].iloc[0] / 3


# -- C29 -----------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_signatures() -> None:
    entries = [
        *adam_practice.ENTRIES[:2],
        adam_practice.Entry("absent", "no_such_package_here", "Model", "optimizer"),
        adam_practice.Entry("json", "json", "dumps", "skipkeys"),
        adam_practice.Entry("renamed", "json", "gone", "skipkeys"),
    ]
    table = adam_practice.defaults(entries)
    assert table["default"].tolist() == ["none", "adam", "", "False", ""]
    assert table["installed"].tolist() == [True, True, False, True, True]
    assert table["adam"].tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("defaults", "verdict"),
    [
        (["none", "adam"], UNDECIDED),
        (["none", "adam", ""], UNDECIDED),
        (["none", "adam", "adamw_torch"], HOLDS),
        (["none", "adam", "rmsprop"], FAILS),
        (["none", "adam", "adam", "sgd"], FAILS),
        ([], UNDECIDED),
    ],
)
def test_c29(defaults: list[str], verdict: Verdict, stored: Stored) -> None:
    rows = [(f"p{i}", "place", name != "", name, "adam" in name) for i, name in enumerate(defaults)]
    table = pd.DataFrame(rows, columns=["package", "place", "installed", "default", "adam"])
    table = table.astype({"installed": bool, "adam": bool})
    assert overall(adam.C29, stored({"defaults": table})) is verdict


# -- races and C30 ---------------------------------------------------------------------------------------


def small(rule: Callable[..., SGD | Adam], grid: list[float]) -> Arm:
    return Arm(rule.__name__, lambda lr: rule(lr=lr), grid)


def test_a_race_pairs_fresh_seeds_at_the_tuned_rates() -> None:
    grid = [10.0**k for k in np.arange(-2.0, 0.5, 0.5)]
    arms = [small(Adam, [lr / 10 for lr in grid]), small(SGD, grid)]
    task = adam_race.digits(logistic_regression(64, 10))
    runs, tuning = adam_race.race(task, arms, Budget(2, 250), seeds=3, tuning_seeds=2)
    assert len(runs) == 2 * 2 * 3 * 3  # arms, measures, seeds, epochs 0 to 2
    start = runs[runs["epoch"] == 0].groupby("seed")["train_loss"]
    assert (start.nunique() == 1).all()
    assert start.first().nunique() == 3
    for (arm, tuned), search in tuning.groupby(["arm", "tuned"]):
        best = search.loc[search["score"].idxmin(), "lr"]
        chosen = runs[(runs["arm"] == arm) & (runs["tuned"] == tuned)]["lr"]
        assert set(chosen) == {best}
    ends = adam_race.finals(runs, "validation")
    assert list(ends) == ["Adam", "SGD"]
    assert (ends["Adam"] < start.first()).all()


def test_a_run_that_diverges_has_an_infinite_loss() -> None:
    task = adam_race.digits()
    population = adam_race.trained(task, SGD(lr=[0.1, 1e30]), [0, 0], Budget(1, 500), "epoch", ("train",))
    loss = adam_race.last(population, "train_loss")
    assert torch.isfinite(loss).tolist() == [True, False]
    assert loss[1] == math.inf


def test_the_ridge_is_half_the_square_over_n() -> None:
    plain = digits_task(logistic_regression(64, 10))
    task = adam_race.ridged(plain)
    model = task.model()
    assert task.train is not None
    batch = task.train.head(7).all()
    square = sum(w.detach().double().square().sum().item() for w in model.parameters())
    expected = plain.loss(model, batch).item() + square / 2000
    assert task.loss(model, batch).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ({"Adam": 1.0, "SGD": 1.2, "AdaGrad": 1.5}, HOLDS),
        ({"Adam": 1.0, "SGD": 0.97, "AdaGrad": 1.5}, HOLDS),
        ({"Adam": 1.0, "SGD": 0.9, "AdaGrad": 1.5}, MIXED),
        ({"Adam": 1.0, "SGD": 0.7, "AdaGrad": 0.8}, FAILS),
        ({"Adam": 1.0, "SGD": math.inf, "AdaGrad": math.inf}, HOLDS),
        ({"Adam": math.inf, "SGD": 0.7, "AdaGrad": 0.8}, FAILS),
    ],
)
def test_c30(losses: dict[str, float], verdict: Verdict, stored: Stored, races: Races) -> None:
    tables = races(losses, ("logistic regression", "MLP with dropout"))
    assert overall(adam.C30, stored(tables)) is verdict


def test_c30_needs_ten_seeds_and_draws(draw: Draw, races: Races) -> None:
    losses = {"Adam": 1.0, "SGD": 1.2, "AdaGrad": 1.5}
    assert overall(adam.C30, races(losses, ("MLP with dropout",), seeds=9)) is UNDECIDED
    draw(adam.C30, races(losses, ("logistic regression", "MLP with dropout")))
