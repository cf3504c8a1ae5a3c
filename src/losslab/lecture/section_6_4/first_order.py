"""C52: with batch norm the loss bends less along its gradient, so its slope can be trusted further."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, Verdict, decided_by
from losslab.lecture.figures import figure, lines, spread
from losslab.lecture.numbers import number
from losslab.lecture.section_6_4.probes import at_equal_loss, edges, paired_ratios, probes
from losslab.lecture.verdicts import paired_family

if TYPE_CHECKING:
    import pandas as pd

LEAST = math.log(2)
"""The median log ratio of the errors from which the slope counts as more trustworthy."""

AT_STEP, AT_LOSS = "first-order error at equal updates", "first-order error at equal training loss"
CONTEXT = {
    "curvature": "curvature along the gradient at equal updates",
    "gradient_change": "change of the gradient at equal updates",
    "beta": "effective smoothness at equal updates",
}


def experiment(lab: Lab) -> Tables:
    """The probes of C51."""
    found = probes(lab)
    return {"probes": found.summary, "tuning": found.tuning}


def judge(tables: Tables) -> list[Finding]:
    """V3 on the first-order error, twice a network; what else the paper plots, as context."""
    rows, tuning = tables["probes"], tables["tuning"]
    raw = rows[rows["kind"] == "raw"]
    findings = []
    for network, mine in raw.groupby("network", sort=False):
        rated = edges(tuning[tuning["network"] == network])
        half = mine["updates"].max() / 2
        pairs = {
            f"{AT_STEP}, {network}": paired_ratios(mine, "first_order_error", last=half),
            f"{AT_LOSS}, {network}": at_equal_loss(mine, "first_order_error"),
        }
        least = int(mine["least"].iloc[0])
        note = f"log(standard / batch norm); {rated}"
        findings += [_graded(f) for f in paired_family(pairs, LEAST, least=least, note=note)]
    return [*findings, *context(rows)]


def context(rows: pd.DataFrame) -> list[Finding]:
    """The other measures of the probes, and the error of relative steps."""
    findings = []
    for network, mine in rows.groupby("network", sort=False):
        raw, relative = (mine[mine["kind"] == kind] for kind in ("raw", "relative"))
        half, least = mine["updates"].max() / 2, int(mine["least"].iloc[0])
        bent = raw.assign(curvature=raw["curvature"].abs())
        pairs = {f"{name}, {network}": paired_ratios(bent, column, half) for column, name in CONTEXT.items()}
        pairs[f"first-order error of relative steps, {network}"] = paired_ratios(
            relative, "first_order_error", half
        )
        found = paired_family(pairs, LEAST, least=least, note="log(standard / batch norm); context")
        findings += [_graded(f) for f in found]
    return findings


def _graded(finding: Finding) -> Finding:
    """A ratio between a half and two decides nothing; only below a half it speaks against batch norm."""
    threshold = f"{finding.threshold}; between {number(-LEAST)} and {number(LEAST)} mixed"
    verdict = finding.verdict
    if verdict is Verdict.FAILS and finding.estimate >= -LEAST:
        verdict = Verdict.MIXED
    return dataclasses.replace(finding, verdict=verdict, threshold=threshold)


def figures(tables: Tables) -> list[Drawing]:
    """The error through training, the error against the loss, and the effective smoothness."""
    rows = tables["probes"]
    raw = rows[rows["kind"] == "raw"]
    first = raw["network"].iloc[0]
    return [_through(raw), _against_loss(raw), _smoothness(raw[raw["network"] == first], first)]


def _through(rows: pd.DataFrame) -> Drawing:
    drawn = figure("Error of the first-order model", "updates", "relative error", log_y=True)
    for (network, arm), mine in rows.groupby(["network", "arm"], sort=False):
        shown = spread(_finite(mine, "first_order_error"), ["updates"], "first_order_error")
        lines(drawn, shown, "updates", "middle", band=("low", "high"), name=f"{arm}, {network}")
    return Drawing(
        drawn,
        "How wrong the slope is about the loss after a step of 0.05 to 0.4 times the gradient, relative to "
        "the decrease it promises (mean over the steps; medians and 80 % of the seeds).",
    )


def _against_loss(rows: pd.DataFrame) -> Drawing:
    drawn = figure("The same at equal loss", "training loss", "relative error", log_x=True, log_y=True)
    for (network, arm), mine in rows.groupby(["network", "arm"], sort=False):
        medians = mine.groupby("updates")[["train_loss", "first_order_error"]].median()
        shown = _finite(medians.sort_values("train_loss"), "first_order_error")
        lines(drawn, shown, "train_loss", "first_order_error", mode="lines+markers", name=f"{arm}, {network}")
    drawn.update_xaxes(autorange="reversed")
    return Drawing(
        drawn,
        "The error where both networks have come equally far (medians over seeds at each probe; training "
        "goes to the right).",
    )


def _smoothness(rows: pd.DataFrame, network: str) -> Drawing:
    drawn = figure("Effective smoothness", "updates", "max ‖Δg‖ / ‖Δθ‖", log_y=True)
    for arm, mine in rows.groupby("arm", sort=False):
        shown = spread(_finite(mine, "beta"), ["updates"], "beta")
        lines(drawn, shown, "updates", "middle", band=("low", "high"), name=str(arm))
    for arm, mine in rows.groupby("arm", sort=False):
        shown = spread(_finite(mine.assign(bend=mine["curvature"].abs()), "bend"), ["updates"], "bend")
        lines(drawn, shown, "updates", "middle", name=f"{arm}: |gᵀHg| / ‖g‖² at the weights")
    return Drawing(
        drawn,
        f"{network}: the largest change of the gradient per distance along the way, and the curvature at its "
        "beginning.",
    )


def _finite(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    return rows[np.isfinite(rows[column])]


def combine(findings: list[Finding]) -> Verdict:
    """The first-order errors decide."""
    return decided_by(*(f.name for f in findings if f.name.startswith((AT_STEP, AT_LOSS))))(findings)


C52 = Claim(
    id="C52",
    section="6.4.2",
    title="With batch norm the slope of the loss can be trusted further",
    statement="Along its gradient the Hessian of a batch-norm network's loss is smaller, so that a "
    "first-order model of the loss is more accurate.",
    source="Notes §6.4.2; Santurkar et al. 2018, section 3.1, Fig. 4b, 4c and theorem 4.2",
    paper=True,
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=combine,  # type: ignore[arg-type]
    caveats=(
        "All quantities of a probe are measured on one batch of 64, with the statistics of this batch, along "
        "its own gradient. Differences between the gradients of successive batches, or envelopes over "
        "learning rates, often go by the same names.",
        "Gradient descent drives the largest curvature towards 2/η with batch norm and without (Cohen et al. "
        "2021): at equal updates only the first half of a short run is compared.",
        "A raw step is a rate times the gradient; how far that is depends on the parametrisation, which "
        "batch norm changes. The error of relative steps, which does not see the scale of the weights, is "
        "reported beside it.",
        "Each arm is trained at its own tuned rate. At equal training loss, errors are interpolated between "
        "probes 20 updates apart. Settled after a first run: the training loss is that with batch "
        "statistics, "
        "not that of evaluation mode, whose averages lag behind.",
    ),
)
