"""C53: whether training needs a start that keeps the non-linearities active."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from losslab.engine import Points
from losslab.layers import lecun
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables
from losslab.lecture.figures import NEUTRAL, figure, lines, reference, spread
from losslab.lecture.section_6_5.networks import digit_rows, forward
from losslab.lecture.training import trained
from losslab.lecture.tuning import rates, tune
from losslab.lecture.verdicts import count, paired_family
from losslab.rules import SGD, Adam, Rule
from losslab.tasks import Task, digits_task, mlp

if TYPE_CHECKING:
    import pandas as pd

GAINS = (0.03, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Factors on LeCun's standard deviation, in every layer."""

HIDDEN = 6
ACTIVE = 0.5
"""A slope of tanh from which a unit counts as active."""

BAND = (0.5, 0.98)
"""The shares of active units that the claim calls good."""

BAD = (0.1, 5.0)
"""Gains up to the first and from the second on should be bad,"""

WORSE = 3.0
"""by this factor in training loss."""

TUNING_SEEDS = (1000, 1001)


class Arm(NamedTuple):
    """A way to train: the rule for any rates, their grid, and whether batch norm is in between."""

    rule: Callable[[list[float]], Rule]
    grid: Sequence[float]
    batch_norm: bool = False


ARMS = {
    "SGD": Arm(lambda lr: SGD(lr=lr), rates(1e-3, 1.0)),
    "Adam": Arm(lambda lr: Adam(lr=lr), rates(1e-5, 1e-1)),
    "SGD with batch norm": Arm(lambda lr: SGD(lr=lr), rates(1e-3, 1.0), batch_norm=True),
}


def task_of(arm: Arm) -> Task:
    """A tanh network of six hidden layers of 32 units on digits, from LeCun's start."""
    widths = (64, *[32] * HIDDEN, 10)
    return digits_task(lecun().on(mlp(*widths, activation="tanh", batch_norm=arm.batch_norm)))


def scaled(task: Task, gains: Sequence[float], seeds: Sequence[int]) -> Points:
    """The starts of some members: each its seed's weights times its gain."""
    points = trained(task, SGD(lr=0.1), seeds=list(seeds), steps=0).points
    factor = torch.tensor(gains).view(-1, 1, 1)
    weights = {name: w * factor if w.dim() == 3 else w for name, w in points.weights.items()}
    return Points(weights, points.buffers)


def layers_at_start(gains: Sequence[float], seeds: int, examples: int = 200) -> pd.DataFrame:
    """The hidden layers before training.

    Returns:
        One row a (gain, seed, layer): ``std`` of the activations and ``active``, the share of units and
        examples with a slope above 0.5.
    """
    import pandas as pd

    members = [(gain, seed) for gain in gains for seed in range(seeds)]
    start = scaled(task_of(ARMS["SGD"]), [g for g, _ in members], [s for _, s in members])
    weights = [w for w in start.weights.values() if w.dim() == 3]
    rows = []
    for layer, h in enumerate(forward(weights, digit_rows(examples), torch.tanh)[:-1], start=1):
        a = torch.tanh(h)
        std, active = a.std((1, 2)), (1 - a.square() > ACTIVE).float().mean((1, 2))
        table = pd.DataFrame(members, columns=["gain", "seed"])
        rows.append(table.assign(layer=layer, std=std.numpy(), active=active.numpy()))
    return pd.concat(rows, ignore_index=True)


