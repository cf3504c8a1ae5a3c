"""C33 and C34: inputs of mean 0 and variance 1, and inputs without correlations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, all_but
from losslab.lecture.figures import figure, intervals, lines, reference, spread
from losslab.lecture.numbers import number
from losslab.lecture.section_6_4.input_scaling import (
    CENTRED,
    NETWORKS,
    PCA,
    RAW,
    SHIFTED,
    STANDARD,
    WHITE,
    ZCA,
    benches,
    one_step,
    race,
    regressions,
)
from losslab.lecture.statistics import fit_power_law
from losslab.lecture.verdicts import identity, law, paired, paired_family

if TYPE_CHECKING:
    import pandas as pd

TARGET = 0.01
"""Excess loss of the regressions to reach, in units of that at the start."""

FLOOR = 1e-8
"""Where the figures cut the excess loss."""


def evidence(lab: Lab, linear: Sequence[str], networks: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Regressions and networks on the scalings asked for."""
    import pandas as pd

    lab.progress("linear regression on digits")
    counts, curves = regressions(linear, lab.replicates(10, 30), TARGET)
    tables = {"linear": counts, "descent": curves}
    races = []
    for bench in benches(lab):
        lab.progress(f"{bench.name} with {', '.join(networks)} inputs")
        races.append(race(bench, networks))
    joined = {name: pd.concat([part[name] for part in races], ignore_index=True) for name in races[0]}
    return tables | joined


def speed_ups(networks: pd.DataFrame, pairs: Sequence[tuple[str, str]], least_ratio: float) -> list[Finding]:
    """V3 for each network: log of the steps with the first inputs over those with the second, per seed.

    The pairs of one network are one family.
    """
    findings = []
    for network, rows in networks.groupby("network", sort=False):
        steps = rows.pivot(index="seed", columns="arm", values="steps")
        differences, notes = {}, []
        for slow, fast in pairs:
            arrived = np.isfinite(steps[slow]) | np.isfinite(steps[fast])
            ratio = (steps[slow] / steps[fast]).where(arrived, 1.0)
            differences[compared(str(network), slow, fast)] = np.log(ratio)
            middle = float(ratio.quantile(0.5, interpolation="lower"))
            edges = sorted(set(rows.arm[rows.at_edge & rows.arm.isin([slow, fast])]))
            told = f"{number(middle)} times the steps in the median"
            notes.append(told + (f"; best rate at the edge of the grid: {', '.join(edges)}" if edges else ""))
        judged = paired_family(differences, math.log(least_ratio), int(rows.least.iloc[0]))
        findings += [
            replace(finding, note=f"{told}; {finding.note}")
            for finding, told in zip(judged, notes, strict=True)
        ]
    return findings


def compared(network: str, slow: str, fast: str) -> str:
    """The name of the finding of `speed_ups` for a pair."""
    return f"{network}: log of the ratio of steps, {slow} against {fast}"


# -- C33 -----------------------------------------------------------------------------------------------

THEORY = "linear regression: steps grow as the spectrum predicts"
RATIO = "linear regression: log of the ratio of steps, raw against standardised inputs"


def experiment_c33(lab: Lab) -> Tables:
    """The regressions and the networks, raw, centred, standardised; the regressions shifted too."""
    return evidence(lab, [RAW, CENTRED, STANDARD, SHIFTED], [RAW, CENTRED, STANDARD])


def judge_c33(tables: Tables) -> list[Finding]:
    """V3 for the networks, V4 for the regressions; centring alone is context."""
    linear, networks = tables["linear"], tables["networks"]
    fit = fit_power_law(linear.predicted, linear.steps)
    exact = int((linear.steps == linear.predicted).sum())
    steps = linear.pivot(index="seed", columns="arm", values="steps")
    kappa = linear.groupby("arm").kappa.median()
    return [
        *speed_ups(networks, [(RAW, STANDARD)], 1.5),
        paired(
            RATIO,
            np.log(steps[RAW] / steps[STANDARD]),
            delta=math.log(1.5),
            note=f"median steps {number(steps[RAW].median())} and {number(steps[STANDARD].median())}; "
            f"κ = {number(kappa[RAW])} and {number(kappa[STANDARD])}, and {number(kappa[SHIFTED])} when 3 is "
            "added to every standardised pixel",
        ),
        law(
            THEORY,
            fit.slope,
            fit.slope_interval,
            theory=1.0,
            n=fit.n,
            note=f"power of the predicted number; {exact} of {len(linear)} counts agree to the step",
        ),
        *speed_ups(networks, [(RAW, CENTRED)], 1.5),
    ]


def figures_c33(tables: Tables) -> list[Drawing]:
    """The regressions' loss and condition numbers, and the network's loss."""
    return [
        _descents(tables, "A mean that is not zero is one huge eigenvalue.", log_x=True),
        _conditions(tables),
        _losses(
            tables,
            "A tanh network learning +1 for the class and −1 for the others, each arm at the rate that is "
            "best for it. Centred inputs differ from raw ones in the mean alone.",
        ),
    ]


def _descents(tables: Tables, caption: str, log_x: bool) -> Drawing:
    kappa = tables["linear"].groupby("arm").kappa.median()
    curves = tables["descent"]
    curves = curves[curves.step > 0] if log_x else curves
    rows = spread(curves.assign(excess=curves.excess.clip(lower=FLOOR)), ["arm", "step"], "excess")
    rows["arm"] = [f"{arm}, κ = {number(kappa[arm])}" for arm in rows.arm]
    drawn = figure(
        "Linear regression on digits", "step", "excess loss, share of the start", log_x=log_x, log_y=True
    )
    lines(drawn, rows, "step", "middle", by="arm", band=("low", "high"))
    reference(drawn, TARGET, "counted as arrived")
    return Drawing(
        drawn,
        "Gradient descent at the rate 1/L, L the largest eigenvalue of the inputs' second moments, on random "
        f"halves of the digits (median and 80 % of them, cut at {number(FLOOR)}). {caption}",
    )


