"""C44: batch norm at test time, by the population's mean and variance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from losslab.engine.randomness import generator, seeded
from losslab.layers import BatchNorm, fold, population_statistics, with_batchnorm, xavier
from losslab.layers.batchnorm import is_batchnorm
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, all_but
from losslab.lecture.figures import figure, lines, reference, spread
from losslab.lecture.numbers import number
from losslab.lecture.statistics import bootstrap_interval, max_relative_error
from losslab.lecture.training import trained
from losslab.lecture.verdicts import bound, identity
from losslab.rules import SGD
from losslab.tasks import Splits, digits, mlp, supervised

if TYPE_CHECKING:
    import pandas as pd

CHECKS = {
    "batch": "an example's output is the same alone, permuted and beside copies of itself",
    "affine": "each layer is an affine map: folded into the weights, the network computes the same",
}
"""What is checked on every instance: column value -> name of the finding."""

SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512)
LARGE = 32
"""From this batch size on, the batch's own statistics should do as well."""

POINTS = 0.3
"""How far two accuracies may differ, in points."""

AVERAGES = "moving averages of training do as well as the population's statistics"


class Sizes(NamedTuple):
    """Replicates, updates, examples a batch, and draws of test batches."""

    seeds: int
    steps: int
    draws: int
    batch: int = 60
    rate: float = 0.5


