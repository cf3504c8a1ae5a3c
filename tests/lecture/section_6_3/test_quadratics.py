"""C18: gradient descent on ill-conditioned quadratics."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from losslab.lecture.claim import Claim, Verdict
from losslab.lecture.section_6_3 import quadratics
from losslab.lecture.section_6_3.convergence import iterations
from losslab.lecture.section_6_3.quadratics import C18

HOLDS, MIXED, FAILS, UNDECIDED = Verdict.HOLDS, Verdict.MIXED, Verdict.FAILS, Verdict.UNDECIDED
Tables = dict[str, pd.DataFrame]


@pytest.fixture(scope="module")
def small() -> Tables:
    return {
        "iterations": iterations(["gradient descent"], [10, 40, 160], range(10)),
        "above": quadratics.sign_changes(100, 40, 1.0, 2.0, seed=1),
        "below": quadratics.sign_changes(100, 40, 0.05, 1.0, seed=2),
        "stiff": quadratics.stiff_traces((0.5, 1.5), 10),
        "gaussians": quadratics.gaussian_runs([0], 300),
    }


def verdicts(tables: Tables) -> dict[str, Verdict]:
    return {finding.name: finding.verdict for finding in C18.judge(tables)}


def test_its_own_experiment(
    small: Tables, stored: Callable[[Tables], Tables], draw: Callable[[Claim, Tables], None]
) -> None:
    findings = C18.judge(stored(small))
    assert {finding.verdict for finding in findings} == {HOLDS}
    assert C18.combine(findings) is HOLDS
    draw(C18, small)


def test_the_two_gaussians_have_the_paper_s_eigenvalues() -> None:
    task = quadratics.two_gaussians(3)
    assert task.train is not None
    x, y = task.train.all()
    assert torch.linalg.eigvalsh(x.T @ x / len(x)).numpy() == pytest.approx([0.036, 0.84])
    assert x.mean(0).abs().max() < 1e-12
    assert bool(((x @ torch.tensor([[0.4], [0.8]], dtype=torch.float64)) * y > 0).double().mean() > 0.95)


def test_the_share_of_sign_changes_is_that_of_the_closed_form() -> None:
    # The component is multiplied by 1 - rate at every step.
    table = quadratics.sign_changes(50, 30, 0.2, 1.9, seed=5)
    assert np.array_equal(table.changed_late == 1, table.rate > 1)
    assert np.array_equal(table.changed == 0, table.rate < 1)
    # At a rate of 1.9 nothing dies out within 30 steps, near 1 it does at once.
    assert table.steps[np.abs(1 - table.rate) > 0.6].min() == 30
    assert table.steps[np.abs(1 - table.rate) < 0.1].max() < 12


def test_iterations_that_do_not_grow_in_proportion_fail(small: Tables) -> None:
    runs = small["iterations"]
    root = runs.assign(iterations=np.sqrt(runs.kappa) * runs.iterations.iloc[0])
    assert verdicts(small | {"iterations": root})[quadratics.SLOPE] is FAILS
    assert C18.combine(C18.judge(small | {"iterations": root})) is MIXED


def test_one_step_without_a_sign_change_is_a_counterexample(small: Tables) -> None:
    above = small["above"].copy()
    above.loc[17, "changed_late"] = 0.95
    assert verdicts(small | {"above": above})[quadratics.FLIPS] is FAILS
    below = small["below"].copy()
    below.loc[3, "changed"] = 0.02
    assert verdicts(small | {"below": below})[quadratics.CALM] is FAILS
    assert C18.combine(C18.judge(small | {"below": below})) is HOLDS, "a control has no part in the verdict"


@pytest.mark.parametrize(
    ("smallest_that_diverges", "verdict"), [(1.5, FAILS), (1.95, UNDECIDED), (2.05, HOLDS), (2.5, UNDECIDED)]
)
def test_the_stability_limit_is_told_from_the_runs(
    small: Tables, smallest_that_diverges: float, verdict: Verdict
) -> None:
    runs = small["gaussians"].copy()
    last = (runs.method == "batch") & (runs.step == runs.step.max())
    runs.loc[last, "train_loss"] = np.where(runs.lr[last] >= smallest_that_diverges, np.nan, 1e-3)
    assert verdicts(small | {"gaussians": runs})[quadratics.LIMIT] is verdict


def test_the_claims_come_in_order() -> None:
    assert [claim.id for claim in quadratics.CLAIMS] == ["C18", "C19", "C20"]
