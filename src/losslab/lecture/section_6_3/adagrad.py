"""C22 and C23: AdaGrad's update, and what it does to components with large gradients; with C24 of `decay`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from losslab.engine import train
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables
from losslab.lecture.driving import drive, drive_torch, member_errors, path_of, pulled
from losslab.lecture.figures import figure, lines
from losslab.lecture.section_6_3 import decay
from losslab.lecture.section_6_3.landscapes import Softmax
from losslab.lecture.tuning import rates, tune
from losslab.lecture.verdicts import count, identity, paired
from losslab.rules import SGD, AdaGrad, Newton, Rule
from losslab.tasks import Task, sparse_classification

if TYPE_CHECKING:
    import pandas as pd

EQUATION = "x ← x − η g / (δ + √Σg²), the sum with the current gradient"
TORCH = "equal to torch's Adagrad"
FINITE = "the formula as printed takes a finite first step"
HISTORY = "the formula as printed depends on past gradients"


# -- C22 ------------------------------------------------------------------------------------------------


def updates(instances: int, steps: int, dimension: int = 6) -> pd.DataFrame:
    """The rule against the equation, evaluated on its own gradients, and against torch's optimizer."""
    import pandas as pd

    gradient, start = pulled(instances, dimension, steps, seed=22)
    rng = np.random.default_rng(22)
    lr = torch.from_numpy(10 ** rng.choice(np.linspace(-2, 0, 10), instances))
    eps = torch.from_numpy(10 ** rng.choice(np.linspace(-10, -2, 3), instances))
    moves = list(drive(AdaGrad(lr=lr, eps=eps), gradient, start, steps))
    path = path_of(iter(moves))
    g = np.stack([move.gradient.numpy() for move in moves])
    scale = eps.numpy()[:, None] + np.sqrt((g**2).cumsum(axis=0))
    by_hand = start.numpy() - (lr.numpy()[:, None] * g / scale).cumsum(axis=0)
    theirs = drive_torch(torch.optim.Adagrad, {"lr": lr, "eps": eps}, gradient, start, steps)
    return pd.DataFrame(
        {
            "equation": member_errors(path[1:], torch.from_numpy(by_hand)),
            "torch": member_errors(path, theirs),
        }
    )


def as_printed(instances: int, dimension: int = 6) -> pd.DataFrame:
    """The notes' formula to the letter: its first step, and its step 5 after two different histories.

    With ``H = sqrt((t - 1) g_t^2)`` a step is ``lr sign(g) / sqrt(t - 1)`` whatever went before.
    """
    import pandas as pd

    gradient, start = pulled(instances, dimension, 5, seed=23)
    rule = AdaGrad(lr=0.1, variant="lecture")
    (first,) = drive(rule, gradient, start, 1)
    small, large = (_fifth(rule, start, factor) for factor in (1.0, 100.0))
    proper = [_fifth(AdaGrad(lr=0.1), start, factor) for factor in (1.0, 100.0)]
    return pd.DataFrame(
        {
            "finite": torch.isfinite(first.after).all(1).numpy(),
            "printed_change": (small - large).abs().amax(1).numpy() / 0.1,
            "proper_change": (proper[0] - proper[1]).abs().amax(1).numpy() / 0.1,
        }
    )


def _fifth(rule: Rule, start: Tensor, factor: float) -> Tensor:
    """The move at step 5 when the gradients before it were ``factor`` times as large as those of step 5."""
    moves = drive(rule, lambda x, step: start * (factor if step < 4 else 1.0), start, 4, first=1)
    *_, last = moves
    return last.after - last.before


