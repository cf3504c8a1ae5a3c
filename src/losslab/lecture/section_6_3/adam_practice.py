"""C29 and C30: who takes Adam by default, and how it does beside the other rules, each at its own best rate."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from losslab.engine import Population, train
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, Verdict
from losslab.lecture.figures import figure, lines
from losslab.lecture.tuning import rates, tune
from losslab.lecture.verdicts import paired
from losslab.rules import SGD, AdaGrad, Adam, Nesterov, RMSProp, Rule
from losslab.rules.schedules import inverse_sqrt
from losslab.tasks import Task, digits_task, logistic_regression, mlp, mnist_task

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

TUNING_SEEDS = 1000
"""The first seed of a search; verdicts use 0, 1, ..."""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: a rule for any rates, one a member, and the grid of its search."""

    name: str
    make: Callable[[list[float]], Rule]
    grid: Sequence[float]


class Budget(NamedTuple):
    """How long every member of a comparison trains."""

    epochs: int
    batch_size: int


def last(population: Population, column: str) -> Tensor:
    """A column of the history at the last step, one value a member; NaN for those that diverged."""
    table = population.history
    row = table[table["step"] == population.plan.steps].set_index("member")[column]
    return torch.tensor(row.reindex(range(len(population))).to_numpy(copy=True))


