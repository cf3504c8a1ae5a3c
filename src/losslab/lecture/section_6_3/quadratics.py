"""C18: gradient descent on ill-conditioned quadratics; with C19 and C20, which lie in `newton`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from losslab.engine import train
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, decided_by
from losslab.lecture.driving import drive
from losslab.lecture.figures import figure, lines, reference
from losslab.lecture.section_6_3 import expense, newton
from losslab.lecture.section_6_3.convergence import CONDITIONS, DIMENSION, iterations, power_of_kappa
from losslab.lecture.section_6_3.landscapes import Bowls
from losslab.lecture.verdicts import bound, identity
from losslab.rules import GD, SGD
from losslab.tasks import Task, half_mse, logistic_regression, supervised

if TYPE_CHECKING:
    import pandas as pd

NEARBY = (1.5, 1.95, 2.05, 2.5)
"""Rates for the two Gaussians: the paper's two, and one on each side of the limit 2/1."""

SLOPE = "iterations grow in proportion to the condition number"
FLIPS = "late steps on which the stiff component keeps its sign, 1/L < η < 2/L"
CALM = "steps on which it changes sign, η ≤ 1/L"
LIMIT = "largest stable rate on two Gaussians with a bias"


def sign_changes(instances: int, steps: int, low: float, high: float, seed: int) -> pd.DataFrame:
    """The share of steps on which the component along the stiffest direction changes its sign.

    Args:
        instances: Random quadratics, condition numbers log-uniform in [10, 1000].
        steps: Updates of each.
        low: Least rate, in units of 1/L.
        high: Greatest rate, in units of 1/L.
        seed: Of all of it.

    Returns:
        One row a quadratic: its rate and condition number, the share over all steps and over the later half
        of them. A component below 1e-9 of its start is rounding and no longer counted.
    """
    import pandas as pd

    rng = np.random.default_rng(seed)
    kappa, rate = 10 ** rng.uniform(1, 3, instances), rng.uniform(low, high, instances)
    bowls = Bowls.of(kappa, [seed * instances + k for k in range(instances)], DIMENSION)
    moves = drive(GD(lr=torch.from_numpy(rate) / bowls.L), bowls.gradient, bowls.start, steps)
    points = [bowls.start, *(move.after for move in moves)]
    component = np.stack([(bowls.stiff * x).sum(1).numpy() for x in points])
    alive = np.abs(component[1:]) > 1e-9 * np.abs(component[0])
    alive = np.logical_and.accumulate(alive, axis=0)
    changed = (np.sign(component[1:]) != np.sign(component[:-1])) & alive
    counted = alive.sum(axis=0)
    late = alive & (np.arange(steps)[:, None] >= counted // 2)
    return pd.DataFrame(
        {
            "kappa": kappa,
            "rate": rate,
            "steps": counted,
            "changed": changed.sum(axis=0) / np.maximum(counted, 1),
            "changed_late": (changed & late).sum(axis=0) / np.maximum(late.sum(axis=0), 1),
        }
    )


def stiff_traces(rates: Sequence[float], steps: int) -> pd.DataFrame:
    """The stiff component of one quadratic, kappa = 100, at several rates in units of 1/L."""
    import pandas as pd

    bowls = Bowls.of([100.0] * len(rates), [0] * len(rates), dimension=2)
    moves = drive(
        GD(lr=torch.tensor(rates, dtype=torch.float64) / bowls.L), bowls.gradient, bowls.start, steps
    )
    points = [bowls.start, *(move.after for move in moves)]
    component = torch.stack([(bowls.stiff * x).sum(1) for x in points])
    component = component / component[0]
    return pd.DataFrame(
        {
            "step": np.repeat(np.arange(steps + 1), len(rates)),
            "rate": np.tile(rates, steps + 1),
            "component": component.flatten().numpy(),
        }
    )


def two_gaussians(seed: int, examples: int = 100) -> Task:
    """Regression of the labels +-1 of two Gaussians on their coordinates and a bias.

    The examples have mean exactly 0 and covariance eigenvalues exactly 0.84 and 0.036, so the Hessian of the
    loss has these two and, for the bias, 1.
    """
    generator = torch.Generator().manual_seed(seed)
    y = torch.ones(examples, 1, dtype=torch.float64)
    y[examples // 2 :] = -1
    along = torch.tensor([[0.4, 0.8]], dtype=torch.float64)
    x = y * along + 0.2 * torch.randn(examples, 2, generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / examples)
    wanted = torch.tensor([0.036, 0.84], dtype=torch.float64)
    x = x @ vectors @ torch.diag((wanted / values).sqrt()) @ vectors.T
    return supervised(
        logistic_regression(2, 1).to(torch.float64), (x, y), criterion=half_mse, name="two_gaussians"
    )


def gaussian_runs(seeds: Sequence[int], steps: int) -> pd.DataFrame:
    """Full-batch descent at the rates of `NEARBY` and single-example descent at 0.2, by the engine."""
    import pandas as pd

    tables = []
    for seed in seeds:
        task = two_gaussians(seed)
        common = {"dtype": "float64", "evaluate_on": ("train",), "progress": False, "record": []}
        evaluate = sorted({int(k) for k in np.geomspace(1, steps, 40)} | {0})
        batch = train(task, GD(lr=NEARBY), seeds=[seed], steps=steps, evaluate=evaluate, **common)  # type: ignore[arg-type]
        single = train(
            task,
            SGD(lr=0.2),
            seeds=[seed],
            steps=steps,
            batch_size=1,
            replacement=True,
            evaluate=evaluate,
            **common,  # type: ignore[arg-type]
        )
        history = batch.history[["step", "lr", "train_loss"]].assign(method="batch")
        noisy = single.history[["step", "train_loss"]].assign(method="one example", lr=0.2)
        tables.append(pd.concat([history, noisy]).assign(seed=seed))
    return pd.concat(tables, ignore_index=True)


def experiment(lab: Lab) -> Tables:
    """Iterations against the condition number, signs of the stiff component, and the two Gaussians."""
    seeds = range(lab.replicates(10, 30))
    instances = lab.pick(200, 1000)
    return {
        "iterations": iterations(["gradient descent"], CONDITIONS, seeds),
        "above": sign_changes(instances, 60, 1.0, 2.0, seed=1),
        "below": sign_changes(instances, 60, 0.05, 1.0, seed=2),
        "stiff": stiff_traces((0.5, 1.5, 1.9), 40),
        "gaussians": gaussian_runs(range(lab.pick(3, 10)), 400),
    }


def judge(tables: Tables) -> list[Finding]:
    """The slope of iterations against kappa, and the signs; the rest is context."""
    runs, above, below = tables["iterations"], tables["above"], tables["below"]
    return [
        power_of_kappa(SLOPE, runs.kappa, runs.iterations, theory=1.0),
        identity(FLIPS, 1 - above.changed_late, tolerance=0.0),
        identity(CALM, below.changed, tolerance=0.0),
        _limit(tables["gaussians"]),
    ]


def _limit(runs: pd.DataFrame) -> Finding:
    """Between which rates full-batch descent on the two Gaussians stops converging."""
    batch = runs[runs.method == "batch"].set_index(["seed", "lr"])
    first, last = (batch.train_loss[batch.step == step] for step in (0, batch.step.max()))
    rates, stable = first.index.get_level_values("lr"), last.reindex(first.index) <= first
    low = float(rates[stable].max()) if stable.any() else 0.0
    high = float(rates[~stable].min()) if not stable.all() else float("inf")
    return bound(
        LIMIT,
        (low + high) / 2,
        (low, high),
        len(first),
        "between the largest rate that converged and the smallest that diverged",
        at_least=1.9,
        at_most=2.1,
        note="the bias input has eigenvalue 1; without it the limit would be 2/0.84 = 2.38",
    )


def figures(tables: Tables) -> list[Drawing]:
    """Iterations, the stiff component, the two Gaussians."""
    runs = tables["iterations"]
    growth = figure(
        "Iterations of gradient descent", "condition number κ", "iterations", log_x=True, log_y=True
    )
    lines(growth, runs, "kappa", "iterations", mode="markers", name="measured")
    theory = runs.drop_duplicates("kappa")
    lines(growth, theory, "kappa", "theory", name="theory")

    stiff = figure("The stiff component", "step", "component along the stiffest direction")
    named = tables["stiff"].assign(rate=[f"η = {rate:g}/L" for rate in tables["stiff"].rate])
    lines(stiff, named, "step", "component", by="rate")
    reference(stiff, 0.0, "")

    runs = tables["gaussians"]
    runs = runs[(runs.seed == runs.seed.min()) & (runs.step > 0)]
    labels = [f"{m}, η = {lr:g}" for m, lr in zip(runs.method, runs.lr, strict=True)]
    loss = figure("Two Gaussians", "step", "training loss", log_x=True, log_y=True)
    lines(loss, runs.assign(run=labels), "step", "train_loss", by="run")
    loss.update_yaxes(range=[-2.5, 3])
    return [
        Drawing(
            growth,
            "Iterations until f has fallen to 10⁻¹² of its start, at the best fixed rate 2/(μ + L), for "
            "random rotations and starts in 20 dimensions; the line is the worst start.",
        ),
        Drawing(
            stiff,
            "With η between 1/L and 2/L the component along the stiffest direction changes its sign at every "
            "step; with η below 1/L it never does (κ = 100).",
        ),
        Drawing(
            loss,
            "Efficient BackProp's example: regression on two Gaussians whose covariance has the eigenvalues "
            "0.84 and 0.036, with a bias.",
        ),
    ]


C18 = Claim(
    id="C18",
    section="6.3",
    title="Gradient descent on ill-conditioned quadratics",
    statement=(
        "On a quadratic with a large condition number κ gradient descent oscillates across the valley and "
        "needs many iterations."
    ),
    source="Notes §6.3; LeCun, Bottou, Orr & Müller 1998, Efficient BackProp",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=decided_by(SLOPE, FLIPS),
    caveats=(
        "Slowness and oscillation are two effects: with η ≤ 1/L descent is slow and does not oscillate at "
        "all.",
        "The count is at the best fixed rate 2/(μ + L), which asks for the spectrum; any other fixed rate "
        "needs more.",
    ),
)

CLAIMS = [C18, newton.C19, expense.C20]
