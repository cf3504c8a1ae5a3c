"""C38: the rate at which a network trains with batch norm and not without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, Verdict, agreement
from losslab.lecture.figures import figure, lines, reference
from losslab.lecture.numbers import number
from losslab.lecture.section_6_4.runs import (
    NORMALISED,
    STANDARD,
    SWEEP,
    WATCHED,
    bench,
    convolutional,
    deep,
    labelled,
)
from losslab.lecture.statistics import bootstrap_interval, clopper_pearson
from losslab.lecture.verdicts import bound

if TYPE_CHECKING:
    import pandas as pd

RATE = 0.5
"""The notes' rate."""

CONVERGED = 0.9
"""Training accuracy above which a run counts as converged."""

CHANCE = 0.1
SHARE = 0.9
"""Of the runs that must converge with batch norm, and fail without."""

PATIENCE = 100
"""Updates for which the loss must stay above its start to count as diverged."""

HEADLINE = f"at rate {RATE:g} batch norm converges and the standard network fails"


def experiment(lab: Lab) -> Tables:
    """The deep network and the convolutional one, at every rate."""
    import pandas as pd

    curves = []
    for setting, rates in ((deep(lab), SWEEP), (convolutional(lab), conv_rates(lab))):
        for arm in (STANDARD, NORMALISED):
            lab.progress(f"{setting.name}, {arm.name}")
            curves.append(labelled(setting, bench(setting).runs(arm, rates)["curves"]))
    return {"curves": pd.concat(curves, ignore_index=True)}


def conv_rates(lab: Lab) -> tuple[float, ...]:
    """All rates, or the notes' two where a convolutional network takes long."""
    return SWEEP if lab.profile == "full" else (WATCHED, RATE)


# -- what became of the runs ------------------------------------------------------------------------------


def outcomes(curves: pd.DataFrame) -> pd.DataFrame:
    """How each run ended: ``accuracy`` (chance once diverged), ``diverged``, ``failed``, ``converged``."""
    import pandas as pd

    keys = ["network", "arm", "lr", "seed"]
    rows = []
    for key, run in curves.groupby(keys, sort=False):
        run = run.sort_values("step")
        diverged = has_diverged(run["step"].to_numpy(), run["train_loss"].to_numpy())
        last = float(run["train_accuracy"].iloc[-1])
        accuracy = CHANCE if diverged or math.isnan(last) else last
        ended = {"accuracy": accuracy, "diverged": diverged, "failed": diverged or accuracy <= 2 * CHANCE}
        rows.append(dict(zip(keys, key, strict=True)) | ended | {"converged": accuracy > CONVERGED})
    return pd.DataFrame(rows)


def has_diverged(steps: np.ndarray, losses: np.ndarray) -> bool:
    """Whether a loss stopped being finite, or stayed above its start for 100 updates in a row.

    Example:
        >>> has_diverged(np.array([0, 60, 120]), np.array([2.3, 2.4, 2.5]))
        False
        >>> has_diverged(np.array([0, 60, 160]), np.array([2.3, 2.4, 2.5]))
        True
    """
    if not np.isfinite(losses).all():
        return True
    since = math.nan
    for step, above in zip(steps, losses > losses[0], strict=True):
        if not above:
            since = math.nan
        elif math.isnan(since):
            since = step
        elif step - since >= PATIENCE:
            return True
    return False


def largest_rates(ends: pd.DataFrame) -> pd.DataFrame:
    """For each seed the largest rate that converged in each arm; 0 where none did."""
    good = ends.assign(eta=ends["lr"].where(ends["converged"], 0.0))
    return good.pivot_table(index="seed", columns="arm", values="eta", aggfunc="max")


# -- the verdict --------------------------------------------------------------------------------------------


def judge(tables: Tables) -> list[Finding]:
    """The notes' rate for each network, then the ratio of the largest rates."""
    curves = tables["curves"]
    ends = outcomes(curves)
    about = curves.groupby("network", sort=False)[["least", "note"]].first()
    groups = list(ends.groupby("network", sort=False))
    at_rate = [_at_rate(str(name), group, *about.loc[name]) for name, group in groups]
    swept = [(str(name), group) for name, group in groups if group["lr"].nunique() >= 5]
    return [*at_rate, *(_ratio(name, group) for name, group in swept)]


def _at_rate(network: str, ends: pd.DataFrame, least: int, note: str) -> Finding:
    here = {arm: _arm(ends, arm, RATE) for arm in (STANDARD.name, NORMALISED.name)}
    n = len(here[NORMALISED.name])
    standard, normalised = here[STANDARD.name], here[NORMALISED.name]
    fail, converge = int(standard["failed"].sum()), int(normalised["converged"].sum())
    lag = float((normalised["accuracy"] - standard["accuracy"]).median())
    if n < least:
        verdict = Verdict.UNDECIDED
    elif converge < SHARE * n:
        verdict = Verdict.FAILS
    elif fail >= SHARE * n:
        verdict = Verdict.HOLDS
    else:
        verdict = Verdict.MIXED if lag > 0.1 else Verdict.FAILS
    slow = {arm: _arm(ends, arm, WATCHED)["converged"] for arm in here}
    told = (
        f"{converge} of {n} converge with batch norm; without, {int(standard['diverged'].sum())} diverge, "
        f"median accuracy {number(standard['accuracy'].median())}; at rate {WATCHED:g} "
        f"{int(slow[NORMALISED.name].sum())} and {int(slow[STANDARD.name].sum())} of {n} converge"
    )
    return Finding(
        f"{HEADLINE}: {network}",
        verdict,
        fail / n,
        clopper_pearson(fail, n),
        n,
        f"{fail} of {n} standard networks fail, Clopper-Pearson",
        f"≥ {SHARE:g} fail without and ≥ {SHARE:g} converge with batch norm; mixed if the standard "
        "network is merely over 10 points worse",
        "; ".join(part for part in (told, note, f"{least} seeds are needed" if n < least else "") if part),
    )


