"""C39: whether networks with batch norm train faster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from losslab.engine import Points, randomness
from losslab.layers import he
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, all_but
from losslab.lecture.figures import figure, lines, reference
from losslab.lecture.numbers import number
from losslab.lecture.section_6_4.sigmoid_runs import (
    GAUSSIAN,
    NORMALISED,
    OWN,
    TUNING_SEEDS,
    XAVIER,
    reached,
    runs,
)
from losslab.lecture.training import trained
from losslab.lecture.tuning import rates, tune
from losslab.lecture.verdicts import paired, paired_family
from losslab.rules import SGD
from losslab.signals import Instrument
from losslab.tasks import Data, Factory, Task, digits, mlp, supervised

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

DEPTH, WIDTH = 50, 32
DEEP_GRID = tuple(rates(0.001, 0.1))
DEEP_SEEDS = 5
DEEP_BATCH = 50
DEEP = f"at depth {DEPTH} batch norm helps too"

NAMES = {
    (GAUSSIAN, OWN): "twice as fast as from a small Gaussian start, each at its own rate",
    (GAUSSIAN, GAUSSIAN): "twice as fast as from a small Gaussian start, at that one's rate",
    (XAVIER, OWN): "twice as fast as from Xavier's start, each at its own rate",
    (XAVIER, XAVIER): "twice as fast as from Xavier's start, at that one's rate",
}
"""Baseline and whose rate batch norm has -> finding."""


def experiment(lab: Lab) -> Tables:
    """Ioffe and Szegedy's network, and a very deep one."""
    found = runs(lab)
    lab.progress(f"digits, {DEPTH} layers")
    deep, start = deep_runs(DEEP_SEEDS, lab.pick(200, 600))
    return {"curves": found.curves, "tuning": found.tuning, "deep": deep, "start": start}


# -- the counter-test -----------------------------------------------------------------------------------


def deep_factory(normalised: bool) -> Factory:
    """Fifty hidden layers of 32 ReLU units, from He's start."""
    return he().on(mlp(64, *[WIDTH] * DEPTH, 10, batch_norm=normalised))


