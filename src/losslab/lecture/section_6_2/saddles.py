"""C14: the noise in SGD helps to escape saddle points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables
from losslab.lecture.figures import contours_with_paths, figure, lines, predicted, reference, spread
from losslab.lecture.numbers import number
from losslab.lecture.section_6_2.motion import mean_escape
from losslab.lecture.section_6_2.saddle_functions import (
    NOISES,
    RADIUS,
    RATE,
    escapes,
    horizon,
    octopus_runs,
    paths,
)
from losslab.lecture.section_6_2.saddle_networks import (
    PLATEAU,
    escape_steps,
    identical_neurons,
    linear_origin,
    plateau,
)
from losslab.lecture.statistics import fit_power_law
from losslab.lecture.verdicts import count, law, paired_family
from losslab.tasks import saddle

if TYPE_CHECKING:
    import pandas as pd

APART = 0.1
"""Difference between two hidden units' weights, themselves of order 1, from which they count as told "
"apart."""


class Sizes(NamedTuple):
    """How much work to do: runs of the functions, seeds of the networks, updates of each."""

    runs: int
    resting: int
    octopus_runs: int
    dimensions: Mapping[int, int]
    seeds: int
    linear: int
    neurons: int
    plateau: int


def evidence(lab: Lab, sizes: Sizes) -> Tables:
    """Five saddles: two functions, a linear network, identical neurons, and a small start on digits."""
    lab.progress("leaving the saddles of two functions")
    tables = {
        "paths": paths([0.0, 1e-12, -1e-3, 0.1], noise=0.15, runs=2, steps=400),
        "escapes": escapes(NOISES, sizes.runs, sizes.resting),
        "octopus": octopus_runs(sizes.dimensions, sizes.octopus_runs),
    }
    lab.progress("leaving the saddles of networks")
    return {
        **tables,
        "linear": linear_origin(2 * sizes.seeds, sizes.linear),
        "neurons": identical_neurons(sizes.seeds, sizes.neurons),
        "plateau": plateau([None, 1, 10, 100], sizes.seeds, sizes.plateau, every=2),
    }


def experiment(lab: Lab) -> Tables:
    """The settings of the claim."""
    sizes = Sizes(
        runs=lab.pick(300, 2000),
        resting=lab.pick(2000, 10000),
        octopus_runs=lab.pick(100, 300),
        dimensions={d: horizon(d) for d in (5, 10)},
        seeds=lab.replicates(10, 30),
        linear=1000,
        neurons=3000,
        plateau=200,
    )
    return evidence(lab, sizes)


def judge(tables: Tables) -> list[Finding]:
    """V2 and V4 for the two functions, V2 for the two symmetric starts, V3 for the plateau."""
    return [
        *_judge_functions(tables["escapes"], tables["octopus"]),
        *_judge_symmetric(tables["linear"], tables["neurons"]),
        *_judge_plateau(tables["plateau"]),
    ]


def _judge_functions(table: pd.DataFrame, octopuses: pd.DataFrame) -> list[Finding]:
    still, noisy = table[table.noise == 0], table[table.noise > 0]
    medians = noisy.groupby("noise").steps.median()
    fit = fit_power_law(1 / (RATE * medians.index), (1 + RATE) ** medians)
    findings = [
        count("x²/2 − y²/2 + y⁴/4: SGD leaves y = 0", _arrived(noisy.steps), len(noisy), at_least=0.95),
        count(
            "gradient descent stays on y = 0",
            len(still) - _arrived(still.steps),
            len(still),
            at_least=0.95,
            note=f"{still.limit.iloc[0]} updates",
        ),
        law(
            "SGD's growth until escape ∝ 1/(η × noise)",
            fit.slope,
            fit.slope_interval,
            theory=1.0,
            n=fit.n,
            note="(1 + η)^T of the median T against 1/(ηs)",
        ),
    ]
    for dimension, group in octopuses.groupby("dimension"):
        sgd, gd = (group[group.rule == rule].steps for rule in ("SGD", "GD"))
        for rule, arrived, runs in (
            ("SGD passes all saddles", _arrived(sgd), len(sgd)),
            ("gradient descent does not, in as many updates", len(gd) - _arrived(gd), len(gd)),
        ):
            note = f"{group.limit.iloc[0]} updates"
            label = f"octopus, d = {dimension}: {rule}"
            findings.append(count(label, arrived, runs, at_least=0.9, note=note))
    return findings


def _arrived(steps: pd.Series) -> int:
    return int(np.isfinite(steps).sum())