def _arm(ends: pd.DataFrame, arm: str, rate: float) -> pd.DataFrame:
    chosen = ends[(ends["arm"] == arm) & (ends["lr"] == rate)]
    return chosen.set_index("seed").sort_index()


def _ratio(network: str, ends: pd.DataFrame) -> Finding:
    largest = largest_rates(ends)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (largest[NORMALISED.name] / largest[STANDARD.name]).to_numpy()
    ratio = np.where(np.isnan(ratio), 1.0, ratio)  # neither trains at any rate
    top = float(ends["lr"].max())
    clipped = int((largest[NORMALISED.name] == top).sum())
    return bound(
        f"largest rate that converges, batch norm over standard: {network}",
        float(np.median(ratio)),
        bootstrap_interval(ratio),
        len(ratio),
        "median over seeds, bootstrap",
        at_least=2.0,
        note=f"median {number(largest[NORMALISED.name].median())} against "
        f"{number(largest[STANDARD.name].median())}; {clipped} of {len(ratio)} with batch norm still "
        f"converge at the largest rate tried, {top:g}",
    )


def notes_rate(findings: Sequence[Finding]) -> Verdict:
    """The overall verdict: the notes' rate decides, the ratio of the largest rates is context."""
    return agreement([finding for finding in findings if finding.name.startswith(HEADLINE)])


# -- figures -------------------------------------------------------------------------------------------


def figures(tables: Tables) -> list[Drawing]:
    """Training curves at two rates for each network, and what every rate leads to."""
    curves = tables["curves"]
    drawn = [_curves(str(name), group) for name, group in curves.groupby("network", sort=False)]
    return [*drawn, _sweep(outcomes(curves))]


def _curves(network: str, curves: pd.DataFrame) -> Drawing:
    two = curves[curves["lr"].isin((WATCHED, RATE))]
    two = two.assign(
        series=[f"{arm}, η = {lr:g}" for arm, lr in zip(two["arm"], two["lr"], strict=True)],
        accuracy=two["train_accuracy"].fillna(CHANCE),
    ).sort_values(["lr", "arm"], ascending=[True, False])
    table = two.groupby(["series", "epoch"], sort=False)["accuracy"].agg(["median", "min", "max"])
    drawn = figure(f"Training curves, {network}", "epoch", "training accuracy")
    lines(drawn, table.reset_index(), "epoch", "median", by="series", band=("min", "max"))
    drawn.update_yaxes(range=[0, 1.02])
    return Drawing(
        drawn,
        f"Median and range over seeds, {network}; a run that has diverged is drawn at chance. At the larger "
        "rate look at the standard network.",
    )


def _sweep(ends: pd.DataFrame) -> Drawing:
    ends = ends.assign(series=ends["arm"] + ", " + ends["network"])
    table = ends.groupby(["series", "lr"], sort=False)["accuracy"].agg(["median", "min", "max"])
    drawn = figure("Final accuracy against the rate", "learning rate η", "training accuracy", log_x=True)
    rows = table.reset_index().sort_values("lr", kind="stable")
    order = rows.set_index("series").loc[list(dict.fromkeys(ends["series"]))].reset_index()
    lines(drawn, order, "lr", "median", by="series", band=("min", "max"), mode="lines+markers")
    reference(drawn, RATE, "the notes' rate", axis="x")
    drawn.update_yaxes(range=[0, 1.02])
    return Drawing(
        drawn,
        "Median and range over seeds after the last epoch. Where a curve falls to 0.1 the network guesses.",
    )


C38 = Claim(
    id="C38",
    section="6.4.2",
    title="Batch norm trains at rates that break the standard network",
    statement=(
        "With batch norm training converges at a learning rate of 0.5, at which the same network without it "
        "diverges; at 0.1 both train."
    ),
    source="Notes §6.4.2, figure 6.3; Santurkar et al. 2018, figure 1",
    paper=True,
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=notes_rate,
    caveats=(
        "The rates are fixed and not tuned, since the statement is about a rate. Plain SGD with batches of "
        "128, He's initialisation in both networks, no clipping.",
        "Diverged means that the loss over the training data stopped being finite, or stood above its first "
        "value for 100 updates in a row; failed means diverged or a training accuracy of at most twice "
        "chance; converged means a training accuracy above 0.9. Accuracies are those of evaluation mode.",
        "Whether a network breaks at a rate depends on its depth, its start and on clipping: with a suitable "
        "initialisation or other remedies deep networks train at high rates without normalisation (Zhang et "
        "al. 2019; Brock et al. 2021). The ratio of the largest rates says more than any one rate "
        "(Bjorck et al. 2018).",
        "The paper's network is a VGG on CIFAR-10 on a GPU; the quick and full profiles use small networks "
        "on small data, and the paper profile scales down where there is no GPU. In the quick profile "
        "the convolutional network has 15 epochs, cut from 30 after a first run, to save time.",
        "CIFAR-10 is here as re-encoded images: compare the arms, not the accuracies with the paper's.",
    ),
)
