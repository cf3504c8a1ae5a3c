"""C43: statistics that are computed once do not stay those of the units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from losslab.engine import Population, cross
from losslab.layers import BatchNorm, he, with_batchnorm
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, decided_by
from losslab.lecture.figures import bars, figure, lines, reference, spread
from losslab.lecture.numbers import number
from losslab.lecture.section_6_4.units import Units
from losslab.lecture.training import trained
from losslab.lecture.verdicts import count, paired, paired_family
from losslab.rules import SGD
from losslab.tasks import Data, Factory, Task, digits, mlp, mnist, supervised

if TYPE_CHECKING:
    import pandas as pd

NORMALISED, AT_START, LATER, INPUTS = (
    "batch norm", "frozen at the start", "frozen after an epoch", "inputs only"
)  # fmt: skip
FROZEN = (AT_START, LATER)

RATES = tuple(0.05 * 2**k for k in range(9))
JUDGED = 0.1
"""The rate at which the drift is judged."""

WITHIN = 5
"""Epochs within which it must have happened."""

ACCURACY = 0.9
"""Training accuracy from which a run has worked."""


@dataclass(frozen=True)
class Setting:
    """Data, network and budget.

    Attributes:
        data: Training examples, standardised.
        widths: Of the network.
        epochs: Passes over the data.
        batch_size: Examples a batch.
        seeds: Replicates.
        least: Seeds that a verdict needs.
    """

    data: Data
    widths: tuple[int, ...]
    epochs: int
    batch_size: int
    seeds: int
    least: int = 10

    @property
    def per_epoch(self) -> int:
        """Updates an epoch."""
        return math.ceil(len(self.data) / self.batch_size)

    def task(self, arm: str) -> Task:
        """A ReLU network, its layers normalised as the arm wants it; the weights start alike in every arm."""
        plain = he().on(mlp(*self.widths))
        if arm == INPUTS:
            return supervised(plain, self.data, name=arm)

        def make(features: int) -> nn.Module:
            return BatchNorm(features, statistics="batch" if arm == NORMALISED else "frozen")

        return supervised(
            Factory(f"{arm}, {plain!r}", lambda: with_batchnorm(plain(), make)), self.data, name=arm
        )


def run(setting: Setting, arm: str, rates: Sequence[float]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Trains one member a (rate, seed).

    Returns:
        One row a (arm, lr, seed): ``accuracy`` and ``loss`` on the training examples in the end, NaN and
        infinite for a run that has diverged. And for the frozen arms one row a (arm, lr, seed, epoch):
        ``share`` of the units whose mean is off by more than a frozen deviation, the median ``shift`` in
        frozen deviations and the median ``width``, the deviation in units of the frozen one; NaN once the
        run has diverged.
    """
    task = setting.task(arm)
    seeds, grid = cross(setting.seeds, lr=list(rates))
    plan = {"seeds": seeds, "batch_size": setting.batch_size}
    epochs = setting.epochs
    start = None
    if arm in FROZEN:
        before = trained(
            setting.task(NORMALISED), SGD(lr=grid["lr"]), steps=setting.per_epoch * (arm == LATER), **plan
        )
        start, epochs = Units(task).freeze(before.points), epochs - (arm == LATER)
    drifts = _Drifts(task, arm, epochs, setting)
    steps = epochs * setting.per_epoch
    population = trained(
        task,
        SGD(lr=grid["lr"]),
        steps=steps,
        start=start,
        evaluate=[steps],
        evaluate_on=["train"],
        record=drifts.at,
        watch=drifts if arm in FROZEN else None,
        **plan,
    )
    return _finals(population, steps, grid["lr"]).assign(arm=arm, least=setting.least), drifts.table()


def _finals(population: Population, steps: int, lrs: list[float]) -> pd.DataFrame:
    import pandas as pd

    rows = population.history
    table = pd.DataFrame({"lr": lrs, "seed": population.seeds})
    if "train_loss" not in rows:  # every member has diverged
        return table.assign(accuracy=np.nan, loss=np.inf)
    ends = rows[rows.step == steps].set_index("member").reindex(range(len(population)))
    return table.assign(
        accuracy=ends.train_accuracy.to_numpy(), loss=ends.train_loss.fillna(np.inf).to_numpy()
    )


