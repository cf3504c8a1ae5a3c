"""C56 and C57: the slope of tanh, and what it does to unit variance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from losslab.engine.randomness import generator
from losslab.lecture.claim import Claim, Drawing, Finding, Tables, all_but, decided_by
from losslab.lecture.figures import colour, figure, reference
from losslab.lecture.section_6_5.cells import everywhere
from losslab.lecture.section_6_5.networks import BLOCKS
from losslab.lecture.verdicts import bound, identity
from losslab.signals import mean_field
from losslab.tasks import ACTIVATIONS

if TYPE_CHECKING:
    import pandas as pd

STEEP = 0.9
"""A slope from which tanh counts as nearly linear."""

EDGE = math.atanh(math.sqrt(1 - STEEP))
"""|x| below which its slope is above that: 0.327."""


# -- C56 -----------------------------------------------------------------------------------------------


def slopes(count: int) -> pd.DataFrame:
    """Tanh's derivative by autograd against 1 - tanh^2, at random points in double precision.

    Returns:
        One row a point: ``x``, ``slope``, ``error``, ``edge``: 1 where the slope is on the other side of 0.9
        than |x| < 0.327 tells, 0 where not.
    """
    import pandas as pd

    x = torch.randn(count, generator=generator(0, "points"), dtype=torch.float64)
    slope = mean_field.derivative("tanh")(x)
    error = (slope - (1 - x.tanh().square())).abs() / slope
    edge = ((slope > STEEP) != (x.abs() < EDGE)).double()
    return pd.DataFrame({"x": x, "slope": slope, "error": error, "edge": edge})


def averages() -> pd.DataFrame:
    """Gaussian averages by quadrature, one row a (quantity): ``value``."""
    import pandas as pd

    slope = mean_field.derivative("tanh")
    values = {
        "E tanh′": mean_field.expectation(slope),
        "E tanh′²": mean_field.mean_square_slope("tanh"),
        "share with slope above 0.9": mean_field.expectation(
            lambda x: (x.abs() < EDGE).double(), kinks=(EDGE, -EDGE)
        ),
        "Var tanh": mean_field.mean_square("tanh"),
        "Var 1.7159 tanh(2x/3)": mean_field.mean_square("lecun_tanh"),
    }
    return pd.DataFrame({"quantity": list(values), "value": list(values.values())})


MASS = "most of N(0, 1) lies where the slope is above 0.9"
MEAN = "under N(0, 1) the slope is 1 within 10 % on average"


def judge_56(tables: Tables) -> list[Finding]:
    """V1; how much of a unit-variance input lies in the linear regime is context."""
    rows = tables["slopes"]
    value = tables["averages"].set_index("quantity").value
    mass, mean = float(value["share with slope above 0.9"]), float(value["E tanh′"])
    return [
        identity("tanh′ = 1 − tanh²", rows.error, tolerance=1e-9),
        identity("tanh′ > 0.9 exactly where |x| < 0.327", rows.edge),
        bound(MASS, mass, (mass, mass), 1, "quadrature", at_least=0.5),
        bound(MEAN, mean, (mean, mean), 1, "quadrature", at_least=0.9, at_most=1.1),
    ]


def figures_56(tables: Tables) -> list[Drawing]:
    """The slope, and the density of a unit-variance input below it."""
    x = np.linspace(-3.5, 3.5, 401)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    drawn = figure("The slope of tanh and a standard normal input", "x", "slope, density")
    inside = np.abs(x) <= EDGE
    drawn.add_scatter(
        x=x[inside], y=density[inside], mode="lines", fill="tozeroy", fillcolor=colour(1, 0.3),
        line={"width": 0}, name="slope above 0.9",
    )  # fmt: skip
    for name, values in (("tanh′(x)", 1 - np.tanh(x) ** 2), ("density of N(0, 1)", density)):
        drawn.add_scatter(x=x, y=values, mode="lines", name=name, meta="series")
    reference(drawn, STEEP, "slope 0.9")
    value = tables["averages"].set_index("quantity").value
    caption = (
        f"The linear regime is narrow: only {100 * value['share with slope above 0.9']:.1f} % of a standard "
        f"normal input meets a slope above 0.9, and the average slope is {value['E tanh′']:.3f}."
    )
    return [Drawing(drawn, caption)]


C56 = Claim(
    id="C56",
    section="6.5.1",
    title="tanh has slope about 1 in its linear regime",
    statement="The derivative of tanh is about 1 in its linear regime.",
    source="Notes §6.5.1, figure 6.1",
    experiment=lambda lab: {"slopes": slopes(lab.pick(1000, 100_000)), "averages": averages()},
    judge=judge_56,
    figures=figures_56,
    combine=all_but(MASS, MEAN),
    caveats=(
        "True where |x| is small. Inputs of unit variance are mostly elsewhere; the two findings about them "
        "do not count for this verdict, their consequence is judged as C57.",
    ),
)


# -- C57 -----------------------------------------------------------------------------------------------


def samples(size: int) -> pd.DataFrame:
    """The variance of activations of standard normal draws: one row a (activation, block)."""
    import pandas as pd

    rows = []
    for name in ("tanh", "lecun_tanh"):
        theory = mean_field.mean_square(name)
        g = generator(0, f"samples {name}")
        for block in range(BLOCKS):
            y = ACTIVATIONS[name]()(torch.randn(size, generator=g)).double()
            variance = float(y.var())
            told = {"activation": name, "block": block, "variance": variance, "ratio": variance / theory}
            rows.append(told)
    return pd.DataFrame(rows)


CLAIMED = "Var tanh(y) = 1 within 10 %"


def judge_57(tables: Tables) -> list[Finding]:
    """Approximately 1 means within 10 %; the scaled tanh and Monte Carlo are context."""
    value = tables["averages"].set_index("quantity").value
    plain, scaled = float(value["Var tanh"]), float(value["Var 1.7159 tanh(2x/3)"])
    return [
        bound(CLAIMED, plain, (plain, plain), 1, "quadrature", at_least=0.9, at_most=1.1),
        bound("the same of 1.7159 tanh(2y/3)", scaled, (scaled, scaled), 1, "quadrature", at_least=0.9,
              at_most=1.1),
        everywhere("normal draws agree with the quadrature", tables["samples"], ["activation"], "ratio",
                   tolerance=0.01),
        identity("1.7159 tanh(2/3) = 1, to its four digits", [1 - 1.7159 * math.tanh(2 / 3)] * 100, 1e-4),
    ]  # fmt: skip


def figures_57(tables: Tables) -> list[Drawing]:
    """The variance that comes out against the variance that goes in."""
    into = np.geomspace(1e-2, 30, 61)
    drawn = figure("Variance through an activation", "Var y", "Var f(y)", log_x=True, log_y=True)
    for name, label in (("tanh", "tanh"), ("lecun_tanh", "1.7159 tanh(2x/3)")):
        out = [mean_field.mean_square(name, q) for q in into]
        drawn.add_scatter(x=into, y=out, mode="lines", name=label, meta="series")
    drawn.add_scatter(x=into, y=into, mode="lines", name="kept", line={"dash": "dash", "color": "#7b838c"})
    value = tables["averages"].set_index("quantity").value
    caption = (
        f"At unit variance tanh lets {value['Var tanh']:.3f} through and LeCun's scaled form "
        f"{value['Var 1.7159 tanh(2x/3)']:.3f}. tanh keeps the variance only where there is little of it."
    )
    return [Drawing(drawn, caption)]


C57 = Claim(
    id="C57",
    section="6.5.1",
    title="tanh keeps unit variance",
    statement="Since the slope of tanh is about 1, Var tanh(y) ≈ 1 when Var y = 1.",
    source="Notes §6.5.1",
    experiment=lambda lab: {"averages": averages(), "samples": samples(lab.pick(50_000, 500_000))},
    judge=judge_57,
    figures=figures_57,
    combine=decided_by(CLAIMED),
    caveats=(
        "y is taken to be Gaussian, as the pre-activations of a wide layer are. A variable y = ±1 would keep "
        "(tanh 1)² = 0.58.",
        "Efficient BackProp pairs its initialisation with 1.7159 tanh(2x/3), which keeps ±1 exactly and a "
        "good part of unit variance, not with plain tanh.",
    ),
    errata=("E28",),
)
