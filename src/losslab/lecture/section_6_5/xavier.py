"""C59 and C60: Xavier's initialisation, its two directions and its two distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from losslab.engine.randomness import generator
from losslab.layers import Initialisation, lecun, xavier, xavier_uniform
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, all_but
from losslab.lecture.figures import figure, lines, predicted, reference, spread
from losslab.lecture.section_6_5.cells import everywhere
from losslab.lecture.section_6_5.networks import BLOCKS, drawn, gaussian_rows, passage, units
from losslab.lecture.statistics import max_relative_error
from losslab.lecture.verdicts import bound, identity
from losslab.signals import mean_field

if TYPE_CHECKING:
    import pandas as pd

# -- C59: forward and backward -------------------------------------------------------------------------

NETWORKS: dict[str, tuple[int, ...]] = {
    "square": (300, 300, 300, 300, 300),
    "tapered": (784, 400, 200, 100, 50),
    "expanding": (64, 128, 256, 400, 600),
}
"""Widths of linear networks."""

SCHEMES: dict[str, Callable[[int, int], float]] = {
    "LeCun": lambda i, o: 1 / i,
    "fan-out": lambda i, o: 1 / o,
    "Xavier": lambda i, o: 2 / (i + o),
}
"""Variance of a weight, from fan-in and fan-out."""

INITIALISATIONS = {
    "LeCun": lecun(),
    "fan-out": Initialisation(
        "fan-out", lambda empty, size, g: empty.normal_(0.0, size.fan_out**-0.5, generator=g)
    ),
    "Xavier": xavier(),
}


def linear_factors(draws: int, examples: int) -> pd.DataFrame:
    """What each layer of linear networks does to the variance of the signal and of the gradient.

    Returns:
        One row a (network, scheme, draw, layer): ``fan_in``, ``fan_out``, ``variance`` of the layer's output
        and ``gradient``, that of the gradient with respect to it, both 1 at their start, the input and the
        top; ``forward`` and ``backward``, the factors of this layer; ``forward_theory``, ``backward_theory``.
    """
    import pandas as pd

    rows = []
    for network, widths in NETWORKS.items():
        x = gaussian_rows(examples, widths[0])
        top = gaussian_rows(draws, examples, widths[-1], seed=1)
        for seed, (scheme, init) in enumerate(INITIALISATIONS.items()):
            weights = drawn(init, widths, draws, seed)
            passed = passage(weights, x, top)
            ahead = [x.expand(draws, *x.shape), *passed.ahead]
            back = [torch.bmm(passed.back[0], weights[0]), *passed.back]
            powers, gradients = ([h.double().square().mean((1, 2)) for h in part] for part in (ahead, back))
            for layer, (i, o) in enumerate(pairwise(widths), start=1):
                spread = SCHEMES[scheme](i, o)
                told = {
                    "network": network, "scheme": scheme, "layer": layer, "fan_in": i, "fan_out": o,
                    "draw": range(draws),
                    "variance": powers[layer] / powers[0], "gradient": gradients[layer] / gradients[-1],
                    "forward": powers[layer] / powers[layer - 1], "forward_theory": i * spread,
                    "backward": gradients[layer - 1] / gradients[layer], "backward_theory": o * spread,
                }  # fmt: skip
                rows.append(pd.DataFrame(told))
    return pd.concat(rows, ignore_index=True)


def tanh_factors(width: int, depth: int, draws: int, examples: int) -> pd.DataFrame:
    """The backward factor of each layer of square tanh networks against E tanh'^2 under the recursion."""
    import pandas as pd

    theory = mean_field.recursion("tanh", depth).chi
    rows = []
    for draw in range(draws):
        weights = drawn(xavier(), [width] * (depth + 1), 1, seed=draw)
        x, top = gaussian_rows(examples, width, seed=draw), gaussian_rows(1, examples, width, seed=~draw)
        back = [float(d.double().square().mean()) for d in passage(weights, x, top, torch.tanh).back]
        for layer, ((below, above), chi) in enumerate(zip(pairwise(back), theory, strict=True), start=1):
            told = {"layer": layer, "draw": draw, "factor": below / above, "theory": chi}
            rows.append(told | {"ratio": below / above / chi})
    return pd.DataFrame(rows)


def experiment_59(lab: Lab) -> Tables:
    """Three shapes of linear networks, and square tanh networks."""
    draws = lab.replicates(20, 100)
    return {
        "linear": linear_factors(draws, examples=64),
        "tanh": tanh_factors(lab.pick(500, 1000), 6, draws, examples=32),
    }


