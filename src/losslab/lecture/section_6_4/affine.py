"""C46: what the scale and the shift of batch norm are for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from losslab.engine import Population
from losslab.layers import BatchNorm, with_batchnorm
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, all_but
from losslab.lecture.figures import figure, lines
from losslab.lecture.numbers import number
from losslab.lecture.section_6_4.forward import instance
from losslab.lecture.statistics import max_relative_error
from losslab.lecture.training import trained
from losslab.lecture.tuning import rates, tune
from losslab.lecture.verdicts import count, identity, paired
from losslab.rules import SGD
from losslab.tasks import Factory, Splits, digits, mlp, supervised

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

IDENTITY = "γ = √(var + ε), β = mean gives the identity"
TOWARDS = "trained γ and β put more of the sigmoid's inputs into its linear regime"
LOWER = {a: f"with γ and β the training loss ends lower ({a})" for a in ("sigmoid", "relu")}

LINEAR = 0.33
"""Below this size an input of a sigmoid is in its linear regime; the curve bends away by 1 % there."""

EIGHT_OF_TEN = 0.44
"""A probability that eight of ten runs show with 95 % confidence, and seven do not."""

GRID = rates(0.03, 3.0)
TUNING_SEEDS = (1000, 1001, 1002)
EDGES = np.linspace(-6, 6, 61)


class Sizes(NamedTuple):
    """Replicates, updates, and examples a batch."""

    seeds: int
    steps: int
    batch: int = 60


def restored(index: int) -> float:
    """The relative error with which γ and β restore a random input, float64."""
    made = instance(index, "C46")
    with torch.no_grad():
        made.gamma.copy_((made.x.var(made.axes, correction=0) + made.layer.eps).sqrt())
        made.beta.copy_(made.x.mean(made.axes))
        return max_relative_error(made.layer(made.x), made.x)


def network(activation: str, affine: bool) -> Factory:
    """64-50-50-10 with batch norm, with or without γ and β."""
    plain = mlp(64, 50, 50, 10, activation=activation)

    def build() -> nn.Module:
        return with_batchnorm(plain(), lambda features: BatchNorm(features, affine=affine))

    return Factory(f"batch norm (affine={affine}) in {plain!r}", build)


def arm(activation: str, affine: bool, splits: Splits, sizes: Sizes) -> tuple[Population, pd.DataFrame]:
    """The networks at the arm's tuned rate, with their final losses in the history; and the search."""
    task = supervised(network(activation, affine), splits.train, splits.test, splits.validation)
    settings = {"steps": sizes.steps, "batch_size": sizes.batch, "evaluate": [sizes.steps]}

    def score(lr: list[float], seeds: list[int]) -> Tensor:
        done = trained(task, SGD(lr=lr), seeds=seeds, evaluate_on=["validation"], **settings)
        values = done.log.tensors().get("validation_loss")
        return torch.full((len(seeds),), math.inf) if values is None else values[-1]

    found = tune(score, GRID, TUNING_SEEDS)
    done = trained(task, SGD(lr=found.lr), seeds=sizes.seeds, evaluate_on=["train", "test"], **settings)
    return done, found.table.assign(chosen=found.lr, at_edge=found.at_edge)


def places(population: Population, x: Tensor) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Where the inputs of the non-linearities are before and behind γ and β, over all of ``x`` as one batch.

    Returns:
        A row a (seed, layer): shares ``linear_before`` and ``linear_after`` with size below `LINEAR`,
        ``active_before`` and ``active_after`` above zero, the root mean squares of gamma and beta. And the
        densities of all inputs of a layer, seeds together.
    """
    import pandas as pd

    rows: list[dict[str, float]] = []
    counts: dict[tuple[int, str], NDArray] = {}
    for seed, module in enumerate(population):
        values = x
        layer = 0
        for part in module.train().children():
            if not isinstance(part, BatchNorm):
                values = part(values).detach()
                continue
            layer += 1
            before = BatchNorm(part.features, eps=part.eps, affine=False)(values)
            values = part(values).detach()
            row: dict[str, float] = {"seed": seed, "layer": layer}
            for name, found in (("before", before), ("after", values)):
                row[f"linear_{name}"] = float((found.abs() < LINEAR).double().mean())
                row[f"active_{name}"] = float((found > 0).double().mean())
                histogram = np.histogram(found.numpy(), bins=EDGES)[0]
                counts[layer, name] = counts[layer, name] + histogram if seed else histogram
            for name, weight in part.named_parameters():
                row[name] = float(weight.detach().square().mean().sqrt())
            rows.append(row)
    middles = (EDGES[1:] + EDGES[:-1]) / 2
    parts = [
        pd.DataFrame({"layer": layer, "stage": name, "s": middles, "density": found / found.sum()})
        for (layer, name), found in counts.items()
    ]
    return pd.DataFrame(rows), pd.concat(parts, ignore_index=True)


def experiment(lab: Lab) -> Tables:
    """Random layers; and networks of both activations, with γ and β and without."""
    sizes = Sizes(lab.replicates(10, 30), lab.pick(300, 1500))
    return evidence(lab, lab.pick(150, 2000), digits(), sizes)


def evidence(lab: Lab, instances: int, splits: Splits, sizes: Sizes) -> Tables:
    """The identity, the arms' ends and searches, and where the inputs are."""
    import pandas as pd

    checks = pd.DataFrame({"instance": range(instances), "error": [restored(i) for i in range(instances)]})
    ends, searches, placed, densities = [], [], [], []
    for activation in LOWER:
        for affine in (True, False):
            name = f"{activation}, {'with' if affine else 'without'} γ, β"
            lab.progress(f"batch norm, {name}")
            named = {"arm": name, "activation": activation, "affine": affine}
            population, search = arm(activation, affine, splits, sizes)
            last = population.history.groupby("seed").last()
            last = last.reindex(range(sizes.seeds)).reset_index()
            columns = ["train_loss", "test_loss", "train_accuracy", "test_accuracy"]
            ends.append(last.reindex(columns=["seed", *columns]).assign(**named))
            searches.append(search.assign(**named))
            if affine:
                where, density = places(population, splits.train.all()[0])
                placed.append(where.assign(activation=activation))
                densities.append(density.assign(activation=activation))
    tables = {"ends": ends, "tuning": searches, "places": placed, "densities": densities}
    return {"instances": checks} | {n: pd.concat(parts, ignore_index=True) for n, parts in tables.items()}


