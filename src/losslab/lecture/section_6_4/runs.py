"""Networks with batch norm, without it and with noise behind it, trained side by side at fixed rates.

Several claims read the same runs: a `Bench` trains each (arm, rate) once and keeps the tables.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from losslab.engine import Population, cross
from losslab.layers import BatchNorm, NoisyBatchNorm, he, with_batchnorm
from losslab.lecture.claim import Lab, Tables
from losslab.lecture.section_6_4.looks import Looks
from losslab.lecture.training import trained
from losslab.rules import SGD
from losslab.tasks import Factory, Splits, Task, cifar10, digits, mlp, mnist, supervised, vgg, vgg11

if TYPE_CHECKING:
    import pandas as pd

SWEEP = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Rates that are compared."""

WATCHED = 0.1
"""The rate at which activations are looked at."""

BATCH = 128


class Arm(NamedTuple):
    """What stands behind each layer but the last: nothing (strength None), or batch norm with noise."""

    name: str
    strength: float | None

    def on(self, factory: Factory) -> Factory:
        """The factory of the same networks with the arm's layers; weights start alike in every arm."""
        if self.strength is None:
            return factory
        strength = self.strength

        def make(features: int) -> nn.Module:
            return NoisyBatchNorm(features, strength=strength) if strength else BatchNorm(features)

        return Factory(f"{self.name} in {factory!r}", lambda: with_batchnorm(factory(), make))


STANDARD = Arm("standard", None)
NORMALISED = Arm("batch norm", 0.0)
NOISY = tuple(Arm(f"noisy batch norm ×{k}", float(k)) for k in (1, 2, 4))
"""Noise of the standard strength, and its multiples."""

FEW = 5
"""The most seeds of an arm with a multiple of the standard noise."""


@dataclass(frozen=True)
class Setting:
    """A network, its data, and how long and how often it is trained.

    Attributes:
        name: For tables and figures.
        factory: The network without batch norm, with its start.
        data: A name of `SOURCES`.
        folder: Where the data are, if they are not embedded.
        epochs: Passes over the training data.
        every: Updates between two measurements of the training accuracy.
        seeds: Replicates.
        least: How many a verdict needs.
        looked: Examples of a look at the activations.
        examples: Training examples, if not all.
        device: Where to train.
        note: What a reader must know.
    """

    name: str
    factory: Factory
    data: str
    folder: Path | None
    epochs: int
    every: int
    seeds: int
    least: int
    looked: int = 256
    examples: int | None = None
    device: str = "cpu"
    note: str = ""


def deep(lab: Lab, layers: int = 8) -> Setting:
    """Hidden layers of 100 ReLU units: MNIST in the longer profiles if its folder is given, else digits."""
    name = f"64-[100]×{layers}-10"
    if lab.profile == "quick" or lab.data is None:
        network = he().on(mlp(64, *[100] * layers, 10))
        return Setting(f"{name} on digits", network, "digits", None, 30, 16, lab.replicates(10), 10)
    network = he().on(mlp(784, *[100] * layers, 10))
    name = name.replace("64", "784", 1)
    return Setting(f"{name} on MNIST", network, "MNIST", lab.data, 3, 215, lab.replicates(5), 5)


def convolutional(lab: Lab) -> Setting:
    """Six convolutions on the digits; VGG-11 on CIFAR-10 in the paper profile where its folder is given."""
    if lab.profile != "paper" or lab.data is None:
        network = he().on(vgg(2, 2, 2, width=4, channels=1, size=8))
        seeds = lab.replicates(10)
        return Setting(
            "6-layer VGG on digits", network, "digit images", None, lab.pick(15, 30), 16, seeds, 10, 64,
            note="a small VGG (4, 8 and 16 channels) stands in for the paper's",
        )  # fmt: skip
    seeds = lab.replicates(5)
    if torch.cuda.is_available():
        network, name = he().on(vgg11()), "VGG-11 on CIFAR-10"
        return Setting(name, network, "CIFAR-10", lab.data, 15, 352, seeds, 5, looked=64, device="cuda")
    network, name = he().on(vgg11(width=8)), "narrow VGG-11 on CIFAR-10"
    note = "there was no GPU: an eighth of VGG-11's width and 2000 training images"
    return Setting(name, network, "CIFAR-10", lab.data, 15, 16, seeds, 5, 64, 2000, note=note)


SOURCES = {
    "digits": lambda folder: digits(),
    "digit images": lambda folder: digits(image=True),
    "MNIST": lambda folder: mnist(folder),
    "CIFAR-10": lambda folder: cifar10(folder),
}


