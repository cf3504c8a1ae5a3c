"""C21: AdaGrad as Newton's method with a diagonal matrix in place of the Hessian."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from losslab.curvature import GaussNewton, Hessian
from losslab.engine import Objective, Population
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, Verdict, decided_by
from losslab.lecture.driving import drive
from losslab.lecture.figures import figure, lines, spread
from losslab.lecture.numbers import number
from losslab.lecture.section_6_2.samples import sample_gradients
from losslab.lecture.statistics import bootstrap_interval, fit_power_law, spearman
from losslab.lecture.training import one_thread, trained
from losslab.lecture.tuning import Tuning, at_edge, rates, tune
from losslab.lecture.verdicts import bound, join_notes, law
from losslab.rules import GD, AdaGrad, Rule
from losslab.tasks import Task, digits, logistic_regression, mlp, supervised

if TYPE_CHECKING:
    import pandas as pd

KAPPA = 1000.0
TARGET = 1e-6
"""f / f(start) at which a run has arrived."""

ANGLES = (0, 15, 30, 45)
"""Of the full profile; the quick one has the first and the last."""
TUNING_SEEDS = (1000, 1001, 1002, 1003)
ALIKE, UNLIKE = 0.5, 0.2
FASTER = 5.0
MATRICES = ("Hessian", "Gauss-Newton", "empirical Fisher")

RANKS = "rank correlation of AdaGrad's sums with the Hessian's diagonal on digits"
SPEED = f"κ = {KAPPA:g} along the axes: gradient descent's steps / AdaGrad's"
TURNED = "turned by 45°: share of that advantage that is left"
ROOT = "AdaGrad's sums ∝ √t on digits"


class Sizes(NamedTuple):
    """How much work to do: angles, starts, longest run of the quadratics; digits, units, seeds, steps."""

    angles: tuple[int, ...]
    starts: int
    limit: int
    examples: int
    hidden: int
    seeds: int
    steps: int


# -- quadratics ------------------------------------------------------------------------------------------


def tilted(angle: float, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Quadratics of two variables with eigenvalues 1 and 1000, turned; starts of equal height on both axes.

    Returns:
        The matrix ``[2, 2]`` and starts ``[N, 2]``: ``A^(-1/2) z`` with z standard normal.
    """
    turn = math.radians(angle)
    q = torch.tensor(
        [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]], dtype=torch.float64
    )
    spectrum = torch.tensor([1.0, KAPPA], dtype=torch.float64)
    z = torch.stack(
        [torch.from_numpy(np.random.default_rng([21, seed]).standard_normal(2)) for seed in seeds]
    )
    return (q * spectrum) @ q.T, z / spectrum.sqrt() @ q.T


def arrivals(
    method: str, angle: float, lrs: Sequence[float], seeds: Sequence[int], limit: int
) -> tuple[Tensor, Tensor]:
    """Steps of each member until f / f(start) <= 1e-6, ``[N]``, infinite for never, and the last ratio."""
    matrix, start = tilted(angle, seeds)
    rule: Rule = (AdaGrad if method == "AdaGrad" else GD)(lr=list(lrs))
    scale = matrix.diagonal() if method == "diagonal Newton" else torch.ones(2, dtype=torch.float64)
    first = (start * (start @ matrix)).sum(1)
    found = torch.full((len(start),), torch.inf, dtype=torch.float64)
    ratio = torch.ones_like(found)
    for move in drive(rule, lambda x, step: x @ matrix / scale, start, limit):
        ratio = (move.after * (move.after @ matrix)).sum(1) / first
        found = torch.where((ratio <= TARGET) & found.isinf(), move.step + 1.0, found)
        if move.step % 50 == 0 and bool((found.isfinite() | ~ratio.isfinite() | (ratio > 1e6)).all()):
            break
    return found, ratio


GRIDS = {
    "gradient descent": rates(3e-4, 1e-2, per_decade=4),
    "AdaGrad": rates(1e-2, 10.0, per_decade=4),
    "diagonal Newton": rates(0.03, 3.0, per_decade=4),
}


def tuned(method: str, angle: float, limit: int) -> Tuning:
    """The rate of the fewest steps, by the median of four starts that no verdict uses.

    Where no rate arrives, the one that comes nearest is best.
    """

    def score(lrs: list[float], seeds: list[int]) -> Tensor:
        steps, ratio = arrivals(method, angle, lrs, seeds, limit)
        return torch.where(steps.isfinite(), steps, limit * (1 + (ratio / TARGET).log10()))

    return tune(score, GRIDS[method], TUNING_SEEDS)


