"""C12: whether the minima that SGD finds generalise better than those of gradient descent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, decided_by
from losslab.lecture.figures import figure, lines, spread
from losslab.lecture.numbers import number
from losslab.lecture.section_6_2.matched import ARMS, Arm, Problem, along, fitted
from losslab.lecture.training import one_thread
from losslab.lecture.tuning import at_edge, rates, tune
from losslab.lecture.verdicts import join_notes, paired_family

if TYPE_CHECKING:
    import pandas as pd

POINTS = 0.5
"""The smallest difference in test accuracy that counts, in points."""

GRID = rates(0.05, 1.5, per_decade=4)
SIZES = (32, 8)


class Sizes(NamedTuple):
    """How much work to do: problems, arms, seeds of the search and of the verdict, updates of each run."""

    problems: tuple[Problem, ...]
    arms: tuple[str, ...]
    searches: int
    seeds: int
    updates: int


def tuned_rate(problem: Problem, arm: Arm, seeds: Sequence[int], updates: int) -> tuple[float, bool]:
    """The rate of the least validation error at the target, and whether it lay at the edge of the grid."""

    def score(lrs: list[float], seeds: list[int]) -> torch.Tensor:
        _, rows = fitted(problem, arm, lrs, seeds, updates)
        error = (100 - rows.validation).where(np.isfinite(rows.updates), np.inf)
        return torch.tensor(error.to_numpy())

    found = tune(score, GRID, seeds)
    return found.lr, found.at_edge


def comparison(sizes: Sizes, lab: Lab) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every arm at its own rate on every problem: the runs' ends, and test accuracies on the way."""
    import pandas as pd

    ends, ways = [], []
    for problem in sizes.problems:
        lab.progress(f"SGD and gradient descent on {problem}")
        for name in sizes.arms:
            arm = ARMS[name]
            lr, edge = tuned_rate(problem, arm, range(1000, 1000 + sizes.searches), sizes.updates)
            lrs, seeds = [lr] * sizes.seeds, range(sizes.seeds)
            run, rows = fitted(problem, arm, lrs, seeds, sizes.updates, tested=True)
            told = {"problem": str(problem), "arm": name}
            per_epoch = -(-problem.examples // (arm.size or problem.examples))
            rows["epochs"] = rows.updates / per_epoch
            ends.append(rows.assign(**told, at_edge=edge))
            way = along(run).assign(**told)
            ways.append(way.assign(epoch=way.step / per_epoch))
    return pd.concat(ends, ignore_index=True), pd.concat(ways, ignore_index=True)


def evidence(lab: Lab, sizes: Sizes) -> Tables:
    """Ends and ways of all arms."""
    ends, ways = comparison(sizes, lab)
    return {"ends": ends, "ways": ways}


def experiment(lab: Lab) -> Tables:
    """The settings of the claim."""
    hidden = lab.pick(64, 256)
    noises, counts = (0.0, 0.2), lab.pick((200,), (200, 500))
    problems = tuple(Problem(n, noise, hidden, 1e-3) for n in counts for noise in noises)
    arms = lab.pick(("GD", "B = 32", "B = 8"), tuple(ARMS))
    sizes = Sizes(problems, arms, 2, lab.replicates(10, 20), lab.pick(2500, 10_000))
    with one_thread():
        return evidence(lab, sizes)


def title(size: int, problem: str) -> str:
    """The finding that decides: rates tuned, as many updates, read at the same training loss."""
    return f"{problem}: test accuracy of B = {size} less gradient descent's"


def judge(tables: Tables) -> list[Finding]:
    """V3 in points of test accuracy; the tuned arms decide, the same epochs are context."""
    ends, ways = tables["ends"], tables["ways"]
    findings, context = [], []
    for problem, rows in ends.groupby("problem", sort=False):
        arms = {str(arm): group.set_index("seed") for arm, group in rows.groupby("arm", sort=False)}
        descent = arms.pop("GD")
        differences = {
            (
                title(int(arm.split()[-1]), str(problem)) if arm.startswith("B") else f"{problem}: {arm}"
            ): group.test - descent.test
            for arm, group in arms.items()
        }
        late = int(np.isinf(rows.updates).sum())
        note = join_notes(
            f"gradient descent {number(descent.test.median())} %",
            f"{late} of {len(rows)} runs short of the training loss" if late else "",
            at_edge({"rates": rows}),
        )
        found = paired_family(differences, delta=POINTS, note=note)
        findings += [f for f in found if ": test accuracy" in f.name]
        context += [f for f in found if ": test accuracy" not in f.name]
        context += _same_epochs(str(problem), arms, ways[ways.problem == problem])
    return findings + context


def _same_epochs(problem: str, arms: dict[str, pd.DataFrame], ways: pd.DataFrame) -> list[Finding]:
    """Gradient descent stopped after as many epochs as the smallest batch took."""
    smallest = arms["B = 8"]
    differences = []
    descent = ways[ways.arm == "GD"]
    for seed, row in smallest.iterrows():
        path = descent[(descent.seed == seed) & (descent.epoch <= row.epochs)]
        differences.append(row.test - path.test.iloc[-1])
    name = f"{problem}: B = 8 less gradient descent after as many epochs"
    return paired_family({name: differences}, delta=POINTS, note="at another training loss")


def figures(tables: Tables) -> list[Drawing]:
    """Accuracies at the same training loss, and test accuracy along the way."""
    ends, ways = tables["ends"], tables["ways"]
    drawn = figure("Test accuracy at the same training loss", "", "test accuracy, %")
    for arm, rows in ends.groupby("arm", sort=False):
        drawn.add_box(x=rows.problem, y=rows.test, name=str(arm), boxpoints="all", meta="series")
    drawn.update_layout(boxmode="group")
    drawn.update_xaxes(title_text="training data")
    last = ways[ways.problem == ways.problem.iloc[-1]]
    way = figure("Test accuracy along the way", "updates", "test accuracy, %", log_x=True)
    for arm, rows in last[last.step > 0].groupby("arm", sort=False):
        found = spread(rows, ["step"], "test").sort_values("step")
        lines(way, found, "step", "middle", band=("low", "high"), name=str(arm))
    return [
        Drawing(
            drawn,
            "Each dot is a seed, read where its training cross-entropy first is 0.001, every arm at its own "
            "tuned rate.",
        ),
        Drawing(
            way, f"{last.problem.iloc[0]}: median and 80 % of the seeds; a line ends with the runs' target."
        ),
    ]


C12 = Claim(
    id="C12",
    section="6.2.2",
    title="Minima found by SGD generalise better",
    statement="The local minima that SGD finds tend to generalise better than those of gradient descent.",
    source="Notes §6.2.2; Keskar et al. 2017; Geiping et al. 2021",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=decided_by(*(title(s, str(Problem(200, noise, 0, 0.0))) for noise in (0.0, 0.2) for s in SIZES)),
    caveats=(
        "Every arm has its own learning rate, by validation accuracy at the target on two seeds of their "
        "own, and as many updates; accuracies are read where the training cross-entropy first is 0.001. "
        "With fixed rates or as many epochs gradient descent is simply less trained.",
        "Keskar et al. 2017 compare Adam with batches of 256 and of a tenth of the data: 98.03 against "
        "97.81 % on MNIST, 80.04 against 77.26 % on CIFAR-10 (networks F1 and C1, Table 2). Geiping et al. "
        "2021 close such a gap with explicit regularisation.",
        "Small networks on few digits; the quick profile is 64 units wide, on 200 images. The full profile "
        "has 256 units, 500 images too, and gradient descent with isotropic noise.",
    ),
)