class _Score:
    """Validation losses; the first search trains the grids of all gains in one program."""

    def __init__(self, arm: Arm, gains: Sequence[float], steps: int) -> None:
        self.arm, self.task, self.steps = arm, task_of(arm), steps
        self.known: dict[tuple[float, float, int], float] = {}
        self._train([(g, lr, s) for g in gains for lr in arm.grid for s in TUNING_SEEDS])

    def of(self, gain: float) -> Callable[[list[float], list[int]], Tensor]:
        """The score of one gain, for `tune`."""

        def score(values: list[float], seeds: list[int]) -> Tensor:
            members = [(gain, lr, seed) for lr, seed in zip(values, seeds, strict=True)]
            self._train([member for member in members if member not in self.known])
            return torch.tensor([self.known[member] for member in members])

        return score

    def _train(self, members: list[tuple[float, float, int]]) -> None:
        if members:
            losses = final_losses(self.arm, self.task, members, self.steps, "validation")
            self.known |= dict(zip(members, losses, strict=True))


def final_losses(
    arm: Arm, task: Task, members: list[tuple[float, float, int]], steps: int, data: str
) -> list[float]:
    """Loss of each member (gain, rate, seed) over a data set after training; infinite where it diverged."""
    gains, lrs, seeds = (list(column) for column in zip(*members, strict=True))
    population = trained(
        task,
        arm.rule(lrs),
        seeds=seeds,
        steps=steps,
        batch_size=20,
        start=scaled(task, gains, seeds),
        evaluate=[steps],
        evaluate_on=(data,),
    )
    rows = population.history
    losses = rows[rows.step == steps].set_index("member")[f"{data}_loss"].reindex(range(len(members)))
    return losses.astype(float).fillna(math.inf).tolist()


