"""C40, C41 and C47: what batch norm does to the inputs of the non-linearities while a network trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, Verdict, decided_by
from losslab.lecture.figures import figure, lines, ridgelines, spread
from losslab.lecture.numbers import number
from losslab.lecture.section_6_4.runs import (
    NORMALISED,
    STANDARD,
    WATCHED,
    Setting,
    convolutional,
    deep,
    side_by_side,
)
from losslab.lecture.section_6_4.sigmoid_runs import BASELINES, GAUSSIAN, OWN, XAVIER, runs
from losslab.lecture.section_6_4.sigmoid_runs import NORMALISED as NORMALISED_SIGMOIDS
from losslab.lecture.statistics import bootstrap_interval, spearman
from losslab.lecture.verdicts import bound, identity, paired_family

if TYPE_CHECKING:
    import pandas as pd

# -- C40 ------------------------------------------------------------------------------------------------

ACTIVE = {
    GAUSSIAN: "half as much is saturated as from a small Gaussian start",
    XAVIER: "half as much is saturated as from Xavier's start",
}
LINKED = "without batch norm the loss falls less where more is saturated"


def active_experiment(lab: Lab) -> Tables:
    """The networks of C39, each at its own rate."""
    found = runs(lab)
    tables = {"curves": found.curves, "looks": found.looks}
    return {name: table[table["rated"] == OWN].reset_index(drop=True) for name, table in tables.items()}


def active_judge(tables: Tables) -> list[Finding]:
    """The saturated share over training; how it goes with progress is context."""
    looks, curves = tables["looks"], tables["curves"]
    share = looks.groupby(["network", "seed"])["saturated"].mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        differences = {
            name: np.log2(share[baseline]) - np.log2(share[NORMALISED_SIGMOIDS])
            for baseline, name in ACTIVE.items()
        }
    told = ", ".join(
        f"{network}: {100 * share[network].median():.2g} %" for network in (*BASELINES, NORMALISED_SIGMOIDS)
    )
    note = f"log2 of the ratio; share of (example, unit) pairs with |input| > 3 over training: {told}"
    least = int(curves["least"].iloc[0])
    return [*paired_family(differences, delta=1.0, least=least, note=note), _linked(looks, curves)]


def _linked(looks: pd.DataFrame, curves: pd.DataFrame) -> Finding:
    correlations = progress_and_saturation(looks, curves)
    here = correlations[correlations["network"] == GAUSSIAN]["correlation"].dropna().to_numpy()
    others = correlations[correlations["network"] != GAUSSIAN].groupby("network")["correlation"].median()
    return bound(
        LINKED,
        float(np.median(here)) if here.size else float("nan"),
        bootstrap_interval(here) if here.size else (float("nan"), float("nan")),
        len(here),
        "rank correlation of the saturated share and the fall of the log loss until the next look, median "
        "over seeds, small Gaussian start",
        at_most=0.0,
        note="; ".join(f"{network}: {number(value)}" for network, value in others.items()),
    )


def progress_and_saturation(looks: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """For each run the rank correlation between saturated share and fall of the log of the loss."""
    import pandas as pd

    share = looks.groupby(["network", "seed", "step"])["saturated"].mean().reset_index()
    # A look is taken after the update that the batch's loss was of.
    losses = curves.assign(step=curves["step"] + 1)[["network", "seed", "step", "loss"]]
    both = share.merge(losses, on=["network", "seed", "step"]).sort_values("step")
    rows = []
    for (network, seed), run in both.groupby(["network", "seed"], sort=False):
        fall = -np.diff(np.log(run["loss"].to_numpy()))
        kept = np.isfinite(fall)
        before = run["saturated"].to_numpy()[:-1][kept]
        correlation = spearman(before, fall[kept]) if kept.sum() >= 2 else float("nan")
        rows.append({"network": network, "seed": seed, "correlation": correlation})
    return pd.DataFrame(rows)


def active_figures(tables: Tables) -> list[Drawing]:
    """Ioffe and Szegedy's figure 1b and 1c, and the saturated share."""
    looks = tables["looks"]
    last = looks[(looks["layer"] == looks["layer"].max()) & (looks["member"] == looks["member"].min())]
    drawn = figure("Input of one sigmoid of the last hidden layer", "updates", "input")
    lines(drawn, last, "step", "p50", by="network", band=("p15", "p85"))
    rows = spread(looks, ["network", "step"], "saturated")
    share = figure("Saturated share", "updates", "share of (example, unit) pairs")
    lines(share, rows, "step", "middle", by="network", band=("low", "high"))
    return [
        Drawing(
            drawn,
            "Median and the range between the 15th and the 85th percentile over test examples, one unit of "
            "one network each, at each network's own rate. Beyond ±3 a sigmoid hardly passes a gradient.",
        ),
        Drawing(share, "Share beyond ±3, median and 80 % of the layers and seeds."),
    ]


