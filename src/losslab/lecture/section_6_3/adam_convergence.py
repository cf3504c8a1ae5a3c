"""C31: Adam on the linear losses of Reddi, Kale & Kumar 2018, beside the rules that converge there."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, agreement
from losslab.lecture.figures import figure, lines, reference
from losslab.lecture.section_6_3.adam_sequence import (
    BETA2,
    MEAN,
    PERIOD,
    PLAIN,
    RANDOM_MEAN,
    RANDOM_RATE,
    contestants,
    critical_beta2,
    drift,
    drive,
    random_stream,
    sequence,
    theorem_1,
)
from losslab.lecture.verdicts import count, identity

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

TEN_OF_TEN = 0.69
"""Ten runs out of ten have a Clopper-Pearson interval from 0.6915."""

SWEEP = "the sign of the drift predicts the end for every β₂"


def horizon(lab: Lab) -> int:
    """Steps of the online run."""
    return PERIOD * lab.pick(1_300, 15_000, 50_000)


def _experiment(lab: Lab) -> Tables:
    tables = {"online": sequence(horizon(lab), lab.progress), "theorem": theorem_1()}
    steps = lab.pick(0, 10_000_000, 20_000_000)
    if steps:
        seeds = lab.replicates(10)
        rules = {
            n: r for n, r in contestants(RANDOM_RATE, (BETA2,), seeds).items() if n in ("Adam", "AMSGrad")
        }
        stream = functools.partial(random_stream, seeds=seeds)
        tables["random"] = drive(rules, stream, steps, RANDOM_MEAN, lab.progress)
    return tables


def ends(table: pd.DataFrame, rule: str, beta2: float | None = BETA2) -> pd.DataFrame:
    """The rows of the last step, of one rule; of one decay where it has any."""
    last = table[(table["step"] == table["step"].max()) & (table["rule"] == rule)]
    return last if beta2 is None or last["beta2"].isna().all() else last[last["beta2"] == beta2]


def reaches(table: pd.DataFrame, rule: str, optimum: bool, what: str) -> Finding:
    """Whether a rule ends at the optimum -1, or at the worst point +1, in ten runs of ten."""
    x = ends(table, rule)["x"]
    good = x < -0.9 if optimum else x > 0.9
    told = f"at the last step x lies in [{x.min():.3f}, {x.max():.3f}]"
    place = "the optimum, x < −0.9" if optimum else "the worst point, x > 0.9"
    return count(f"{rule} ends at {place} ({what})", int(good.sum()), len(good), TEN_OF_TEN, note=told)


def _keeps_regret(table: pd.DataFrame, mean: float, what: str) -> Finding:
    """Whether Adam's expected average regret at T exceeds 0.9 times that of x = 1 and has not fallen."""
    after = ends(table, "Adam").set_index("run")["expected"]
    adam = table[(table["rule"] == "Adam") & (table["beta2"] == BETA2)]
    tenth = adam[adam["step"] == int(table["step"].max()) // 10]
    before = tenth.set_index("run")["expected"].reindex(after.index)
    share = after / (2 * mean)
    kept = (share > 0.9) & (after >= before)
    return count(
        f"Adam's average regret does not vanish ({what})",
        int(kept.sum()),
        len(kept),
        TEN_OF_TEN,
        note=f"at the last step {share.min():.3f} to {share.max():.3f} of the regret of x = 1",
    )


def _sweep_ends(table: pd.DataFrame) -> pd.DataFrame:
    last = ends(table, "Adam", None).copy()
    last["drift"] = [drift(beta2) for beta2 in last["beta2"]]
    return last


def _judge(tables: Tables) -> list[Finding]:
    table, theorem = tables["online"], tables["theorem"]
    sweep = _sweep_ends(table)
    agree = (sweep["x"] < 0) == (sweep["drift"] > 0)
    findings = [
        reaches(table, "Adam", False, "online"),
        reaches(table, PLAIN, False, "online"),
        _keeps_regret(table, MEAN, "online"),
        reaches(table, "AMSGrad", True, "online"),
        reaches(table, "SGD", True, "online"),
        identity("Theorem 1: x = 1 at the start of every period", theorem["deviation"]),
        count(SWEEP, int(agree.sum()), len(agree), 0.9, note=f"critical β₂ = {critical_beta2():.5f}"),
    ]
    if "random" in tables:
        random = tables["random"]
        findings += [
            reaches(random, "Adam", False, "stochastic"),
            _keeps_regret(random, RANDOM_MEAN, "stochastic"),
            reaches(random, "AMSGrad", True, "stochastic"),
        ]
    return findings


def spread(table: pd.DataFrame, column: str, names: tuple[str, ...]) -> pd.DataFrame:
    """Median, smallest and largest over the runs of each rule at each step, from the second period on."""
    main = table[table["beta2"].isna() | (table["beta2"] == BETA2)]
    main = main[main["rule"].isin(names) & (main["step"] > PERIOD)]
    grouped = main.groupby(["rule", "step"], sort=False)[column].agg(["median", "min", "max"])
    return grouped.reset_index()


def _figures(tables: Tables) -> list[Drawing]:
    table = tables["online"]
    names = ("Adam", "AMSGrad", "AdamNC", "SGD")
    path = figure("Where the rules go", "step t", "x", log_x=True)
    lines(path, spread(table, "x", names), "step", "median", by="rule", band=("min", "max"))
    reference(path, -1.0, "optimum")
    average = figure("Average regret", "step t", "R/t, expected", log_x=True)
    lines(average, spread(table, "expected", names), "step", "median", by="rule", band=("min", "max"))
    reference(average, 2 * MEAN, "regret of x = 1")
    return [
        Drawing(
            path,
            "Median over the offsets of the sequence, and range. Over a period the losses sum to 10 x, so "
            "the optimum is −1: Adam drifts to +1, the others reach the optimum.",
        ),
        Drawing(
            average,
            "Average regret against −1 so far, with the mean gradient 10/101 in place of each step's: "
            "Adam's tends to that of always playing +1.",
        ),
        Drawing(
            _sweep_figure(table),
            "The same problem with other decays. To the right of the line the net move of a period, known "
            f"in closed form, points to +1, to the left to −1; it vanishes at β₂ = {critical_beta2():.5f}.",
        ),
    ]


def _sweep_figure(table: pd.DataFrame) -> Figure:
    grouped = _sweep_ends(table).groupby("beta2", as_index=False)
    sweep = grouped.agg(median=("x", "median"), low=("x", "min"), high=("x", "max"))
    drawn = figure("End point and decay", "1 − β₂", "x at the last step", log_x=True)
    sweep["memory"] = 1 - sweep["beta2"]
    lines(drawn, sweep, "memory", "median", band=("low", "high"), mode="lines+markers", name="Adam")
    reference(drawn, 1 - critical_beta2(), "predicted change", axis="x")
    return drawn


C31 = Claim(
    id="C31",
    section="6.3.3",
    title="Adam does not converge on some convex problems",
    statement="Although widely used, Adam provably fails to converge, even on some convex problems.",
    source="Notes §6.3.3; Reddi, Kale & Kumar 2018, Theorems 1–3 and §5",
    paper=True,
    experiment=_experiment,
    judge=_judge,
    figures=_figures,
    combine=lambda findings: agreement([finding for finding in findings if finding.name != SWEEP]),
    caveats=(
        "The losses are a sequence made for given β₁ and β₂: 1010 x once in 101 steps and −10 x otherwise, "
        "x in [−1, 1], β₁ = 0.9, β₂ = 0.99. The theorems do not speak of one fixed convex function.",
        "The paper prints no step size here. α = 3.5 in α/√t was derived before any run: the geometric "
        "mean of the least α at which AMSGrad can drift from +1 to −0.9 and the largest at which AdamNC's "
        "swing within a period stays below 0.1. Between them is room from 1.2·10⁵ steps on. SGD's rate is "
        "AMSGrad's, divided by the root of its final v.",
        "Regret is judged with the mean gradient. The exact regret, kept in the tables, has a term from "
        "the swing within a period; it falls like α/√t and hides the limit at short horizons.",
        "A β₂ large enough for the problem repairs Adam (Zhang et al. 2022). The sweep, which shows where, "
        "has no part in the verdict.",
        "The stochastic version (1010 x with probability 0.01) needs 5.6·10⁶ steps by the same argument. It "
        "runs in the profiles full (10⁷) and paper (2·10⁷), with α = 0.57. A run of 3·10⁶ with α = 0.4 was "
        "too short: AMSGrad was at the optimum in 3 of 10 runs.",
        "Toint (2023) gives a fixed smooth function of one variable, not convex, on which Adam with a "
        "constant step diverges; it is not run here.",
    ),
    errata=("E21",),
)