def sweep(name: str, gains: Sequence[float], seeds: int, steps: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training losses from every gain, each at its own best rate.

    Returns:
        The runs, one row a (gain, seed): ``arm``, ``lr``, ``train_loss``. And the searches, one row a (gain,
        rate): ``score``, ``at_edge``.
    """
    import pandas as pd

    arm = ARMS[name]
    score = _Score(arm, gains, steps)
    searches = {gain: tune(score.of(gain), arm.grid, TUNING_SEEDS) for gain in gains}
    members = [(gain, searches[gain].lr, seed) for gain in gains for seed in range(seeds)]
    runs = pd.DataFrame(members, columns=["gain", "lr", "seed"])
    runs["train_loss"] = final_losses(arm, score.task, members, steps, "train")
    tables = [search.table.assign(gain=gain, at_edge=search.at_edge) for gain, search in searches.items()]
    return runs.assign(arm=name), pd.concat(tables, ignore_index=True).assign(arm=name)


def evidence(arms: Sequence[str], gains: Sequence[float], seeds: int, steps: int) -> Tables:
    """The layers at the start, the runs and the searches of every arm."""
    import pandas as pd

    found = [sweep(name, gains, seeds, steps) for name in arms]
    return {
        "start": layers_at_start(gains, seeds),
        "runs": pd.concat([runs for runs, _ in found], ignore_index=True),
        "tuning": pd.concat([searches for _, searches in found], ignore_index=True),
    }


def experiment(lab: Lab) -> Tables:
    """Ten gains, 500 updates; Adam and batch norm beside SGD in the longer profiles."""
    return evidence(lab.pick(("SGD",), tuple(ARMS)), GAINS, lab.replicates(10, 30), steps=500)


def judge(tables: Tables) -> list[Finding]:
    """V2 for where the least loss lies, V3 for how much worse the bad gains are."""
    share = tables["start"].groupby("gain").active.mean()
    active = dict(zip(map(float, share.index), share.tolist(), strict=True))
    good = [gain for gain, share in active.items() if BAND[0] <= share <= BAND[1]]
    runs = tables["runs"]
    sgd = runs[runs.arm == "SGD"]
    losses = {gain: sgd[sgd.gain == gain].set_index("seed").train_loss for gain in active}
    best = [min(losses, key=lambda gain: losses[gain][seed]) for seed in losses[min(losses)].index]
    least = min(losses, key=lambda gain: losses[gain].median())
    inside = min(good, key=lambda gain: losses[gain].median(), default=least)
    apart = losses[inside].median() / losses[least].median()
    where = (
        f"least at gain {least:g} with {active[least]:.2f} active; gain {inside:g} with {active[inside]:.2f} "
        f"active has {apart:.2f} times its loss"
    )
    ratios = {}
    for gain, values in losses.items():
        if gain <= BAD[0] or gain >= BAD[1]:
            ratios[f"gain {gain:g} ends {WORSE:g} times worse"] = np.log(values / losses[inside])
    note = f"log of the ratio of training losses, against gain {inside:g}{_edges(tables)}"
    return [
        count(
            "the least training loss starts from a gain with 50 to 98 % of the units active",
            sum(gain in good for gain in best), len(best), at_least=0.5, note=where,
        ),
        *paired_family(ratios, delta=math.log(WORSE), note=note),
    ]  # fmt: skip


def _edges(tables: Tables) -> str:
    tuning = tables["tuning"]
    edge = tuning[tuning.at_edge & (tuning.arm == "SGD")].gain.unique()
    told = ", ".join(f"{gain:g}" for gain in edge)
    return f"; the best rate lay at the edge of the search for gain {told}" if len(edge) else ""


def figures(tables: Tables) -> list[Drawing]:
    """Loss against gain with the active share, and the layers' spreads at the start."""
    runs, start = tables["runs"], tables["start"]
    drawn = figure("Training loss against the gain", "gain", "training loss", log_x=True, log_y=True)
    rows = spread(runs.replace(math.inf, np.nan), ["arm", "gain"], "train_loss")
    lines(drawn, rows, "gain", "middle", by="arm", band=("low", "high"), mode="lines+markers")
    share = start.groupby("gain").active.mean()
    drawn.add_scatter(
        x=share.index, y=share, yaxis="y2", mode="lines", name="active share (right)",
        line={"color": NEUTRAL, "dash": "dot", "width": 2},
    )  # fmt: skip
    axis = {"overlaying": "y", "side": "right", "range": [0, 1.05], "showgrid": False, "dtick": 0.25}
    axis |= {"tickmode": "linear", "tick0": 0.0}
    drawn.update_layout(yaxis2=axis | {"title": {"text": "share with slope above 0.5"}})
    depth = figure("Spread of the layers before training", "hidden layer", "std of the activations",
                   log_y=True)  # fmt: skip
    some = start[start.gain.isin([0.1, 0.6, 1.0, 2.0, 5.0])]
    bands = spread(some.assign(name="gain " + some.gain.map("{:g}".format)), ["name", "layer"], "std")
    lines(depth, bands, "layer", "middle", by="name", band=("low", "high"), mode="lines+markers")
    reference(depth, 1.0, "saturated")
    return [
        Drawing(
            drawn,
            "After 500 updates on digits, six hidden layers of 32 tanh units, each gain at its own best rate "
            "(median and 80 % of the seeds). Too small a gain leaves no signal, too large a gain saturates "
            "the units.",
        ),
        Drawing(
            depth,
            "A small gain shrinks the signal by the same factor in every layer; a large one drives tanh to "
            "±1.",
        ),
    ]


C53 = Claim(
    id="C53",
    section="6.5",
    title="A good start keeps the non-linearities active",
    statement="The goal of initialisation is that the non-linearities are in their active regime, without "
    "which training is slow.",
    source="Notes §6.5",
    experiment=experiment,
    judge=judge,
    figures=figures,
    caveats=(
        "Active means a slope of tanh above 0.5. Small gains have nearly all units active, and train badly "
        "because the signal vanishes: hence the upper end of 98 %. The active share alone does not tell a "
        "good start from one that is too small.",
        "The rate of every gain is chosen by validation loss, over at least seven rates; the losses are "
        "those after 500 updates, and longer training shrinks the differences.",
        "The longer profiles draw Adam and batch norm beside SGD: batch norm flattens the curve, Adam hardly "
        "does.",
    ),
    errata=("E27",),
)