COMPROMISE = "Xavier keeps both variances where fan-in ≠ fan-out"
TANH = "tanh: the gradient's factor is E tanh′² of the recursion"


def judge_59(tables: Tables) -> list[Finding]:
    """V4 at 5 % for every layer; where Xavier keeps both is context."""
    table = tables["linear"]
    rows = table.assign(
        ahead=table.forward / table.forward_theory, behind=table.backward / table.backward_theory
    )
    cells = ["network", "layer"]
    arms = dict(list(rows.groupby("scheme", sort=False)))
    findings = [
        everywhere("gradients keep their variance under 1/fan-out", arms["fan-out"], cells, "backward"),
        everywhere("signals keep their variance under 1/fan-in", arms["LeCun"], cells, "forward"),
        everywhere("under 1/fan-in gradients change by fan-out/fan-in", arms["LeCun"], cells, "behind"),
        everywhere("under 1/fan-out signals change by fan-in/fan-out", arms["fan-out"], cells, "ahead"),
        everywhere("Xavier: signals change by 2 fan-in/(fan-in + fan-out)", arms["Xavier"], cells, "ahead"),
        everywhere("Xavier: gradients change by 2 fan-out/(fan-in + fan-out)", arms["Xavier"], cells,
                   "behind"),
        everywhere(TANH, tables["tanh"], ["layer"], "ratio", wide=True),
    ]  # fmt: skip
    uneven = arms["Xavier"][arms["Xavier"].fan_in != arms["Xavier"].fan_out]
    both = uneven.melt(cells, ["forward", "backward"], "direction", "factor")
    return [*findings, everywhere(COMPROMISE, both, [*cells, "direction"], "factor")]


def figures_59(tables: Tables) -> list[Drawing]:
    """Signal and gradient by depth in the tapered linear network, for each scheme."""
    table = tables["linear"]
    rows = table[table.network == "tapered"]
    widths = "-".join(map(str, NETWORKS["tapered"]))
    told = {
        "variance": ("Signal by depth", "variance of the layer's output"),
        "gradient": ("Gradient by depth", "variance of the gradient at the output"),
    }
    drawings = []
    for column, (title, axis) in told.items():
        drawn = figure(title, "layer", axis, log_y=True)
        table = spread(rows, ["scheme", "layer"], column)
        lines(drawn, table, "layer", "middle", by="scheme", band=("low", "high"), mode="lines+markers")
        curves = []
        for _, group in rows[rows.draw == 0].groupby("scheme", sort=False):
            ahead = np.cumprod(group.forward_theory)
            behind = np.cumprod(np.r_[1.0, group.backward_theory[:0:-1]])[::-1]
            curves.append((group.layer, ahead if column == "variance" else behind))
        predicted(drawn, *curves, name="theory")
        drawn.update_xaxes(dtick=1)
        caption = f"Linear network {widths}, median and 80 % of the draws. " + (
            "1/fan-in keeps the signal, 1/fan-out lets it grow where the network narrows, Xavier lies "
            "between."
            if column == "variance"
            else "The gradient enters at the last layer. 1/fan-out keeps it, 1/fan-in lets it shrink on "
            "the way to the wide first layers."
        )
        drawings.append(Drawing(drawn, caption))
    return drawings


C59 = Claim(
    id="C59",
    section="6.5.2",
    title="Xavier balances the forward and the backward pass",
    statement="Keeping the variance of back-propagated gradients needs Var w = 1/fan-out; "
    "Var w = 2/(fan-in + fan-out) combines this with LeCun's 1/fan-in.",
    source="Notes §6.5.2; Glorot & Bengio 2010, eqs. 5 to 12",
    experiment=experiment_59,
    judge=judge_59,
    figures=figures_59,
    combine=all_but(COMPROMISE),
    caveats=(
        "Xavier's factors are f = 2 fan-in/(fan-in + fan-out) forward and b = 2 fan-out/(fan-in + fan-out) "
        "backward. Both are 1 only in square layers; otherwise one grows, the other shrinks, and their "
        "product is below 1: 784 → 100 gives 1.774 and 0.226, 64 → 300 gives 0.352 and 1.648. The notes' "
        "'same variance' in both directions is the finding that does not count for the verdict.",
        "The laws are exact for linear networks of any width. With tanh a further factor E tanh′² < 1 comes "
        "in, which is compared with the limit of infinite width, to within 5 %.",
        "Settled after a first run: each scheme has its own draws, and agreement with the limit of infinite "
        "width means that the whole interval lies within the tolerance.",
    ),
    errata=("E30",),
)


# -- C60: the two distributions ------------------------------------------------------------------------