def quadratic_runs(angles: Sequence[int], starts: int, limit: int) -> pd.DataFrame:
    """Steps at each method's own best rate: one row a (method, angle, start)."""
    import pandas as pd

    tables = []
    for angle in angles:
        for method in GRIDS:
            best = tuned(method, angle, limit)
            steps, _ = arrivals(method, angle, [best.lr] * starts, range(starts), limit)
            table = pd.DataFrame({"start": range(starts), "steps": steps.numpy()})
            tables.append(
                table.assign(arm=method, angle=angle, lr=best.lr, at_edge=best.at_edge, limit=limit)
            )
    return pd.concat(tables, ignore_index=True)


# -- digits ----------------------------------------------------------------------------------------------


def networks(sizes: Sizes) -> dict[str, Task]:
    """Softmax regression and a small tanh network on digits."""
    x, y = digits().train.all()
    pairs = (x[: sizes.examples], y[: sizes.examples])
    models = {
        "softmax regression": logistic_regression(64, 10),
        "tanh network": mlp(64, sizes.hidden, 10, activation="tanh"),
    }
    return {name: supervised(model, pairs, name=name) for name, model in models.items()}


def comparisons(sizes: Sizes) -> tuple[pd.DataFrame, pd.DataFrame]:
    """AdaGrad's sums on digits beside three diagonals at the same weights.

    Returns:
        One row a (network, seed, matrix) with the rank correlation over the weights, and the growth of the
        sums: one row a (network, seed, step) with the median of their roots.
    """
    import pandas as pd

    ranks, growth = [], []
    for name, task in networks(sizes).items():
        looks = sorted({int(k) for k in np.geomspace(10, sizes.steps, 12)})
        roots: list[pd.DataFrame] = []

        def keep(population: Population, name: str = name, roots: list[pd.DataFrame] = roots) -> None:
            middle = _sums(population).median(1).values.numpy()
            table = pd.DataFrame({"seed": population.seeds, "root": middle})
            roots.append(table.assign(network=name, step=population.step))

        run = trained(
            task, AdaGrad(lr=0.1), seeds=sizes.seeds, steps=sizes.steps, batch_size=32, dtype="float64",
            record=[look - 1 for look in looks], watch=keep,
        )  # fmt: skip
        growth += roots
        ranks.append(_ranks(run, sizes).assign(network=name))
    return pd.concat(ranks, ignore_index=True), pd.concat(growth, ignore_index=True)


def _sums(population: Population) -> Tensor:
    """``G_t``, the root of the summed squares, of the weights that ever had a gradient, ``[N, P']``."""
    parts = [population.state["s"][n].flatten(1) for n in population.points.weights]
    total = torch.cat(parts, dim=1).sqrt()
    return total[:, (total > 0).all(0)]


def _ranks(run: Population, sizes: Sizes) -> pd.DataFrame:
    import pandas as pd

    objective = Objective.of(run, execution="stacked")
    diagonals = {
        "Hessian": Hessian(objective, run.points).dense().diagonal(dim1=1, dim2=2).abs(),
        "Gauss-Newton": GaussNewton(objective, run.points).dense().diagonal(dim1=1, dim2=2),
        "empirical Fisher": torch.stack(
            [sample_gradients(run.task, module).square().mean(0) for module in run]
        ),
    }
    total = torch.cat([run.state["s"][n].flatten(1) for n in run.points.weights], dim=1).sqrt()
    rows = []
    for i, seed in enumerate(run.seeds):
        moved = total[i] > 0  # a pixel that is always 0 has no gradient, and would agree with everything
        for matrix, diagonal in diagonals.items():
            rows.append((seed, matrix, spearman(total[i][moved].numpy(), diagonal[i][moved].numpy())))
    return pd.DataFrame(rows, columns=["seed", "matrix", "rank"])


def evidence(lab: Lab, sizes: Sizes) -> Tables:
    """Quadratics along the axes and turned, and two networks on digits."""
    lab.progress("turned quadratics")
    quadratics = quadratic_runs(sizes.angles, sizes.starts, sizes.limit)
    lab.progress("diagonals on digits")
    ranks, growth = comparisons(sizes)
    return {"quadratics": quadratics, "ranks": ranks, "growth": growth}


def experiment(lab: Lab) -> Tables:
    """The settings of the claim."""
    sizes = Sizes(
        angles=lab.pick((0, 45), ANGLES),
        starts=20,
        limit=lab.pick(5000, 20_000),
        examples=lab.pick(300, 1000),
        hidden=lab.pick(8, 32),
        seeds=lab.replicates(5, 10),
        steps=lab.pick(400, 2000),
    )
    with one_thread():
        return evidence(lab, sizes)


