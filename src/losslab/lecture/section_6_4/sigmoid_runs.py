"""Ioffe and Szegedy's experiment: a sigmoid network with and without batch norm (2015, section 4.1).

C39, C40 and C41 read the same runs, which are made once for the same profile, seeds and data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from losslab.engine import Population
from losslab.layers import gaussian, xavier
from losslab.lecture.claim import Lab, quiet
from losslab.lecture.section_6_4.looks import Looks
from losslab.lecture.training import arrival
from losslab.lecture.training import trained as train
from losslab.lecture.tuning import Tuning, rates, tune
from losslab.rules import SGD
from losslab.tasks import Factory, Splits, Task, digits, mlp, mnist, supervised

if TYPE_CHECKING:
    import pandas as pd

SMALL = 0.03
"""Standard deviation of the paper's "small" Gaussian, which it does not state: a third of Xavier's."""

GRID = tuple(rates(0.1, 10.0))
TUNING_SEEDS = (1000, 1001)
BATCH = 60
LOOK = 100
"""Updates between two looks at the activations."""

NORMALISED = "batch norm"
GAUSSIAN = "standard, small Gaussian start"
XAVIER = "standard, Xavier start"
BASELINES = (GAUSSIAN, XAVIER)
OWN = "own rate"


@dataclass(frozen=True)
class Setting:
    """What the networks are trained on, and for how long.

    Attributes:
        data: For tables and captions.
        inputs: Pixels.
        target: The test accuracy to reach.
        steps: Updates of a run.
        tuning_steps: Updates of a run in the search for a rate.
        every: Updates between two measurements of the accuracy; five times as many in the first tenth.
        seeds: Replicates.
        least: How many a verdict needs.
        folder: Where MNIST is.
    """

    data: str
    inputs: int
    target: float
    steps: int
    tuning_steps: int
    every: int
    seeds: int
    least: int
    folder: Path | None = None

    def when(self, steps: int) -> list[int]:
        """The steps of a run at which the accuracy is measured."""
        early = range(0, min(steps, self.steps // 10), self.every // 5)
        return [*early, *range(self.steps // 10, steps, self.every), steps]

    def splits(self) -> Splits:
        """The data: the digits as they are always, MNIST black and white as in the paper."""
        return digits() if self.folder is None else mnist(self.folder, binarise=True)


def setting_of(lab: Lab) -> Setting:
    """The paper's MNIST where its folder is given and the profile is not quick; otherwise the digits."""
    if lab.profile == "quick" or lab.data is None:
        return Setting("digits", 64, 0.90, 1500, 1000, 25, lab.replicates(10, 20), 10)
    steps, tuning, every = lab.pick((0, 0, 0), (10_000, 3000, 250), (50_000, 5000, 500))
    return Setting("binarised MNIST", 784, 0.95, steps, tuning, every, lab.replicates(5), 5, lab.data)


class Runs(NamedTuple):
    """The tables of the experiment.

    Attributes:
        curves: A row a (run, measurement): network, rated (whose rate it is: `OWN`, or a baseline whose rate
            batch norm takes over), lr, seed, step, test_accuracy, test_loss (infinite once diverged),
            loss (of the batch, where a look was taken).
        tuning: The searches: network, lr, score, at_edge.
        looks: As `Looks` gives them, with network and rated.
    """

    curves: pd.DataFrame
    tuning: pd.DataFrame
    looks: pd.DataFrame


def runs(lab: Lab) -> Runs:
    """The runs of a profile; made once, and kept."""
    setting = setting_of(lab)
    if setting not in _KEPT:
        _KEPT[setting] = run(setting, lab.progress)
    return _KEPT[setting]


_KEPT: dict[Setting, Runs] = {}


def factory(setting: Setting, network: str) -> Factory:
    """Three hidden layers of 100 sigmoids."""
    model = mlp(setting.inputs, 100, 100, 100, 10, activation="sigmoid", batch_norm=network == NORMALISED)
    return (xavier() if network == XAVIER else gaussian(SMALL)).on(model)


