"""The lottery behind C65 to C68: drawn once, read four times."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from torch.nn.functional import avg_pool2d

from losslab.layers import xavier
from losslab.lecture.claim import Lab, Tables
from losslab.rules import Adam
from losslab.tasks import Data, Task, conv2, digits_task, lenet_300_100, mlp, mnist_task, supervised
from losslab.tasks.sources import cifar10
from losslab.tickets import Lottery, Plan, Scope, lottery

if TYPE_CHECKING:
    import pandas as pd

RATE = 1.2e-3
BATCH = 60
TWENTY_ONE, MATCHED = 7, 11
"""Levels with controls in the quick profile: 21 % and 9 % of the weights."""

DRAWN = (0, TWENTY_ONE)
"""Levels whose validation curves are kept."""

CONV = "Conv-2 on CIFAR-10, reduced"
CONV_NOTE = (
    "Conv-2 is reduced for a processor: images averaged to 16×16 pixels, 10,000 of them for training, 1,000 "
    "for validation, 5,000 for testing, 1,000 updates instead of 20,000, 11 levels. Rates (10 % of "
    "convolutions and output, 20 % of the rest) and Adam at 2e-4 are the paper's as they are remembered."
)


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


def conv_plan(replicates: int) -> Plan:
    """Conv-2's plan, for a few levels and updates."""
    return Plan(
        scope=Scope(rate=0.2, output=0.1, rates={"0.weight": 0.1, "2.weight": 0.1}),
        levels=MATCHED,
        controls=("reinit",),
        control_levels=(TWENTY_ONE, MATCHED),
        replicates=replicates,
        init=xavier(),
        rule=Adam(lr=2e-4),
        steps=1000,
        batch_size=BATCH,
        evaluate=50,
    )


def conv_task(data: Path | None) -> Task:
    """CIFAR-10 of 16×16 pixels, a part of it, by Conv-2."""
    splits = cifar10(data)

    def some(part: Data, count: int) -> Data:
        images, labels = part.head(count).all()
        return Data((avg_pool2d(images, 2), labels))

    parts = some(splits.train, 10_000), some(splits.test, 5000), some(splits.validation, 1000)
    return supervised(conv2(size=16), *parts, name=CONV)


def runs(lab: Lab) -> Tables:
    """``runs``: one row a network; ``curves``: validation losses of the dense networks and of one level."""
    replicates = lab.replicates(10, 20, 5)
    lab.progress("lottery tickets")
    return _drawn(lab.profile, replicates, lab.data, _stage(lab))


def convolutional(lab: Lab) -> Tables:
    """``conv``: one row a network of the reduced Conv-2, in the paper profile; else nothing."""
    if lab.profile != "paper":
        return {}
    lab.progress(CONV)
    found = _kept(conv_task(lab.data), conv_plan(lab.replicates(5)), _stage(lab), "conv-2")
    return {"conv": table(found, "cifar10")}


def fine_tuned(lab: Lab) -> pd.DataFrame:
    """Dense networks, and the same after one cut to 9 % and as long a training again at the same rate."""
    lab.progress("pruning after training")
    return _tuned(lab.profile, lab.replicates(10, 20, 5), lab.data, _stage(lab))


def table(found: Lottery, data: str) -> pd.DataFrame:
    """The columns that claims read; accuracies in percent."""
    rows = found.table
    told = rows[["level", "arm", "replicate", "kept", "remaining", "stop_step", "diverged"]].copy()
    told["accuracy"] = 100 * rows["test_accuracy"]
    told["final_accuracy"] = 100 * rows["final_test_accuracy"]
    told["final_train_accuracy"] = 100 * rows["final_train_accuracy"]
    return told.assign(data=data)


def _stage(lab: Lab) -> Path | None:
    """Where levels are kept: the paper profile takes hours, and goes on after a break."""
    return lab.folder if lab.profile == "paper" else None


def _kept(task: Task, plan: Plan, folder: Path | None, name: str) -> Lottery:
    out = None if folder is None else folder / f"{name}-{plan.replicates}"
    return lottery(task, plan, out=out, resume=out is not None and out.exists(), progress=False)


def _data(profile: str) -> str:
    return "mnist" if profile == "paper" else "digits"


@functools.lru_cache(maxsize=1)
def _drawn(profile: str, replicates: int, data: Path | None, folder: Path | None) -> dict[str, pd.DataFrame]:
    found = _kept(task_of(profile, data), plan_of(profile, replicates), folder, "lottery")
    curves = found.curves
    return {
        "runs": table(found, _data(profile)),
        "curves": curves[curves.level.isin(DRAWN)].reset_index(drop=True),
    }


@functools.lru_cache(maxsize=1)
def _tuned(profile: str, replicates: int, data: Path | None, folder: Path | None) -> pd.DataFrame:
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
    found = table(_kept(task_of(profile, data), plan, folder, "fine-tuned"), _data(profile))
    return found.assign(arm=found["arm"].replace({"ticket": "pruned and fine-tuned"}))