@functools.lru_cache(maxsize=2)
def splits(data: str, folder: Path | None) -> Splits:
    """A data set, decoded once."""
    return SOURCES[data](folder)


class Bench:
    """The runs of one setting, trained when they are first asked for."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.known: dict[tuple[Arm, float], Tables] = {}

    def runs(self, arm: Arm, rates: Sequence[float]) -> dict[str, pd.DataFrame]:
        """The runs of an arm; those not known yet are trained as one population.

        Returns:
            ``curves``, a row a (run, measurement): arm, lr, seed, step, epoch, train_loss (infinite once the
            run has diverged) and train_accuracy (then NaN). ``looks``, ``samples`` and ``outputs`` as `Looks`
            gives them, over the first training examples at the rate 0.1 once an epoch, with arm, lr, epoch.
        """
        import pandas as pd

        missing = [rate for rate in rates if (arm, rate) not in self.known]
        if missing:
            self._train(arm, missing)
        parts = [self.known[arm, rate] for rate in rates]
        names = dict.fromkeys(name for part in parts for name in part)
        return {
            name: pd.concat([part[name] for part in parts if name in part], ignore_index=True)
            for name in names
        }

    def _train(self, arm: Arm, rates: Sequence[float]) -> None:
        setting, task = self.setting, self.task(arm)
        assert task.train is not None
        multiple = (arm.strength or 0.0) > 1
        members, grid = cross(min(setting.seeds, FEW) if multiple else setting.seeds, lr=list(rates))
        watched = [i for i, lr in enumerate(grid["lr"]) if lr == WATCHED]
        looks = Looks(task.train.head(setting.looked).all(), watched)
        population = trained(
            task,
            SGD(lr=grid["lr"]),
            seeds=members,
            epochs=setting.epochs,
            batch_size=BATCH,
            # Grouped convolutions on a GPU are slower than one network after another.
            execution="stacked" if setting.device == "cpu" else "loop",
            device=setting.device,
            evaluate=setting.every,
            evaluate_on=["train"],
            record="epoch",
            watch=looks if watched else None,
        )
        curves = curves_of(population).assign(arm=arm.name)
        seen = looks.tables() if watched else {}
        for name, table in seen.items():
            epochs = table["step"] / population.per_epoch
            seen[name] = table.assign(arm=arm.name, lr=WATCHED, epoch=epochs)
        for rate in rates:
            here = {"curves": curves[curves["lr"] == rate]}
            self.known[arm, rate] = here | seen if rate == WATCHED else here

    def task(self, arm: Arm) -> Task:
        """What the arm minimises."""
        setting = self.setting
        data = splits(setting.data, setting.folder)
        learn = data.train if setting.examples is None else data.train.head(setting.examples)
        return supervised(arm.on(setting.factory), learn, name=setting.name)


bench = functools.cache(Bench)
"""The bench of a setting: the same one for the same setting."""


def labelled(setting: Setting, table: pd.DataFrame) -> pd.DataFrame:
    """A setting's table with what a judge must know of the setting: ``network``, ``least``, ``note``."""
    return table.assign(network=setting.name, least=setting.least, note=setting.note)


def side_by_side(lab: Lab, settings: Sequence[Setting], arms: Sequence[Arm]) -> Tables:
    """The arms of several settings at the rate at which activations are looked at.

    Returns:
        ``curves``, ``looks``, ``samples`` and ``outputs`` as `Bench.runs` gives them, with `labelled`'s
        columns.
    """
    import pandas as pd

    parts = []
    for setting in settings:
        for arm in arms:
            lab.progress(f"{setting.name}, {arm.name}")
            tables = bench(setting).runs(arm, (WATCHED,))
            parts.append({name: labelled(setting, table) for name, table in tables.items()})
    return {name: pd.concat([part[name] for part in parts], ignore_index=True) for name in parts[0]}


def curves_of(population: Population) -> pd.DataFrame:
    """Loss and accuracy at every measured step of every member; infinite and NaN once it has diverged."""
    history, every, total = population.history, population.plan.evaluate, population.plan.steps
    assert isinstance(every, int)
    measured = history.set_index(["step", "member"])[["train_loss", "train_accuracy"]]
    # Measurements end where all members have diverged; the table goes on.
    steps = [*range(0, total, every), total]
    rows = measured.reindex(
        [(step, member) for step in steps for member in range(len(population))]
    ).reset_index()
    rows["train_loss"] = rows["train_loss"].fillna(math.inf)
    for name, values in {"seed": population.seeds, **population.hyperparameters}.items():
        rows[name] = [values[member] for member in rows["member"]]
    rows["epoch"] = rows["step"] / population.per_epoch
    return rows.drop(columns="member")