def deep_runs(seeds: int, steps: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Very deep networks on the digits, each arm at its own rate, and their gradients before any update.

    Returns:
        The runs, a row a (network, seed): ``lr``, ``at_edge``, ``accuracy`` on test data after the last step
        (0 for a run that has diverged), ``steps``. And the starts, a row a (network, seed, layer):
        ``gradient``, the norm of the loss's gradient with respect to the layer's pre-activations over that at
        the last hidden layer.
    """
    import pandas as pd

    data, ends, starts = digits(), [], []
    for name, normalised in ((GAUSSIAN.split(",")[0], False), (NORMALISED, True)):
        task = supervised(deep_factory(normalised), data.train, data.test, data.validation)

        def accuracy(lrs: list[float], members: list[int], on: str, task: Task = task) -> Tensor:
            settings = {"seeds": members, "steps": steps, "batch_size": DEEP_BATCH}
            population = trained(task, SGD(lr=lrs), evaluate=[steps], evaluate_on=[on], **settings)
            row = population.log.rows.get(steps, {})
            return row.get(f"{on}_accuracy", torch.zeros(len(members))).nan_to_num(0.0)

        tuning = tune(lambda lrs, members: 1 - accuracy(lrs, members, "validation"), DEEP_GRID, TUNING_SEEDS)
        final = accuracy([tuning.lr] * seeds, list(range(seeds)), "test")
        frame = pd.DataFrame({"seed": range(seeds), "accuracy": final.double().numpy()})
        ends.append(frame.assign(network=name, lr=tuning.lr, at_edge=tuning.at_edge, steps=steps))
        starts.append(gradients_at_start(task, seeds).assign(network=name))
    return pd.concat(ends, ignore_index=True), pd.concat(starts, ignore_index=True)


def gradients_at_start(task: Task, seeds: int) -> pd.DataFrame:
    """Norms of the gradient at each hidden layer, relative to the last, for networks as they are drawn."""
    import pandas as pd

    modules = []
    for seed in range(seeds):
        with randomness.seeded(seed, "init"):
            modules.append(task.model())
    points = Points.from_modules(modules).to(dtype=torch.float64)
    assert isinstance(task.test, Data)
    batch = task.test.head(DEEP_BATCH).to(dtype=torch.float64).all()
    keys = randomness.member_keys(range(seeds), "forward")
    seen = Instrument(modules[0], task.loss)(points, batch, keys)
    names = [name for name, layer in seen.layers.items() if layer.weights and layer.kind == "Linear"][:-1]
    norms = torch.stack([seen.gradients[name].flatten(1).norm(dim=1) for name in names])
    table = pd.DataFrame((norms / norms[-1]).numpy()).reset_index(names="layer")
    table["layer"] += 1
    return table.melt("layer", var_name="seed", value_name="gradient").astype({"seed": int})


# -- the verdict ------------------------------------------------------------------------------------------


def judge(tables: Tables) -> list[Finding]:
    """Steps to the target at each network's own rate and at equal rates; the very deep network is context."""
    curves = tables["curves"]
    least, target = int(curves["least"].iloc[0]), float(curves["target"].iloc[0])
    steps = steps_to(curves, target)
    with np.errstate(invalid="ignore"):  # neither network arrives
        differences = {
            name: np.log2(steps[baseline, OWN]) - np.log2(steps[NORMALISED, rated])
            for (baseline, rated), name in NAMES.items()
        }
    edges = tables["tuning"].groupby("network")["at_edge"].first()
    at_edge = [str(network) for network in edges.index[edges]]
    note = f"log2 of the ratio of updates to {100 * target:g} % test accuracy; " + "; ".join(
        f"{label}: {number(steps[key].median())}" for key, label in _labels(curves).items()
    )
    if at_edge:
        note += f"; rate at the edge of its grid: {', '.join(at_edge)}"
    found = paired_family(differences, delta=1.0, least=least, note=note)
    return [*found, _deep(tables["deep"], tables["start"])]


def steps_to(curves: pd.DataFrame, target: float) -> Mapping[tuple[str, str], pd.Series]:
    """(Network, whose rate) -> updates to the target by seed, at least 1, infinite for never."""
    groups = curves.groupby(["network", "rated"], sort=False)
    return {
        (str(network), str(rated)): reached(rows, "test_accuracy", target).clip(lower=1.0)
        for (network, rated), rows in groups
    }


def _labels(curves: pd.DataFrame) -> dict[tuple[str, str], str]:
    keys = curves[["network", "rated", "lr"]].drop_duplicates()
    return {
        (network, rated): f"{network}, η = {lr:.2g}" for network, rated, lr in keys.itertuples(index=False)
    }


def _deep(deep: pd.DataFrame, start: pd.DataFrame) -> Finding:
    arms = {str(name): group.set_index("seed").sort_index() for name, group in deep.groupby("network")}
    names = [name for name in arms if name != NORMALISED]
    standard, normalised = arms[names[0]], arms[NORMALISED]
    first = start[start["layer"] == 1].groupby("network")["gradient"].median()
    note = (
        f"test accuracy after {deep['steps'].iloc[0]} updates, each at its own rate: median "
        f"{number(normalised['accuracy'].median())} with batch norm (η = {normalised['lr'].iloc[0]:.2g}), "
        f"{number(standard['accuracy'].median())} without (η = {standard['lr'].iloc[0]:.2g}); before any "
        "update the gradient at the first layer over that at the last is "
        f"{number(first[NORMALISED])} with and {number(first[names[0]])} without"
    )
    edges = [name for name, arm in arms.items() if arm["at_edge"].any()]
    if edges:
        note += f"; rate at the edge of its grid: {', '.join(edges)}"
    return paired(DEEP, normalised["accuracy"] - standard["accuracy"], delta=0.0, least=5, note=note)


# -- figures ------------------------------------------------------------------------------------------------


def figures(tables: Tables) -> list[Drawing]:
    """Ioffe and Szegedy's figure 1a with the Xavier arm, equal rates, and gradients in very deep networks."""
    curves = tables["curves"]
    labels = _labels(curves)
    curves = curves.assign(
        series=[labels[pair] for pair in zip(curves["network"], curves["rated"], strict=True)],
        accuracy=curves["test_accuracy"].fillna(0.0),
    )
    equal = curves[(curves["network"] != NORMALISED) | (curves["rated"] != OWN)]
    data = curves["data"].iloc[0]
    own = _accuracy(curves[curves["rated"] == OWN], f"Each network at its own rate, {data}")
    same = _accuracy(equal, f"Batch norm at the other networks' rates, {data}")
    return [
        Drawing(
            own,
            "Test accuracy of sigmoid networks with three hidden layers, median and range over seeds. The "
            "updates are on a logarithmic axis: a curve further left by a factor is faster by that factor.",
        ),
        Drawing(same, "The same when batch norm has to use the rate that is best for the standard network."),
        _deep_figure(tables["start"]),
    ]


def _accuracy(curves: pd.DataFrame, title: str) -> Figure:
    later = curves[curves["step"] > 0]
    table = later.groupby(["series", "step"], sort=False)["accuracy"].agg(["median", "min", "max"])
    drawn = figure(title, "updates", "test accuracy", log_x=True)
    lines(drawn, table.reset_index(), "step", "median", by="series", band=("min", "max"))
    reference(drawn, float(curves["target"].iloc[0]), "target")
    return drawn


def _deep_figure(start: pd.DataFrame) -> Drawing:
    table = start.groupby(["network", "layer"], sort=False)["gradient"].agg(["median", "min", "max"])
    drawn = figure(f"Gradients at the start, {DEPTH} layers", "layer", "gradient, last layer = 1", log_y=True)
    lines(drawn, table.reset_index(), "layer", "median", by="network", band=("min", "max"))
    return Drawing(
        drawn,
        "Norm of the loss's gradient at each hidden layer before any update, He's start, ReLU. With batch "
        "norm it grows by a factor a layer on its way back.",
    )


C39 = Claim(
    id="C39",
    section="6.4.2",
    title="Batch norm networks train faster",
    statement="Networks with batch norm train and converge faster than the same networks without it.",
    source="Notes §6.4.2; Ioffe & Szegedy 2015, section 4.1 and figure 1a",
    paper=True,
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=all_but(DEEP),
    caveats=(
        "Faster is in updates: an update with batch norm takes longer. The ratio is to be at least 2, both "
        "at the rate that is best for each network and at the rate that is best for the standard one.",
        "The paper does not state the rate nor the size of its Gaussian start. Rates are tuned on validation "
        "data by updates to the target; the Gaussian has a standard deviation of 0.03, about a third of "
        "Xavier's, from which a trial of the standard network alone showed that it still learns. That start "
        "is a weak baseline, so Xavier's is judged beside it.",
        "On the digits the target is 90 % test accuracy and the pixels are standardised: on 8 × 8 pixels the "
        "standard network ends near 95 %, the target on MNIST, whose pixels are black or white as in the "
        "paper. Both were settled on a trial of the standard network before batch norm had run; the runs on "
        "the digits were cut from 2500 updates to 1500 after a first run, those of the search for a rate to "
        "1000, and the batches of the depth-50 networks from 100 to 50, to save time.",
        "On ImageNet the paper counts updates to 72.2 % accuracy: 31.0 million for Inception, 13.3 million "
        "with batch norm, 2.1 million with it at five times the rate.",
        "Very deep networks are a counter-test, with ReLU and He's start: gradients of plain batch-norm "
        "networks grow exponentially with depth at the start (Yang et al. 2019). It is context, not part of "
        "the verdict.",
    ),
)
