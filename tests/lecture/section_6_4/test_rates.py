"""C38: planted runs of every outcome, and the experiment in miniature."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from tests.lecture.evidence import FAILS, HOLDS, MIXED, UNDECIDED, Draw, Stored, Tables, overall, verdicts

from losslab.layers import he
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_4 import rates
from losslab.lecture.section_6_4.rates import C38, HEADLINE, has_diverged, outcomes
from losslab.lecture.section_6_4.runs import SWEEP, Setting
from losslab.tasks import mlp


def planted(
    standard: list[float], normalised: list[float], network: str = "net", rates: tuple[float, ...] = SWEEP
) -> pd.DataFrame:
    """Final accuracies at rate 0.5, a seed each; elsewhere batch norm trains, the standard net below 0.3."""
    rows = []
    for arm, ends in (("standard", standard), ("batch norm", normalised)):
        for lr in rates:
            for seed, end in enumerate(ends):
                final = end if lr == 0.5 else 0.99 if arm == "batch norm" or lr < 0.3 else 0.1
                for step, accuracy in ((0, 0.1), (100, (0.1 + final) / 2), (240, final)):
                    loss = math.inf if math.isnan(final) and step else 2.3 - 2 * np.nan_to_num(accuracy)
                    rows.append((arm, lr, seed, step, step / 8, loss, accuracy))
    table = pd.DataFrame(rows, columns=["arm", "lr", "seed", "step", "epoch", "train_loss", "train_accuracy"])
    return table.assign(network=network, least=10, note="small")


GOOD, BAD, LATE = [0.99] * 10, [0.12] * 10, [0.7] * 10


@pytest.mark.parametrize(
    ("standard", "normalised", "verdict"),
    [
        (BAD, GOOD, HOLDS),
        ([math.nan] * 10, GOOD, HOLDS),
        ([0.99, *BAD[1:]], GOOD, HOLDS),  # nine of ten are enough
        ([0.99, 0.99, *BAD[2:]], GOOD, MIXED),
        (LATE, GOOD, MIXED),
        ([0.95] * 10, GOOD, FAILS),  # four points
        (BAD, [0.85] * 10, FAILS),
        (BAD, [0.12, 0.12, *GOOD[2:]], FAILS),
        (BAD[:9], GOOD[:9], UNDECIDED),
    ],
)
def test_c38_at_the_notes_rate(standard: list[float], normalised: list[float], verdict: str) -> None:
    tables = {"curves": planted(standard, normalised)}
    assert verdicts(C38, tables)[f"{HEADLINE}: net"] is verdict
    assert overall(C38, tables) is verdict


def test_c38_networks_must_agree(stored: Stored, draw: Draw) -> None:
    both = pd.concat([planted(BAD, GOOD), planted(LATE, GOOD, "other", (0.1, 0.5))])
    tables = stored({"curves": both})
    assert overall(C38, tables) is MIXED
    names = [finding.name for finding in C38.judge(tables)]
    assert len(names) == 3  # the ratio of the largest rates needs a sweep
    draw(C38, tables)


def test_c38_ratio_of_the_largest_rates() -> None:
    finding = C38.judge({"curves": planted(BAD, GOOD)})[-1]
    assert finding.estimate == pytest.approx(2.0 / 0.2)
    assert finding.verdict is HOLDS
    assert "10 of 10" in finding.note
    never = planted(BAD, GOOD)
    never.loc[never["arm"] == "standard", "train_accuracy"] = 0.1
    assert C38.judge({"curves": never})[-1].estimate == math.inf
    neither = never.assign(train_accuracy=0.1)
    assert C38.judge({"curves": neither})[-1].estimate == 1.0


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([2.0, 1.0, 1.0, 1.0], False),
        ([2.0, math.inf, math.inf, math.inf], True),
        ([2.0, 2.1, 2.1, 2.1], True),
        ([2.0, 2.1, 1.9, 2.1], False),
        ([2.0, 1.9, 2.1, 2.1], False),  # 80 updates only
        ([2.0, 2.0, 2.0, 2.0], False),
    ],
)
def test_diverged_is_not_finite_or_above_the_start_for_long(losses: list[float], diverged: bool) -> None:
    assert has_diverged(np.array([0, 40, 80, 160]), np.array(losses)) is diverged


def test_a_diverged_run_has_failed_whatever_its_accuracy() -> None:
    curves = planted([0.99] * 10, GOOD)
    here = (curves["arm"] == "standard") & (curves["lr"] == 0.5) & (curves["step"] > 0)
    curves.loc[here, "train_loss"] = 5.0
    ends = outcomes(curves).query("arm == 'standard' and lr == 0.5")
    assert ends["failed"].all()
    assert ends["accuracy"].eq(0.1).all()


def test_c38_in_miniature(monkeypatch: pytest.MonkeyPatch, stored: Stored, draw: Draw) -> None:
    tiny = Setting("tiny", he().on(mlp(64, 8, 6, 10)), "digits", None, 3, 8, 3, 10, 40, 300)
    monkeypatch.setattr(rates, "deep", lambda lab: tiny)
    monkeypatch.setattr(rates, "convolutional", lambda lab: tiny)
    tables: Tables = stored(rates.experiment(Lab()))
    curves = tables["curves"]
    assert set(curves["lr"]) == set(SWEEP)
    assert overall(C38, tables) is UNDECIDED  # three seeds
    assert rates.conv_rates(Lab("full")) == SWEEP
    draw(C38, tables)