def judge(tables: Tables) -> list[Finding]:
    """V2 on the direction; V1 on the identity; V3, as context, on what γ and β do for the training loss."""
    return [
        _direction(tables["places"]),
        identity(IDENTITY, tables["instances"].error),
        *(_lower(activation, tables["ends"], tables["tuning"]) for activation in LOWER),
    ]


def _direction(places: pd.DataFrame) -> Finding:
    means = places.groupby(["activation", "seed"]).mean(numeric_only=True)
    sigmoid, relu = means.loc["sigmoid"], means.loc["relu"]
    more = sigmoid.linear_after > sigmoid.linear_before
    note = (
        f"share of |s| < {LINEAR:g}: {_mean(sigmoid.linear_before)} before, {_mean(sigmoid.linear_after)} "
        f"after; root mean square of γ {_mean(sigmoid.weight)}, of β {_mean(sigmoid.bias)}; ReLU units are "
        f"active for {_mean(relu.active_before)} before, {_mean(relu.active_after)} after"
    )
    return count(TOWARDS, int(more.sum()), len(more), at_least=EIGHT_OF_TEN, note=note)


def _mean(values: pd.Series) -> str:
    return number(values.mean())


def _lower(activation: str, ends: pd.DataFrame, search: pd.DataFrame) -> Finding:
    ends, search = ends[ends.activation == activation], search[search.activation == activation]
    loss = ends.assign(train_loss=ends.train_loss.fillna(math.inf)).pivot(
        index="seed", columns="affine", values="train_loss"
    )
    test = ends.groupby("affine").test_accuracy.mean()
    chosen = search.groupby("affine").chosen.first()
    with np.errstate(invalid="ignore"):
        gain = (np.log10(loss[False]) - np.log10(loss[True])).where(loss[False] != loss[True], 0.0)
    note = (
        f"log₁₀ of the ratio of losses, rates {number(chosen[True])} and "
        f"{number(chosen[False])} without; test accuracy {number(test[True])} and "
        f"{number(test[False])} without"
    )
    return paired(LOWER[activation], gain, 0.0, note=note)


def figures(tables: Tables) -> list[Drawing]:
    """Where the sigmoid's inputs are, and what the rates do to each arm."""
    drawn = figure("Inputs of the sigmoids", "s", "share of the inputs")
    rows = tables["densities"]
    rows = rows[rows.activation == "sigmoid"]
    names = {"before": "before γ and β", "after": "behind γ and β"}
    labels = [f"layer {layer}, {names[stage]}" for layer, stage in zip(rows.layer, rows.stage, strict=True)]
    lines(drawn, rows.assign(series=labels), "s", "density", by="series")
    drawn.add_vrect(-LINEAR, LINEAR, fillcolor="rgba(123,131,140,0.2)", line_width=0)
    searched = figure("Rates", "learning rate", "validation loss", log_x=True, log_y=True)
    search = tables["tuning"]
    search = search[np.isfinite(search.score)]
    lines(searched, search, "lr", "score", by="arm", mode="lines+markers")
    return [
        Drawing(
            drawn,
            "Digits, 64-50-50-10 after training. The grey band is the sigmoid's linear regime; the question "
            "is whether γ and β move inputs into it.",
        ),
        Drawing(searched, "The search for each arm's rate, seeds of its own (medians)."),
    ]


C46 = Claim(
    id="C46",
    section="6.4.1",
    title="γ and β shift the distribution back to the linear regime",
    statement="The learned scale and shift give back what the normalisation took; the notes say that they "
    "shift the distribution back to the linear regime of the non-linearity.",
    source="Notes §6.4.1; Ioffe & Szegedy 2015, section 3",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=all_but(*LOWER.values()),
    caveats=(
        "The paper's reason is the opposite of the notes': the normalisation alone would hold a sigmoid's "
        "inputs in its linear regime, and γ, β let the layer represent the identity again.",
        "Inputs are measured over the whole training set as one batch. The comparison of arms with and "
        "without γ, β is context and does not decide.",
    ),
    errata=("E20",),
)
