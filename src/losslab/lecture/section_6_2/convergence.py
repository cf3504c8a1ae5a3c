"""C11: SGD converges more slowly: per update, per sample, and down to which level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables
from losslab.lecture.figures import figure, lines, predicted, reference, spread
from losslab.lecture.numbers import number
from losslab.lecture.section_6_2.noise_floor import RATES, excess_under_noise
from losslab.lecture.section_6_2.race import ARMS, DECAY, TARGETS, Arm, Problem, directions, race
from losslab.lecture.statistics import bootstrap_interval, fit_power_law
from losslab.lecture.verdicts import law, paired, paired_family
from losslab.tasks import Data, digits

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

COPIES, PATTERNS = 10, 100
REDUNDANT = {
    name: ARMS[name]._replace(updates=updates) for name, updates in (("GD", 200), ("SGD, B = 1", 4000))
}


def copied(data: Data, patterns: int, copies: int) -> Data:
    """The first examples of a data set, several times over."""
    x, y = data.head(patterns).all()
    return Data((x.repeat(copies, 1), y.repeat(copies)))


def evidence(
    lab: Lab, seeds: int, arms: Mapping[str, Arm], redundant: Mapping[str, Arm], runs: int, steps: int
) -> Tables:
    """The race on digits and on ten copies of 100 digits, and the floor of a noisy quadratic.

    Args:
        lab: Told about progress.
        seeds: Replicates of each race.
        arms: What races on digits.
        redundant: What races on the copies.
        runs: Runs of the quadratic at each rate.
        steps: Updates of each; the floor is measured over the later half.
    """
    import pandas as pd

    lab.progress("racing gradient descent and SGD on digits")
    problem = Problem.of(digits().train)
    reached, curves = race(problem, arms, TARGETS, seeds)
    lab.progress("racing them on ten copies of 100 digits")
    tenfold = Problem.of(copied(digits().train, PATTERNS, COPIES))
    copies, _ = race(tenfold, redundant, [0.01], seeds)
    lab.progress("measuring the noise floor of a quadratic")
    floor, course = excess_under_noise(RATES, runs, settle=steps // 2, steps=steps)
    fastest = reached[(reached.arm == "GD") & (reached.target == min(TARGETS))].lr.iloc[0]
    facts = {
        "problem": ["digits", "copies"],
        "minimum": [problem.minimum, tenfold.minimum],
        "gap": [problem.gap, tenfold.gap],
        "mu": DECAY,
        "L": [problem.smoothness, tenfold.smoothness],
    }
    return {
        "reached": pd.concat(
            [reached.assign(data="digits"), copies.assign(data="copies")], ignore_index=True
        ),
        "curves": curves,
        "directions": directions(problem, float(fastest), seeds),
        "floor": floor,
        "course": course,
        "problems": pd.DataFrame(facts),
    }


def experiment(lab: Lab) -> Tables:
    """Three arms on digits, two on the copies, seven rates on the quadratic."""
    return evidence(
        lab, lab.replicates(10, 30), ARMS, REDUNDANT, runs=lab.pick(24, 100), steps=lab.pick(20000, 60000)
    )


def judge(tables: Tables) -> list[Finding]:
    """V3 per update and per sample, V4 for the floor."""
    reached, floor, course = tables["reached"], tables["floor"], tables["directions"]
    digit = reached[reached["data"] == "digits"]
    means = floor.groupby("rate")[["excess", "exact"]].mean()
    fit, bend = (fit_power_law(means.index, means[column]) for column in ("excess", "exact"))
    ratio = floor.excess / floor.exact
    note = "median of log₁₀ of SGD's count over gradient descent's, every rate tuned for its target"
    per_update = {
        f"more updates to 0.1 % excess, {arm}": ratios
        for arm, ratios in _log_ratios(digit[digit.target == min(TARGETS)], "updates").items()
    }
    per_sample = {
        f"more samples to {100 * target:g} % excess, {arm}": ratios
        for target in TARGETS[:2]
        for arm, ratios in _log_ratios(digit[digit.target == target], "samples").items()
    }
    copies = _log_ratios(reached[reached["data"] == "copies"], "samples")
    return [
        *paired_family(per_update, delta=0.0, note=note),
        law(
            "excess left by a constant rate ∝ η",
            fit.slope,
            fit.slope_interval,
            theory=1.0,
            n=fit.n,
            note=f"slope of the exact recursion at these rates: {number(bend.slope)}; 1 as η → 0",
        ),
        law(
            "that excess over the exact recursion's",
            float(ratio.mean()),
            bootstrap_interval(ratio, np.mean),
            theory=1.0,
            n=len(ratio),
        ),
        *paired_family(per_sample, delta=0.0, note=note),
        *(
            paired(f"more samples to 1 % on ten copies of 100 digits, {arm}", ratios, delta=0.0, note=note)
            for arm, ratios in copies.items()
        ),
        paired(
            "a sample's step points less towards the minimum",
            (course.whole - course["sample"]).groupby(course.seed).mean(),
            delta=0.1,
            note="difference of the cosines, the mean along gradient descent",
        ),
    ]


def _log_ratios(reached: pd.DataFrame, count: str) -> dict[str, np.ndarray]:
    """For each arm but GD, log10 of its count over that of GD, one value a seed."""
    wide = np.log10(reached.pivot(index="seed", columns="arm", values=count))
    return {arm: (wide[arm] - wide["GD"]).to_numpy() for arm in ARMS if arm != "GD" and arm in wide}


def figures(tables: Tables) -> list[Drawing]:
    """Excess loss against updates and against samples, and the floor against the rate."""
    setting = "L2-regularised softmax regression on 1000 digits, every rate tuned for 0.1 % excess."
    by_update = _excess(tables["curves"], "step", "updates", TARGETS[2:])
    by_sample = _excess(tables["curves"], "samples", "samples processed", TARGETS[:2])
    floor = tables["floor"].groupby("rate")[["excess", "exact"]].mean().reset_index()
    level = figure("Noise floor", "learning rate × L", "excess loss at the end", log_x=True, log_y=True)
    lines(level, floor, "rate", "excess", mode="markers", name="SGD")
    predicted(level, (floor.rate, floor.exact), name="exact")
    return [
        Drawing(by_update, f"{setting} Per update gradient descent is the fastest by far."),
        Drawing(by_sample, f"{setting} Per sample the order is reversed, until SGD nears its noise floor."),
        Drawing(
            level,
            "A quadratic with condition number 100 and additive gradient noise: a constant rate stalls at a "
            "height in proportion to it.",
        ),
    ]


def _excess(curves: pd.DataFrame, count: str, title: str, targets: Sequence[float]) -> Figure:
    rows = spread(curves[curves[count] > 0], ["arm", count], "excess")
    drawn = figure(f"Excess loss against {title}", title, "excess / its start", log_x=True, log_y=True)
    lines(drawn, rows[rows.middle > 1e-5], count, "middle", by="arm", band=("low", "high"))
    for target in targets:
        reference(drawn, target, f"{100 * target:g} %")
    return drawn


C11 = Claim(
    id="C11",
    section="6.2.2",
    title="SGD converges more slowly",
    statement="SGD converges more slowly than gradient descent, because its gradient is noisier and a step "
    "need not point at the minimum.",
    source="Notes §6.2.2; Bottou, Curtis & Nocedal 2018, Theorem 4.6; Efficient BackProp §4.1",
    experiment=experiment,
    judge=judge,
    figures=figures,
    caveats=(
        "Updates and samples are different clocks: an update of gradient descent costs as many samples as "
        "there are. Both are judged.",
        "The quantity minimised is the training loss itself, so the rates are tuned on it, with other seeds "
        "than those judged, separately for each method and target.",
        "A constant rate is used throughout. A decreasing one removes the floor, and where every sample can "
        "be fitted exactly there is none (Ma, Bassily & Belkin 2018; Vaswani et al. 2019).",
        "The time to a target is read off a grid of about 10 % steps.",
    ),
    errata=("E6",),
)