def _judge_symmetric(linear: pd.DataFrame, neurons: pd.DataFrame) -> list[Finding]:
    sgd = linear[linear.rule == "sgd"]
    resting, kicked = sgd[sgd.start == "W = 0"], sgd[sgd.start == "kicked"]
    arms = {arm: group.difference for arm, group in neurons.groupby("arm")}
    rounded = arms["matrix products"]
    return [
        count(
            "SGD leaves W = 0 of a three-layer linear network",
            int((resting.moved > 0).sum()),
            len(resting),
            at_least=0.5,
            note="every sample's gradient is zero there",
        ),
        count(
            "after a Gaussian kick to the weights it does",
            int((kicked.loss < 0.5).sum()),
            len(kicked),
            at_least=0.5,
            note="loss below half of that at W = 0",
        ),
        count(
            "SGD tells identical neurons apart",
            int((arms["identical"] > APART).sum()),
            len(arms["identical"]),
            at_least=0.5,
            note=f"largest difference after the run: {number(arms['identical'].max())}; with matrix "
            f"products, which may round identical columns differently, {number(rounded.min())} to "
            f"{number(rounded.max())}",
        ),
        count(
            "after a Gaussian kick to the weights they part",
            int((arms["kicked"] > APART).sum()),
            len(arms["kicked"]),
            at_least=0.5,
        ),
    ]


def _judge_plateau(rows: pd.DataFrame) -> list[Finding]:
    steps = escape_steps(rows)
    differences = {
        f"fewer updates to leave the plateau of a small start, {arm}": 1 - steps[arm] / steps["GD"]
        for arm in steps
        if arm != "GD"
    }
    note = f"share saved against gradient descent, which takes {number(steps['GD'].median())} updates"
    return paired_family(differences, delta=0.2, note=note)


def figures(tables: Tables) -> list[Drawing]:
    """The paths over the saddle, escape time against noise, and the plateau."""
    return [_paths(tables["paths"]), _times(tables["escapes"]), _plateau(tables["plateau"])]


def _paths(rows: pd.DataFrame) -> Drawing:
    across = up = np.linspace(-1.5, 1.5, 71)
    grid = torch.from_numpy(np.stack(np.meshgrid(across, up), axis=-1))
    tracks = {str(name): group[["x", "y"]].to_numpy() for name, group in rows.groupby("path", sort=False)}
    drawn = contours_with_paths("Paths over the saddle", across, up, saddle.f(grid).numpy(), tracks)
    return Drawing(
        drawn,
        "400 steps with η = 0.1 on x²/2 − y²/2 + y⁴/4. Gradient descent comes from the right, (1.3, y₀): "
        "from y₀ = 0 it ends in the saddle, from anywhere else it waits there, the longer the smaller y₀ is, "
        "and leaves. SGD, whose gradients carry normal noise of 0.15, comes from (−1.3, 0) and does not "
        "wait.",
    )


def _times(table: pd.DataFrame) -> Drawing:
    noisy = table[np.isfinite(table.steps) & (table.noise > 0)]
    rows = spread(noisy, ["noise"], "steps", low=0.05, high=0.95)
    title = f"steps until |y| ≥ {RADIUS:g}"
    drawn = figure("Escape time of SGD", "noise s of the gradient", title, log_x=True)
    lines(drawn, rows, "noise", "middle", band=("low", "high"), mode="lines+markers", name="SGD from y = 0")
    rough = [math.log(RADIUS / (RATE * s)) / math.log(1 + RATE) for s in rows.noise]
    predicted(drawn, (rows.noise, rough), name="log(r/ηs) / log(1 + η)")
    exact = [mean_escape(RATE, 1.0, s, RADIUS) for s in rows.noise]
    predicted(drawn, (rows.noise, exact), name="exact mean of the quadratic part")
    drawn.data[-1].line.dash = "dot"
    return Drawing(
        drawn,
        "The time to leave the saddle grows only like the logarithm of 1/noise (median and 90 % of the "
        "runs). Without noise it is infinite.",
    )


def _plateau(rows: pd.DataFrame) -> Drawing:
    middle = rows.groupby(["arm", "step"], sort=False).train_loss.median().reset_index()
    drawn = figure("Leaving a plateau", "updates", "training loss")
    lines(drawn, middle, "step", "train_loss", by="arm")
    reference(drawn, PLATEAU, "left the plateau")
    return Drawing(
        drawn,
        "Digits, 64-32-10 tanh network from weights of scale 10⁻³ at one learning rate (medians over seeds): "
        "here the start is beside the saddle, not on it, and noise has nothing to add.",
    )


C14 = Claim(
    id="C14",
    section="6.2.2",
    title="Noise helps SGD to escape saddle points",
    statement="The noisier gradients of SGD help it to escape saddle points.",
    source="Notes §6.2.2, §6.2.3; Ge et al. 2015; Du et al. 2017; Jin et al. 2017",
    experiment=experiment,
    judge=judge,
    figures=figures,
    caveats=(
        "Noise helps where it has a component along a direction of negative curvature (Daneshmand et al. "
        "2018). Sampling noise need not: it vanishes at W = 0 of a deep linear network, and it is the same "
        "for identical neurons.",
        "Gradient descent from random starts avoids strict saddles with probability one (Lee et al. 2016), "
        "but it may wait long at each; in double precision the octopus even stops it for good, when a "
        "coordinate has shrunk to exactly zero.",
        "Identical neurons are kept in double precision by sums that run in one order for all of them. The "
        "same network with matrix products is reported beside it: there rounding may break the tie, which "
        "depends on the processor and is no property of SGD.",
        "The octopus agrees with the paper's function on its tubes and is our own extension outside of them.",
    ),
    errata=("E8",),
)