C40 = Claim(
    id="C40",
    section="6.4.2",
    title="Batch norm keeps non-linearities active",
    statement="Batch norm keeps the inputs of the non-linearities where these are active, not saturated.",
    source="Notes §6.4.2; Ioffe & Szegedy 2015, figure 1b and 1c",
    paper=True,
    experiment=active_experiment,
    judge=active_judge,
    figures=active_figures,
    combine=decided_by(*ACTIVE.values()),
    caveats=(
        "Measured on the networks of C39, over a fixed batch of test examples in training mode, every 100 "
        "updates. Saturated means that a sigmoid's input is beyond 3 in size, where its slope is below "
        "0.045; the largest is 0.25.",
        "Active is not the same as useful, and γ and β can move the inputs back into saturation. That less "
        "saturation is the reason for the faster training is not shown by this (Lipton & Steinhardt 2018).",
    ),
    errata=("E27",),
)


# -- C41 ------------------------------------------------------------------------------------------------

EXACT = "mean β and variance γ² var / (var + ε) at every look"
STABLE = {
    (GAUSSIAN, OWN): "drift at most half that from a small Gaussian start, each at its own rate",
    (GAUSSIAN, GAUSSIAN): "drift at most half that from a small Gaussian start, at that one's rate",
    (XAVIER, OWN): "drift at most half that from Xavier's start, each at its own rate",
    (XAVIER, XAVIER): "drift at most half that from Xavier's start, at that one's rate",
}
"""Baseline and whose rate batch norm has -> finding."""

OTHERS = {
    "drift_normalised": "before γ and β: ",
    "wasserstein": "by the Wasserstein distance: ",
}
"""Column -> how the findings on it begin."""


def stable_experiment(lab: Lab) -> Tables:
    """The networks of C39, and batch norm at the others' rates."""
    found = runs(lab)
    least = int(found.curves["least"].iloc[0])
    return {"looks": found.looks.assign(least=least)}


def stable_judge(tables: Tables) -> list[Finding]:
    """The identity and the drift of what the non-linearities get; other measures of drift are context."""
    looks = tables["looks"]
    exact = looks[(looks["network"] == NORMALISED_SIGMOIDS) & (looks["rated"] == OWN)]
    errors = exact[["mean_error", "variance_error"]].max(axis=1).dropna()
    last = exact[exact["step"] == exact["step"].max()]
    found = identity(EXACT, errors)
    told = (
        f"after the affine map the middle unit ends with a mean of size {number(last['mean'].median())} and "
        f"a variance of {number(last['variance'].median())}, not 0 and 1"
    )
    least = int(looks["least"].iloc[0])
    drifts = paired_family(_ratios(looks, "drift"), 1.0, least, _drift_note(looks))
    more = [
        finding
        for column, prefix in OTHERS.items()
        for finding in paired_family(_ratios(looks, column, prefix), 1.0, least, "log2 of the ratio")
    ]
    return [drifts[0], dataclasses.replace(found, note=told), *drifts[1:], *more]


def _ratios(looks: pd.DataFrame, column: str, prefix: str = "") -> dict[str, pd.Series]:
    """For each comparison log2 of the baseline's mean drift over that with batch norm, by seed."""
    found = {}
    for (baseline, rated), name in STABLE.items():
        normalised = looks[(looks["network"] == NORMALISED_SIGMOIDS) & (looks["rated"] == rated)]
        standard = looks[(looks["network"] == baseline) & (looks["step"] <= normalised["step"].max())]
        other = column.removesuffix("_normalised")  # without batch norm there is nothing before γ and β
        means = [
            table.groupby("seed")[which].mean() for table, which in ((standard, other), (normalised, column))
        ]
        found[prefix + name] = np.log2(means[0]) - np.log2(means[1])
    return found