def errors(index: int) -> dict[str, float]:
    """The relative error of each check of `CHECKS` on a random network, odd ones convolutional, float64."""
    g = generator(index, "C44")
    model: nn.Module
    shape: tuple[int, ...]
    with seeded(index, "C44"):
        if index % 2:
            parts = nn.Conv2d(2, 4, 3), BatchNorm(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
            model, shape = nn.Sequential(*parts).double(), (2, 4, 4)
        else:
            model, shape = with_batchnorm(mlp(5, 8, 7, 3, activation="tanh")()).double(), (5,)
    with torch.no_grad():
        for norm in filter(is_batchnorm, model.modules()):
            for weight in norm.parameters():
                weight.copy_(torch.randn(weight.shape, generator=g, dtype=torch.float64))
        data = torch.randn(60, *shape, generator=g, dtype=torch.float64) * 2 + 1
        model = population_statistics(model, data, batch_size=20).eval()
        x = data[: int(torch.randint(3, 20, (), generator=g))]
        y = model(x)
        order = torch.randperm(len(x), generator=g)
        alone = torch.cat([model(row) for row in x.split(1)])
        doubled = model(torch.cat([x, x[:1].expand(9, *shape)]))[: len(x)]
        others = (alone, model(x[order])[order.argsort()], doubled)
        return {
            "batch": max(max_relative_error(y, other) for other in others),
            "affine": max_relative_error(y, fold(model)(x)),
        }


def accuracies(splits: Splits, sizes: Sizes) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Test accuracy of trained networks by the statistics that they are given.

    Returns:
        A row a (seed, statistics, batch size): the accuracy, for batches the mean over draws of test batches,
        each normalised by itself. And a row a (seed, layer): how far the moving averages are from the
        population, the mean over units of ``|mean - mean| / std`` and of ``|var / var - 1|``.
    """
    import pandas as pd

    task = supervised(
        xavier().on(mlp(64, 100, 100, 100, 10, activation="sigmoid", batch_norm=True)), splits.train
    )
    population = trained(
        task, SGD(lr=sizes.rate), seeds=sizes.seeds, steps=sizes.steps, batch_size=sizes.batch
    )
    train, _ = splits.train.all()
    x, y = splits.test.all()
    rows, apart = [], []
    for seed, averaged in enumerate(population):
        exact = population_statistics(averaged, train, exact=True)
        paper = population_statistics(averaged, train, batch_size=sizes.batch)
        for name, model in (("moving average", averaged), ("algorithm 2", paper), ("exact", exact)):
            rows.append({"seed": seed, "statistics": name, "batch": 0, "accuracy": accuracy(model(x), y)})
        norms = zip(_norms(averaged), _norms(exact), strict=True)
        for layer, (found, wanted) in enumerate(norms, start=1):
            shift = (found.running_mean - wanted.running_mean).abs() / wanted.running_var.sqrt()
            ratio = (found.running_var / wanted.running_var - 1).abs()
            apart.append({"seed": seed, "layer": layer, "mean": float(shift.mean())})
            apart[-1]["variance"] = float(ratio.mean())
        for size in SIZES:
            size = min(size, len(x))
            mean = by_batches(averaged, x, y, size, sizes.draws, seed)
            rows.append({"seed": seed, "statistics": "batch", "batch": size, "accuracy": mean})
    return pd.DataFrame(rows), pd.DataFrame(apart)


def by_batches(model: nn.Module, x: Tensor, y: Tensor, size: int, draws: int, seed: int) -> float:
    """The accuracy with each batch normalised by itself; an incomplete last batch is left out."""
    ghost = with_batchnorm(model, lambda features: BatchNorm(features, ghost=size)).train()
    found = []
    for draw in range(draws if size < len(x) else 1):
        order = torch.randperm(len(x), generator=generator(seed, "test batches", draw))
        order = order[: len(x) - len(x) % size]
        found.append(accuracy(ghost(x[order]), y[order]))
    return float(np.mean(found))


def accuracy(outputs: Tensor, y: Tensor) -> float:
    """The share of right answers."""
    return float((outputs.argmax(1) == y).double().mean())


def _norms(model: nn.Module) -> list[Any]:
    norms: list[Any] = [m for m in model.modules() if is_batchnorm(m)]
    return norms


def experiment(lab: Lab) -> Tables:
    """Random networks; and a sigmoid network on the digits."""
    sizes = Sizes(lab.replicates(10, 30), lab.pick(500, 2000), lab.pick(10, 50))
    return evidence(lab, lab.pick(120, 1000), digits(), sizes)


def evidence(lab: Lab, instances: int, splits: Splits, sizes: Sizes) -> Tables:
    """Checks on random networks, accuracies, and the distance of the moving averages."""
    import pandas as pd

    checks = [
        {"instance": i, "check": check, "error": error}
        for i in range(instances)
        for check, error in errors(i).items()
    ]
    lab.progress("testing by batches and by the population")
    table, apart = accuracies(splits, sizes)
    return {"instances": pd.DataFrame(checks), "accuracy": table, "averages": apart}


def judge(tables: Tables) -> list[Finding]:
    """V1 on the independence; the mean difference of accuracies, in points, at every large batch size."""
    rows, table = tables["instances"], tables["accuracy"]
    findings = [identity(name, rows[rows.check == check].error) for check, name in CHECKS.items()]
    population = _accuracy(table, "algorithm 2")
    batches = table[table.statistics == "batch"]
    for size in sorted(batches.batch[batches.batch >= LARGE].unique()):
        own = batches[batches.batch == size].set_index("seed").accuracy
        findings.append(
            _close(f"batches of {size} do as well as the population's statistics", own, population)
        )
    apart = tables["averages"]
    note = (
        f"the moving averages' means are off by {number(apart['mean'].mean())} standard deviations, their "
        f"variances by {number(100 * apart.variance.mean())} %"
    )
    return [*findings, _close(AVERAGES, _accuracy(table, "moving average"), _accuracy(table, "exact"), note)]


def _accuracy(table: pd.DataFrame, statistics: str) -> pd.Series:
    return table[table.statistics == statistics].set_index("seed").accuracy


def _close(name: str, one: pd.Series, other: pd.Series, note: str = "") -> Finding:
    points = 100 * (one - other)
    ends = bootstrap_interval(points, np.mean)
    test = "mean difference of test accuracy in points, bootstrap"
    return bound(name, points.mean(), ends, len(points), test, -POINTS, POINTS, note)


def figures(tables: Tables) -> list[Drawing]:
    """Accuracy by the size of the test batches, and the moving averages' distance."""
    table = tables["accuracy"]
    drawn = figure("Test accuracy by the statistics used", "examples in a test batch", "accuracy", log_x=True)
    rows = spread(table[table.statistics == "batch"], ["batch"], "accuracy")
    lines(drawn, rows, "batch", "middle", band=("low", "high"), mode="lines+markers", name="the batch's own")
    reference(drawn, float(_accuracy(table, "algorithm 2").median()), "the population's")
    return [
        Drawing(
            drawn,
            "A sigmoid network 64-[100]×3-10 on the digits (median and 80 % of the seeds). Normalised by the "
            "batch it comes in, an example's output depends on the others, and small batches are poor; with "
            "the population's statistics batches no longer matter.",
        )
    ]


C44 = Claim(
    id="C44",
    section="6.4.1",
    title="At test time the whole data's mean and deviation are used",
    statement="At test time activations are normalised by the mean and standard deviation over all batches.",
    source="Notes §6.4.1; Ioffe & Szegedy 2015, section 3.1 and algorithm 2",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=all_but(AVERAGES),
    caveats=(
        "The population's variance is the mean of the batches' variances times m/(m − 1); libraries keep a "
        "moving average instead, with the unbiased variance. Both are compared with one exact pass.",
        "One network, trained at one rate: no methods are compared. Where test data differ from training "
        "data, or training batches are tiny, the two statistics differ more (Singh & Shrivastava 2019).",
    ),
    errata=("E25",),
)