def _conditions(tables: Tables) -> Drawing:
    rows = spread(tables["linear"], ["arm"], "kappa", low=0.0, high=1.0)
    drawn = figure("Condition number of linear regression", "condition number κ", "inputs", log_x=True)
    intervals(drawn, rows.arm.tolist(), rows.middle, rows.low, rows.high)
    return Drawing(
        drawn,
        "Largest over smallest eigenvalue of the Hessian, which is the second moment of the inputs and the "
        "constant 1; median and range over halves of the digits.",
    )


def _losses(tables: Tables, caption: str) -> Drawing:
    curves = tables["training"]
    first = curves.network.iloc[0]
    curves = curves[(curves.network == first) & (curves.step > 0)]
    curves = curves.assign(train_loss=curves.train_loss.replace(math.inf, np.nan))
    rows = spread(curves, ["arm", "step"], "train_loss")
    drawn = figure(f"Training loss, {first}", "step", "half the squared error", log_x=True, log_y=True)
    lines(drawn, rows, "step", "middle", by="arm", band=("low", "high"))
    reference(drawn, float(curves.target.iloc[0]), "counted as arrived")
    return Drawing(drawn, caption + " Median and 80 % of the seeds.")


C33 = Claim(
    id="C33",
    section="6.4.1",
    title="Inputs of mean 0 and variance 1",
    statement="Training is faster when the inputs are normalised to mean 0 and variance 1.",
    source="Notes §6.4.1; LeCun, Bottou, Orr & Müller 1998, Efficient BackProp, §4.3 and §5.3",
    experiment=experiment_c33,
    judge=judge_c33,
    figures=figures_c33,
    combine=all_but(*(compared(name, RAW, CENTRED) for name in NETWORKS)),
    caveats=(
        "A common factor of all inputs is absorbed by the learning rate; what counts is the mean and the "
        "ratio of the scales. With saturating units the scale counts as well, because the initial weights "
        "were meant for inputs of variance 1.",
        "Dividing by a small deviation also magnifies pixels that are hardly ever set. Pixels that are "
        "constant are left out of it.",
        "Speed is what is compared, so the rates are chosen, for each arm, by the steps to the target "
        "on seeds of their own, not by validation loss. The target, a share of the loss of the best constant "
        "output, and the steps allowed were settled after a first look at what the arms reach in seconds.",
        "The regressions run at 1/L and start from zero weights; eigenvalues below 10⁻¹² of the largest "
        "count as zero.",
    ),
    errata=("E18",),
)

# -- C34 -----------------------------------------------------------------------------------------------

ONE_STEP = "linear regression on whitened inputs converges in one step"
GENERAL = "test accuracy, points lost by whitening"


def experiment_c34(lab: Lab) -> Tables:
    """One step on random whitened data; the regressions and networks standardised and whitened."""
    instances = lab.pick(200, 1000)
    return evidence(lab, [STANDARD, WHITE], [STANDARD, PCA, ZCA]) | {"one_step": one_step(instances)}


def judge_c34(tables: Tables) -> list[Finding]:
    """V1 for the one step, V3 for the networks; what whitening does to test accuracy is context."""
    instances, networks = tables["one_step"], tables["networks"]
    findings = [
        *speed_ups(networks, [(STANDARD, PCA), (STANDARD, ZCA)], 1.2),
        replace(
            identity(ONE_STEP, instances.whitened),
            note=f"standardised, it leaves {number(instances.standardised.median())} of the excess",
        ),
    ]
    for network, rows in networks.groupby("network", sort=False):
        scores = 100 * rows.pivot(index="seed", columns="arm", values="test_accuracy").fillna(0.0)
        findings.append(
            paired(
                f"{network}: {GENERAL}",
                scores[STANDARD] - scores[PCA],
                delta=0.5,
                least=int(rows.least.iloc[0]),
                note=f"{number(scores[STANDARD].median())} % standardised, {number(scores[PCA].median())} % "
                "whitened, after the same number of steps",
            )
        )
    return findings


def figures_c34(tables: Tables) -> list[Drawing]:
    """The regressions' and the network's loss."""
    return [
        _descents(tables, "On whitened inputs the first step arrives at the minimum.", log_x=False),
        _losses(
            tables,
            "A tanh network on pixels that are standardised, and on the same pixels made uncorrelated, each "
            "arm at the rate that is best for it.",
        ),
    ]


C34 = Claim(
    id="C34",
    section="6.4.1",
    title="Whitened inputs",
    statement="Training is faster when the inputs are whitened, which also removes their correlations.",
    source="Notes §6.4.1; LeCun, Bottou, Orr & Müller 1998, Efficient BackProp, §4.3",
    experiment=experiment_c34,
    judge=judge_c34,
    figures=figures_c34,
    combine=all_but(*(f"{name}: {GENERAL}" for name in NETWORKS)),
    caveats=(
        "The notes use whitening for mean 0 and variance 1; it also asks for no correlations.",
        "With the identity as second moment every direction of a linear model has the same curvature, and "
        "that is all that is proved. A network's hidden layers are not whitened by it.",
        "For the networks 1 % of the mean eigenvalue is added to every eigenvalue of the standardised "
        "inputs. Whitening makes directions of noise as large as the others, and may cost generalisation "
        "(Wadia et al. 2021).",
        "The rates are chosen as for C33, by the steps to the target on seeds of their own.",
    ),
    errata=("E18",),
)
