"""The lottery behind C65 to C68: drawn once, read four times."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from losslab.layers import xavier
from losslab.lecture.claim import Lab, Tables
from losslab.rules import Adam
from losslab.tasks import Task, digits_task, lenet_300_100, mlp, mnist_task
from losslab.tickets import Lottery, Plan, Scope, lottery

if TYPE_CHECKING:
    import pandas as pd

RATE = 1.2e-3
BATCH = 60
TWENTY_ONE, MATCHED = 7, 11
"""Levels with controls in the quick profile: 21 % and 9 % of the weights."""

DRAWN = (0, TWENTY_ONE)
"""Levels whose validation curves are kept."""


def plan_of(profile: str, replicates: int) -> Plan:
    """The plan of a profile: the paper's, at the length of the data at hand."""
    quick, paper = profile == "quick", profile == "paper"
    return Plan(
        scope=Scope(rate=0.2, output=0.1),
        levels=21 if paper else 22,
        controls=("reinit", "random", "dense"),
        control_levels=(TWENTY_ONE, MATCHED) if quick else None,
        replicates=replicates,
        init=xavier(),
        rule=Adam(lr=RATE),
        steps={"quick": 600, "full": 1500, "paper": 50_000}[profile],
        batch_size=BATCH,
        evaluate=100 if paper else 10,
    )


def task_of(profile: str, data: Path | None) -> Task:
    """Digits by 64-300-100-10; in the paper profile MNIST by LeNet-300-100."""
    return mnist_task(lenet_300_100(), data) if profile == "paper" else digits_task(mlp(64, 300, 100, 10))


def runs(lab: Lab) -> Tables:
    """``runs``: one row a network; ``curves``: validation losses of the dense networks and of one level."""
    replicates = lab.replicates(10, 20, 5)
    lab.progress("lottery tickets")
    return _drawn(lab.profile, replicates, lab.data)


def fine_tuned(lab: Lab) -> pd.DataFrame:
    """Dense networks, and the same after one cut to 9 % and as long a training again at the same rate."""
    lab.progress("pruning after training")
    return _tuned(lab.profile, lab.replicates(10, 20, 5), lab.data)


def table(found: Lottery, profile: str) -> pd.DataFrame:
    """The columns that claims read; accuracies in percent."""
    rows = found.table
    told = rows[["level", "arm", "replicate", "kept", "remaining", "stop_step", "diverged"]].copy()
    told["accuracy"] = 100 * rows["test_accuracy"]
    told["final_accuracy"] = 100 * rows["final_test_accuracy"]
    told["final_train_accuracy"] = 100 * rows["final_train_accuracy"]
    return told.assign(data="mnist" if profile == "paper" else "digits")


@functools.lru_cache(maxsize=1)
def _drawn(profile: str, replicates: int, data: Path | None) -> dict[str, pd.DataFrame]:
    found = lottery(task_of(profile, data), plan_of(profile, replicates), progress=False)
    curves = found.curves
    return {"runs": table(found, profile), "curves": curves[curves.level.isin(DRAWN)].reset_index(drop=True)}


@functools.lru_cache(maxsize=1)
def _tuned(profile: str, replicates: int, data: Path | None) -> pd.DataFrame:
    like = plan_of(profile, replicates)
    plan = Plan(
        scope=Scope(rate=0.92, output=0.46),
        levels=1,
        rewind="fine-tune",
        controls=(),
        replicates=replicates,
        init=like.init,
        rule=like.rule,
        steps=like.steps,
        batch_size=like.batch_size,
        evaluate=like.evaluate,
    )
    found = table(lottery(task_of(profile, data), plan, progress=False), profile)
    return found.assign(arm=found["arm"].replace({"ticket": "pruned and fine-tuned"}))