class _Drifts:
    """Looks at the frozen arms after each of the first epochs."""

    def __init__(self, task: Task, arm: str, epochs: int, setting: Setting) -> None:
        self.units, self.arm, self.setting = Units(task), arm, setting
        looks = range(1, min(epochs, WITHIN) + 1) if arm in FROZEN else ()
        self.at = [epoch * setting.per_epoch - 1 for epoch in looks]
        self.found: list[pd.DataFrame] = []

    def __call__(self, population: Population) -> None:
        import pandas as pd

        shift, width = self.units.drift(population.points)
        share = (shift > 1).double().mean(1).where(shift.isfinite().all(1), math.nan)
        columns = {"share": share, "shift": shift.nanquantile(0.5, 1), "width": width.nanquantile(0.5, 1)}
        table = pd.DataFrame({name: value.double().numpy() for name, value in columns.items()})
        self.found.append(
            table.assign(
                arm=self.arm,
                lr=population.hyperparameters["lr"],
                seed=population.seeds,
                epoch=population.step // self.setting.per_epoch,
            )
        )

    def table(self) -> pd.DataFrame:
        import pandas as pd

        columns = ["share", "shift", "width", "arm", "lr", "seed", "epoch"]
        return pd.concat(self.found, ignore_index=True) if self.found else pd.DataFrame(columns=columns)


def evidence(lab: Lab, setting: Setting) -> Tables:
    """All arms at all rates."""
    import pandas as pd

    runs, drifts = [], []
    for arm in (NORMALISED, AT_START, LATER, INPUTS):
        lab.progress(f"{arm} at {len(RATES)} rates")
        ends, drift = run(setting, arm, RATES)
        runs.append(ends)
        drifts += [drift] if len(drift) else []
    return {"runs": pd.concat(runs, ignore_index=True), "drift": pd.concat(drifts, ignore_index=True)}


def experiment(lab: Lab) -> Tables:
    """Three hidden layers on digits; on MNIST in the longer profiles, where its folder is given."""
    if lab.profile != "quick" and lab.data is not None:
        data = mnist(lab.data).train.head(10000)
        return evidence(lab, Setting(data, (784, 100, 100, 100, 10), 10, 100, lab.replicates(5), least=5))
    return evidence(lab, Setting(digits().train, (64, 50, 50, 50, 10), 10, 50, lab.replicates(10, 30)))


def moved(arm: str) -> str:
    """The name of the finding on an arm's drift."""
    return f"{arm}: seeds in which most units' means leave their frozen deviation within {WITHIN} epochs"


def slower(arm: str) -> str:
    """The name of the finding on an arm's largest rate."""
    return f"largest rate that works, log₂ of batch norm over {arm}"


def largest_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """The largest rate of each seed (rows) and arm (columns) that ends above `ACCURACY`; 0 for none."""
    rates = runs.lr.where(runs.accuracy > ACCURACY, 0.0)
    return rates.groupby([runs.seed, runs.arm], sort=False).max().unstack("arm")


