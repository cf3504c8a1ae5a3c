"""C15, C16 and C17: gradient descent on a quadratic, its eigencomponents, and how they leave a saddle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, decided_by
from losslab.lecture.figures import figure, lines, predicted
from losslab.lecture.section_6_2.motion import (
    escaped,
    first_passage,
    gradient_of,
    growth_time,
    mean_escape,
    walk,
)
from losslab.lecture.statistics import bootstrap_interval, fit_power_law, max_relative_error
from losslab.lecture.verdicts import bound, identity, law
from losslab.rules import GD, SGD
from losslab.tasks import Quadratic

if TYPE_CHECKING:
    import pandas as pd

INSTANCES = 120
RATE = 0.1
RADIUS = 1.0
"""Where a component counts as escaped."""

SYMMETRIC = "A symmetric: the gradient is Ax"
ANY = "any A: the gradient is (A + Aᵀ)x/2"
LOPSIDED = "A not symmetric: Ax is not the gradient"


# -- C15: the gradient of a quadratic ------------------------------------------------------------------


def gradients(instances: int, seed: int = 15) -> pd.DataFrame:
    """Autograd's gradient of random quadratics, d from 2 to 30, against Ax and (A + A^T)x/2."""
    import pandas as pd

    rng = np.random.default_rng(seed)
    rows = []
    for k in range(2 * instances):
        d = int(rng.integers(2, 31))
        a, x = torch.from_numpy(rng.standard_normal((d, d))), torch.from_numpy(rng.standard_normal(d))
        if symmetric := k < instances:
            a = (a + a.T) / 2
        gradient = gradient_of(Quadratic.of(a).f)(x[None])[0]
        rows.append(
            {
                "symmetric": symmetric,
                "dimension": d,
                "error_Ax": max_relative_error(gradient, a @ x),
                "error_half": max_relative_error(gradient, (a + a.T) @ x / 2),
            }
        )
    return pd.DataFrame(rows)


def experiment_c15(lab: Lab) -> Tables:
    """Random matrices, symmetric and not."""
    return {"gradients": gradients(lab.pick(INSTANCES, 1000))}


def judge_c15(tables: Tables) -> list[Finding]:
    """V1 for both formulas, and Ax must be wrong without symmetry."""
    table = tables["gradients"]
    plain, lopsided = table[table.symmetric], table[~table.symmetric].error_Ax
    return [
        identity(SYMMETRIC, plain.error_Ax),
        identity(ANY, table.error_half),
        bound(
            LOPSIDED,
            float(lopsided.median()),
            (float(lopsided.min()), float(lopsided.max())),
            len(lopsided),
            "median relative error of Ax, and its range",
            at_least=1e-3,
        ),
    ]


# -- C16: the expansion in eigenvectors ----------------------------------------------------------------


