"""C51: batch normalisation improves the Lipschitz constant of the loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from losslab.layers import BatchNorm
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, all_but
from losslab.lecture.figures import figure, lines, reference, spread
from losslab.lecture.numbers import number
from losslab.lecture.section_6_4.probes import ARMS, edges, log_ratio, paired_ratios, probes
from losslab.lecture.statistics import max_relative_error
from losslab.lecture.verdicts import identity, paired_family

if TYPE_CHECKING:
    import pandas as pd

LEAST = math.log(2)
"""The median log ratio of the loss's ranges from which batch norm counts as smoother."""

IDENTITY = "gradient of the loss behind an inserted batch norm"
RELATIVE = "steps relative to the weights"


def experiment(lab: Lab) -> Tables:
    """The identity on random layers, and two networks probed along the gradient while they train."""
    lab.progress("identity")
    errors = identities(lab.pick(200, 1000))
    found = probes(lab)
    return {"identity": errors, "probes": found.summary, "tuning": found.tuning}


def identities(instances: int) -> pd.DataFrame:
    """Both sides of the identity on random batches, layers and losses in double precision.

    With ``z = gamma y_hat + beta``, ``y_hat = (y - mean) / sigma`` over m examples, and ``g = dL/dz``, for
    each unit j,

        ||dL/dy_j||^2 = (gamma^2 / sigma_j^2) (||g_j||^2 - <1, g_j>^2 / m - <g_j, y_hat_j>^2 / m)

    Returns:
        One row an instance: ``error``, the largest relative difference over units, and ``factor``, the median
        of ``||dL/dy_j||^2 / ||g_j||^2``.
    """
    import pandas as pd

    rows = []
    for instance in range(instances):
        left, right, factor = sides(torch.Generator().manual_seed(instance))
        rows.append({"error": max_relative_error(left.numpy(), right.numpy()), "factor": factor})
    return pd.DataFrame(rows)


