"""C35: what becomes of a whitened input on its way through the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from losslab.layers import Initialisation, he, standardise, whiten, xavier
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables
from losslab.lecture.figures import figure, lines, reference, spread
from losslab.lecture.numbers import number
from losslab.lecture.training import trained
from losslab.lecture.verdicts import count
from losslab.rules import Adam
from losslab.tasks import Data, Splits, digits, mlp, mnist, supervised

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

APART = 0.2
"""How far a unit's mean may be from 0, or its variance from 1, and still count as normalised."""

CONDITION = 10.0
"""Condition number of the units' covariance from which they no longer count as white."""

ACTIVATIONS: dict[str, Callable[[], Initialisation]] = {"tanh": xavier, "relu": he, "sigmoid": xavier}
SCALINGS = ("standardised", "whitened")
STATES = ("untrained", "trained")


class Sizes(NamedTuple):
    """The network and its training."""

    width: int
    depth: int
    seeds: int
    steps: int
    examples: int


class Moments(NamedTuple):
    """How far a layer's units are from white.

    Attributes:
        mean: ``[k]``, float64.
        variance: Biased, ``[k]``.
        kappa: The condition number of the covariance of the units that are not constant; infinite when these
            are linearly dependent, NaN when there are none.
    """

    mean: Tensor
    variance: Tensor
    kappa: float


def moments(values: Tensor) -> Moments:
    """The moments of activations ``[n, k]``.

    Example:
        >>> found = moments(torch.tensor([[1.0, 2.0], [-1.0, 2.0], [3.0, -2.0], [-3.0, -2.0]]))
        >>> found.mean.tolist(), found.variance.tolist(), found.kappa
        ([0.0, 0.0], [5.0, 4.0], 1.25)
    """
    values = values.double()
    mean, variance = values.mean(0), values.var(0, correction=0)
    varies = (values != values[0]).any(0)
    centred = (values - mean)[:, varies]
    if not centred.shape[1]:
        return Moments(mean, variance, float("nan"))
    spectrum = torch.linalg.eigvalsh(centred.T @ centred / len(centred))
    low, high = float(spectrum[0]), float(spectrum[-1])
    # Rounding leaves the smallest eigenvalue of a singular matrix this far from zero, on either side.
    singular = low <= len(spectrum) * torch.finfo(torch.float64).eps * high
    return Moments(mean, variance, float("inf") if singular else high / low)


def layers(network: nn.Module, x: Tensor) -> list[Tensor]:
    """The input and the output of every hidden layer of a sequential network."""
    kept = [x]
    with torch.no_grad():
        for part in list(network.children())[:-1]:
            x = part(x)
            if not isinstance(part, nn.Linear):
                kept.append(x)
    return kept


def profile(splits: Splits, activation: str, scaling: str, sizes: Sizes) -> pd.DataFrame:
    """The activations of untrained and trained networks on their own training examples.

    Returns:
        One row a (state, seed, layer), layer 0 the input: ``off``, the share of units whose mean or variance
        is off by more than `APART`; ``mean``, the largest absolute one; ``low``, ``middle``, ``high``, the
        quantiles 0, 1/2 and 1 of the units' variances; ``kappa`` as in `Moments`; ``constant``, the share of
        units that are; ``accuracy`` on the training examples.
    """
    import pandas as pd

    x, y = splits.train.head(sizes.examples).all()
    scale = standardise(x) if scaling == "standardised" else whiten(x, "pca")
    x = scale(x)
    factory = mlp(x.shape[1], *[sizes.width] * sizes.depth, 10, activation=activation)
    task = supervised(ACTIVATIONS[activation]().on(factory), Data((x, y)), name=f"{activation}, {scaling}")
    rows = []
    for state, steps in zip(STATES, (0, sizes.steps), strict=True):
        rule = Adam(lr=[1e-3] * sizes.seeds)
        population = trained(task, rule, seeds=sizes.seeds, steps=steps, batch_size=50)
        for seed, network in enumerate(population):
            with torch.no_grad():
                accuracy = float((network(x).argmax(1) == y).float().mean())
            for layer, values in enumerate(layers(network, x)):
                mean, variance, kappa = moments(values)
                off = ((variance - 1).abs() > APART) | (mean.abs() > APART)
                low, middle, high = variance.quantile(
                    torch.tensor([0, 0.5, 1.0], dtype=torch.float64)
                ).tolist()
                rows.append(
                    {"state": state, "seed": seed, "layer": layer, "off": float(off.double().mean())}
                    | {"mean": float(mean.abs().max()), "low": low, "middle": middle, "high": high}
                    | {"kappa": kappa, "constant": float((values == values[0]).all(0).double().mean())}
                    | {"accuracy": accuracy}
                )
    return pd.DataFrame(rows).assign(activation=activation, scaling=scaling)


