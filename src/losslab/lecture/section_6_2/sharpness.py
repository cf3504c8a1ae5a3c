"""C13: SGD has a regularising effect: sharpness where runs reach the same training loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from losslab.curvature import Hessian, density, eigenpairs
from losslab.engine import Objective, Points, Population
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, all_but
from losslab.lecture.figures import colour, figure, lines, reference, spread
from losslab.lecture.numbers import number
from losslab.lecture.section_6_2.matched import ARMS, Problem, fitted
from losslab.lecture.statistics import spearman
from losslab.lecture.training import one_thread, trained
from losslab.lecture.verdicts import bound, join_notes, paired_family
from losslab.rules import GD
from losslab.tasks import digits, half_mse, mlp, supervised

if TYPE_CHECKING:
    import pandas as pd

RATES = (0.05, 0.1, 0.2, 0.4)
LESS = -0.2
"""Change of log lambda_max that counts: 18 % less."""

CORRELATION = "rank correlation of η/B with the largest eigenvalue"
RIDGES = 6
"""Moments of training at which the whole spectrum is drawn."""

EDGE = "gradient descent on squared loss: largest eigenvalue × η / 2 late in training"


class Sizes(NamedTuple):
    """How much work to do: the problem, seeds, updates; images, rates and steps of the edge of stability."""

    problem: Problem
    seeds: int
    updates: int
    edge_examples: int
    edge_rates: tuple[float, ...]
    edge_steps: int
    edge_hidden: int


def sharpness(
    objective: Objective, points: Points, start: torch.Tensor | None = None
) -> tuple[np.ndarray, torch.Tensor]:
    """The largest eigenvalue of the Hessian at each point, to a thousandth, NaN where the search failed.

    Returns:
        ``[N]`` and the eigenvectors, to start the next search from.
    """
    found = eigenpairs(Hessian(objective, points), 1, tol=1e-3, start=start, second_look=start is None)
    values = found.values.reshape(points.members, -1)[:, 0]
    sure = found.converged.reshape(points.members, -1)[:, 0]
    return torch.where(sure, values, torch.nan).numpy(), found.vectors


def runs(sizes: Sizes) -> pd.DataFrame:
    """The largest eigenvalue, and more, where runs of equal rates first reach the target."""
    import pandas as pd

    lrs = [lr for lr in RATES for _ in range(sizes.seeds)]
    seeds = list(range(sizes.seeds)) * len(RATES)
    tables = []
    for name in ("GD", "B = 32", "B = 8"):
        run, rows = fitted(sizes.problem, ARMS[name], lrs, seeds, sizes.updates, every=10)
        arrived = np.flatnonzero(np.isfinite(rows.updates))
        rows["sharpness"] = np.nan
        rows["norm"] = run.points.matrix().norm(dim=1).numpy()
        if len(arrived):
            objective = Objective.of(run, execution="stacked")
            rows.loc[arrived, "sharpness"] = sharpness(objective, run.points.select(arrived.tolist()))[0]
        batch = ARMS[name].size or sizes.problem.examples
        tables.append(rows.assign(arm=name, batch=batch, temperature=rows.lr / batch))
    return pd.concat(tables, ignore_index=True)


def edge_of_stability(
    examples: int, lrs: Sequence[float], steps: int, hidden: int, looks: int = 30
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Descent on the squared loss, tanh network.

    Returns:
        The largest eigenvalue, one row a (rate, step); the density of the whole spectrum, in eigenvalues per
        unit, at the largest rate and a few moments: one row a (step, grid point).
    """
    import pandas as pd

    x, y = digits().train.all()
    pairs = (x[:examples], F.one_hot(y[:examples], 10).float())
    task = supervised(
        mlp(64, hidden, hidden, 10, activation="tanh"), pairs, criterion=half_mse, name="digits"
    )
    objective = Objective(task, execution="stacked")
    found: list[pd.DataFrame] = []
    vectors: list[torch.Tensor] = []
    spectra: list[pd.DataFrame] = []
    grid = torch.linspace(-2, 2.4 / max(lrs), 161, dtype=torch.float64)
    moments = {int(k) for k in np.geomspace(1, looks, RIDGES)}

    def look(population: Population) -> None:
        points = population.points
        values, ends = sharpness(objective, points, vectors[-1] if vectors else None)
        vectors[:] = [ends]
        told = {"lr": list(lrs), "sharpness": values, "loss": objective.value(points).numpy()}
        found.append(pd.DataFrame(told).assign(step=population.step))
        if len(found) in moments:
            top = points.select([int(np.argmax(lrs))])
            height = density(Hessian(objective, top))(grid, width=0.03 / max(lrs))[1].value * top.parameters
            table = pd.DataFrame({"eigenvalue": grid.numpy(), "density": height.flatten().numpy()})
            spectra.append(table.assign(step=population.step, lr=max(lrs)))

    every = max(1, steps // looks)
    trained(task, GD(lr=list(lrs)), seeds=[0] * len(lrs), steps=steps, record=every, watch=look)
    return pd.concat(found, ignore_index=True), pd.concat(spectra, ignore_index=True)


def evidence(lab: Lab, sizes: Sizes) -> Tables:
    """Runs of equal rates, and gradient descent at the edge of stability."""
    lab.progress("sharpness of SGD and gradient descent")
    edge, spectra = edge_of_stability(
        sizes.edge_examples, sizes.edge_rates, sizes.edge_steps, sizes.edge_hidden
    )
    return {"runs": runs(sizes), "edge": edge, "spectra": spectra}


def experiment(lab: Lab) -> Tables:
    """The settings of the claim."""
    problem = Problem(200, 0.0, lab.pick(64, 256), lab.pick(1e-2, 1e-3))
    sizes = Sizes(
        problem,
        lab.replicates(10, 20),
        lab.pick(1500, 20_000),
        lab.pick(200, 1000),
        (0.1, 0.2, 0.4),
        lab.pick(1500, 10_000),
        lab.pick(32, 200),
    )
    with one_thread():
        return evidence(lab, sizes)


def title(batch: int, lr: float) -> str:
    """The finding about one batch size and rate."""
    return f"B = {batch} against gradient descent, η = {lr:g}: log of the largest eigenvalue"


def judge(tables: Tables) -> list[Finding]:
    """V3 at equal rates and training loss, the correlation, and the control of gradient descent."""
    rows = tables["runs"]
    logs = np.log(rows.sharpness)
    wide = rows.assign(log=logs).pivot_table(index=["lr", "seed"], columns="arm", values="log", dropna=False)
    findings: list[Finding] = []
    for batch in (8, 32):
        differences = {}
        for lr in RATES:
            here = wide.loc[lr]
            both = (here[f"B = {batch}"] - here["GD"]).dropna()
            differences[title(batch, lr)] = both.to_numpy()
        late = int((~np.isfinite(rows[rows.batch.isin((batch, rows.batch.max()))].updates)).sum())
        note = f"{late} runs short of the training loss are left out" if late else ""
        findings += paired_family(differences, delta=LESS, note=note)
    return [*findings, _judge_correlation(rows.dropna(subset="sharpness")), _judge_edge(tables["edge"])]


def _judge_correlation(rows: pd.DataFrame) -> Finding:
    value = spearman(rows.temperature, rows.sharpness)
    seeds = rows.seed.unique()
    groups = {seed: rows[rows.seed == seed] for seed in seeds}
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(300):
        parts = [groups[s] for s in rng.choice(seeds, len(seeds))]
        temperature, height = (np.concatenate([p[c] for p in parts]) for c in ("temperature", "sharpness"))
        draws.append(spearman(temperature, height))
    ends = (float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975)))
    within = [spearman(g.temperature, g.sharpness) for _, g in rows.groupby("lr")]
    note = f"at one rate {number(min(within))} to {number(max(within))}"
    return bound(
        CORRELATION, value, ends, len(seeds), "Spearman, bootstrap over seeds", at_most=-0.5, note=note
    )