def race(
    task: Task, arms: Sequence[Arm], budget: Budget, seeds: int, tuning_seeds: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tunes each arm's rate on validation loss, then trains every arm from the same fresh seeds.

    A seed fixes the initial weights, the order of the data and dropout, so runs of one seed are paired.

    Returns:
        The runs (arm, lr, seed, epoch, train_loss: after each epoch, over all training data without dropout;
        infinite for a run that diverged) and the searches (arm, lr, score, at_edge).
    """
    import numpy as np
    import pandas as pd

    runs, searches = [], []
    for arm in arms:

        def score(values: list[float], members: list[int], arm: Arm = arm) -> Tensor:
            return last(_train(task, arm.make(values), members, budget, "validation"), "validation_loss")

        tuning = tune(score, arm.grid, list(range(TUNING_SEEDS, TUNING_SEEDS + tuning_seeds)))
        history = _train(task, arm.make([tuning.lr] * seeds), list(range(seeds)), budget, "train").history
        frame = history[["seed", "epoch", "train_loss"]].assign(arm=arm.name, lr=tuning.lr)
        frame["train_loss"] = frame["train_loss"].fillna(np.inf)
        runs.append(frame)
        searches.append(tuning.table.assign(arm=arm.name, at_edge=tuning.at_edge))
    return pd.concat(runs, ignore_index=True), pd.concat(searches, ignore_index=True)


def _train(task: Task, rule: Rule, seeds: list[int], budget: Budget, data: str) -> Population:
    return train(
        task,
        rule,
        seeds=seeds,
        epochs=budget.epochs,
        batch_size=budget.batch_size,
        evaluate_on=(data,),
        record=(),
        progress=False,
    )


def finals(runs: pd.DataFrame) -> dict[str, pd.Series]:
    """Training loss after the last epoch by seed, for each arm."""
    end = runs[runs["epoch"] == runs["epoch"].max()]
    return {str(arm): group.set_index("seed")["train_loss"] for arm, group in end.groupby("arm", sort=False)}


def curves(runs: pd.DataFrame, title: str) -> Figure:
    """Median training loss against epochs with the range over seeds, a line an arm."""
    table = runs.groupby(["arm", "epoch"], sort=False)["train_loss"].agg(["median", "min", "max"]).reset_index()
    drawn = figure(title, "epoch", "training loss", log_y=True)
    lines(drawn, table, "epoch", "median", by="arm", band=("min", "max"))
    return drawn


class Bench(NamedTuple):
    """The data of a comparison that the papers made on MNIST, with the sizes that fit."""

    name: str
    inputs: int
    least: int
    task: Callable[[Any], Task]
    note: str


def bench(lab: Lab) -> Bench:
    """MNIST in the profiles full and paper when its folder is known, the digits otherwise."""
    if lab.profile != "quick" and lab.data is not None:
        return Bench("MNIST", 784, 5, lambda model: mnist_task(model, lab.data), "")
    return Bench("digits", 64, 10, digits_task, "the digits stand in for the paper's MNIST")


# -- C29 -----------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """Where a package says which optimizer it takes when the user names none; no parameter: nowhere."""

    package: str
    module: str
    name: str
    parameter: str | None


ENTRIES = (
    Entry("torch", "torch.nn", "Module", None),
    Entry("scikit-learn", "sklearn.neural_network", "MLPClassifier", "solver"),
    Entry("keras", "keras", "Model.compile", "optimizer"),
    Entry("transformers", "transformers", "TrainingArguments", "optim"),
    Entry("fastai", "fastai.learner", "Learner", "opt_func"),
    Entry("skorch", "skorch", "NeuralNet", "optimizer"),
)


def defaults(entries: Sequence[Entry] = ENTRIES) -> pd.DataFrame:
    """The default optimizer of each package that is installed here, read from its signatures.

    Columns package, place, installed, default (``"none"`` where the user must name one, ``""`` where it could
    not be read) and adam (the default is Adam or AdamW).
    """
    import pandas as pd

    rows = []
    for entry in entries:
        installed = importlib.util.find_spec(entry.module.split(".")[0]) is not None
        default = _default(entry) if installed else ""
        place = f"{entry.module}.{entry.name}" + (f"({entry.parameter}=)" if entry.parameter else "")
        rows.append((entry.package, place, installed, default, "adam" in default.lower()))
    return pd.DataFrame(rows, columns=["package", "place", "installed", "default", "adam"])


def _default(entry: Entry) -> str:
    try:
        found: Any = importlib.import_module(entry.module)
        for part in entry.name.split("."):
            found = getattr(found, part)
        if entry.parameter is None:
            return "" if hasattr(found, "fit") else "none"
        value = inspect.signature(found).parameters[entry.parameter].default
    except (ImportError, AttributeError, KeyError, ValueError):
        return ""
    return "none" if value is inspect.Parameter.empty else getattr(value, "__name__", str(value))


def _judge_29(tables: Tables) -> list[Finding]:
    read = tables["defaults"].query("installed and default != ''")
    n, k = len(read), int(read["adam"].sum())
    share = k / n if n else float("nan")
    verdict = Verdict.UNDECIDED if n < 3 else Verdict.HOLDS if k > n / 2 else Verdict.FAILS
    absent = tables["defaults"].loc[~tables["defaults"].index.isin(read.index), "package"]
    told = "; ".join(f"{row.package}: {row.default}" for row in read.itertuples())
    return [
        Finding(
            "most packages take Adam unless told otherwise",
            verdict,
            share,
            (float("nan"), float("nan")),
            n,
            f"{k} of {n} packages that are installed here, by their signatures",
            "more than half of at least 3 packages",
            told + (f"; not checkable here: {', '.join(absent)}" if len(absent) else ""),
        )
    ]


C29 = Claim(
    id="C29",
    section="6.3.3",
    title="Adam as the default optimizer",
    statement="Adam is what most packages use by default today.",
    source="Notes §6.3.3",
    experiment=lambda lab: {"defaults": defaults()},
    judge=_judge_29,
    caveats=(
        "Documentation, not an experiment: only packages installed beside losslab are looked at, so the result "
        "is about this installation. AdamW counts as Adam.",
        "torch, where most networks are trained, has no default: the user names an optimizer. A package that "
        "leaves the choice to the user counts against the claim.",
        "A default says little about use; surveys of papers (Schmidt, Schneider & Hennig 2021) count mentions.",
    ),
)


# -- C30 -----------------------------------------------------------------------------------------------


def _arms(decaying: bool) -> list[Arm]:
    """The paper's rules, with plain SGD in the place of AdaDelta, which is not among ours."""

    def arm(name: str, make: Callable[..., Rule], low: float, high: float) -> Arm:
        def build(values: list[float]) -> Rule:
            return make(lr=inverse_sqrt(values) if decaying else values)

        factor = 10**0.5 if decaying else 1.0  # a decaying rate starts higher
        return Arm(name, build, tuple(rates(low * factor, high * factor)))

    return [
        arm("Adam", Adam, 1e-3, 1.0),
        arm("SGD", SGD, 1e-2, 10.0),
        arm("Nesterov", Nesterov, 1e-3, 1.0),
        arm("AdaGrad", AdaGrad, 1e-3, 1.0),
        arm("RMSProp", RMSProp, 1e-4, 1e-1),
    ]


def _experiment_30(lab: Lab) -> Tables:
    import pandas as pd

    where = bench(lab)
    mnist = where.name == "MNIST"
    hidden = lab.pick(32, 200, 1000) if mnist else 32
    networks = (
        ("logistic regression", logistic_regression(where.inputs, 10), True, 10),
        ("MLP with dropout", mlp(where.inputs, hidden, hidden, 10, dropout=0.5), False, 5 if mnist else 10),
    )
    runs, searches = [], []
    for network, model, decaying, epochs in networks:
        lab.progress(f"{network} on {where.name}")
        budget = Budget(epochs, 128 if mnist else 64)
        seeds, tuning_seeds = lab.replicates(10, where.least), 1 if mnist else 3
        done, search = race(where.task(model), _arms(decaying), budget, seeds, tuning_seeds)
        runs.append(done.assign(network=network, data=where.name, note=where.note))
        searches.append(search.assign(network=network))
    return {"runs": pd.concat(runs, ignore_index=True), "tuning": pd.concat(searches, ignore_index=True)}


def _judge_30(tables: Tables) -> list[Finding]:
    findings = []
    for network, runs in tables["runs"].groupby("network", sort=False):
        losses = finals(runs)
        best = min((arm for arm in losses if arm != "Adam"), key=lambda arm: losses[arm].median())
        least = 5 if (runs["data"] == "MNIST").all() else 10
        told = runs["note"].iloc[0]
        adam = losses["Adam"]
        findings += [
            paired(f"Adam ends below AdaGrad ({network})", 1 - adam / losses["AdaGrad"], 0.0, least, told),
            paired(
                f"Adam is within 5 % of the best other rule ({network})",
                1.05 - adam / losses[best],
                0.0,
                least,
                "; ".join(part for part in (f"the best other is {best}", told) if part),
            ),
        ]
    return findings


def _figures_30(tables: Tables) -> list[Drawing]:
    drawings = []
    for network, runs in tables["runs"].groupby("network", sort=False):
        chosen = ", ".join(f"{arm} {group['lr'].iloc[0]:.2g}" for arm, group in runs.groupby("arm", sort=False))
        text = f"{network} on {runs['data'].iloc[0]}: median and range over seeds. Rates chosen on validation: "
        drawings.append(Drawing(curves(runs, str(network)), text[0].upper() + text[1:] + chosen + "."))
    return drawings


C30 = Claim(
    id="C30",
    section="6.3.3",
    title="Adam's speed in practice",
    statement="Combining momentum with per-parameter rates works well: Adam trains faster than AdaGrad and about "
    "as fast as the best other rule.",
    source="Implied in notes §6.3.3; Kingma & Ba 2015, §6",
    experiment=_experiment_30,
    judge=_judge_30,
    figures=_figures_30,
    caveats=(
        "The paper shows curves and no table of numbers, so only the order of the rules is tested. On the digits "
        "everything is smaller: batches of 64, two hidden layers of 32 units, 10 epochs of 1000 examples.",
        "Plain SGD stands in for the paper's AdaDelta. The convolutional network on CIFAR-10 is not run.",
        "The best other rule is picked by the runs that are judged, which is to Adam's disadvantage.",
        "Training loss at a fixed budget: nothing is said about generalisation, where adaptive rules can be "
        "worse (Wilson et al. 2017).",
    ),
)
