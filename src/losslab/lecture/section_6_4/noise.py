"""C48 and C49: noise behind batch norm, which makes activations jump and training hardly worse."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, Verdict, agreement
from losslab.lecture.figures import figure, lines, reference
from losslab.lecture.numbers import number
from losslab.lecture.section_6_4.activations import drift_by_layer, histograms
from losslab.lecture.section_6_4.runs import (
    FEW,
    NOISY,
    NORMALISED,
    STANDARD,
    WATCHED,
    Setting,
    convolutional,
    deep,
    side_by_side,
)
from losslab.lecture.statistics import bootstrap_interval, clopper_pearson
from losslab.lecture.verdicts import paired

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

PAPER = NOISY[0]
"""The noise of `NoisyBatchNorm` at strength 1; the others are its multiples."""

TRAINING, EVALUATED = "in training mode", "in evaluation mode"

ARMS = (STANDARD, NORMALISED, *NOISY)


def settings(lab: Lab) -> list[Setting]:
    """The deep network, and in the longer profiles the convolutional one."""
    return [deep(lab)] if lab.profile == "quick" else [deep(lab), convolutional(lab)]


def drift_experiment(lab: Lab) -> Tables:
    """All arms' activations."""
    tables = side_by_side(lab, settings(lab), ARMS)
    return {name: tables[name] for name in ("looks", "samples")}


def accuracy_experiment(lab: Lab) -> Tables:
    """All arms' training accuracy, in both modes."""
    import pandas as pd

    tables = side_by_side(lab, settings(lab), ARMS)
    rows = {
        TRAINING: tables["outputs"],
        EVALUATED: tables["curves"].rename(columns={"train_accuracy": "accuracy"}),
    }
    shared = ["network", "arm", "seed", "step", "epoch", "accuracy", "least", "note"]
    accuracies = [table[shared].assign(mode=mode) for mode, table in rows.items()]
    return {"accuracies": pd.concat(accuracies, ignore_index=True)}


def deciding(findings: Sequence[Finding]) -> Verdict:
    """The overall verdict: findings on noise of strength 1 decide, its multiples are context."""
    return agreement([finding for finding in findings if PAPER.name in finding.name])


# -- C48 ------------------------------------------------------------------------------------------------

TIMES = 3.0


def drift_judge(tables: Tables) -> list[Finding]:
    """Drift with noise against batch norm and against the standard network, for each network."""
    looks = tables["looks"]
    groups = [(str(name), group) for name, group in looks.groupby("network", sort=False)]
    return [finding for name, group in groups for arm in NOISY for finding in _drifts(name, arm.name, group)]


def _drifts(network: str, noisy: str, looks: pd.DataFrame) -> list[Finding]:
    drift = looks["drift"].where(looks["drift"].notna() | (looks["epoch"] < 1), np.inf)
    table = looks.assign(drift=drift)
    means = table.groupby(["arm", "seed"])["drift"].mean()
    by_layer = table.groupby(["arm", "layer"])["drift"].mean()
    ratio = by_layer[noisy] / by_layer[NORMALISED.name]
    told = (
        f"ratio by layer {number(ratio.min())} to {number(ratio.max())}; mean D "
        f"{', '.join(f'{arm}: {number(means[arm].mean())}' for arm in (noisy, *_BASES))}"
    )
    least, note = int(looks["least"].iloc[0]), str(looks["note"].iloc[0])
    note = "; ".join(part for part in (told, note) if part)
    least = least if noisy == PAPER.name else FEW
    seeds = means[noisy].index
    logs = {arm: np.log2(means[arm].reindex(seeds)) for arm in (noisy, *_BASES)}
    return [
        paired(
            f"{noisy}: at least three times the drift of batch norm, {network}",
            logs[noisy] - logs[NORMALISED.name],
            math.log2(TIMES),
            least,
            f"log2 of the ratio; {note}",
        ),
        paired(
            f"{noisy}: more drift than the standard network, {network}",
            logs[noisy] - logs[STANDARD.name],
            0.0,
            least,
            "log2 of the ratio",
        ),
    ]


_BASES = (NORMALISED.name, STANDARD.name)