def two_rates(steps: int = 60) -> pd.DataFrame:
    """The rate, step over gradient, of weights with gradients of size 1, and of 5 on every tenth step."""
    import pandas as pd

    rng = np.random.default_rng(1)
    g = np.stack([rng.choice([-1.0, 1.0], steps), 5 * rng.choice([-1.0, 1.0], steps)], axis=1)
    g[np.arange(steps) % 10 > 0, 1] *= 1e-3
    stream = torch.from_numpy(g)[:, None]
    rows = []
    for name, variant in (("AdaGrad", "mirror"), ("as printed", "lecture")):
        rule = AdaGrad(lr=1.0, variant=variant)
        first = 1 if variant == "lecture" else 0  # its first step is infinite
        start = torch.zeros(1, 2, dtype=torch.float64)
        moves = drive(rule, lambda x, step: stream[step], start, steps - first, first=first)
        for move in moves:
            rate = ((move.before - move.after) / move.gradient)[0].abs().tolist()
            rows += [
                (name, weight, move.step + 1, r) for weight, r in zip(("even", "bursts"), rate, strict=True)
            ]
    return pd.DataFrame(rows, columns=["update", "gradients", "step", "rate"])


def update_experiment(lab: Lab) -> Tables:
    """The rule on random problems, and the formula as printed."""
    instances = lab.pick(100, 1000)
    return {"updates": updates(instances, 200), "printed": as_printed(instances), "rates": two_rates()}


def update_judge(tables: Tables) -> list[Finding]:
    """The equation as it is meant, then as it is printed."""
    runs, printed = tables["updates"], tables["printed"]
    changed, proper = (int((printed[c] > 1e-9).sum()) for c in ("printed_change", "proper_change"))
    return [
        identity(EQUATION, runs.equation),
        identity(TORCH, runs.torch),
        count(
            FINITE, int(printed.finite.sum()), len(printed), at_least=0.5, note="√0 stands in the denominator"
        ),
        count(
            HISTORY,
            changed,
            len(printed),
            at_least=0.5,
            note=f"a step after 100 times larger gradients; AdaGrad's own changes in {proper} of "
            f"{len(printed)}",
        ),
    ]


def update_figures(tables: Tables) -> list[Drawing]:
    """The rates of two weights with different histories."""
    runs = tables["rates"]
    drawn = figure("Rates of two weights", "step", "rate: step / gradient", log_y=True)
    finite = runs[np.isfinite(runs.rate)]
    labels = [f"{update}, {g}" for update, g in zip(finite["update"], finite.gradients, strict=True)]
    lines(drawn, finite.assign(run=labels), "step", "rate", by="run")
    return [
        Drawing(
            drawn,
            "Two weights, η = 1: gradients of size 1 at every step (even), and of size 5 at every tenth "
            "step with almost none between (bursts). AdaGrad's rates only fall; those of the printed "
            "formula follow the gradient of the moment.",
        )
    ]


C22 = Claim(
    id="C22",
    section="6.3.1",
    title="AdaGrad's update",
    statement=(
        "AdaGrad gives each parameter its own step size from the history of its gradients: x ← x − η G⁻¹ ∇f "
        "with G_ii the root of the sum of squared gradients."
    ),
    source="Notes §6.3.1; Duchi, Hazan & Singer 2011",
    experiment=update_experiment,
    judge=update_judge,
    figures=update_figures,
    caveats=(
        "The words and the update of the paper hold; the formula as printed in the notes is another one, "
        "which divides by zero at first and keeps no history after.",
        "Only the diagonal rule without a penalty is compared; the paper also has a full matrix, proximal "
        "steps and dual averaging.",
    ),
    errata=("E9", "E10", "E11", "E12", "E22"),
)


# -- C23 ------------------------------------------------------------------------------------------------

RIDGE = 1e-3
TARGET = 0.1
"""The share of the first excess over the least loss that a run must fall below."""

SPEED = 0.8
ORDER = "pairs of weights ordered against their sums of squared gradients"
FASTER = "log of AdaGrad's steps over SGD's on sparse features"
ARMS: dict[str, tuple[type[Rule], list[float]]] = {
    "AdaGrad": (AdaGrad, rates(0.01, 3.0)),
    "SGD": (SGD, rates(0.1, 30.0)),
}


