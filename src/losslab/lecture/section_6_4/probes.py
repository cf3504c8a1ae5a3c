"""Networks with and without batch norm, probed along the gradient while they train.

C51 and C52 read the same probes, which are made once for the same profile, seeds and data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from losslab.engine import Objective, Population
from losslab.layers import he, xavier
from losslab.lecture.claim import Lab, quiet
from losslab.lecture.section_6_4.courses import Course
from losslab.lecture.section_6_4.runs import NORMALISED, STANDARD, Arm, splits
from losslab.lecture.tuning import rates
from losslab.signals import smoothness
from losslab.tasks import Task, mlp, supervised, vgg11

if TYPE_CHECKING:
    import pandas as pd

ARMS = (STANDARD, NORMALISED)

LOSSES = 20
"""Training losses at which arms are compared, between the highest and the lowest that both have had."""


@dataclass(frozen=True, kw_only=True)
class Setting(Course):
    """A network, its data, how long it is trained and how often it is probed.

    Attributes:
        data: A name of `runs.SOURCES`.
        folder: Where the data are, if they are not embedded.
        least: How many replicates a verdict needs.
        examples: Training examples, if not all.
    """

    data: str
    folder: Any
    least: int
    examples: int | None = None


def settings(lab: Lab) -> list[Setting]:
    """The deep ReLU network and the sigmoid network; on CIFAR-10 also VGG-11 in the paper profile."""
    digits = Setting(
        name="ReLU 64-[100]×8-10",
        factory=he().on(mlp(64, *[100] * 8, 10)),
        data="digits",
        folder=None,
        grid=tuple(rates(0.01, 1.0)),
        steps=200,
        every=20,
        batch=64,
        seeds=lab.replicates(10, 20),
        least=10,
    )
    sigmoid = replace(
        digits,
        name="sigmoid 64-[100]×3-10",
        factory=xavier().on(mlp(64, 100, 100, 100, 10, activation="sigmoid")),
        grid=tuple(rates(0.1, 10.0)),
    )
    found = [digits, sigmoid]
    if lab.profile == "paper" and lab.data is not None:
        gpu = torch.cuda.is_available()
        found.append(
            replace(
                digits,
                name="VGG-11 on CIFAR-10" if gpu else "VGG-11, eighth width, on 2000 images of CIFAR-10",
                factory=he().on(vgg11() if gpu else vgg11(width=8)),
                data="CIFAR-10",
                folder=lab.data,
                steps=3000 if gpu else 200,
                every=100 if gpu else 20,
                batch=128 if gpu else 64,
                seeds=lab.replicates(5),
                least=5,
                examples=None if gpu else 2000,
                device="cuda" if gpu else "cpu",
                execution="loop",
            )
        )
    return found


class Probes(NamedTuple):
    """The tables of the experiment.

    Attributes:
        summary: A row a (network, arm, seed, updates, kind): what `Smoothness.summary` gives with the
            statistics of the batch, and ``train_loss``.
        tuning: The searches: network, arm, lr, score, at_edge, chosen.
    """

    summary: pd.DataFrame
    tuning: pd.DataFrame


def probes(lab: Lab) -> Probes:
    """The probes of a profile; made once, and kept."""
    key = (lab.profile, lab.seeds, lab.data)
    if key not in _KEPT:
        _KEPT[key] = run(settings(lab), lab.progress)
    return _KEPT[key]


_KEPT: dict[Any, Probes] = {}


def run(networks: list[Setting], progress: Callable[[str], None] = quiet) -> Probes:
    """Tunes each arm's rate on half a run, trains the arms from the same weights, and probes them."""
    import pandas as pd

    seen, searches = [], []
    for setting in networks:
        for arm in ARMS:
            progress(f"{setting.name}, {arm.name}")
            task = task_of(setting, arm)
            tuning = setting.search(task, setting.steps // 2)
            chosen = tuning.table["lr"] == tuning.lr
            named = {"network": setting.name, "arm": arm.name}
            searches.append(tuning.table.assign(**named, at_edge=tuning.at_edge, chosen=chosen))
            seen.append(probed(task, setting, tuning.lr).assign(**named, least=setting.least))
    return Probes(pd.concat(seen, ignore_index=True), pd.concat(searches, ignore_index=True))


def task_of(setting: Setting, arm: Arm) -> Task:
    """What an arm minimises."""
    data = splits(setting.data, setting.folder)
    learn = data.train if setting.examples is None else data.train.head(setting.examples)
    return supervised(arm.on(setting.factory), learn, validation=data.validation, name=setting.name)


def probed(task: Task, setting: Setting, lr: float) -> pd.DataFrame:
    """Probes before the first update and at every interval, each on a batch of its own."""
    import pandas as pd

    objective = Objective(task, data=setting.batch_at(task, "probe", 0), execution=setting.execution)
    whole = training_loss(task, setting.execution)
    tables: list[pd.DataFrame] = []

    def probe(population: Population) -> None:
        here = objective.on(setting.batch_at(task, "probe", population.step))
        loss = whole.value(population.points).numpy(force=True)
        parts = [
            # Gradients all the way along the raw steps; losses are enough for the relative ones.
            smoothness(here, population.points, relative=(), modes=["batch"]),
            smoothness(here, population.points, raw=(), modes=["batch"], gradients=False, curvature=False),
        ]
        for part in parts:
            rows = part.summary.drop(columns="mode").assign(updates=population.step)
            tables.append(rows.assign(train_loss=loss[rows["member"]]))

    setting.follow(task, lr, probe)
    return pd.concat(tables, ignore_index=True).rename(columns={"member": "seed"}).assign(lr=lr)


def training_loss(task: Task, execution: str = "stacked") -> Objective:
    """The loss over all training data as training sees it: batch norm by the data's own statistics.

    In evaluation mode a network with batch norm would be told by averages that lag behind it.
    """
    return Objective(task, chunk=2000, execution=execution)


def log_ratio(upper: pd.Series, lower: pd.Series) -> pd.Series:
    """``log(upper / lower)``; a run that has diverged counts as infinite, two of them as equal."""
    a, b = (values.astype(float).fillna(np.inf) for values in (upper, lower))
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = a.map(np.log) - b.map(np.log)
    return difference.where(~(np.isinf(a) & np.isinf(b)), 0.0)


def paired_ratios(rows: pd.DataFrame, column: str, last: float | None = None) -> pd.Series:
    """For each seed the median over updates of log(standard / batch norm); up to ``last`` updates."""
    if last is not None:
        rows = rows[rows["updates"] <= last]
    by_arm = rows.pivot_table(index=["seed", "updates"], columns="arm", values=column, dropna=False)
    ratios = log_ratio(by_arm[STANDARD.name], by_arm[NORMALISED.name])
    return ratios.groupby("seed").median()


def at_equal_loss(rows: pd.DataFrame, column: str) -> pd.Series:
    """For each seed the median of log(standard / batch norm) over training losses that both have had.

    Each arm's column is interpolated, in logarithms, between its probes in the order of their training loss.
    Where the arms have no loss in common, an arm that has diverged counts as infinite, and else the ratio is
    NaN.
    """
    import pandas as pd

    found = {}
    for seed, mine in rows.groupby("seed"):
        curves, lost = [], []
        for arm in ARMS:
            run = mine[mine["arm"] == arm.name].sort_values("train_loss")
            there = run[np.isfinite(run["train_loss"])]
            lost.append(len(there) < len(run))
            curves.append((np.log(there["train_loss"].to_numpy()), there[column].fillna(np.inf).to_numpy()))
        low, high = (pick(x[end] for x, _ in curves) for pick, end in ((max, 0), (min, -1)))
        if low >= high:
            found[seed] = math.nan if lost[0] == lost[1] else math.inf if lost[0] else -math.inf
            continue
        grid = np.linspace(low, high, LOSSES)
        standard, normalised = (pd.Series(_interpolated(grid, x, y)) for x, y in curves)
        found[seed] = float(log_ratio(standard, normalised).median())
    return pd.Series(found).rename_axis("seed")


def _interpolated(grid: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # between an infinite error and a finite one
        return np.exp(np.nan_to_num(np.interp(grid, x, np.log(y)), nan=np.inf, posinf=np.inf))


def edges(tuning: pd.DataFrame) -> str:
    """A sentence on the rates, for a note."""
    told = []
    for (_, arm), rows in tuning.groupby(["network", "arm"], sort=False):
        picked = rows[rows["chosen"]].iloc[0]
        told.append(f"{arm} {picked['lr']:.3g}{' (edge of the grid)' if picked['at_edge'] else ''}")
    return "rates: " + ", ".join(told)