def drift_figures(tables: Tables) -> list[Drawing]:
    """The notes' figure 6.5a, and drift by layer."""
    samples, looks = tables["samples"], tables["looks"]
    network = looks["network"].iloc[0]
    three = (STANDARD.name, NORMALISED.name, PAPER.name)
    drawn = histograms(network, samples[samples["network"] == network], three)
    return [drawn, drift_by_layer(looks[looks["network"] == network])]


C48 = Claim(
    id="C48",
    section="6.4.2",
    title="Noise behind batch norm makes activations unstable",
    statement=(
        "Noise that changes over time, added after batch norm, makes the distributions of the activations "
        "unstable."
    ),
    source="Notes §6.4.2, figure 6.5a; Santurkar et al. 2018, section 2 and appendix",
    paper=True,
    experiment=drift_experiment,
    judge=drift_judge,
    figures=drift_figures,
    combine=deciding,
    caveats=(
        "The noise is a random scale and a random shift, redrawn at every step: first for each unit, then "
        "around these for each example. The notes call it Gaussian; only the scale of an example is.",
        "Drift D as in C41, once an epoch at rate 0.1, over a fixed batch in training mode with the noise of "
        "that step. Part of D is the noise itself, which would jump as much if nothing trained.",
        "The ranges of the noise are our recollection of the paper's appendix, so they are swept: once, "
        "twice and four times, the multiples on five seeds.",
    ),
    errata=("E26",),
)


# -- C49 ------------------------------------------------------------------------------------------------

GAP = 0.02
"""What batch norm must gain somewhere in training for the statement to be testable."""

COST = 0.25
"""The share of batch norm's gain that noise may cost."""

CHEAP = "costs at most a quarter of what batch norm gains"
BETTER = "at least as accurate as the standard network"


def accuracy_judge(tables: Tables) -> list[Finding]:
    """The cost of noise against the gain of batch norm; noise of strength 1 against no norm; both modes."""
    groups = list(tables["accuracies"].groupby(["network", "mode"], sort=False))
    return [
        finding
        for arm in NOISY
        for (network, mode), group in groups
        for finding in _accuracies(f"{network}, {mode}", arm.name, group)[: None if arm is PAPER else 1]
    ]