def ordering(instances: int, steps: int = 50, dimension: int = 8) -> pd.DataFrame:
    """Whether a larger sum of squared gradients always means a smaller rate; share of pairs that disagree."""
    import pandas as pd

    gradient, start = pulled(instances, dimension, steps, seed=31)
    moves = list(drive(AdaGrad(lr=0.1), gradient, start, steps))
    squares = torch.stack([move.gradient for move in moves]).square().sum(0)
    last = moves[-1]
    rate = (last.before - last.after) / last.gradient
    pair = torch.triu_indices(dimension, dimension, offset=1)
    agree = (squares[:, pair[0]] > squares[:, pair[1]]) == (rate[:, pair[0]] < rate[:, pair[1]])
    return pd.DataFrame({"disagree": 1 - agree.double().mean(1).numpy()})


@cache
def sparse_task(seed: int, examples: int, features: int) -> tuple[Task, float]:
    """Ridge logistic regression on Zipf features, and its least training loss, by Newton's method."""
    base = sparse_classification(examples, features, seed=seed)
    assert base.train is not None
    x, y = base.train.all()
    problem = Softmax.of(x, y, RIDGE)
    point = torch.zeros(1, problem.parameters, dtype=torch.float64)
    for move in drive(Newton(), problem.gradient, point, 20, problem.hessian):
        point = move.after
        if float(move.gradient.abs().max()) < 1e-10:
            break

    def loss(network: torch.nn.Module, batch: object) -> Tensor:
        squares = torch.stack([w.square().sum() for w in network.parameters()])
        return base.loss(network, batch) + RIDGE / 2 * squares.sum()

    return base.replace(loss=loss), float(problem.value(point))


def sparse_runs(
    arm: str, lrs: Sequence[float], seed: int, steps: int, examples: int, features: int
) -> pd.DataFrame:
    """The excess training loss of one data set at several rates, every ten steps, as a share of the first."""
    task, least = sparse_task(seed, examples, features)
    run = train(
        task,
        ARMS[arm][0](lr=list(lrs)),
        seeds=[seed],
        steps=steps,
        batch_size=32,
        record=[],
        evaluate=10,
        evaluate_on=("train",),
        progress=False,
    )
    table = run.history[["step", "member", "lr", "train_loss"]]
    excess = table.train_loss - least
    first = excess[table.step == 0].iloc[0]
    return table.assign(excess=excess / first, arm=arm, seed=seed).drop(columns="train_loss")


def steps_needed(runs: pd.DataFrame, by: str) -> pd.Series:
    """The first step below the target for each value of a column; inf where there is none."""
    there = runs[runs.excess <= TARGET].groupby(by).step.min()
    return there.reindex(runs[by].unique()).fillna(np.inf)


def race(
    seeds: Sequence[int], tuning_seeds: Sequence[int], steps: int, examples: int, features: int
) -> dict[str, pd.DataFrame]:
    """Steps to the target of both arms, each at its tuned rate; every seed is a data set of its own."""
    import pandas as pd

    sizes = {"steps": steps, "examples": examples, "features": features}
    curves, tunings = [], []
    for arm, (_, grid) in ARMS.items():

        def score(lrs: list[float], members: list[int], arm: str = arm) -> Tensor:
            found = torch.empty(len(lrs), dtype=torch.float64)
            for seed in set(members):
                rows = [i for i, s in enumerate(members) if s == seed]
                runs = sparse_runs(arm, [lrs[i] for i in rows], seed, **sizes)
                found[rows] = torch.tensor(steps_needed(runs, "member").tolist(), dtype=torch.float64)
            return found

        tuning = tune(score, grid, tuning_seeds)
        tunings.append(tuning.table.assign(arm=arm, chosen=tuning.lr, at_edge=tuning.at_edge))
        curves += [sparse_runs(arm, [tuning.lr], seed, **sizes) for seed in seeds]
    runs = pd.concat(curves, ignore_index=True)
    counts = [
        steps_needed(group, "seed").rename("steps").rename_axis("seed").reset_index().assign(arm=arm)
        for arm, group in runs.groupby("arm", sort=False)
    ]
    return {
        "steps": pd.concat(counts, ignore_index=True),
        "curves": runs.drop(columns="member"),
        "tuning": pd.concat(tunings, ignore_index=True),
    }