def sides(draw: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """The two sides for one random layer, ``[units]``, and the median of their ratio to ``||g_j||^2``."""
    m, units = (int(torch.randint(low, high, (), generator=draw)) for low, high in ((3, 40), (1, 12)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    layer = BatchNorm(units, eps=0.0).double()
    assert layer.weight is not None
    with torch.no_grad():
        layer.weight.copy_(normal(units))
    y = (normal(m, units) * (2 * normal(units)).exp() + 3 * normal(units)).requires_grad_()
    z = layer(y)
    z.retain_grad()
    hidden = torch.tanh(nn.functional.linear(z, normal(7, units)))
    ((hidden * normal(m, 7)).sum() + hidden.square().mean()).backward()
    assert y.grad is not None
    assert z.grad is not None
    g, sigma = z.grad, y.detach().std(0, correction=0)
    y_hat = (y.detach() - y.detach().mean(0)) / sigma
    gamma = layer.weight.detach()
    rest = g.square().sum(0) - g.sum(0).square() / m - (g * y_hat).sum(0).square() / m
    left = y.grad.square().sum(0)
    return left, (gamma / sigma).square() * rest, float((left / g.square().sum(0)).median())


def judge(tables: Tables) -> list[Finding]:
    """V3 on the range of the loss along raw steps, V1 for the identity, V3 on relative steps as context."""
    rows, tuning = tables["probes"], tables["tuning"]
    errors = tables["identity"]
    exact = identity(IDENTITY, errors["error"])
    return [*ranges(rows, tuning, "raw"), exact, *ranges(rows, tuning, "relative")]


def ranges(rows: pd.DataFrame, tuning: pd.DataFrame, kind: str) -> list[Finding]:
    """Per network, standard against batch norm over the first half of training."""
    title = "range of the loss along the gradient" if kind == "raw" else RELATIVE
    findings = []
    for network, mine in rows[rows["kind"] == kind].groupby("network", sort=False):
        ratios = paired_ratios(mine, "variation", last=mine["updates"].max() / 2)
        note = (
            f"log(standard / batch norm), first half of training; {edges(tuning[tuning.network == network])}"
        )
        (found,) = paired_family(
            {f"{title}, {network}": ratios}, LEAST, least=int(mine["least"].iloc[0]), note=note
        )
        findings.append(found)
    return findings


def figures(tables: Tables) -> list[Drawing]:
    """The range through training as in the paper's Fig. 4a, and the ratio of the ranges for both steps."""
    rows = tables["probes"]
    first = rows["network"].iloc[0]
    raw = rows[(rows["network"] == first) & (rows["kind"] == "raw")]
    return [_bands(raw, first), _ratios(rows)]


def _bands(rows: pd.DataFrame, network: str) -> Drawing:
    drawn = figure("Loss along the gradient", "updates", "loss")
    for arm in ARMS:
        mine = rows[rows["arm"] == arm.name].groupby("updates")[["low", "high", "loss"]].median()
        lines(drawn, mine.reset_index(), "updates", "loss", band=("low", "high"), name=arm.name)
    return Drawing(
        drawn,
        f"{network}: the loss of a batch (line) and the values it takes on the way down its gradient, up to "
        "0.4 times the gradient (band; medians over seeds). The narrower the band, the smoother the loss.",
    )


def _ratios(rows: pd.DataFrame) -> Drawing:
    drawn = figure("Range without batch norm over range with it", "updates", "ratio", log_y=True)
    keys = ["network", "kind", "seed", "updates"]
    by_arm = rows.pivot_table(index=keys, columns="arm", values="variation", sort=False, dropna=False)
    names = [arm.name for arm in ARMS]
    ratio = np.exp(log_ratio(by_arm[names[0]], by_arm[names[1]])).rename("ratio").reset_index()
    for (network, kind), mine in ratio.groupby(["network", "kind"], sort=False):
        # An infinite ratio has no place on the page.
        shown = spread(mine[np.isfinite(mine["ratio"])], ["updates"], "ratio")
        lines(drawn, shown, "updates", "middle", band=("low", "high"), name=f"{network}, {kind} steps")
    # A run that is about to diverge has ranges beyond any scale.
    drawn.update_yaxes(range=[-2, 3])
    reference(drawn, 2.0, f"asked for: {number(2.0)}")
    return Drawing(
        drawn,
        "Above 1 the loss varies less along the gradient with batch norm (medians and 80 % of the seeds). "
        "Raw steps are rate times gradient; relative steps are a share of the weights' length, so that "
        "scaling weights to which the loss is blind changes nothing. Cut off at 1000.",
    )


C51 = Claim(
    id="C51",
    section="6.4.2",
    title="Batch norm improves the Lipschitz constant of the loss",
    statement="Batch normalisation makes the loss smoother: its Lipschitz constant improves.",
    source="Notes §6.4.2; Santurkar et al. 2018, section 3.1, Fig. 4a and theorem 4.1",
    paper=True,
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=lambda findings: all_but(*(f.name for f in findings if f.name.startswith(RELATIVE)))(findings),
    caveats=(
        "The identity is derived and checked here, with the projection on ŷ divided by m; the paper "
        "states an inequality.",
        "The theorem speaks of the activations of one layer behind which batch norm is inserted, all other "
        "weights kept, and makes the gradient smaller only where γ²/σ² ≤ 1: where the activations vary by "
        "more than γ. For units of small variance batch norm enlarges the gradient.",
        "Behind batch norm the loss does not change when the weights are scaled, so the gradient is "
        "proportional to 1/‖W‖ (van Laarhoven 2017; Arora, Li and Lyu 2019). Lipschitz constants in the "
        "space of weights then compare parametrisations as much as losses: the steps relative to the "
        "weights are reported beside the paper's, and do not count for the verdict.",
        "The range of each probe is that of the loss of one batch of 64 along its own gradient, with the "
        "batch's statistics. Many published plots under this name show the envelope of runs at several "
        "learning rates, which is something else.",
        "Each arm is trained at its own rate, tuned on validation data for half the length of the run, so "
        "that at equal updates batch norm is usually further down; C52 also compares at equal training loss.",
        "At initialisation the gradients of very deep batch-norm networks explode (Yang et al. 2019): eight "
        "layers are not many.",
        "The sigmoid network starts from Xavier's distribution. From small weights it would stand on a "
        "plateau, where nothing varies and any ratio could be had.",
    ),
    errata=("E24",),
)