def _drift_note(looks: pd.DataFrame) -> str:
    means = looks.groupby(["network", "rated"])["drift"].mean()
    rows = means.reset_index().itertuples(index=False)
    told = ", ".join(f"{network} ({rated}): {number(value)}" for network, rated, value in rows)
    return f"log2 of the ratio; mean drift D over looks and layers: {told}"


def stable_figures(tables: Tables) -> list[Drawing]:
    """Drift over time, and by layer."""
    looks = tables["looks"]
    looks = looks[looks["drift"].notna()]
    looks = looks.assign(series=_series(looks))
    over = spread(looks, ["series", "step"], "drift")
    drawn = figure("Drift of the sigmoids' inputs", "updates", "drift D since the look before", log_y=True)
    lines(drawn, over, "step", "middle", by="series", band=("low", "high"))
    deep_rows = spread(looks.groupby(["series", "layer", "seed"], sort=False)["drift"].mean().reset_index(),
                       ["series", "layer"], "drift")  # fmt: skip
    layers = figure("Drift by layer", "hidden layer", "mean drift D", log_y=True)
    lines(layers, deep_rows, "layer", "middle", by="series", band=("low", "high"), mode="lines+markers")
    return [
        Drawing(
            drawn,
            "How far a unit's median moves in 100 updates, in units of its interquartile range (middle unit; "
            "median and 80 % of layers and seeds).",
        ),
        Drawing(layers, "The same averaged over training: without batch norm drift grows with depth."),
    ]


def _series(looks: pd.DataFrame) -> list[str]:
    pairs = zip(looks["network"], looks["rated"], strict=True)
    return [network if rated == OWN else f"{network}, rate of {rated}" for network, rated in pairs]


C41 = Claim(
    id="C41",
    section="6.4.2",
    title="Batch norm stabilises the inputs of the layers",
    statement=(
        "Batch norm gives every layer inputs of mean 0 and variance 1 throughout training, which solves the "
        "problem of internal covariate shift."
    ),
    source="Notes §6.4.2; Ioffe & Szegedy 2015",
    paper=True,
    experiment=stable_experiment,
    judge=stable_judge,
    figures=stable_figures,
    combine=decided_by(EXACT, *STABLE.values()),
    caveats=(
        "Drift D is the distance that a unit's median moves between two looks 100 updates apart, over its "
        "interquartile range at the later one, in the middle over a layer's units and averaged over layers "
        "and looks. It is judged as a ratio: batch norm is to have at most half.",
        "At its own rate batch norm takes smaller steps than the standard networks do at theirs, so the same "
        "is judged at equal rates, over the updates that both runs have.",
        "Only two moments are fixed, unit by unit and batch by batch, and only before γ and β. Whether this "
        "removes internal covariate shift depends on what that is: C50 measures the definition by gradients "
        "(Santurkar et al. 2018), and the term has been partly rehabilitated since (Awais et al. 2020).",
    ),
    errata=("E23",),
)


# -- C47 ------------------------------------------------------------------------------------------------

SIMILAR, FAR = 2.0, 5.0
FIRST_EPOCHS = 2
"""Looks from here on count: the first of them is of the second epoch."""


def settings(lab: Lab) -> list[Setting]:
    """Five hidden ReLU layers, and the convolutional network."""
    return [deep(lab, 5), convolutional(lab)]


def also_experiment(lab: Lab) -> Tables:
    """Both networks with and without batch norm, at one rate."""
    return side_by_side(lab, settings(lab), (STANDARD, NORMALISED))


def also_judge(tables: Tables) -> list[Finding]:
    """The ratio of the drifts, layer by layer, for each network."""
    looks = tables["looks"]
    return [_similar(str(name), group) for name, group in looks.groupby("network", sort=False)]


def layer_ratios(looks: pd.DataFrame) -> pd.DataFrame:
    """Drift without batch norm over drift with it, a row a seed, a column a hidden layer from the second."""
    late = looks[(looks["epoch"] >= FIRST_EPOCHS) & (looks["layer"] >= 2)]
    # A run that has diverged has drifted without end.
    drift = late["drift"].where(late["drift"].notna(), np.inf)
    means = late.assign(drift=drift).pivot_table(index=["seed", "layer"], columns="arm", values="drift")
    return (means[STANDARD.name] / means[NORMALISED.name]).unstack("layer")