def closed_form(a: Tensor, start: Tensor, rates: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """``x_t = sum_i (1 - eta lambda_i)^t c_{i,0} v_i`` of symmetric A ``[N, d, d]`` from ``[N, d]``.

    Returns:
        The points ``[steps + 1, N, d]``, the eigenvalues ``[N, d]`` and the eigenvectors ``[N, d, d]``.
    """
    values, vectors = torch.linalg.eigh(a)
    factors = 1 - rates[:, None] * values
    t = torch.arange(steps + 1, dtype=torch.float64)[:, None, None]
    components = factors**t * torch.einsum("nij,ni->nj", vectors, start)
    return torch.einsum("nij,tnj->tni", vectors, components), values, vectors


def saddles(instances: int, dimension: int, seed: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Random symmetric A with eigenvalues in [-1, 1], one of them 0 and one -1/2.

    Returns:
        A ``[N, d, d]``, starts ``[N, d]`` and rates in [0.05, 2.5] ``[N]``; beyond 2 the stiff ones diverge.
    """
    rng = np.random.default_rng(seed)
    bases = np.linalg.qr(rng.standard_normal((instances, dimension, dimension)))[0]
    values = rng.uniform(-1, 1, (instances, dimension))
    values[:, 0], values[:, 1] = 0.0, -0.5
    a = torch.from_numpy((bases * values[:, None, :]) @ bases.transpose(0, 2, 1))
    start = torch.from_numpy(rng.standard_normal((instances, dimension)))
    return (a + a.mT) / 2, start, torch.from_numpy(rng.uniform(0.05, 2.5, instances))


def expansion(instances: int, dimension: int, steps: int) -> Tables:
    """Gradient descent against the closed form, and what the printed expansion leaves out."""
    import pandas as pd

    a, start, rates = saddles(instances, dimension)
    rates[0] = 2.3  # the one that is drawn: growing, resting, shrinking and diverging components
    a[0], start[0] = torch.diag(torch.linspace(-1, 1, dimension, dtype=torch.float64)), 1.0
    a[0, dimension // 2, dimension // 2] = 0.0
    points = torch.stack(list(walk(GD(lr=rates), lambda x: torch.einsum("nij,nj->ni", a, x), start, steps)))
    exact, values, vectors = closed_form(a, start, rates, steps)
    size = torch.maximum(points.abs().amax(2), exact.abs().amax(2))
    errors = ((points - exact).abs().amax(2) / size).amax(0)
    # sum c_i lambda_i v_i spans the eigenvectors with lambda_i != 0: the rest of x_0 is out of its reach.
    kernel = torch.where(values.abs() < 1e-9, torch.einsum("nij,ni->nj", vectors, start), 0.0)
    table = pd.DataFrame(
        {
            "rate": rates.numpy(),
            "smallest": values[:, 0].numpy(),
            "largest": values[:, -1].numpy(),
            "error": errors.nan_to_num(nan=math.inf).numpy(),
            "unreachable": (kernel.norm(dim=1) / start.norm(dim=1)).numpy(),
        }
    )
    return {"instances": table, "components": _drawn_components(points, exact, values, vectors)}


def _drawn_components(points: Tensor, exact: Tensor, values: Tensor, vectors: Tensor) -> pd.DataFrame:
    import pandas as pd

    d, shown = values.shape[1], min(len(points), 41)
    ours, theirs = ((p[:shown, 0] @ vectors[0]).abs().numpy() for p in (points, exact))
    rows = [
        {
            "step": t,
            "eigenvalue": round(values[0, i].item(), 3) + 0.0,
            "size": ours[t, i],
            "exact": theirs[t, i],
        }
        for i in sorted({0, d // 4, d // 2, 3 * d // 4, d - 1})
        for t in range(shown)
    ]
    return pd.DataFrame(rows)


def experiment_c16(lab: Lab) -> Tables:
    """Random saddles in 20 dimensions, 200 steps."""
    return expansion(lab.pick(INSTANCES, 1000), dimension=20, steps=200)


CORRECTED = "x_t = Σ (1 − ηλ_i)ᵗ c_i v_i"
PRINTED = "the printed x_t = Σ c_i λ_i v_i reaches every point"


def judge_c16(tables: Tables) -> list[Finding]:
    """V1 for the corrected expansion; the printed one must reach each x_0 to be right."""
    table = tables["instances"]
    return [
        identity(CORRECTED, table.error),
        identity(PRINTED, table.unreachable),
    ]


def figures_c16(tables: Tables) -> list[Drawing]:
    """The components of one run."""
    table = tables["components"].copy()
    table["label"] = "λ = " + table.eigenvalue.map("{:g}".format)
    drawn = figure("Components of one run", "step t", "size of the component", log_y=True)
    lines(drawn, table[table["size"] > 0], "step", "size", by="label", mode="markers")
    curves = [(group.step, group.exact) for _, group in table.groupby("label", sort=False)]
    predicted(drawn, *curves, name="|1 − ηλ|ᵗ")
    return [
        Drawing(
            drawn,
            "Gradient descent with η = 2.3 on a quadratic with eigenvalues from −1 to 1: the sizes of five "
            "components of the iterates. A negative eigenvalue makes its component grow, a zero one leaves "
            "it at rest, and one above 2/η ≈ 0.87 makes it grow too, which is divergence and no escape.",
        )
    ]


# -- C17: the growing component ------------------------------------------------------------------------


def formula_instances(instances: int, seed: int = 17) -> pd.DataFrame:
    """Escape steps of gradient descent from random starts, rates and negative curvatures."""
    import pandas as pd

    rng = np.random.default_rng(seed)
    rate, curvature = rng.uniform(0.05, 0.5, instances), rng.uniform(0.5, 2.0, instances)
    start = 10 ** rng.uniform(-14, -2, instances)
    distances = zip(RADIUS / start, 1 + rate * curvature, strict=True)
    formula = np.array([growth_time(distance, factor) for distance, factor in distances])
    bend = torch.from_numpy(curvature)[:, None]
    points = list(
        walk(
            GD(lr=torch.from_numpy(rate)),
            lambda y: -bend * y,
            torch.from_numpy(start)[:, None],
            math.ceil(formula.max()) + 1,
        )
    )
    sizes = torch.stack(points)[..., 0].abs()
    steps = first_passage(points, _outside)
    return pd.DataFrame(
        {
            "rate": rate,
            "curvature": curvature,
            "start": start,
            "steps": steps,
            "formula": formula,
            "least_growth": (sizes[1:] / sizes[:-1]).amin(0).numpy(),
        }
    )


def resting(instances: int, steps: int, seed: int = 170) -> pd.DataFrame:
    """How far gradient descent gets from the ridge y = 0 of x^2/2 - y^2/2 when it starts on it."""
    import pandas as pd

    x = np.random.default_rng(seed).standard_normal(instances)
    start = torch.stack([torch.from_numpy(x), torch.zeros(instances, dtype=torch.float64)], dim=1)
    away = torch.zeros(instances, dtype=torch.float64)
    for point in walk(GD(lr=RATE), gradient_of(_saddle().f), start, steps):
        away = torch.maximum(away, point[:, 1].abs())
    return pd.DataFrame({"start_x": x, "steps": steps, "away": away.numpy()})


def starts_grid(starts: Sequence[float]) -> pd.DataFrame:
    """Escape steps from (1, y_0) at eta = 0.1, lambda = -1."""
    import pandas as pd

    formula = [growth_time(RADIUS / y, 1 + RATE) for y in starts]
    start = torch.tensor([[1.0, y] for y in starts], dtype=torch.float64)
    points = walk(GD(lr=RATE), gradient_of(_saddle().f), start, math.ceil(max(formula)) + 1)
    return pd.DataFrame({"start": starts, "steps": first_passage(points, _outside), "formula": formula})


def noisy_escapes(noises: Sequence[float], runs: int, seed: int = 171) -> pd.DataFrame:
    """Escape steps of SGD from exactly (1, 0), with gradient noise of several sizes."""
    import pandas as pd

    members = [(noise, run) for noise in noises for run in range(runs)]
    noise = torch.tensor([m[0] for m in members], dtype=torch.float64)[:, None]
    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(len(members), 2)
    limit = math.ceil(2 * mean_escape(RATE, 1.0, min(noises), RADIUS))
    steps = first_passage(walk(SGD(lr=RATE), gradient_of(_saddle().f), start, limit, noise, seed), _outside)
    return pd.DataFrame(members, columns=["noise", "run"]).assign(steps=steps)


def _saddle() -> Quadratic:
    return Quadratic.of([[1.0, 0.0], [0.0, -1.0]])


def _outside(point: Tensor) -> Tensor:
    return point[:, -1].abs() >= RADIUS


def experiment_c17(lab: Lab) -> Tables:
    """Gradient descent from on and beside the ridge, and noisy runs from on it."""
    return {
        "instances": formula_instances(lab.pick(200, 1000)),
        "ridge": resting(100, steps=lab.pick(2000, 10000)),
        "starts": starts_grid([10.0**-k for k in range(14, 1, -1)]),
        "noisy": noisy_escapes([1e-2, 1e-4, 1e-6, 1e-8], lab.pick(1000, 5000)),
    }


LAW = "growth until escape ∝ 1/|c₀|"
STEPS = "steps = ⌈log(r/|c₀|) / log(1 + η|λ|)⌉"
GROWS = "|c_t| grows every step when c₀ ≠ 0"
RESTS = "c₀ = 0 never moves"
NOISY = "SGD from c₀ = 0: mean escape time over the exact one"


def judge_c17(tables: Tables) -> list[Finding]:
    """V4 for the escape times, V1 for growth and for rest."""
    starts, instances, noisy = tables["starts"], tables["instances"], tables["noisy"]
    fit = fit_power_law(RADIUS / starts.start, (1 + RATE) ** starts.steps)
    ratio = noisy.steps / noisy.noise.map(lambda s: mean_escape(RATE, 1.0, s, RADIUS))
    late = (instances.steps - np.ceil(instances.formula)) / instances.formula
    return [
        law(LAW, fit.slope, fit.slope_interval, theory=1.0, n=fit.n, note="(1 + η|λ|)^T against r/|c₀|"),
        identity(STEPS, late),
        identity(GROWS, np.where(instances.least_growth > 1, 0.0, math.inf)),
        identity(RESTS, tables["ridge"].away, tolerance=0.0),
        law(NOISY, float(ratio.mean()), bootstrap_interval(ratio, np.mean), theory=1.0, n=len(ratio)),
    ]


def figures_c17(tables: Tables) -> list[Drawing]:
    """Escape time against the start, and its distribution under noise."""
    starts, noisy = tables["starts"], tables["noisy"]
    times = figure("Escape time of gradient descent", "start y₀", "steps until |y| ≥ 1", log_x=True)
    lines(times, starts, "start", "steps", mode="markers", name="gradient descent")
    predicted(times, (starts.start, starts.formula), name="log(1/y₀) / log 1.1")
    spread = figure("Escape of SGD from the ridge", "step t", "share of runs escaped")
    curves = []
    for noise in noisy.noise.unique().tolist():
        found = noisy.steps[noisy.noise == noise].to_numpy()
        steps = np.arange(found[np.isfinite(found)].max() + 1)
        share = np.searchsorted(np.sort(found), steps, side="right") / len(found)
        lines(spread, _curve(steps, share), "step", "share", name=f"noise {noise:g}")
        curves.append((steps, escaped(steps, RATE, 1.0, noise, RADIUS)))
    predicted(spread, *curves, name="exact")
    return [
        Drawing(
            times,
            "x²/2 − y²/2 with η = 0.1 from (1, y₀). Eight more digits of symmetry cost 193 more steps; "
            "y₀ = 0 is never left.",
        ),
        Drawing(
            spread,
            "SGD from exactly (1, 0), where gradient descent stays for ever; each gradient carries normal "
            "noise. A hundred times less noise costs 48 more steps.",
        ),
    ]


def _curve(steps: np.ndarray, share: np.ndarray) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame({"step": steps, "share": share})


C15 = Claim(
    id="C15",
    section="6.2.3",
    title="The gradient of ½ xᵀAx",
    statement="For f(x) = ½ xᵀAx with a symmetric matrix A the gradient is Ax.",
    source="Notes §6.2.3",
    experiment=experiment_c15,
    judge=judge_c15,
    caveats=("Without symmetry the gradient is (A + Aᵀ)x/2: only the symmetric part of A is seen by f.",),
)

C16 = Claim(
    id="C16",
    section="6.2.3",
    title="Gradient descent acts on each eigencomponent alone",
    statement="On ½ xᵀAx a step multiplies the component along the i-th eigenvector by 1 − ηλ_i, so after t "
    "steps by (1 − ηλ_i)ᵗ.",
    source="Notes §6.2.3",
    experiment=experiment_c16,
    judge=judge_c16,
    figures=figures_c16,
    combine=decided_by(CORRECTED),
    caveats=(
        "Judged is the expansion x_t = Σ c_i v_i. The notes print an extra λ_i in it, with which no point "
        "that has a component in the kernel of A can be written; that finding is shown and does not count.",
        "The error is relative to the largest entry of the iterate: the rounding of a growing component "
        "drowns the shrinking ones.",
        "Components with λ_i > 2/η grow as well; that is divergence.",
    ),
    errata=("E7",),
)

C17 = Claim(
    id="C17",
    section="6.2.3",
    title="A negative eigenvalue drives the iterate out",
    statement="Where λ_i < 0 the i-th component grows with every iteration, and that takes the iterate away "
    "from the saddle.",
    source="Notes §6.2.3",
    experiment=experiment_c17,
    judge=judge_c17,
    figures=figures_c17,
    caveats=(
        "The notes derive this for gradient descent and conclude it for SGD. Gradient descent needs c₀ ≠ 0; "
        "SGD gets it from its noise, here additive and normal in every direction.",
        "The exact mean for SGD counts a run as escaped from its first step outside on; for the noise used "
        "here a return has no measurable probability.",
    ),
    errata=("E7", "E8"),
)