def _judge_edge(rows: pd.DataFrame) -> Finding:
    late = rows[rows.step >= 0.75 * rows.step.max()]
    ratio = (late.sharpness * late.lr / 2).groupby(late.lr).median()
    first = (rows.sharpness * rows.lr / 2).groupby(rows.lr).first()
    return bound(
        EDGE,
        float(ratio.median()),
        (float(ratio.min()), float(ratio.max())),
        len(ratio),
        "median over the last quarter; the interval is the range over the rates",
        at_least=0.8,
        at_most=1.2,
        note=join_notes(f"at the first look {number(first.min())} to {number(first.max())}"),
    )


def figures(tables: Tables) -> list[Drawing]:
    """Sharpness against rate and batch, and through training at the edge of stability."""
    rows = tables["runs"].dropna(subset="sharpness")
    drawn = figure("Sharpness at the same training loss", "learning rate η", "largest eigenvalue", True, True)
    for arm, group in rows.groupby("arm", sort=False):
        found = spread(group, ["lr"], "sharpness")
        lines(drawn, found, "lr", "middle", band=("low", "high"), mode="lines+markers", name=str(arm))
    edge = tables["edge"]
    through = figure("Sharpness through training", "updates", "largest eigenvalue", log_y=True)
    for index, lr in enumerate(sorted(edge.lr.unique())):
        group = edge[edge.lr == lr]
        lines(through, group, "step", "sharpness", name=f"η = {lr:g}")
        through.add_hline(2 / lr, line={"color": colour(index), "dash": "dot", "width": 1.5})
    reference(through, 2 / float(edge.lr.max()), "dotted: 2/η")
    return [
        Drawing(
            drawn,
            "Largest eigenvalue of the Hessian of the training loss where a run first reaches the target "
            "(median and 80 % of the seeds): smaller batches and larger rates end in flatter places.",
        ),
        Drawing(
            through,
            "Gradient descent on the squared loss, tanh network: the largest eigenvalue climbs towards 2/η, "
            "where descent becomes unstable; once there it stays.",
        ),
        _spectra(tables["spectra"]),
    ]