def judge(tables: Tables) -> list[Finding]:
    """V2 for the drift, V3 for the rates; the arm frozen at the start decides, the others are context."""
    runs, drift = tables["runs"], tables["drift"]
    largest, least = largest_rates(runs), int(runs.least.iloc[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = {arm: np.log2(largest[NORMALISED] / largest[arm]) for arm in (AT_START, LATER, INPUTS)}
    middle = largest.median()
    told = "median " + ", ".join(f"{number(middle[arm])} {arm}" for arm in largest.columns)
    told += f"; {number(runs.lr.max())} is the largest tried"
    others = {slower(arm): ratios[arm] for arm in (LATER, INPUTS)}
    return [
        _judge_drift(drift, AT_START),
        paired(slower(AT_START), ratios[AT_START], delta=1.0, least=least, note=told),
        _judge_drift(drift, LATER),
        *paired_family(others, delta=1.0, least=least),
    ]


def _judge_drift(drift: pd.DataFrame, arm: str) -> Finding:
    everywhere = drift[drift.arm == arm]
    rows = everywhere[np.isclose(everywhere.lr, JUDGED)]
    most = rows.groupby("seed").share.max()
    last = rows[rows.epoch == rows.epoch.max()]
    shares = everywhere.groupby("lr").share.median().dropna()
    told = (
        f"at the rate {JUDGED:g}, after {last.epoch.max()} epochs: {100 * last.share.median():.0f} % of the "
        f"units, median distance {number(last['shift'].median())} and deviation "
        f"{number(last.width.median())}, in frozen deviations"
    )
    if len(shares):
        told += (
            f"; over all rates at most {100 * shares.max():.0f} % of the units, at {shares.idxmax():g} among "
            "the runs that were left"
        )
    return count(moved(arm), int((most > 0.5).sum()), len(most), at_least=0.69, note=told)


def figures(tables: Tables) -> list[Drawing]:
    """The largest rates, the drift, and accuracy against the rate."""
    runs, drift = tables["runs"], tables["drift"]
    largest = largest_rates(runs)
    heights = figure("Largest rate that works", "arm", "learning rate")
    bars(heights, list(largest.columns), largest.median())
    return [
        Drawing(
            heights,
            f"The largest rate of a grid up to {number(runs.lr.max())} with more than {100 * ACCURACY:.0f} % "
            "training accuracy in the end (median over seeds). Statistics that are frozen are constants: "
            "such a network is one without batch norm whose units start normalised.",
        ),
        _drift(drift),
        _accuracy(runs),
    ]


def _drift(drift: pd.DataFrame) -> Drawing:
    rows = spread(drift[np.isclose(drift.lr, JUDGED)], ["arm", "epoch"], "shift")
    drawn = figure("Drift of the units' means", "epoch", "median distance in frozen deviations")
    lines(drawn, rows, "epoch", "middle", by="arm", band=("low", "high"), mode="lines+markers")
    reference(drawn, 1.0, "one deviation")
    return Drawing(
        drawn,
        f"How far the mean of a unit's pre-activation is from the mean it is normalised by, at the rate "
        f"{JUDGED:g}: median over units, then over seeds with 80 % of them.",
    )


def _accuracy(runs: pd.DataFrame) -> Drawing:
    rows = runs.assign(accuracy=runs.accuracy.fillna(0.1))  # chance, for drawing only
    drawn = figure("Training accuracy after the last epoch", "learning rate", "accuracy", log_x=True)
    rows = spread(rows, ["arm", "lr"], "accuracy")
    lines(drawn, rows, "lr", "middle", by="arm", band=("low", "high"), mode="lines+markers")
    reference(drawn, ACCURACY, "works")
    return Drawing(drawn, "Median and 80 % of the seeds; runs that diverged are drawn at chance.")


C43 = Claim(
    id="C43",
    section="6.4.2",
    title="Statistics cannot be computed once",
    statement="Because hidden units depend on parameters that change, their mean and deviation cannot be "
    "computed once and for all; hence mini-batches.",
    source="Notes §6.4.2",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=decided_by(moved(AT_START), slower(AT_START)),
    caveats=(
        "Frozen means: each unit is normalised by its mean and deviation over all training examples at one "
        "moment, constants from then on, in the forward and in the backward pass. γ and β are trained in "
        "both.",
        "That units drift does not show that training fails without fresh statistics: normalising once is a "
        "good start for training (LSUV, Fixup), and Batch Renormalisation works with slow averages.",
        "No arm is tuned: the claim is about the range of rates, and every rate is reported. The grid ends "
        f"at {number(RATES[-1])}; an arm that still works there may work beyond it.",
        "Settled after a first run: the grid, which had ended at 3.2, and the freezing of deeper layers, "
        "which a test showed to be wrong.",
    ),
)
