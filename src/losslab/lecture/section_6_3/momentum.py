"""C27: Polyak's momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, decided_by
from losslab.lecture.driving import (
    Gradient,
    drive,
    drive_torch,
    member_errors,
    path_of,
    pulled,
)
from losslab.lecture.figures import figure, lines
from losslab.lecture.section_6_3.convergence import CONDITIONS, TARGET, iterations, power_of_kappa
from losslab.lecture.section_6_3.landscapes import Bowls
from losslab.lecture.verdicts import identity
from losslab.rules import Momentum

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

HALFWAY = 1e-6
LARGE = 100.0
"""Condition numbers from which log((√κ + 1)/(√κ − 1)) is 2/√κ to within 1 %; at κ = 10 it is 4 % more."""

STEEP = (*CONDITIONS, 1e4, 1e5)

EQUATION = "v = −∇f + βv, x ← x + ηv"
TORCH = "equal to torch's SGD with momentum"
HEAVY = "x ← x − η∇f + β(x − x_before)"
SUM = "v = −Σ β^k ∇f of k steps ago"
STEADY = "under a constant gradient the step is η/(1 − β) times it"
SLOPE = "power of κ in the iterations from 10⁻⁶ to 10⁻¹², κ ≥ 100"
WHOLE = "power of κ in the iterations from the start to 10⁻¹², κ ≤ 1000"
EDGE = "quadratics on the wrong side of the stability limit 2(1 + β)/L"


def settings(instances: int) -> tuple[Tensor, Tensor]:
    """Rates and decays, one a member; few values, so that torch's optimizer has few groups."""
    rng = np.random.default_rng(30)
    lr = torch.from_numpy(10 ** rng.choice(np.linspace(-3, -2, 5), instances))
    return lr, torch.from_numpy(rng.choice([0.0, 0.5, 0.9, 0.99], instances))


def updates(instances: int, steps: int, dimension: int = 6) -> pd.DataFrame:
    """The rule against the notes' equation, torch's optimizer, the heavy ball, and the sum of gradients."""
    import pandas as pd

    gradient, start = pulled(instances, dimension, steps, seed=30)
    lr, beta = settings(instances)
    moves = list(drive(Momentum(lr=lr, beta=beta), gradient, start, steps))
    path = path_of(iter(moves))
    g = torch.stack([move.gradient for move in moves])
    age = torch.arange(steps - 1, -1, -1, dtype=torch.float64)[:, None, None]
    summed = (beta[:, None] ** age * g).sum(0)
    theirs = drive_torch(torch.optim.SGD, {"lr": lr, "momentum": beta}, gradient, start, steps)
    return pd.DataFrame(
        {
            "equation": member_errors(path, as_in_the_notes(gradient, start, lr, beta, steps)),
            "torch": member_errors(path, theirs),
            "heavy": member_errors(path, heavy_ball_path(gradient, start, lr, beta, steps)),
            "sum": member_errors(moves[-1].state["b"][None], summed[None]),
        }
    )


def as_in_the_notes(gradient: Gradient, start: Tensor, lr: Tensor, beta: Tensor, steps: int) -> Tensor:
    """The path of ``v = -g + beta v``, ``x = x + lr v``."""
    path, v = [start], torch.zeros_like(start)
    for step in range(steps):
        v = -gradient(path[-1], step) + beta[:, None] * v
        path.append(path[-1] + lr[:, None] * v)
    return torch.stack(path)


def heavy_ball_path(gradient: Gradient, start: Tensor, lr: Tensor, beta: Tensor, steps: int) -> Tensor:
    """The path of ``x_next = x - lr g + beta (x - x_before)``."""
    path = [start, start]
    for step in range(steps):
        x = path[-1]
        path.append(x - lr[:, None] * gradient(x, step) + beta[:, None] * (x - path[-2]))
    return torch.stack(path[1:])


def steady_steps(instances: int) -> pd.DataFrame:
    """The step over the gradient after a long time, in units of lr/(1 - beta)."""
    import pandas as pd

    rng = np.random.default_rng(31)
    beta = rng.uniform(0, 0.95, instances)
    g = torch.from_numpy(rng.standard_normal((instances, 1)))
    *_, last = drive(Momentum(lr=0.1, beta=beta.tolist()), lambda x, step: g, torch.zeros_like(g), 600)
    ratio = ((last.before - last.after) / g)[:, 0].numpy() * (1 - beta) / 0.1
    return pd.DataFrame({"beta": beta, "error": np.abs(ratio - 1)})


def edges(instances: int, steps: int) -> pd.DataFrame:
    """Growth of f on random quadratics at 98 % and at 102 % of the rate 2(1 + beta)/L."""
    import pandas as pd

    rng = np.random.default_rng(32)
    beta, kappa = rng.uniform(0, 0.95, instances), 10 ** rng.uniform(1, 3, instances)
    share = np.where(np.arange(instances) % 2 == 0, 0.98, 1.02)
    bowls = Bowls.of(kappa, range(3000, 3000 + instances), 5)
    lr = torch.from_numpy(share * 2 * (1 + beta)) / bowls.L
    *_, last = drive(Momentum(lr=lr, beta=beta.tolist()), bowls.gradient, bowls.start, steps)
    growth = bowls.value(last.after) / bowls.value(bowls.start)
    return pd.DataFrame({"beta": beta, "kappa": kappa, "share": share, "growth": growth.numpy()})


