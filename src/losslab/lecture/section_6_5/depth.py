"""C58: whether a network of LeCun's initialisation keeps mean 0 and variance 1 through its layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from losslab.engine.randomness import generator
from losslab.layers import lecun
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, decided_by
from losslab.lecture.figures import figure, lines, predicted, spread
from losslab.lecture.section_6_5.cells import everywhere, student_interval
from losslab.lecture.section_6_5.networks import digit_rows, units
from losslab.lecture.section_6_5.tanh import EDGE
from losslab.lecture.verdicts import bound
from losslab.signals import mean_field
from losslab.tasks import ACTIVATIONS

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = 32
DEPTH = 30


class Arm(NamedTuple):
    """An activation with the gain on LeCun's standard deviation, and the inputs."""

    activation: str
    gain: float
    inputs: str


ARMS = {
    "tanh": Arm("tanh", 1.0, "Gaussian"),
    "1.7159 tanh(2x/3)": Arm("lecun_tanh", 1.0, "Gaussian"),
    "tanh, gain 5/3": Arm("tanh", 5 / 3, "Gaussian"),
    "tanh on digits": Arm("tanh", 1.0, "digits"),
}


def theory(arm: Arm, x: Tensor, depth: int) -> list[float]:
    """The variance of each layer's pre-activations, averaged over examples of their own mean squares."""
    each = [
        mean_field.recursion(arm.activation, depth, arm.gain**2, inputs=power).variance
        for power in (x.double().square().mean(1).tolist() if arm.inputs == "digits" else [1.0])
    ]
    return np.mean(each, axis=0).tolist()


def moments(width: int, depth: int, draws: int) -> pd.DataFrame:
    """Pre-activations of every layer of random tanh networks.

    The arms share the draws of the weights: the same standard normal matrices, times each arm's gain. Only
    one layer is held at a time.

    Returns:
        One row a (arm, draw, layer): ``variance`` of the pre-activations around 0 over units and examples,
        ``theory``, ``mean`` in units of their standard deviation, and ``linear``, the share on which tanh has
        a slope above 0.9 (not for the scaled tanh).
    """
    import pandas as pd

    seen = digit_rows(EXAMPLES)
    expected = {name: theory(arm, seen, depth) for name, arm in ARMS.items()}
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        name: ACTIVATIONS[arm.activation]() for name, arm in ARMS.items()
    }
    rows = []
    for draw in range(draws):
        g = generator(width, "depth", draw)
        gaussian = torch.randn(EXAMPLES, width, generator=g)
        gaussian /= gaussian.square().mean(1, keepdim=True).sqrt()
        first = units(lecun(), 64, width, g)
        second = units(lecun(), width, width, g)
        hidden = {
            name: arm.gain * (seen @ first.T if arm.inputs == "digits" else gaussian @ second.T)
            for name, arm in ARMS.items()
        }
        for layer in range(1, depth + 1):
            rows += [_row(name, h, draw, layer, expected[name]) for name, h in hidden.items()]
            if layer < depth:
                w = units(lecun(), width, width, g)
                a = torch.cat([functions[name](h) for name, h in hidden.items()]) @ w.T
                parts = zip(ARMS.items(), a.split(EXAMPLES), strict=True)
                hidden = {name: arm.gain * part for (name, arm), part in parts}
    return pd.DataFrame(rows).assign(width=width)


def _row(name: str, h: Tensor, draw: int, layer: int, expected: list[float]) -> dict[str, object]:
    variance = float(h.square().mean())
    return {
        "arm": name,
        "draw": draw,
        "layer": layer,
        "variance": variance,
        "theory": expected[layer - 1],
        "mean": float(h.mean()) / math.sqrt(variance),
        "linear": float((h.abs() < EDGE).float().mean()) if ARMS[name].activation == "tanh" else math.nan,
    }


def experiment(lab: Lab) -> Tables:
    """Networks of 30 layers of 1000 and of 100 units."""
    import pandas as pd

    draws = lab.replicates(20, 100)
    found = []
    for width in (1000, 100):
        lab.progress(f"30 layers of {width} units")
        found.append(moments(width, DEPTH, draws))
    return {"moments": pd.concat(found, ignore_index=True)}


VARIANCE = "tanh: the variance is 1 within 10 % in the last layer"
CENTRED = "tanh: the mean is 0 in every layer"
LINEAR = "tanh: the last layer is in the linear regime"