def _spectra(rows: pd.DataFrame) -> Drawing:
    """Ridges of the logarithm of the density: on a linear scale all eigenvalues but zero are invisible."""
    drawn = figure("The spectrum through training", "eigenvalue of the Hessian", "updates")
    steps = sorted(rows.step.unique())
    logs = np.log10(rows.density.clip(lower=0.1)) + 1
    tall = 1.6 / float(logs.max())
    for place, step in reversed(list(enumerate(steps))):  # the earlier ones stand in front
        x, height = rows.eigenvalue[rows.step == step].to_numpy(), logs[rows.step == step].to_numpy()
        drawn.add_scatter(
            x=np.r_[x, x[::-1]],
            y=np.r_[place + tall * height, np.full(x.size, place)],
            mode="lines",
            fill="toself",
            fillcolor=colour(0, 0.4),
            line={"color": colour(0), "width": 1},
            name=f"{step} updates",
            showlegend=False,
            hoverinfo="name",
        )
    rate = float(rows.lr.iloc[0])
    reference(drawn, 2 / rate, "2/η", axis="x")
    drawn.update_yaxes(tickvals=list(range(len(steps))), ticktext=[str(step) for step in steps])
    drawn.update_layout(height=460)
    return Drawing(
        drawn,
        f"Density of all eigenvalues (log scale, stochastic Lanczos) along gradient descent at η = {rate:g}: "
        "nearly all stay at zero, a few travel towards 2/η.",
    )


C13 = Claim(
    id="C13",
    section="6.2.2",
    title="SGD has a regularisation effect",
    statement="SGD has a regularisation effect.",
    source="Notes §6.2.2; Keskar et al. 2017; Smith et al. 2021; Cohen et al. 2021",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=all_but(EDGE),
    caveats=(
        "Sharpness is the largest eigenvalue of the Hessian of the whole training loss, by Lanczos to a "
        "thousandth, read where the training cross-entropy first is at the target, at equal rates. Runs that "
        "do not get there are left out and counted.",
        "Gradient descent is regularised too: its rate bounds the sharpness it can live with, 2/η, so arms "
        "must be compared at the same rate.",
        "The control is undecided where 2/η is far above the sharpness that this small network reaches in "
        "the steps of the quick profile: at the two smaller rates the largest eigenvalue is still climbing "
        "when training ends, at 0.4 it has arrived. The interval is the range over the rates, and the "
        "control has no part in the verdict.",
        "At the largest rate a run of the smallest batch may diverge or stall before the target; with fewer "
        "than ten pairs left that comparison says nothing, whatever the size of the difference.",
        "Sharpness depends on the parametrisation (Dinh et al. 2017), and its link to generalisation is weak "
        "(Andriushchenko et al. 2023): flatter is not better by itself; see C12.",
    ),
)