def judge(tables: Tables) -> list[Finding]:
    """The correlation decides together with the speed; the turned quadratic is the control."""
    ranks = tables["ranks"]
    against = ranks[ranks.matrix == "Hessian"]["rank"]
    others = [f"{m} {number(ranks[ranks.matrix == m]['rank'].median())}" for m in MATRICES[1:]]
    exact = ranks[ranks.matrix == "Hessian"].groupby("network")["rank"].median()
    by_network = [f"{name} {number(middle)}" for name, middle in exact.items()]
    found = bound(
        RANKS,
        float(against.median()),
        bootstrap_interval(against),
        len(against),
        "median over seeds and networks of Spearman's correlation over the weights",
        at_least=ALIKE,
        note=join_notes(*by_network, "with the " + " and the ".join(others)),
    )
    if found.verdict == Verdict.FAILS and found.estimate >= UNLIKE:
        found = dataclasses.replace(found, verdict=Verdict.MIXED)
    return [found, *_judge_speed(tables["quadratics"], at_edge(tables)), _judge_root(tables["growth"])]


def _judge_speed(rows: pd.DataFrame, edge: str) -> list[Finding]:
    # A run that has not arrived counts as one that arrives at the end.
    limit = int(rows.limit.iloc[0])
    missed = int((~np.isfinite(rows.steps)).sum())
    lost = f"{missed} of {len(rows)} runs had not arrived after {limit} steps" if missed else ""
    reached = rows.assign(steps=rows.steps.clip(upper=float(limit)))
    steps = reached.pivot_table(index=["angle", "start"], columns="arm", values="steps")
    gain = steps["gradient descent"] / steps["AdaGrad"]
    plain, turned = gain.loc[0], gain.loc[45]
    left = turned / plain.median()
    newton = (steps["gradient descent"] / steps["diagonal Newton"]).loc[0].median()
    return [
        bound(
            SPEED,
            float(plain.median()),
            bootstrap_interval(plain),
            len(plain),
            "median over starts, both at their best rate",
            at_least=FASTER,
            note=join_notes(f"the Hessian's own diagonal gains {number(newton)}", edge, lost),
        ),
        bound(
            TURNED,
            float(left.median()),
            bootstrap_interval(left),
            len(left),
            "median over starts",
            at_most=0.5,
        ),
    ]


def _judge_root(growth: pd.DataFrame) -> Finding:
    slopes = [fit_power_law(g.step, g.root).slope for _, g in growth.groupby(["network", "seed"])]
    ends = bootstrap_interval(slopes)
    return law(ROOT, float(np.median(slopes)), ends, theory=0.5, n=len(slopes), note="median over the runs")


def figures(tables: Tables) -> list[Drawing]:
    """Steps against the angle, and the correlations."""
    drawn = figure("Steps against the tilt of the valley", "angle to the axes", "steps", log_y=True)
    for method, rows in tables["quadratics"].groupby("arm", sort=False):
        found = spread(rows[np.isfinite(rows.steps)], ["angle"], "steps")
        lines(drawn, found, "angle", "middle", band=("low", "high"), mode="lines+markers", name=str(method))
    drawn.update_xaxes(ticksuffix="°")
    ranks = figure("AdaGrad's sums beside the curvature", "", "rank correlation")
    for network, rows in tables["ranks"].groupby("network", sort=False):
        ranks.add_box(x=rows.matrix, y=rows["rank"], name=str(network), boxpoints="all", meta="series")
    ranks.update_layout(boxmode="group")
    ranks.update_xaxes(title_text="diagonal of")
    return [
        Drawing(
            drawn,
            f"Steps until f has fallen to {TARGET:g} of its start on a quadratic with κ = {KAPPA:g}, each "
            "method at its best rate for that angle. A diagonal matrix helps along the axes only.",
        ),
        Drawing(
            ranks,
            "Spearman's correlation, over the weights of a network, of AdaGrad's root of summed squares with "
            "three diagonals at the same weights; dots are seeds.",
        ),
    ]


C21 = Claim(
    id="C21",
    section="6.3.1",
    title="AdaGrad approximates a diagonal Newton step",
    statement="AdaGrad approximates the Newton update in a sense, a diagonal matrix in place of the Hessian.",
    source="Notes §6.3.1; Duchi, Hazan & Singer 2011",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=decided_by(RANKS, SPEED),
    caveats=(
        "AdaGrad's authors derive it from regret bounds with adaptive proximal functions, not from Newton's "
        "method; no second derivative enters. Its matrix is the root of a sum over all steps and never "
        "shrinks, as a Hessian's diagonal may.",
        "Newton's step is the same in any coordinates. AdaGrad's is not even in rescaled ones: a weight "
        "measured in other units still moves by about η.",
        "Squared gradients are the empirical Fisher matrix, which is close to the Hessian only where the "
        "model fits the data (Kunstner et al. 2019).",
        "Rates are tuned for each method and angle; on digits AdaGrad runs at 0.1 with batches of 32. The "
        "weights of pixels that are always blank are left out: their sums and curvatures are both zero.",
        "Settled after a first run: the grids of rates are finer, and the quick profile has the angles 0° "
        "and 45° alone; the full one has 15° and 30° too.",
    ),
    errata=("E41",),
)

CLAIMS = [C21]