def judge(tables: Tables) -> list[Finding]:
    """The claim's three parts for tanh at width 1000, then the recursion at 3 % as the control."""
    table = tables["moments"]
    wide = table[table.width == table.width.max()]
    last = wide[wide.layer == wide.layer.max()]
    arms = dict(list(last.groupby("arm", sort=False)))
    everyone = wide.assign(ratio=wide.variance / wide.theory)
    findings = [
        _kept(VARIANCE, arms["tanh"]),
        everywhere(CENTRED, wide[wide.arm == "tanh"], ["layer"], "mean", theory=0.0, tolerance=0.05,
                   note="in units of the standard deviation"),
        _in_the_linear_regime(wide[wide.arm == "tanh"]),
        *(
            _kept(f"{name}: the variance is 1 within 10 % in the last layer", arms[name])
            for name in ARMS if name != "tanh"
        ),
    ]  # fmt: skip
    return findings + [
        everywhere(f"{name}: the recursion predicts every layer's variance", group, ["layer"], "ratio",
                   tolerance=0.03, wide=True)
        for name, group in everyone.groupby("arm", sort=False)
    ]  # fmt: skip


def _kept(name: str, rows: pd.DataFrame) -> Finding:
    mean, ends = student_interval(rows.variance.to_numpy())
    return bound(
        name, mean, ends, len(rows), "mean variance over draws", at_least=0.9, at_most=1.1,
        note=f"layer {rows.layer.iloc[0]}",
    )  # fmt: skip


def _in_the_linear_regime(rows: pd.DataFrame) -> Finding:
    last = rows[rows.layer == rows.layer.max()]
    mean, ends = student_interval(last.linear.to_numpy())
    first = rows[rows.layer == 1].linear.mean()
    return bound(
        LINEAR, mean, ends, len(last), "share of pre-activations with a slope above 0.9", at_least=0.9,
        note=f"{first:.2f} in layer 1: the signal gets there by shrinking",
    )  # fmt: skip


def figures(tables: Tables) -> list[Drawing]:
    """The variance by depth against the recursion, and the share in the linear regime."""
    table = tables["moments"]
    wide = table[table.width == table.width.max()]
    drawn = figure("Variance by depth", "layer", "variance of the pre-activations", log_y=True)
    rows = spread(wide, ["arm", "layer"], "variance")
    lines(drawn, rows, "layer", "middle", by="arm", band=("low", "high"))
    curves = [group[group.draw == 0] for _, group in wide.groupby("arm", sort=False)]
    predicted(drawn, *((group.layer, group.theory) for group in curves), name="recursion")
    narrow = table[(table.width == table.width.min()) & (table.arm == "tanh")]
    middle = narrow.groupby("layer").variance.median().reset_index()
    lines(drawn, middle, "layer", "variance", mode="markers", name="tanh, width 100")
    linear = figure("Units in the linear regime", "layer", "share with a slope above 0.9")
    shares = spread(wide.dropna(subset=["linear"]), ["arm", "layer"], "linear")
    lines(linear, shares, "layer", "middle", by="arm", band=("low", "high"))
    return [
        Drawing(
            drawn,
            "Median and 80 % of the draws at width 1000. With tanh the variance decays like 1/(2 depth), "
            "with a gain of 5/3 and with the scaled tanh it settles; the recursion lies on all of them.",
        ),
        Drawing(
            linear,
            "With tanh the units do reach the linear regime, but because the signal dies out: in the first "
            "layer, where the variance is 1, a quarter of them are there.",
        ),
    ]


C58 = Claim(
    id="C58",
    section="6.5.1",
    title="Mean 0 and variance 1 through every layer",
    statement="So a network keeps outputs of mean 0 and variance 1 through every layer and stays in the "
    "linear regime of its activations.",
    source="Notes §6.5.1; recursion: Poole et al. 2016, Schoenholz et al. 2017",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=decided_by(VARIANCE, CENTRED, LINEAR),
    caveats=(
        "The mean is 0 by symmetry, for any odd activation without biases. The variance follows "
        "q → E tanh(√q z)², whose only fixed point is 0: gain 1 is exactly critical, so it decays like a "
        "power of the depth, slower than any exponential.",
        "The recursion is that of infinite width. A network of width n differs from it by a term of order "
        "depth/n, so it is asked to agree within 3 % at width 1000, not to be indistinguishable.",
        "On digits every example starts with its own mean square, and the prediction is the average over "
        "examples; correlated examples share the fluctuations of one draw.",
        "Settled after a first run: agreement with the recursion means that the whole 95 % interval lies "
        "within the tolerance, each layer's interval on its own.",
    ),
    errata=("E31",),
)