def displacements(examples: int, features: int) -> pd.DataFrame:
    """How far a weight moves each time its feature occurs, over one pass example by example."""
    import pandas as pd

    task = sparse_classification(examples, features, seed=7)
    assert task.train is not None
    x, y = task.train.all()
    x, y = x.double(), y.double()
    rows = []
    for name, rule in (("AdaGrad", AdaGrad(lr=0.1)), ("SGD", SGD(lr=0.1))):
        moved = torch.zeros(1, features, dtype=torch.float64)

        def gradient(w: Tensor, step: int) -> Tensor:
            return ((w @ x[step]).sigmoid() - y[step])[:, None] * x[step]

        for move in drive(rule, gradient, moved, examples):
            moved = moved + (move.after - move.before).abs()
        occurrences = x.sum(0)
        table = pd.DataFrame({"frequency": occurrences / examples, "moved": (moved[0] / occurrences).numpy()})
        rows.append(table[occurrences.numpy() > 0].assign(rule=name))
    return pd.concat(rows, ignore_index=True)


def sparse_experiment(lab: Lab) -> Tables:
    """The order of the rates, a race on sparse features, and moves by the frequency of a feature."""
    seeds = range(lab.replicates(10, 30))
    examples, features = lab.pick((1000, 200), (2000, 500))
    tables = race(seeds, [1000, 1001, 1002], lab.pick(400, 2000), examples, features)
    return {
        "ordering": ordering(lab.pick(200, 2000)),
        **tables,
        "displacements": displacements(2 * examples, features),
    }


def sparse_judge(tables: Tables) -> list[Finding]:
    """The order of the rates and the steps to the target."""
    steps = tables["steps"].pivot(index="seed", columns="arm", values="steps")
    with np.errstate(invalid="ignore"):
        ratio = np.log(steps["AdaGrad"]) - np.log(steps["SGD"])
    return [
        identity(ORDER, tables["ordering"].disagree, tolerance=0.0),
        paired(
            FASTER,
            ratio,
            delta=float(np.log(SPEED)),
            note=f"medians: AdaGrad {steps['AdaGrad'].median():g}, SGD {steps['SGD'].median():g} steps",
        ),
    ]


def sparse_figures(tables: Tables) -> list[Drawing]:
    """Loss curves of the race, and moves by frequency."""
    import pandas as pd

    curves = tables["curves"]
    race_drawn = figure("Sparse features", "step", "excess training loss, share of the first", log_y=True)
    groups = curves.groupby(["arm", "step"], sort=False).excess
    ends = {name: groups.quantile(share) for name, share in (("low", 0.1), ("middle", 0.5), ("high", 0.9))}
    spread = pd.DataFrame(ends).reset_index()
    lines(race_drawn, spread, "step", "middle", by="arm", band=("low", "high"))

    moved = figure(
        "Moves by frequency",
        "share of the examples that have the feature",
        "move an occurrence",
        log_x=True,
        log_y=True,
    )
    lines(moved, tables["displacements"], "frequency", "moved", by="rule", mode="markers")
    return [
        Drawing(
            race_drawn,
            "Logistic regression on features whose frequencies follow Zipf's law, batch 32, each method at "
            "its tuned rate: median and 10 to 90 % of the replicates.",
        ),
        Drawing(
            moved,
            "How far a weight moves each time its feature occurs: AdaGrad moves the weights of rare features "
            "farther, SGD does not.",
        ),
    ]


C23 = Claim(
    id="C23",
    section="6.3.1",
    title="Large past gradients scale a component's rate down",
    statement=(
        "AdaGrad's factor scales down the rate of the components that saw comparatively large gradients, so "
        "the others learn faster."
    ),
    source="Notes §6.3.1; Duchi, Hazan & Singer 2011",
    experiment=sparse_experiment,
    judge=sparse_judge,
    figures=sparse_figures,
    caveats=(
        "The sparse data are synthetic: binary features with Zipf frequencies, where rare features matter "
        "as much as frequent ones. The paper's text and image collections are not rebuilt here.",
        "Speed is the number of steps until the training loss has lost 90 % of its excess; each replicate "
        "is a data set of its own, and so is each one that the rates are tuned on. They are tuned on that "
        "same number of steps, the quantity compared, and not on a validation loss.",
    ),
)

CLAIMS = [C22, C23, decay.C24]
