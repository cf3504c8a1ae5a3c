"""Networks and regressions fed with the same inputs, scaled in different ways."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losslab.layers import lecun, standardise, whiten
from losslab.lecture.claim import Lab
from losslab.lecture.section_6_4.regression import Regressions, steps_to
from losslab.lecture.training import arrival, trained
from losslab.lecture.tuning import rates, tune
from losslab.rules import SGD
from losslab.tasks import Batch, Data, Splits, Task, digits, half_mse, mlp, mnist, supervised

if TYPE_CHECKING:
    import pandas as pd

Map = Callable[[Tensor], Tensor]
"""Inputs ``[n, d]`` -> inputs ``[n, k]``."""

SHIFT = 3.0
RIDGE = 1e-2
"""What whitening adds to each eigenvalue, in units of their mean, for the networks."""

GRID = tuple(rates(1e-3, 1.0))
TUNING_SEEDS = (1000, 1001, 1002)

NETWORKS = ("digits 64-30-10", "MNIST 784-100-10")
RAW, CENTRED, STANDARD, SHIFTED = "raw", "centred", "standardised", "standardised + 3"
PCA, ZCA, WHITE = "whitened (PCA)", "whitened (ZCA)", "whitened"


def fitted(name: str, x: Tensor) -> Map:
    """One of the scalings, fitted to inputs ``[n, d]``."""
    if name == RAW:
        return lambda z: z
    if name == CENTRED:
        mean = x.mean(0)
        return lambda z: z - mean
    if name == WHITE:
        return whiten(x, "zca")
    scale = standardise(x)
    if name == STANDARD:
        return scale
    if name == SHIFTED:
        return lambda z: scale(z) + SHIFT
    turn = whiten(scale(x), {PCA: "pca", ZCA: "zca"}[name], eps=RIDGE)
    return lambda z: turn(scale(z))


def signs(labels: Tensor, classes: int = 10) -> Tensor:
    """Targets +1 for the class of the example and -1 for the others, ``[n] -> [n, classes]``."""
    return 2.0 * F.one_hot(labels, classes) - 1.0


# -- linear regression ---------------------------------------------------------------------------------


def regressions(
    arms: Sequence[str], seeds: int, target: float, looks: int = 60
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Gradient descent at the rate 1/L on random halves of the digits, each scaled in every way.

    Args:
        arms: Scalings.
        seeds: Halves; each is scaled by its own statistics.
        target: Excess loss to reach, in units of that at the start.
        looks: Points a curve.

    Returns:
        One row a (arm, seed): ``kappa``, ``steps`` counted and ``predicted`` by the spectrum. And the excess
        along the way, one row a (arm, seed, step).
    """
    import pandas as pd

    x, labels = digits(raw=True).train.all()
    x, y = x.double(), signs(labels).double()
    generator = torch.Generator().manual_seed(33)
    halves = [torch.randperm(len(x), generator=generator)[: len(x) // 2] for _ in range(seeds)]
    counts, curves = [], []
    for arm in arms:
        problem = Regressions.of([fitted(arm, x[half])(x[half]) for half in halves], [y[h] for h in halves])
        predicted = problem.predicted(target)
        steps = 2 + int(1.1 * predicted.max())
        path = problem.descend(steps)
        table = {"seed": range(seeds), "kappa": problem.condition.numpy(), "predicted": predicted.numpy()}
        counts.append(pd.DataFrame(table).assign(arm=arm, steps=steps_to(path, target).numpy()))
        at = np.unique(np.r_[0, np.geomspace(1, steps, looks).astype(int)])
        frame = pd.DataFrame(path[at].numpy()).assign(step=at, arm=arm)
        curves.append(frame.melt(id_vars=["arm", "step"], var_name="seed", value_name="excess"))
    tables = pd.concat(counts, ignore_index=True), pd.concat(curves, ignore_index=True)
    return tables[0], tables[1].astype({"seed": int})


def one_step(instances: int) -> pd.DataFrame:
    """The excess loss after one step at the rate 1/L on random whitened data, and on standardised ones.

    Returns:
        One row an instance: ``whitened`` and ``standardised``, in units of the excess at the start.
    """
    import pandas as pd

    rng = np.random.default_rng(34)
    rows = []
    for instance in range(instances):
        d, k = int(rng.integers(2, 21)), int(rng.integers(1, 4))
        n = int(rng.integers(2 * d, 10 * d))
        mixing = rng.standard_normal((d, d)) * 10 ** rng.uniform(-2, 2, d)
        x = torch.from_numpy(rng.standard_normal((n, d)) @ mixing + 10 * rng.standard_normal(d))
        y = torch.from_numpy(rng.standard_normal((n, k)))
        kind = "pca" if instance % 2 else "zca"
        left = [
            float(Regressions.of([scale(x)], [y]).descend(1)[1])
            for scale in (whiten(x, kind), standardise(x))
        ]
        rows.append({"instance": instance, "whitened": left[0], "standardised": left[1]})
    return pd.DataFrame(rows)


# -- networks ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """A network and its data.

    Attributes:
        name: What tables call it.
        widths: Of the network.
        share: The training loss to reach, in units of that of the best constant output.
        steps: Updates allowed; a target not reached by then counts as never reached.
        seeds: Replicates.
        least: Seeds that a verdict needs.
        tuning_seeds: Seeds of the search for a rate.
        folder: Of MNIST; None for the digits.
        looks: Evaluations a decade of steps.
    """

    name: str
    widths: tuple[int, ...]
    share: float
    steps: int
    seeds: int
    least: int = 10
    tuning_seeds: int = 3
    folder: Path | None = None
    looks: int = 24


@functools.lru_cache(maxsize=1)
def raw_inputs(folder: Path | None) -> Splits:
    """The raw inputs: 0 to 16 for the digits, 0 to 1 for MNIST, of which 10,000 are used to train."""
    if folder is None:
        return digits(raw=True)
    splits = mnist(folder, validation=2000)
    low, high = (end(splits.train.all()[0]) for end in (torch.min, torch.max))
    pairs = [split.head(10000).all() for split in splits]
    return Splits(*(Data(((x - low) / (high - low), y)) for x, y in pairs))


def benches(lab: Lab) -> list[Bench]:
    """The digits; in the longer profiles MNIST too, where its folder is given."""
    share, steps = lab.pick((0.5, 600), (0.25, 4000))
    found = [Bench(NETWORKS[0], (64, 30, 10), share, steps, lab.replicates(10, 20))]
    if lab.profile != "quick" and lab.data is not None:
        seeds = lab.replicates(5)
        found.append(Bench(NETWORKS[1], (784, 100, 10), share, 3000, seeds, 5, 1, lab.data, looks=12))
    return found


def scaled_task(bench: Bench, arm: str) -> tuple[Task, float]:
    """Learning +1 and -1 by half the squared error with a tanh network; and the loss to reach."""
    splits = raw_inputs(bench.folder)
    scale = fitted(arm, splits.train.all()[0])
    parts = [Data((scale(x), signs(y))) for x, y in (split.all() for split in splits)]
    x, y = parts[0].all()
    # Whitening may leave fewer coordinates than there are pixels.
    network = lecun().on(mlp(x.shape[1], *bench.widths[1:], activation="lecun_tanh"))
    task = supervised(network, parts[0], parts[2], parts[1], criterion=half_mse, name=f"{bench.name}, {arm}")
    constant = float((y - y.mean(0)).square().sum(1).mean() / 2)
    return task.replace(metrics=_accuracy), bench.share * constant


def _accuracy(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return {"accuracy": (model(batch[0]).argmax(-1) == batch[1].argmax(-1)).float().mean()}


def race(bench: Bench, arms: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Every arm at the rate that takes it to the target soonest.

    Returns:
        ``networks``, one row a (network, arm, seed): ``lr``, ``at_edge``, ``steps`` until the training loss
        is at most the target, ``test_accuracy`` at the end. ``training``: the loss along the way. ``tuning``:
        every rate tried, with the median of log10 of the steps that it took on seeds of its own.
    """
    import pandas as pd

    parts = [_arm(bench, arm) for arm in arms]
    return {
        name: pd.concat([part[name] for part in parts], ignore_index=True)
        for name in ("networks", "training", "tuning")
    }


@functools.cache
def _arm(bench: Bench, arm: str) -> dict[str, pd.DataFrame]:
    """One arm, kept: two claims share the standardised one."""
    task, target = scaled_task(bench, arm)

    def score(lrs: list[float], seeds: list[int]) -> Tensor:
        rows = _train(bench, task, lrs, seeds, ["train"])
        steps = arrival(rows, "train_loss", target)
        last = rows.groupby("member").train_loss.last()
        # Where no rate arrives, the one that comes nearest is best.
        missed = math.log10(bench.steps) + np.log10(last / target)
        return torch.tensor(np.log10(steps.clip(lower=1)).where(steps < math.inf, missed).to_numpy())

    tuned = tune(score, GRID, TUNING_SEEDS[: bench.tuning_seeds])
    seeds = list(range(bench.seeds))
    rows = _train(bench, task, [tuned.lr] * len(seeds), seeds, ["train", "test"])
    ends = rows[rows.step == bench.steps].set_index("member").test_accuracy
    told = {"network": bench.name, "arm": arm}
    networks = rows[rows.step == 0][["seed"]].assign(
        **told,
        lr=tuned.lr,
        at_edge=tuned.at_edge,
        least=bench.least,
        steps=arrival(rows, "train_loss", target).to_numpy(),
        test_accuracy=ends.reindex(range(len(seeds))).to_numpy(),
    )
    kept = rows[["step", "seed", "train_loss"]].assign(**told, target=target)
    search = tuned.table.assign(**told, at_edge=tuned.at_edge)
    return {"networks": networks, "training": kept, "tuning": search}


def _train(bench: Bench, task: Task, lrs: list[float], seeds: list[int], on: list[str]) -> pd.DataFrame:
    """The history of one member a (rate, seed); a loss is infinite from where its member has diverged."""
    looks = np.unique(np.geomspace(1, bench.steps, math.ceil(bench.looks * math.log10(bench.steps))).round())
    evaluate = [0, *looks.astype(int).tolist()]
    population = trained(
        task,
        SGD(lr=lrs),
        seeds=seeds,
        steps=bench.steps,
        batch_size=10,
        evaluate=evaluate,
        evaluate_on=on,
        record=[],
    )
    rows = population.history
    losses = [f"{name}_loss" for name in on]
    return rows.assign(**rows[losses].fillna(math.inf))
