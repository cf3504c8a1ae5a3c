"""C54 and C55: the variance of a linear unit over the draws of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Generator, Tensor

from losslab.engine.randomness import generator
from losslab.layers import he, lecun, lecun_uniform
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, all_but
from losslab.lecture.figures import figure, lines, reference
from losslab.lecture.section_6_5.cells import everywhere
from losslab.lecture.section_6_5.networks import BLOCKS, digit_rows, units
from losslab.lecture.verdicts import bound

if TYPE_CHECKING:
    import pandas as pd


# -- C54: LeCun ----------------------------------------------------------------------------------------

LECUN = {"normal": lecun(), "uniform": lecun_uniform()}
SIZES = (4, 16, 64, 256, 1024, 4096)


def outputs_of_units(sizes: Sequence[int], draws: int) -> pd.DataFrame:
    """Mean and variance of y = w x over draws of w, for inputs of mean square 1.

    Returns:
        One row a (distribution, n, block): ``mean`` and ``variance`` of y, over units and inputs.
    """
    import pandas as pd

    rows = []
    for name, init in LECUN.items():
        for n in sizes:
            stream = generator(n, f"units {name}")
            for block in range(BLOCKS):
                x = torch.randn(max(4, n // 16), n, generator=stream)
                x /= x.square().mean(1, keepdim=True).sqrt()
                y = (units(init, n, max(50, draws // n), stream) @ x.T).double()
                told = {"mean": float(y.mean()), "variance": float(y.square().mean() - y.mean() ** 2)}
                rows.append({"distribution": name, "n": n, "block": block, **told})
    return pd.DataFrame(rows)


def digit_units(draws: int, examples: int = 200) -> pd.DataFrame:
    """Two variances of y = w x on digits: of each example over draws of w, of each unit over the digits.

    Returns:
        One row a (kind, index, block): ``variance``; and ``theory``, the mean square of an ``"example"``, or
        w^T Sigma w of a ``"unit"``. Blocks of examples have their own draws.
    """
    import pandas as pd

    x = digit_rows(1000).double()
    few, sigma = x[:examples], x.T.cov(correction=0)
    power = few.square().mean(1)
    found = []
    for block in range(BLOCKS):
        w = units(lecun(), 64, draws // BLOCKS, generator(block, "digit units")).double()
        told = {"index": range(examples), "variance": (w @ few.T).var(0), "theory": power}
        found.append(pd.DataFrame(told).assign(kind="example", block=block))
    some = w[:examples]
    told = {"variance": (x @ some.T).var(0, correction=0), "theory": ((some @ sigma) * some).sum(1)}
    return pd.concat([*found, pd.DataFrame(told).assign(kind="unit", index=range(len(some)), block=0)])


def experiment_54(lab: Lab) -> Tables:
    """Units of 4 to 4096 inputs, and units on digits."""
    return {
        "units": outputs_of_units(SIZES, lab.pick(200_000, 2_000_000)),
        "digits": digit_units(lab.pick(16_000, 64_000)),
    }


FIXED = "for one fixed unit the variance over the digits is 1 within 10 %"


def judge_54(tables: Tables) -> list[Finding]:
    """V4 at 2 % for every size and distribution; the digits are context."""
    table, rows = tables["units"], tables["digits"]
    findings = [
        everywhere(f"Var y = 1, {name} weights", group, ["n"], "variance", tolerance=0.02)
        for name, group in table.groupby("distribution", sort=False)
    ]
    findings += [
        everywhere(f"E y = 0, {name} weights", group, ["n"], "mean", theory=0.0, tolerance=0.02)
        for name, group in table.groupby("distribution", sort=False)
    ]
    seen, fixed = (rows[rows.kind == kind] for kind in ("example", "unit"))
    ratios = seen.assign(ratio=seen.variance / seen.theory).groupby("block").ratio.mean()
    blocks = ratios.reset_index().assign(mean="over examples")
    share = float((np.abs(fixed.variance - 1) <= 0.1).mean())
    spans = fixed.variance.quantile([0.05, 0.95])
    return [
        *findings,
        everywhere(
            "on digits Var y is the mean square of the example", blocks, ["mean"], "ratio", tolerance=0.02,
            note=f"it runs from {seen.theory.min():.2f} to {seen.theory.max():.2f}, "
            f"{seen.theory.mean():.2f} on average",
        ),
        bound(
            FIXED, share, (share, share), len(fixed), "share of units", at_least=0.9,
            note=f"90 % of the units lie between {spans.iloc[0]:.2f} and {spans.iloc[1]:.2f}: "
            "over inputs the variance is wᵀΣw, which is 1 only on average over w",
        ),
    ]  # fmt: skip


def figures_54(tables: Tables) -> list[Drawing]:
    """Both averages on digits, and the variance against the number of inputs."""
    rows = tables["digits"]
    drawn = figure("Two variances on digits", "variance of y", "share of examples, or of units", log_x=True)
    for kind, name in (("example", "over weights, one digit each"), ("unit", "over digits, one unit each")):
        values = np.sort(rows[rows.kind == kind].groupby("index").variance.mean().to_numpy())
        drawn.add_scatter(
            x=values, y=(np.arange(values.size) + 0.5) / values.size, mode="lines", name=name, meta="series"
        )
    reference(drawn, 1.0, "1", axis="x")
    caption = (
        "Cumulative distributions. The variance that the notes compute is over the draws of the weights; for "
        "a given digit it is the digit's mean square. The one over the digits, for a given unit, is wᵀΣw. "
        "Both are 1 only on average."
    )
    return [Drawing(drawn, caption)]


C54 = Claim(
    id="C54",
    section="6.5.1",
    title="LeCun's initialisation keeps unit variance",
    statement="Weights of mean 0 and variance 1/fan-in turn inputs of mean 0 and variance 1 into outputs of "
    "mean 0 and variance 1.",
    source="Notes §6.5.1; LeCun et al., Efficient BackProp 1998, §4.6",
    experiment=experiment_54,
    judge=judge_54,
    figures=figures_54,
    combine=all_but(FIXED),
    caveats=(
        "The expectation is over the draws of the weights. For one network, and inputs drawn at random, the "
        "variance of a unit is wᵀΣw, which is 1 only in expectation over w.",
        "Given an input x, Var y is its mean square Σxⱼ²/n. Standardised digits have 1 in the mean over "
        "examples only up to the pixels that never change, and single digits differ widely.",
        "Settled after a first run: the replicates on digits are independent blocks of weights.",
    ),
)


# -- C55: products and sums ----------------------------------------------------------------------------

Sample = Callable[[Generator, tuple[int, int]], Tensor]


def _normal(g: Generator, shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=g)


def _uniform(g: Generator, shape: tuple[int, int]) -> Tensor:
    return torch.rand(shape, generator=g)


def _equicorrelated(g: Generator, shape: tuple[int, int]) -> Tensor:
    """Unit-variance normals with correlation 0.9 along a row."""
    return math.sqrt(0.9) * _normal(g, (shape[0], 1)) + math.sqrt(0.1) * _normal(g, shape)


SAMPLES: dict[str, tuple[Sample, float, float]] = {  # how to draw, mean, variance
    "N(0, 1)": (_normal, 0.0, 1.0),
    "N(2, 1)": (lambda g, s: _normal(g, s) + 2, 2.0, 1.0),
    "U[0, 1]": (_uniform, 0.5, 1 / 12),
    "ReLU of N(0, 1)": (
        lambda g, s: _normal(g, s).relu(),
        1 / math.sqrt(2 * math.pi),
        0.5 - 1 / (2 * math.pi),
    ),
    "equal": (lambda g, s: _normal(g, (s[0], 1)).expand(s), 0.0, 1.0),
    "correlated 0.9": (_equicorrelated, 0.0, 1.0),
}

TERMS = 10
PRODUCTS = ("N(0, 1)", "N(2, 1)", "U[0, 1]", "ReLU of N(0, 1)")


def products(size: int) -> pd.DataFrame:
    """Var(w x) of independent w and x against the formula: one row a (w, x, block) with ``ratio``."""
    import pandas as pd

    rows = []
    for w_name in PRODUCTS:
        for x_name in PRODUCTS:
            (draw_w, mean_w, var_w), (draw_x, mean_x, var_x) = SAMPLES[w_name], SAMPLES[x_name]
            theory = var_w * var_x + var_w * mean_x**2 + var_x * mean_w**2
            g = generator(0, f"product {w_name} {x_name}")
            for block in range(BLOCKS):
                variance = float((draw_w(g, (size, 1)) * draw_x(g, (size, 1))).double().var())
                rows.append({"w": w_name, "x": x_name, "block": block, "ratio": variance / theory})
    return pd.DataFrame(rows)


def sums(size: int) -> pd.DataFrame:
    """Var of a sum of products against the sum of their variances, the x dependent or not.

    Returns:
        One row a (w, x, block): ``ratio``, and ``theory`` = 1 + covariances / variances.
    """
    import pandas as pd

    rows = []
    for w_name in ("N(0, 1)", "N(2, 1)"):
        for x_name, correlation in (("N(0, 1)", 0.0), ("correlated 0.9", 0.9), ("equal", 1.0)):
            (draw_w, mean_w, var_w), (draw_x, _, var_x) = SAMPLES[w_name], SAMPLES[x_name]
            each = var_x * (var_w + mean_w**2)
            cross = (TERMS - 1) * mean_w**2 * correlation * var_x
            g = generator(0, f"sum {w_name} {x_name}")
            for block in range(BLOCKS):
                y = (draw_w(g, (size, TERMS)) * draw_x(g, (size, TERMS))).double().sum(1)
                ratio = float(y.var()) / (TERMS * each)
                told = {"ratio": ratio, "theory": 1 + cross / each, "mean_w": mean_w}
                rows.append({"w": w_name, "x": x_name, "block": block, **told})
    return pd.DataFrame(rows)


def rectified(size: int) -> pd.DataFrame:
    """Var of a unit with ReLU inputs of unit pre-activation variance: one row a (init, block)."""
    import pandas as pd

    rows = []
    for name, init, theory in (("LeCun", lecun(), 0.5), ("He", he(), 1.0)):
        g = generator(0, f"rectified {name}")
        for block in range(BLOCKS):
            x = torch.randn(500, 100, generator=g).relu()
            y = units(init, 100, size // 500, g) @ x.T
            rows.append({"init": name, "block": block, "ratio": float(y.double().var()) / theory})
    return pd.DataFrame(rows)


def experiment_55(lab: Lab) -> Tables:
    """Products, sums and ReLU inputs, by Monte Carlo."""
    size = lab.pick(40_000, 400_000)
    return {"products": products(5 * size), "sums": sums(size), "rectified": rectified(20 * size)}


BIASED = "variances add when E w ≠ 0 and the x are dependent"


def judge_55(tables: Tables) -> list[Finding]:
    """V4 at 1 %; the counter-example is context."""
    table = tables["sums"]
    centred, shifted = table[table.mean_w == 0], table[(table.mean_w != 0) & (table.theory > 1)]
    explained = table.assign(part=table.ratio / table.theory)
    return [
        everywhere("Var(wx) is the sum of the three terms", tables["products"], ["w", "x"], "ratio",
                   tolerance=0.01),
        everywhere("variances add when E w = 0, however the x depend", centred, ["x"], "ratio",
                   tolerance=0.01),
        everywhere("otherwise the covariances (E w)² Cov(xⱼ, xₖ) come in", explained, ["w", "x"], "part",
                   tolerance=0.01),
        everywhere("ReLU inputs: half the variance under 1/fan-in, all of it under 2/fan-in",
                   tables["rectified"], ["init"], "ratio", tolerance=0.01,
                   note="E x² = Var x + (E x)² = 1/2"),
        everywhere(BIASED, shifted, ["x"], "ratio", tolerance=0.01),
    ]  # fmt: skip


def figures_55(tables: Tables) -> list[Drawing]:
    """The variance of a sum against the dependence of its terms."""
    table = tables["sums"].groupby(["w", "x"], sort=False)["ratio"].mean().reset_index()
    drawn = figure("Variance of a sum of ten products", "the x", "Var Σ wx / Σ Var wx", log_y=True)
    lines(drawn, table.assign(w="w ~ " + table.w), "x", "ratio", by="w", mode="lines+markers")
    reference(drawn, 1.0, "variances add")
    caption = (
        "With weights of mean 0 the variances add even when all x are the same number; with weights of mean "
        "2 they do only if the x are uncorrelated."
    )
    return [Drawing(drawn, caption)]


C55 = Claim(
    id="C55",
    section="6.5.1",
    title="The variance of w x, and of a sum of such terms",
    statement="For independent w and x, Var(wx) = Var w Var x + Var w (E x)² + Var x (E w)², and the "
    "variances of the terms of a unit add up.",
    source="Notes §6.5.1",
    experiment=experiment_55,
    judge=judge_55,
    figures=figures_55,
    combine=all_but(BIASED),
    caveats=(
        "The notes ask for independent terms. Uncorrelated ones are enough, and weights that are independent "
        "with mean 0 make them so, whatever the x are.",
        "The inputs of hidden ReLU units have a mean: the second term does not vanish, and He's 2/fan-in is "
        "what makes up for the lost half of the mean square.",
        "Settled after a first run: larger samples behind the products, for narrower intervals.",
    ),
    errata=("E44",),
)
