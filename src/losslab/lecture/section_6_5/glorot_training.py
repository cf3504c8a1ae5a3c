"""Training from the two initialisations of Glorot and Bengio: their table 1, at the size that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from losslab.engine import Points
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_5.glorot_start import INITIALISATIONS
from losslab.lecture.training import trained
from losslab.lecture.tuning import rates, tune
from losslab.rules import SGD
from losslab.tasks import Task, digits_task, mlp, mnist_task

if TYPE_CHECKING:
    import pandas as pd

BATCH = 10
HIDDEN = 5
TUNING_SEED = 1000


class Arm(NamedTuple):
    """A row of the paper's table, and its test error in per cent there on MNIST."""

    activation: str
    init: str
    paper: float


ARMS = {
    "softsign": Arm("softsign", "standard", 1.64),
    "softsign N": Arm("softsign", "normalised", 1.72),
    "tanh": Arm("tanh", "standard", 1.76),
    "tanh N": Arm("tanh", "normalised", 1.64),
    "sigmoid": Arm("sigmoid", "standard", 2.21),
}

GRIDS = {"softsign": rates(1e-2, 1.0), "tanh": rates(3e-3, 0.3), "sigmoid": rates(3e-2, 3.0)}

Member = tuple[str, float, int]
"""Arm, rate, seed."""


@dataclass(frozen=True)
class Setting:
    """Where the arms are trained.

    Attributes:
        name: Of the data.
        task: The task of a model.
        inputs: Numbers an example.
        width: Units of each of the five hidden layers.
        epochs: Passes over the data.
        seeds: Of the verdict.
        tuning_seeds: Of the searches for rates.
        least: Seeds that a paired comparison needs.
        delta: The difference of test errors that counts, in points.
        device: Where the networks are.
        note: What is smaller than in the paper.
    """

    name: str
    task: Callable[..., Task]
    inputs: int
    width: int
    epochs: int
    seeds: int
    tuning_seeds: int
    least: int
    delta: float
    device: str = "cpu"
    note: str = ""


def setting(lab: Lab) -> Setting:
    """Digits in the profiles quick and full; MNIST in paper, whole on a GPU, small on a CPU."""
    if lab.profile != "paper" or lab.data is None:
        width = lab.pick(100, 200)
        epochs = lab.pick(10, 40)
        note = f"digits stand in for MNIST, 5 layers of {width} units, {epochs} epochs"
        seeds, tuning = lab.replicates(10), lab.pick(2, 3)
        return Setting("digits", digits_task, 64, width, epochs, seeds, tuning, 10, 0.5, "cpu", note)
    gpu = torch.cuda.is_available()
    width, epochs = (1000, 10) if gpu else (100, 2)
    note = f"5 layers of {width} units, {epochs} epochs"
    note += "" if gpu else ": scaled down, since there is no GPU"

    def task(model: Callable[[], torch.nn.Module]) -> Task:
        return mnist_task(model, lab.data)

    seeds = lab.replicates(5)
    return Setting("MNIST", task, 784, width, epochs, seeds, 1, 5, 0.05, "cuda" if gpu else "cpu", note)


class Runs:
    """Trains arms of one activation in one program, whichever initialisation they start from."""

    def __init__(self, activation: str, where: Setting) -> None:
        self.where, self.activation = where, activation
        model = mlp(where.inputs, *[where.width] * HIDDEN, 10, activation=activation)
        self.tasks = {name: where.task(init.on(model)) for name, init in INITIALISATIONS.items()}
        self.known: dict[Member, float] = {}

    def errors(self, members: Sequence[Member], data: str) -> list[float]:
        """The error of each member over a data set after training, in per cent; 100 where it diverged."""
        where, lrs = self.where, [lr for _, lr, _ in members]
        task = self.tasks["standard"]
        assert task.train is not None
        steps = where.epochs * (len(task.train) // BATCH)
        population = trained(
            task,
            SGD(lr=lrs),
            seeds=[seed for _, _, seed in members],
            steps=steps,
            batch_size=BATCH,
            start=self._start(members),
            evaluate=[steps],
            evaluate_on=(data,),
            device=where.device,
        )
        rows = population.history
        accuracy = rows[rows.step == steps].set_index("member")[f"{data}_accuracy"]
        return (100 * (1 - accuracy.reindex(range(len(members))).fillna(0.0))).tolist()

    def search(self, members: Sequence[Member]) -> None:
        """Trains members for a search; their validation errors are then known."""
        new = [member for member in members if member not in self.known]
        if new:
            self.known |= dict(zip(new, self.errors(new, "validation"), strict=True))

    def score(self, arm: str) -> Callable[[list[float], list[int]], Tensor]:
        """The score of an arm, for `tune`."""

        def score(values: list[float], seeds: list[int]) -> Tensor:
            members = [(arm, lr, seed) for lr, seed in zip(values, seeds, strict=True)]
            self.search(members)
            return torch.tensor([self.known[member] for member in members])

        return score

    def _start(self, members: Sequence[Member]) -> Points:
        """Each member's weights: its seed's draw of its arm's initialisation."""
        seeds = sorted({seed for _, _, seed in members})
        drawn = {
            name: trained(task, SGD(lr=0.1), seeds=seeds, steps=0).points for name, task in self.tasks.items()
        }
        picked = [drawn[ARMS[arm].init].select([seeds.index(seed)]) for arm, _, seed in members]
        names = picked[0].weights
        return Points({name: torch.cat([points[name] for points in picked]) for name in names}, {})


def table_1(where: Setting, progress: Callable[[str], None]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The test error of every arm at its best rate, on fresh seeds.

    Returns:
        The runs, one row a (arm, seed): ``lr``, ``error`` in per cent, ``paper``; with the setting's
        ``data``, ``note``, ``least`` and ``delta``. And the searches, one row a
        (arm, rate): ``score``, ``at_edge``.
    """
    import pandas as pd

    fresh = list(range(TUNING_SEED, TUNING_SEED + where.tuning_seeds))
    runs, searches = [], []
    for activation, grid in GRIDS.items():
        progress(f"five layers of {where.width} {activation} units on {where.name}")
        training = Runs(activation, where)
        arms = [name for name, arm in ARMS.items() if arm.activation == activation]
        training.search([(arm, lr, seed) for arm in arms for lr in grid for seed in fresh])
        found = {arm: tune(training.score(arm), grid, fresh) for arm in arms}
        members = [(arm, found[arm].lr, seed) for arm in arms for seed in range(where.seeds)]
        table = pd.DataFrame(members, columns=["arm", "lr", "seed"])
        table["error"] = training.errors(members, "test")
        runs.append(table)
        searches += [search.table.assign(arm=arm, at_edge=search.at_edge) for arm, search in found.items()]
    result = pd.concat(runs, ignore_index=True)
    result["paper"] = [ARMS[arm].paper for arm in result.arm]
    result = result.assign(data=where.name, note=where.note, least=where.least, delta=where.delta)
    return result, pd.concat(searches, ignore_index=True)
