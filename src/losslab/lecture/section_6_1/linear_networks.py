"""C1: linear networks, where every local minimum is global."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from losslab.curvature.critical import examine
from losslab.engine import Objective, Points
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, Verdict, decided_by
from losslab.lecture.figures import colour, figure, lines, reference
from losslab.lecture.numbers import number
from losslab.lecture.section_6_1.certified import (
    FINE,
    certified_minima,
    certified_saddles,
    normal_starts,
)
from losslab.lecture.section_6_1.relief import surface
from losslab.lecture.training import one_thread, trained
from losslab.lecture.verdicts import bound, count, join_notes
from losslab.rules import GD
from losslab.tasks import Task, half_mse, linear_net, supervised

if TYPE_CHECKING:
    import pandas as pd

INPUTS, OUTPUTS, EXAMPLES = 8, 5, 60
SCALES = (0.1, 1.0, 2.0)
EXCESS = 1e-6
"""(L - L*) / L* above which a minimum is not global."""

FEW = 0.02
"""Share of bad minima that the runs must be able to exclude: the bound of 0 in 200 is 0.018."""


class Sizes(NamedTuple):
    """How much work to do: layers, starts of each shape, starts of the saddle searches, steps of each."""

    depths: tuple[int, ...]
    starts: int
    saddles: int
    steps: int
    flat_steps: int


def shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """Hidden widths of a network of ``depth`` matrices: as wide as the input, and with a bottleneck."""
    wide = [INPUTS] * (depth - 1)
    narrow = list(wide)
    narrow[(depth - 1) // 2] = 3
    return {"wide": tuple(wide), "bottleneck": tuple(narrow)}


def regression(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal inputs ``[60, 8]`` and noisy linear targets ``[60, 5]``."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((EXAMPLES, INPUTS))
    y = x @ rng.standard_normal((INPUTS, OUTPUTS)) / INPUTS**0.5
    return torch.from_numpy(x), torch.from_numpy(y + 0.5 * rng.standard_normal(y.shape))


def least(x: torch.Tensor, y: torch.Tensor, rank: int) -> float:
    """The global minimum over matrices of a rank (Baldi and Hornik 1989).

    ``L* = (tr Y'Y - sum of the rank largest eigenvalues of Y'X (X'X)^-1 X'Y) / (2 n)``, examples in rows.
    """
    explained = y.T @ x @ torch.linalg.solve(x.T @ x, x.T @ y)
    top = torch.linalg.eigvalsh(explained).flip(0)[:rank].sum()
    return float((y.square().sum() - top) / (2 * len(x)))


def linear_task(hidden: Sequence[int]) -> Task:
    """The regression by a linear network, in float64."""
    model = linear_net(INPUTS, *hidden, OUTPUTS).to(torch.float64)
    return supervised(model, regression(), criterion=half_mse, name="linear network")


def searches(sizes: Sizes) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Ends of descents, and of searches for a vanishing gradient, with the Hessian's verdict on each."""
    import pandas as pd

    x, y = regression()
    minima, saddles = [], []
    for depth in sizes.depths:
        for shape, hidden in shapes(depth).items():
            objective = Objective(linear_task(hidden), execution="stacked")
            like = Points.from_modules([objective.task.model()])
            generator = torch.Generator().manual_seed(10 * depth + len(shape))
            scales = np.resize(SCALES, sizes.starts)
            starts = normal_starts(like, scales, generator)
            best = least(x, y, min(*hidden, INPUTS, OUTPUTS))
            _, rows = certified_minima(objective, starts, sizes.steps, rough=FINE / 2)
            minima.append(
                rows.assign(depth=depth, shape=shape, scale=scales, excess=(rows.value - best) / best)
            )
            if sizes.saddles:
                few = starts.select(range(sizes.saddles))
                _, rows = certified_saddles(objective, few, sizes.flat_steps)
                saddles.append(rows.assign(depth=depth, shape=shape, excess=(rows.value - best) / best))
    return pd.concat(minima, ignore_index=True), pd.concat(saddles, ignore_index=True)


def origins(depths: Sequence[int]) -> pd.DataFrame:
    """W = 0, a critical point of every linear network."""
    import pandas as pd

    rows = []
    for depth in depths:
        objective = Objective(linear_task(shapes(depth)["wide"]), execution="stacked")
        like = Points.from_modules([objective.task.model()])
        found = examine(objective, like.map(torch.zeros_like))
        size = torch.maximum(found.smallest.abs(), found.largest.abs())
        rows.append((depth, float(found.gradient_norms), float(size), str(found.kinds[0])))
    return pd.DataFrame(rows, columns=["depth", "gradient", "curvature", "kind"])


STARTS = {"from (1.2, −1.19)": (1.2, -1.19), "from (−1.5, 1.4)": (-1.5, 1.4), "from (1.9, −1.9)": (1.9, -1.9)}


def descents(steps: int = 100) -> pd.DataFrame:
    """Gradient descent on ``(ab - 1)^2 / 2``, the linear network of one unit and two layers."""
    import pandas as pd

    one = torch.ones(1, 1, dtype=torch.float64)
    task = supervised(linear_net(1, 1, 1).to(torch.float64), (one, one), criterion=half_mse)
    tables = []
    for name, (a, b) in STARTS.items():
        path = [(a, b)]

        def keep(population: object, path: list[tuple[float, float]] = path) -> None:
            path.append(tuple(population.points.matrix()[0].tolist()))  # type: ignore[attr-defined]

        start = Points({"0.weight": a * one[None], "1.weight": b * one[None]}, {})
        trained(task, GD(lr=0.1), steps=steps, dtype="float64", start=start, record=1, watch=keep)
        tables.append(pd.DataFrame(path, columns=["a", "b"]).assign(path=name))
    return pd.concat(tables, ignore_index=True)


def evidence(lab: Lab, sizes: Sizes) -> Tables:
    """Minima, saddles, the origin, and paths on the smallest network."""
    lab.progress("searching the critical points of linear networks")
    minima, saddles = searches(sizes)
    return {"minima": minima, "saddles": saddles, "origin": origins(sizes.depths), "paths": descents()}


def experiment(lab: Lab) -> Tables:
    """The settings of the claim."""
    starts = lab.pick(102, 210)
    sizes = Sizes((2, 3, 4), starts, lab.pick(18, 102), lab.pick(400, 3000), lab.pick(150, 600))
    with one_thread():
        return evidence(lab, sizes)


def title(depth: int) -> str:
    """The finding about networks of so many layers."""
    return f"{depth} layers: certified minima above the global one"


def judge(tables: Tables) -> list[Finding]:
    """V2 for each depth; one certified bad minimum is a counterexample to a theorem."""
    findings = []
    minima = tables["minima"]
    for depth in sorted(minima.depth.unique()):
        rows = minima[minima.depth == depth]
        good = rows[rows.certified]
        bad = int((good.excess > EXCESS).sum())
        note = f"{len(rows)} starts; largest (L − L*)/L* of a certified minimum {number(good.excess.max())}"
        found = count(title(depth), bad, len(good), at_most=FEW, note=note)
        findings.append(dataclasses.replace(found, verdict=Verdict.FAILS) if bad else found)
    saddles = tables["saddles"]
    high = saddles[(saddles.gradient <= 1e-9) & (saddles.excess > EXCESS)]
    bent = int((high.kind == "strict saddle").sum())
    findings.append(
        count(
            "critical points above the global minimum have negative curvature",
            bent,
            len(high),
            at_least=0.9,
            note="found by minimising |∇L|² from random weights",
        )
    )
    deep = tables["origin"][tables["origin"].depth >= 3]
    worst = float(deep.curvature.max())
    findings.append(
        bound(
            "W = 0 with three or more layers: largest |eigenvalue|",
            worst,
            (worst, worst),
            len(deep),
            "exact Hessian",
            at_most=1e-12,
            note=join_notes("a saddle without negative curvature", *_origin_of_two(tables["origin"])),
        )
    )
    return findings


def _origin_of_two(rows: pd.DataFrame) -> list[str]:
    two = rows[rows.depth == 2]
    return [f"with two layers W = 0 is a {two.kind.iloc[0]}"] if len(two) else []


def figures(tables: Tables) -> list[Drawing]:
    """The saddle of the smallest network, heights of critical points, curvature at the minima."""
    return [_saddle(tables["paths"]), _heights(tables), _curvature(tables["minima"])]


def _saddle(paths: pd.DataFrame) -> Drawing:
    across = np.linspace(-2, 2, 61)
    a, b = np.meshgrid(across, across)
    drawn = surface(
        "A saddle between two valleys of minima",
        across,
        across,
        (a * b - 1) ** 2 / 2,
        {
            str(name): np.c_[rows.a, rows.b, (rows.a * rows.b - 1) ** 2 / 2]
            for name, rows in paths.groupby("path", sort=False)
        },
        ("first weight a", "second weight b", "loss"),
        top=4.5,
    )
    return Drawing(
        drawn,
        "The loss (ab − 1)²/2 of the linear network x ↦ b a x. Both valleys, ab = 1, are global minima; the "
        "origin between them is a saddle, which gradient descent (η = 0.1) nears from (1.9, −1.9) along "
        "the ridge, where it stays, and leaves from beside the ridge.",
    )


def _heights(tables: Tables) -> Drawing:
    saddles = tables["saddles"][tables["saddles"].gradient <= 1e-9]
    drawn = figure("Height of critical points", "negative eigenvalues of the Hessian", "(L − L*) / L*")
    for depth, rows in saddles.groupby("depth"):
        lines(drawn, rows, "index", "excess", mode="markers", name=f"{depth} layers")
    return Drawing(
        drawn,
        "Critical points found by minimising the gradient's length. The higher they lie, the more directions "
        "lead down; the only ones without such a direction lie at the global minimum, at height 0.",
    )


def _curvature(minima: pd.DataFrame) -> Drawing:
    good = minima[minima.certified]
    share = _signed_decades((good.smallest / good.largest).to_numpy())
    drawn = figure("Curvature at certified minima", "lowest eigenvalue / highest", "minima")
    for k, depth in enumerate(sorted(good.depth.unique())):
        drawn.add_histogram(
            x=share[good.depth == depth],
            name=f"{depth} layers",
            marker={"color": colour(k)},
            opacity=0.7,
            xbins={"start": -20.25, "end": 20.25, "size": 0.5},
        )
    reference(drawn, float(_signed_decades(np.array([-1e-8]))[0]), "tolerance", axis="x")
    ticks = [sign * 10.0**power for sign in (-1, 1) for power in (-8, -12, -16)]
    drawn.update_xaxes(
        tickvals=[0.0, *_signed_decades(np.array(ticks))],
        ticktext=[
            "0",
            *(f"{'−' if tick < 0 else ''}10<sup>−{-np.log10(abs(tick)):.0f}</sup>" for tick in ticks),
        ],
        range=[-13, float(share.max(initial=0.0)) + 1],
    )
    return Drawing(
        drawn,
        "Every minimum is flat along the directions that change the factors and not their product, so its "
        "lowest eigenvalue is zero but for rounding, mostly just below. The axis counts decades on either "
        "side of zero, down to 10⁻²⁰.",
    )


def _signed_decades(values: np.ndarray) -> np.ndarray:
    """Decades above 1e-20, with the sign of the value; 0 for what is smaller."""
    return np.sign(values) * np.log10(np.maximum(np.abs(values) / 1e-20, 1.0))


C1 = Claim(
    id="C1",
    section="6.1",
    title="Linear networks: every local minimum is global",
    statement="A network with linear activations multiplies matrices; its local minima are global minima.",
    source="Notes §6.1; Baldi & Hornik 1989; Kawaguchi 2016, Theorem 2.3; Laurent & von Brecht 2018",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=decided_by(*(title(depth) for depth in (2, 3, 4))),
    caveats=(
        "Minima are those where the gradient is below 1e-9 and no eigenvalue of the exact Hessian is below "
        "−10⁻⁸ of the largest. A degenerate saddle, whose fall begins at third order, would pass for a "
        "minimum; it would then count against the claim.",
        "That the map is linear in x does not make the loss convex in the weights: the theorem is about the "
        "factors, and saddles abound. W = 0 is one, with three or more layers one without curvature, where "
        "the time of gradient descent can grow exponentially with the depth (Shamir 2019).",
        "The theorem needs a differentiable convex loss (Laurent & von Brecht 2018) and, as stated by "
        "Kawaguchi, data of full rank. A weight penalty changes the problem.",
    ),
    errata=("E2",),
)