def experiment(lab: Lab) -> Tables:
    """Identities on random problems, iterations against the condition number, the limit of stability."""
    import pandas as pd

    instances = lab.pick(100, 1000)
    seeds = range(lab.replicates(10, 30))
    descent = iterations(["gradient descent"], CONDITIONS, seeds)
    rolling = iterations(["momentum"], STEEP, seeds, levels=(HALFWAY, TARGET))
    return {
        "updates": updates(instances, 200),
        "steady": steady_steps(instances),
        "iterations": pd.concat([descent, rolling], ignore_index=True),
        "edges": edges(lab.pick(200, 1000), 300),
    }


def judge(tables: Tables) -> list[Finding]:
    """The identities and the power of kappa."""
    runs, edge = tables["updates"], tables["edges"]
    wrong = (edge.growth < 1) != (edge.share < 1)
    return [
        identity(EQUATION, runs.equation),
        identity(TORCH, runs.torch),
        identity(HEAVY, runs.heavy),
        identity(SUM, runs["sum"]),
        identity(STEADY, tables["steady"].error),
        *_powers(tables["iterations"]),
        identity(EDGE, wrong.astype(float), tolerance=0.0),
    ]


def _powers(runs: pd.DataFrame) -> list[Finding]:
    runs = runs[runs.method == "momentum"]
    counts = runs.pivot(index=["kappa", "seed"], columns="level", values="iterations").reset_index()
    steep, mild = counts[counts.kappa >= LARGE], counts[counts.kappa <= max(CONDITIONS)]
    double = (
        "at the best rate and decay the extreme eigenvalues have double roots: the distance falls as "
        "(1 + ct) r^t, which costs some more iterations the larger κ is"
    )
    return [
        power_of_kappa(SLOPE, steep.kappa, steep[TARGET] - steep[HALFWAY], theory=0.5),
        power_of_kappa(WHOLE, mild.kappa, mild[TARGET], theory=0.5, note=double),
    ]


def figures(tables: Tables) -> list[Drawing]:
    """Iterations against the condition number, and the limit of stability."""
    return [
        Drawing(
            _iterations_figure(tables["iterations"]),
            "Iterations until f has fallen to 10⁻¹² of its start on random quadratics in 20 dimensions, at "
            "the best fixed rate and decay; lines: the asymptotic contraction.",
        ),
        Drawing(
            _edge_figure(tables["edges"]),
            "f after 300 steps on random quadratics, with rates of 98 % and of 102 % of 2(1 + β)/L.",
        ),
    ]


def _iterations_figure(runs: pd.DataFrame) -> Figure:
    drawn = figure("Momentum and conditioning", "condition number κ", "iterations", log_x=True, log_y=True)
    runs = runs[runs.level == TARGET]
    lines(drawn, runs, "kappa", "iterations", by="method", mode="markers")
    for trace, (_, rows) in zip(list(drawn.data), runs.groupby("method", sort=False), strict=True):
        theory = rows.drop_duplicates("kappa")
        drawn.add_scatter(x=theory.kappa, y=theory.theory, mode="lines", line=trace.line, showlegend=False)
    return drawn


def _edge_figure(edge: pd.DataFrame) -> Figure:
    drawn = figure("The limit of stability", "decay β", "f after / f before", log_y=True)
    named = edge.assign(
        growth=edge.growth.clip(lower=1e-300), side=[f"{share:.0%} of the limit" for share in edge.share]
    )
    lines(drawn, named, "beta", "growth", by="side", mode="markers")
    return drawn


C27 = Claim(
    id="C27",
    section="6.3.3",
    title="Polyak's momentum",
    statement=(
        "Momentum accumulates past gradients while descending: v ← −∇f + βv, x ← x + ηv. (Added here: it "
        "needs about √κ iterations where gradient descent needs κ.)"
    ),
    source="Notes §6.3.3; Polyak 1964",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=decided_by(EQUATION, TORCH, HEAVY, SUM, SLOPE, WHOLE),
    caveats=(
        "The power 1/2 is that of quadratics at the best rate and decay, which ask for the spectrum. On "
        "some strongly convex functions the same setting does not converge at all (Lessard, Recht & Packard "
        "2016).",
        "With large gradient noise momentum gains little (Kidambi et al. 2018).",
        "The notes say nothing of κ; the comparison with gradient descent is added here. Counted from the "
        "start at κ ≤ 1000, the setting fixed beforehand, the power is above 1/2: the double root there adds "
        "a factor 1 + ct, which theory puts at 0.535. The count over the later half of the way, up "
        "to κ = 10⁵, was added after a first run to separate the two; both count towards the verdict.",
        "The counts have hardly any noise, so the interval of a power is narrow and resolves the last "
        "thousandths that a finite κ leaves.",
    ),
    errata=("E22",),
)

CLAIMS = [C27]