def mean_accuracies(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """Training accuracy of each arm by seed, averaged over the measurements after the first epoch began."""
    later = rows[rows["epoch"] >= 1]
    later = later.assign(accuracy=later["accuracy"].fillna(0.0))
    return {str(arm): table.groupby("seed")["accuracy"].mean() for arm, table in later.groupby("arm")}


def largest_gap(rows: pd.DataFrame) -> float:
    """The largest median gain of batch norm over the standard network at any measurement."""
    filled = rows.assign(accuracy=rows["accuracy"].fillna(0.0))
    by_arm = filled.pivot_table(index=["step", "seed"], columns="arm", values="accuracy")
    return float((by_arm[NORMALISED.name] - by_arm[STANDARD.name]).groupby("step").median().max())


def _accuracies(where: str, noisy: str, rows: pd.DataFrame) -> list[Finding]:
    least, note = int(rows["least"].iloc[0]), str(rows["note"].iloc[0])
    least = least if noisy == PAPER.name else FEW
    means = mean_accuracies(rows)
    means = {arm: values.reindex(means[noisy].index) for arm, values in means.items()}
    gain = means[NORMALISED.name] - means[STANDARD.name]
    loss = means[NORMALISED.name] - means[noisy]
    gap = largest_gap(rows)
    end = rows[rows["step"] == rows["step"].max()].groupby("arm")["accuracy"].median()
    shown = (noisy, NORMALISED.name, STANDARD.name)
    told = (
        f"mean accuracy over training: {', '.join(f'{arm} {number(means[arm].median())}' for arm in shown)}; "
        f"at the end: {', '.join(number(end[arm]) for arm in shown)}; largest gain {number(gap)}"
    )
    note = "; ".join(part for part in (told, note) if part)
    quarter = f"difference of {COST:g} × gain and cost; {note}"
    cheap = paired(f"{noisy}: {CHEAP}, {where}", COST * gain - loss, 0.0, least, quarter)
    better, n = int((loss <= gain).sum()), len(loss)
    above = Finding(
        f"{noisy}: {BETTER}, {where}",
        (Verdict.HOLDS if better == n else Verdict.FAILS) if n >= least else Verdict.UNDECIDED,
        better / n,
        clopper_pearson(better, n),
        n,
        f"{better} of {n}, Clopper-Pearson",
        f"all seeds, at least {least}",
    )
    if gap >= GAP:
        return [cheap, above]
    why = f"not testable here: batch norm never gains {100 * GAP:g} points"
    return [dataclasses.replace(finding, verdict=Verdict.UNDECIDED, note=why) for finding in (cheap, above)]


def accuracy_figures(tables: Tables) -> list[Drawing]:
    """The notes' figure 6.5b with three strengths of noise, in both modes, and what each costs."""
    rows = tables["accuracies"]
    rows = rows[rows["network"] == rows["network"].iloc[0]]
    return [*(_curves(str(mode), group) for mode, group in rows.groupby("mode", sort=False)), _costs(rows)]


def _curves(mode: str, rows: pd.DataFrame) -> Drawing:
    filled = rows.assign(accuracy=rows["accuracy"].fillna(0.0))
    table = filled.groupby(["arm", "epoch"], sort=False)["accuracy"].agg(["median", "min", "max"])
    drawn = figure(f"Training accuracy {mode}", "epoch", "training accuracy")
    lines(drawn, table.reset_index(), "epoch", "median", by="arm", band=("min", "max"))
    network = rows["network"].iloc[0]
    how = "with the noise" if mode == TRAINING else "without the noise, by the running statistics"
    return Drawing(drawn, f"Median and range over seeds, {network}, rate {WATCHED:g}, measured {how}.")


def _costs(rows: pd.DataFrame) -> Drawing:
    import pandas as pd

    drawn = figure("What the noise costs", "strength of the noise", "points of mean accuracy lost")
    for mode, group in rows.groupby("mode", sort=False):
        means = mean_accuracies(group)
        lost = {arm.strength: 100 * (means[NORMALISED.name] - means[arm.name]).dropna() for arm in NOISY}
        ends = [bootstrap_interval(values) for values in lost.values()]
        table = pd.DataFrame({"strength": list(lost), "lost": [values.median() for values in lost.values()]})
        table = table.assign(low=[low for low, _ in ends], high=[high for _, high in ends])
        lines(drawn, table, "strength", "lost", band=("low", "high"), mode="lines+markers", name=str(mode))
        if mode == TRAINING:
            gain = 100 * float((means[NORMALISED.name] - means[STANDARD.name]).median())
            reference(drawn, COST * gain, "a quarter of batch norm's gain")
    return Drawing(
        drawn,
        "Mean training accuracy with batch norm minus that with noise behind it (median over seeds, 95 % "
        "interval); the dashed line is a quarter of what batch norm gains over the standard network.",
    )


C49 = Claim(
    id="C49",
    section="6.4.2",
    title="Noisy batch norm trains almost as well",
    statement=(
        "With noise added after it batch norm trains almost as well as without, and much better than the "
        "standard network, although the activations are unstable: the stability is not what helps."
    ),
    source="Notes §6.4.2, figure 6.5b; Santurkar et al. 2018, section 2",
    paper=True,
    experiment=accuracy_experiment,
    judge=accuracy_judge,
    figures=accuracy_figures,
    combine=deciding,
    caveats=(
        "One rate, 0.1, in all arms. Accuracy is averaged over the measurements of a run from the first "
        "epoch on, so that speed counts and not only the end.",
        "Accuracy on training data is measured in two ways, and both decide: in training mode with the "
        "noise, over a fixed batch; and in evaluation mode, where there is no noise, but the running "
        "statistics were gathered under it and do not fit. The first was added after the second had failed "
        "in a first run.",
        "Almost as well means that noise costs at most a quarter of what batch norm gains; that is only "
        f"asked where batch norm gains at least {100 * GAP:g} points at some moment.",
        "The strength of the noise was the authors' choice, so it is swept. Noise leaves other effects of "
        "batch norm in place, such as the invariance to the scale of the weights, so this does not isolate "
        "the shift of distributions (Awais et al. 2020).",
    ),
    errata=("E26",),
)
