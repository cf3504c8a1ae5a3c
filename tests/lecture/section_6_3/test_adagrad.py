"""C22, C23 and C24: AdaGrad's update, its order of rates, and their decay."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from tests.lecture.evidence import FAILS, HOLDS, MIXED, UNDECIDED, Draw, Stored, Tables, overall, verdicts

from losslab.lecture.claim import Verdict
from losslab.lecture.section_6_3 import adagrad, decay, jumping
from losslab.lecture.section_6_3.adagrad import C22, C23
from losslab.lecture.section_6_3.decay import C24
from losslab.rules import GD, AdaGrad, RMSProp
from losslab.tasks import digits_task, mlp

# -- C22 -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def update_parts() -> Tables:
    return {
        "updates": adagrad.updates(100, steps=12),
        "printed": adagrad.as_printed(100),
        "rates": adagrad.two_rates(15),
    }


def test_c22_on_its_own_experiment(update_parts: Tables, stored: Stored, draw: Draw) -> None:
    found = verdicts(C22, stored(update_parts))
    assert [found[name] for name in (adagrad.EQUATION, adagrad.TORCH)] == [HOLDS, HOLDS]
    assert [found[name] for name in (adagrad.FINITE, adagrad.HISTORY)] == [FAILS, FAILS]
    assert overall(C22, update_parts) is MIXED
    draw(C22, update_parts)


def test_c22_would_hold_if_the_printed_formula_were_adagrad(update_parts: Tables) -> None:
    printed = update_parts["printed"]
    proper = printed.assign(finite=True, printed_change=printed.proper_change)
    assert overall(C22, update_parts | {"printed": proper}) is HOLDS


@pytest.mark.parametrize(("column", "name"), [("equation", adagrad.EQUATION), ("torch", adagrad.TORCH)])
def test_c22_one_counter_instance_is_enough(update_parts: Tables, column: str, name: str) -> None:
    broken = update_parts["updates"].copy()
    broken.loc[3, column] = 1e-7
    assert verdicts(C22, update_parts | {"updates": broken})[name] is FAILS


def test_the_printed_formula_is_sign_descent_with_a_rate_of_its_own(update_parts: Tables) -> None:
    rates = update_parts["rates"]
    printed = rates[(rates["update"] == "as printed") & (rates.gradients == "even")]
    # Gradients of size 1 and eta = 1: the rate is 1/sqrt(t - 1).
    assert printed.rate.to_numpy() == pytest.approx(1 / np.sqrt(printed.step - 1))
    assert printed.step.min() == 2


# -- C23 -----------------------------------------------------------------------------------------------


def race_of(adagrad_steps: list[float], sgd_steps: list[float]) -> pd.DataFrame:
    rows = [("AdaGrad", seed, steps) for seed, steps in enumerate(adagrad_steps)]
    rows += [("SGD", seed, steps) for seed, steps in enumerate(sgd_steps)]
    return pd.DataFrame(rows, columns=["arm", "seed", "steps"])


@pytest.fixture(scope="module")
def sparse_parts() -> Tables:
    adagrad_run = adagrad.sparse_runs("AdaGrad", [0.3], 0, steps=40, examples=120, features=12)
    sgd_run = adagrad.sparse_runs("SGD", [1.0], 0, steps=40, examples=120, features=12)
    return {
        "ordering": adagrad.ordering(100, steps=10),
        "steps": race_of([40.0] * 10, [60.0 + k for k in range(10)]),
        "curves": pd.concat([adagrad_run, sgd_run], ignore_index=True),
        "displacements": adagrad.displacements(200, 10),
    }


def test_c23_on_its_own_experiment(sparse_parts: Tables, stored: Stored, draw: Draw) -> None:
    found = verdicts(C23, stored(sparse_parts))
    assert found == {adagrad.ORDER: HOLDS, adagrad.FASTER: HOLDS}
    draw(C23, sparse_parts)


@pytest.mark.parametrize(
    ("steps", "verdict"),
    [
        (race_of([50] * 10, [60 + k for k in range(10)]), HOLDS),
        (race_of([58] * 10, [60 + k for k in range(10)]), FAILS),  # faster, but not by a fifth
        (race_of([70] * 10, [60 + k for k in range(10)]), FAILS),
        (race_of([np.inf] * 10, [60] * 10), FAILS),
        (race_of([60] * 10, [np.inf] * 10), HOLDS),
        (race_of([np.inf] * 10, [np.inf] * 10), UNDECIDED),
        (race_of([40, 90] * 5, [60] * 10), MIXED),
    ],
)
def test_c23_judges_the_race(sparse_parts: Tables, steps: pd.DataFrame, verdict: Verdict) -> None:
    assert verdicts(C23, sparse_parts | {"steps": steps})[adagrad.FASTER] is verdict


def test_c23_one_pair_out_of_order_is_enough(sparse_parts: Tables) -> None:
    broken = sparse_parts["ordering"].copy()
    broken.loc[0, "disagree"] = 1 / 28
    assert overall(C23, sparse_parts | {"ordering": broken}) is MIXED


def test_the_least_loss_of_a_sparse_task_is_its_least_loss() -> None:
    task, least = adagrad.sparse_task(5, 120, 12)
    run = adagrad.train(
        task, GD(lr=2.0), steps=600, record=[600], evaluate=[600], evaluate_on=("train",), progress=False
    )
    reached = run.history.train_loss.iloc[-1]
    assert least - 1e-6 < reached < least + 1e-3


def test_a_race_tunes_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Five rates at most sqrt(10) apart are the least that tuning takes.
    grid = [0.1, 0.3, 0.9, 2.7, 8.1]
    monkeypatch.setattr(adagrad, "ARMS", {"AdaGrad": (AdaGrad, grid), "SGD": (adagrad.SGD, grid)})
    tables = adagrad.race([0, 1], [1000], steps=60, examples=120, features=12)
    assert tables["steps"].groupby("arm").seed.nunique().tolist() == [2, 2]
    assert set(tables["tuning"].arm) == {"AdaGrad", "SGD"}
    first = tables["curves"][tables["curves"].step == 0]
    assert first.excess.to_numpy() == pytest.approx(1.0)


def test_a_target_that_is_not_reached_takes_for_ever() -> None:
    runs = pd.DataFrame({"seed": [0, 0, 1, 1], "step": [0, 10, 0, 10], "excess": [1.0, 0.05, 1.0, 0.5]})
    assert adagrad.steps_needed(runs, "seed").to_dict() == {0: 10, 1: np.inf}


def test_adagrad_moves_rare_features_farther(sparse_parts: Tables) -> None:
    moved = sparse_parts["displacements"]
    rare = moved[moved.frequency < 0.1].groupby("rule").moved.mean()
    common = moved[moved.frequency > 0.2].groupby("rule").moved.mean()
    assert rare["AdaGrad"] > 1.5 * common["AdaGrad"]
    assert rare["SGD"] < 1.5 * common["SGD"]


# -- C24 -----------------------------------------------------------------------------------------------


def network(power: float, update: float, gradient: float, losses: tuple[float, float]) -> pd.DataFrame:
    """Ten seeds whose rate follows a power of the step, and whose norms end at a share of the first."""
    rows = []
    steps = decay.moments(20_000)
    for arm, loss in zip(("AdaGrad", "RMSProp"), losses, strict=True):
        for seed in range(10):
            for step in [*steps, 20_000]:
                done, last = step / 20_000, step == 20_000
                rows.append(
                    {
                        "step": step,
                        "seed": seed,
                        "arm": arm,
                        "train_loss": loss * (1 + seed / 1000),
                        "rate": np.nan if last else (step + 1.0) ** power,
                        "update_norm": np.nan if last else update**done,
                        "gradient_norm": np.nan if last else gradient**done,
                    }
                )
    return pd.DataFrame(rows)


def recovery(tuned: tuple[float, float], default: tuple[float, float]) -> pd.DataFrame:
    rows = [
        {"choice": choice, "lr": 0.1, "jump": jump, "seed": seed, "arm": arm, "steps": steps + seed}
        for choice, pair in (("tuned", tuned), ("default", default))
        for arm, steps in zip(("AdaGrad", "RMSProp"), pair, strict=True)
        for jump in (100, 10_000)
        for seed in range(10)
    ]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def decay_parts() -> Tables:
    return {
        "constant": decay.constant_size(100, 30),
        "rises": decay.rises(100, 20),
        "recovery": recovery((1000, 100), (np.inf, 100)),
        "recovery_trace": jumping.recoveries([0], (20,), horizon=40)["recovery_trace"],
        "network": network(-0.5, 5e-3, 0.5, (1e-2, 1e-4)),
    }


def test_c24_holds_on_gradients_that_stay(decay_parts: Tables, stored: Stored, draw: Draw) -> None:
    findings = C24.judge(stored(decay_parts))
    assert {finding.verdict for finding in findings} == {HOLDS}
    assert C24.combine(findings) is HOLDS
    draw(C24, decay_parts)


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({"network": network(-0.06, 5e-3, 0.5, (1e-2, 1e-4))}, {decay.SLOPE}),
        ({"network": network(-0.5, 5e-3, 1e-2, (1e-2, 1e-4))}, {decay.STOPPED}),
        ({"network": network(-0.5, 5e-2, 0.5, (1e-2, 1e-4))}, {decay.STOPPED}),
        ({"network": network(-0.5, 5e-3, 0.5, (1e-4, 1e-2))}, {decay.WORSE}),
        ({"recovery": recovery((400, 100), (np.inf, 100))}, {decay.RECOVERY}),
        ({"recovery": recovery((1000, 100), (100, 100))}, {decay.DEFAULTS}),
        ({"rises": pd.DataFrame({"rise": [0.0] * 99 + [1e-6]})}, {decay.FALLING}),
        ({"constant": pd.DataFrame({"error": [0.0] * 99 + [1e-6]})}, {decay.EXACT}),
    ],
)
def test_c24_each_part_can_fail(decay_parts: Tables, change: Tables, failing: set[str]) -> None:
    found = verdicts(C24, decay_parts | change)
    assert {name for name, verdict in found.items() if verdict is FAILS} == failing
    context = {decay.WORSE, decay.DEFAULTS, decay.EXACT}
    assert overall(C24, decay_parts | change) is (HOLDS if failing <= context else MIXED)


def test_c24_a_network_that_diverges_has_not_stopped_and_is_worse(decay_parts: Tables) -> None:
    runs = decay_parts["network"].copy()
    lost = (runs.arm == "AdaGrad") & (runs.step > 5000)
    runs.loc[lost, ["train_loss", "rate", "update_norm", "gradient_norm"]] = np.nan
    found = verdicts(C24, decay_parts | {"network": runs})
    assert found[decay.STOPPED] is FAILS
    assert found[decay.WORSE] is HOLDS


def test_the_recorded_rate_is_the_rule_s_own() -> None:
    # After the first step s = g^2, so the update is lr sign(g) and the rate lr/|g|.
    run = decay.long_run("AdaGrad", digits_task(mlp(64, 4, 10)), 0.1, seeds=[0, 1], steps=25)
    assert run.step.max() == 25
    assert np.isfinite(run.train_loss).all()
    first = run[run.step == 0]
    assert first.rate.notna().all()
    # Median over all weights, of which those with a zero gradient have the rate lr/eps.
    assert ((first.rate > 0.1) & (first.rate < 0.1 / 1e-10)).all()
    rates = run[run.rate.notna()].pivot(index="step", columns="seed", values="rate")
    assert (rates.diff().dropna() <= 0).all().all()


def test_runs_on_digits_come_with_their_tuning() -> None:
    tables = decay.network_runs([0, 1], steps=30, tuning_steps=10, width=4)
    assert set(tables["network"].arm) == {"AdaGrad", "RMSProp"}
    tuning = tables["network_tuning"]
    chosen = tuning.loc[tuning.groupby("arm").score.idxmin()].set_index("arm")
    assert np.array_equal(chosen.lr, chosen.chosen)


def test_recovery_counts_from_the_jump() -> None:
    excess = np.array([[9.0, 9.0], [1.0, 8.0], [4.0, 7.0], [0.5, 6.0], [0.3, 5.0], [0.2, 4.0]])
    assert jumping._recovered(excess, np.array([2, 1]), horizon=4) == [2.0, np.inf]
    assert jumping._recovered(excess, np.array([2, 1]), horizon=2) == [np.inf, np.inf]


def test_the_optimum_jumps_once_and_arms_share_the_noise() -> None:
    problem = jumping.Jumping([3, 3, 4], [2, 5, 5], steps=8)
    at = [problem._optimum(step) for step in (1, 2)]
    assert not torch.equal(at[0][0], at[1][0])
    assert torch.equal(at[0][1:], at[1][1:])
    alone = jumping.Jumping([4], [5], steps=8)
    together, apart = problem.run(RMSProp(lr=0.1), 8)[:, 2], alone.run(RMSProp(lr=0.1), 8)[:, 0]
    assert torch.equal(together, apart)