def _similar(network: str, looks: pd.DataFrame) -> Finding:
    ratios = layer_ratios(looks)
    least, note = int(looks["least"].iloc[0]), str(looks["note"].iloc[0])
    middle = ratios.median()
    half = ratios.shape[1] / 2
    if len(ratios) < least or bool(ratios.isna().any(axis=None)):
        verdict = Verdict.UNDECIDED
        note = "; ".join(part for part in (note, f"{least} seeds are needed") if part)
    elif (middle <= SIMILAR).sum() > half:
        verdict = Verdict.HOLDS
    else:
        verdict = Verdict.FAILS if (middle > FAR).sum() > half else Verdict.MIXED
    told = ", ".join(f"layer {layer}: {number(value)}" for layer, value in middle.items())
    across = ratios.median(axis=1).to_numpy()
    return Finding(
        f"drift without batch norm is like that with it: {network}",
        verdict,
        float(middle.median()),
        bootstrap_interval(across) if not np.isnan(across).any() else (float("nan"), float("nan")),
        len(ratios),
        f"ratio of mean drifts from the second epoch on at rate {WATCHED:g}, median over seeds and layers",
        f"≤ {SIMILAR:g} at most layers; does not hold if > {FAR:g} at most layers",
        "; ".join(part for part in (told, note) if part),
    )


def also_figures(tables: Tables) -> list[Drawing]:
    """The notes' figure 6.4 for each network, and drift by layer."""
    drawn = [histograms(str(name), rows) for name, rows in tables["samples"].groupby("network", sort=False)]
    return [*drawn[:2], drift_by_layer(tables["looks"])]


def histograms(network: str, samples: pd.DataFrame, arms: Sequence[str] = ()) -> Drawing:
    """One unit's inputs through training, a panel an arm."""
    layer = (samples["layer"].max() + 1) // 2
    rows = samples[samples["layer"] == layer].assign(epoch=samples["epoch"].astype(int))
    if arms:
        rows = rows[rows["arm"].isin(arms)]
    there = np.unique(rows["epoch"])
    chosen = np.unique(np.geomspace(1, there.max() + 1, 8).round().astype(int) - 1)
    rows = rows[rows["epoch"].isin(chosen)].sort_values("epoch", kind="stable")
    drawn = ridgelines(f"Activations, {network}", rows, "value", "epoch", "arm", "input", "epoch")
    return Drawing(
        drawn,
        f"Input of one unit of hidden layer {layer} over a fixed batch, from the start (bottom) to the end "
        f"of training (top) at rate {WATCHED:g}.",
    )


def drift_by_layer(looks: pd.DataFrame) -> Drawing:
    """Mean drift from the second epoch on, layer by layer."""
    late = looks[looks["epoch"] >= FIRST_EPOCHS]
    late = late.assign(series=late["arm"] + ", " + late["network"])
    means = late.groupby(["series", "layer", "seed"], sort=False)["drift"].mean().reset_index()
    drawn = figure("Drift by layer", "hidden layer", "mean drift D per epoch", log_y=True)
    rows = spread(means, ["series", "layer"], "drift")
    lines(drawn, rows, "layer", "middle", by="series", band=("low", "high"), mode="lines+markers")
    return Drawing(
        drawn,
        "How far a unit's median moves in an epoch, in units of its interquartile range: middle unit, mean "
        "from the second epoch on, median and 80 % of the seeds.",
    )


C47 = Claim(
    id="C47",
    section="6.4.2",
    title="Activations are also stable without batch norm",
    statement="The distributions of the activations are stable during training without batch norm as well.",
    source="Notes §6.4.2, figure 6.4; Santurkar et al. 2018, figure 1c",
    paper=True,
    experiment=also_experiment,
    judge=also_judge,
    figures=also_figures,
    caveats=(
        "The paper shows pictures of a VGG on CIFAR-10; the thresholds on the drift D (see C41) are ours. "
        "The rate is 0.1 in both arms, with He's start and ReLU.",
        "For Ioffe and Szegedy's sigmoid networks C41 measures the same with another outcome: the clash of "
        "the two papers' figures is one of architectures.",
        "CIFAR-10 is here as re-encoded images, and the network is narrower where there is no GPU.",
    ),
)