SHAPES = ((784, 100), (64, 300), (500, 500), (1000, 10))
XAVIER = {
    "normal": (xavier(), nn.init.xavier_normal_),
    "uniform": (xavier_uniform(), nn.init.xavier_uniform_),
}


def draws_60(size: int) -> pd.DataFrame:
    """Moments of drawn weights: ours and torch's.

    Returns:
        One row a (distribution, source, inputs, outputs, block): ``variance`` in units of
        2 / (fan-in + fan-out), ``mean`` in units of its root, ``largest`` |w| in units of
        sqrt(6 / (fan-in + fan-out)), and ``error``, the largest relative difference of the two.
    """
    import pandas as pd

    rows = []
    for name, (init, theirs) in XAVIER.items():
        for inputs, outputs in SHAPES:
            theory = 2 / (inputs + outputs)
            times = max(1, round(size / (inputs * outputs * BLOCKS)))
            for block in range(BLOCKS):
                own, other = (generator(block, f"{name} {inputs} {outputs}") for _ in range(2))
                ours = torch.stack([units(init, inputs, outputs, own) for _ in range(times)])
                torchs = torch.stack(
                    [theirs(torch.empty(outputs, inputs), generator=other) for _ in range(times)]
                )
                error = max_relative_error(ours.numpy(), torchs.numpy())
                for source, w in (("losslab", ours), ("torch", torchs)):
                    told = {
                        "variance": float(w.double().var()) / theory,
                        "mean": float(w.double().mean()) / math.sqrt(theory),
                        "largest": float(w.abs().max()) / math.sqrt(3 * theory),
                        "error": error,
                    }
                    where = {"distribution": name, "source": source, "inputs": inputs, "outputs": outputs}
                    rows.append({**where, "block": block, **told})
    return pd.DataFrame(rows)


def judge_60(tables: Tables) -> list[Finding]:
    """V4 at 1 % for the variances, V1 for the two sources."""
    table = tables["draws"]
    findings = []
    for (name, source), group in table.groupby(["distribution", "source"], sort=False):
        cells = ["inputs", "outputs"]
        findings += [
            everywhere(f"{name} ({source}): variance 2/(fan-in + fan-out)", group, cells, "variance",
                       tolerance=0.01),
            everywhere(f"{name} ({source}): mean 0", group, cells, "mean", theory=0.0, tolerance=0.01),
        ]  # fmt: skip
    uniform = float(table[table.distribution == "uniform"].largest.max())
    return [
        *findings,
        identity("the same generator gives torch's numbers", table.error, tolerance=1e-6),
        bound("the uniform weights fill the symmetric interval ±√6/√(fan-in + fan-out)", uniform,
              (uniform, uniform), len(table), "largest |w| over the interval's end", 0.999, 1 + 1e-6),
    ]  # fmt: skip


def figures_60(tables: Tables) -> list[Drawing]:
    """The two densities over each other."""
    w = np.linspace(-3.5, 3.5, 401)
    normal = np.exp(-(w**2) / 2) / math.sqrt(2 * math.pi)
    uniform = np.where(np.abs(w) <= math.sqrt(3), 1 / (2 * math.sqrt(3)), 0.0)
    drawn = figure("Two densities of one variance", "w / √(2/(fan-in + fan-out))", "density")
    for name, density in (("normal", normal), ("uniform", uniform)):
        drawn.add_scatter(x=w, y=density, mode="lines", name=name, meta="series")
    reference(drawn, math.sqrt(3), "√6/√(fan-in + fan-out)", axis="x")
    worst = tables["draws"].groupby("distribution").variance.mean()
    caption = (
        "The uniform interval ends at √3 standard deviations. Measured variance over 2/(fan-in + fan-out): "
        f"normal {worst['normal']:.4f}, uniform {worst['uniform']:.4f}."
    )
    return [Drawing(drawn, caption)]


C60 = Claim(
    id="C60",
    section="6.5.2",
    title="Normal and uniform weights of Xavier's variance",
    statement="N(0, 2/(fan-in + fan-out)) and the uniform distribution on ±√6/√(fan-in + fan-out) both have "
    "mean 0 and variance 2/(fan-in + fan-out).",
    source="Notes §6.5.2; Glorot & Bengio 2010, eq. 16",
    experiment=lambda lab: {"draws": draws_60(lab.pick(2_000_000, 20_000_000))},
    judge=judge_60,
    figures=figures_60,
    caveats=(
        "The second argument of N is the variance; numpy's and torch's normal take its root, and passing the "
        "variance there makes the weights far too small.",
        "The notes print the left end of the interval with the root of −6; it is minus the right end.",
    ),
    errata=("E29",),
)