def evidence(lab: Lab, sizes: Sizes, splits: Splits) -> Tables:
    """Every activation and scaling."""
    import pandas as pd

    parts = []
    for activation in ACTIVATIONS:
        lab.progress(f"{activation} layers on white inputs")
        parts += [profile(splits, activation, scaling, sizes) for scaling in SCALINGS]
    return {"layers": pd.concat(parts, ignore_index=True)}


def experiment(lab: Lab) -> Tables:
    """Five hidden layers on digits; on MNIST in the longer profiles, where its folder is given."""
    if lab.profile != "quick" and lab.data is not None:
        return evidence(lab, Sizes(100, 5, lab.replicates(10), 2000, 10000), mnist(lab.data))
    return evidence(lab, Sizes(50, 5, lab.replicates(10, 30), lab.pick(100, 1000), 1000), digits(raw=True))


def judge(tables: Tables) -> list[Finding]:
    """V2 for each scaling and activation: seeds in which no layer from the second on is white."""
    return [
        _judge(tables["layers"], scaling, activation)
        for scaling in SCALINGS[::-1]
        for activation in ACTIVATIONS
    ]


def _judge(table: pd.DataFrame, scaling: str, activation: str) -> Finding:
    rows = table[(table.scaling == scaling) & (table.activation == activation) & (table.layer >= 2)]
    lost = ((rows.off > 0.5) & (rows.kappa > CONDITION)).groupby(rows.seed).all()
    ends = rows[rows.layer == rows.layer.max()]
    told = []
    for state in STATES:
        part = ends[ends.state == state]
        told.append(
            f"{state} ({100 * part.accuracy.median():.0f} % correct) κ = {number(part.kappa.median())}, "
            f"variance {number(part.middle.median())}, {100 * part.constant.median():.0f} % constant units"
        )
    return count(
        f"{scaling} inputs, {activation}: seeds in which all layers from the second on have lost it",
        int(lost.sum()),
        len(lost),
        at_least=0.69,
        note="last layer " + "; ".join(told),
    )


def figures(tables: Tables) -> list[Drawing]:
    """Condition numbers and variances by depth, for whitened inputs."""
    table = tables["layers"]
    table = table[table.scaling == "whitened"]
    table = table.assign(
        kappa=table.kappa.replace(np.inf, np.nan),
        network=[f"{a}, {s}" for a, s in zip(table.activation, table.state, strict=True)],
    )
    return [
        Drawing(
            _by_depth(table, "kappa", "Condition number of the units' covariance", "κ", (CONDITION,), True),
            "Inputs whitened exactly have κ = 1. Each layer is a linear map that is no rotation, and a "
            "non-linearity: correlations grow with depth (median and 80 % of the seeds; constant units are "
            "left out).",
        ),
        Drawing(
            _by_depth(
                table, "middle", "Variance of the units", "median variance", (1 - APART, 1 + APART), True
            ),
            "The median over a layer's units of their variance over the training examples. Dashed: what "
            "still counts as variance 1.",
        ),
        Drawing(
            _by_depth(table, "mean", "Means of the units", "largest |mean|", (APART,)),
            "The unit of each layer whose mean over the training examples is farthest from 0. Units that are "
            "not odd functions have means of one sign, however the input is centred.",
        ),
    ]


def _by_depth(
    table: pd.DataFrame, column: str, title: str, label: str, marks: Sequence[float], log: bool = False
) -> Figure:
    rows = spread(table, ["network", "layer"], column)
    drawn = figure(title, "layer (0 is the input)", label, log_y=log)
    lines(drawn, rows, "layer", "middle", by="network", band=("low", "high"), mode="lines+markers")
    for mark in marks:
        reference(drawn, mark, "")
    return drawn


C35 = Claim(
    id="C35",
    section="6.4.1",
    title="Whiteness is lost with depth",
    statement="As a normalised input passes through the hidden layers its distribution is transformed, and "
    "it is whitened no longer.",
    source="Notes §6.4.1",
    experiment=experiment,
    judge=judge,
    figures=figures,
    caveats=(
        f"Lost means: for more than half of the units the mean is more than {APART} from 0 or the variance "
        f"more than {APART} from 1, and the condition number of the units' covariance is above "
        f"{CONDITION:g}, in every layer from the second on, before and after training. Units that are "
        "constant, as dead ones are, count as off and are left out of the covariance.",
        "The activations are those that the next layer gets, on the training examples that the scaling was "
        "fitted to. Five hidden layers; Xavier weights for tanh and sigmoid, He's for ReLU; trained with "
        "Adam at its default rate, which is not tuned: no speed is compared here.",
        "Standardised inputs are correlated before the first layer already; only the whitened ones start "
        "from κ = 1.",
    ),
    errata=("E18",),
)