def run(setting: Setting, progress: Callable[[str], None] = quiet) -> Runs:
    """Tunes each network's rate, trains each at its own, and batch norm at the baselines' too."""
    import pandas as pd

    data = setting.splits()
    curves, searches, looks = [], [], []
    chosen: dict[str, Tuning] = {}
    for network in (*BASELINES, NORMALISED):
        progress(f"{setting.data}, rate of {network}")
        task = supervised(factory(setting, network), data.train, data.test, data.validation)
        tuning = chosen[network] = search(task, setting)
        searches.append(tuning.table.assign(network=network, at_edge=tuning.at_edge))
    # Twice as fast as a baseline, which has all the steps, is to be there by half of them.
    half = [(NORMALISED, baseline, setting.steps // 2) for baseline in BASELINES]
    for network, rated, steps in [(network, OWN, setting.steps) for network in chosen] + half:
        progress(f"{setting.data}, {network}, {rated}")
        task = supervised(factory(setting, network), data.train, data.test)
        lr = chosen[network if rated == OWN else rated].lr
        look = Looks(data.test.head(256).all())
        population = trained(task, setting, [lr] * setting.seeds, steps, look)
        curves.append(measured(population, setting).assign(network=network, rated=rated))
        looks.append(look.tables()["looks"].assign(network=network, rated=rated))
    rows = pd.concat(curves, ignore_index=True)
    return Runs(
        rows.assign(data=setting.data, target=setting.target, least=setting.least),
        pd.concat(searches, ignore_index=True),
        pd.concat(looks, ignore_index=True),
    )


def trained(
    task: Task,
    setting: Setting,
    learning_rates: Sequence[float],
    steps: int,
    watch: Looks | None = None,
    seeds: Sequence[int] | None = None,
    on: str = "test",
) -> Population:
    """A population of plain SGD, its accuracy measured along the way."""
    return train(
        task,
        SGD(lr=list(learning_rates)),
        seeds=list(range(len(learning_rates))) if seeds is None else list(seeds),
        steps=steps,
        batch_size=BATCH,
        evaluate=setting.when(steps),
        evaluate_on=[on],
        record=LOOK if watch is not None else [0],
        watch=watch,
    )


def search(task: Task, setting: Setting) -> Tuning:
    """The rate that reaches the target first on validation data; where none does, the one nearest to it."""

    def score(learning_rates: list[float], seeds: list[int]) -> Tensor:
        steps = setting.tuning_steps
        population = trained(task, setting, learning_rates, steps, seeds=seeds, on="validation")
        rows = measured(population, setting, "validation")
        best = rows.groupby("member")["validation_accuracy"].max().fillna(0.0)
        first = reached(rows, "validation_accuracy", setting.target)
        missed = math.log10(steps) + (setting.target - best)
        scores = first.map(lambda step: math.log10(max(step, 1.0))).where(first < math.inf, missed)
        return torch.tensor(scores.to_numpy(copy=True))

    return tune(score, GRID, TUNING_SEEDS)


def measured(population: Population, setting: Setting, on: str = "test") -> pd.DataFrame:
    """Accuracy and loss along the way, a row a (measurement, member); NaN and infinite once diverged."""
    names = [f"{on}_accuracy", f"{on}_loss", "loss"]
    rows = population.history.set_index(["step", "member"])
    steps = setting.when(population.plan.steps)
    everyone = [(step, member) for step in steps for member in range(len(population))]
    rows = rows[names].reindex(everyone).reset_index()
    rows[names[1]] = rows[names[1]].fillna(math.inf)
    rows["seed"] = [population.seeds[member] for member in rows["member"]]
    rows["lr"] = [population.hyperparameters["lr"][member] for member in rows["member"]]
    return rows


def reached(rows: pd.DataFrame, column: str, target: float) -> pd.Series:
    """The first measured step at which each member has an accuracy of at least ``target``."""
    # Accuracies are float32: a share that is the target may lie a little below it.
    return arrival(rows.assign(error=1 - rows[column]), "error", 1 - target + 1e-6)
