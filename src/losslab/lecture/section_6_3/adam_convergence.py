"""C31: Adam on the linear losses of Reddi, Kale & Kumar 2018, beside the rules that converge there."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from losslab.engine.randomness import generator
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, agreement
from losslab.lecture.figures import figure, lines, reference
from losslab.lecture.verdicts import count, identity
from losslab.rules import SGD, Adam, AdamNC, AMSGrad, Rule
from losslab.rules.schedules import inverse_sqrt

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray
    from plotly.graph_objects import Figure

LARGE, SMALL, PERIOD = 1010.0, -10.0, 101
"""The gradients of the online sequence: the large one once a period, the small one otherwise."""

MEAN = (LARGE + (PERIOD - 1) * SMALL) / PERIOD
RANDOM_SHARE = 0.01
RANDOM_MEAN = RANDOM_SHARE * LARGE + (1 - RANDOM_SHARE) * SMALL
"""The mean gradients of the sequence and of its stochastic version; twice that is the regret of x = 1."""

BETA1, BETA2 = 0.9, 0.99
BETA2S = (0.9, 0.97, 0.99, 0.997, 0.999, 0.9997, 0.9999, 0.99997, 0.99999)
OFFSETS = tuple(range(0, 100, 10))
RATE = 3.5  # `rate()`, rounded
RANDOM_RATE = 0.4
TEN_OF_TEN = 0.69
"""Ten runs out of ten have a Clopper-Pearson interval from 0.6915."""

PLAIN = "Adam, no correction"
SWEEP = "the sign of the drift predicts the end for every β₂"

Progress = Callable[[str], None]


def period(beta1: float, beta2: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Adam's ``m`` and ``v`` after each gradient of a period, the large one first, once they repeat."""
    k = np.arange(PERIOD, dtype=np.float64)
    peaks = [(1 - beta) * beta**k / (1 - beta**PERIOD) for beta in (beta1, beta2)]
    return SMALL + (LARGE - SMALL) * peaks[0], SMALL**2 + (LARGE**2 - SMALL**2) * peaks[1]


def drift(beta2: float, beta1: float = BETA1) -> float:
    """How far Adam moves towards the optimum -1 in a period, in units of the rate; negative: towards +1."""
    m, v = period(beta1, beta2)
    return float((m / np.sqrt(v)).sum())


def critical_beta2() -> float:
    """The decay at which Adam's drift changes its sign.

    Example:
        >>> round(critical_beta2(), 4)
        0.9995
    """
    from scipy.optimize import brentq

    return 1 - 10 ** float(brentq(lambda power: drift(1 - 10**power), -5, -2))


def rate() -> float:
    """The ``alpha`` in ``alpha/sqrt(t)`` at which every remedied rule can reach -1 and then stay near it.

    AMSGrad, the slowest, drifts by ``10 alpha_t/sqrt(v_max)`` a period, so by ``a alpha sqrt(T)`` in T steps;
    it must manage the 1.9 from +1 to -0.9. AdamNC, the widest, swings by ``b alpha_t`` within a period, which
    must be at most 0.1 at T. The bounds ``1.9/(a sqrt(T))`` and ``0.1 sqrt(T)/b`` have a geometric mean
    without T, and leave room from T = 1.2e5 on.

    Example:
        >>> round(rate(), 1)
        3.5
    """
    travel = 2 * MEAN / math.sqrt(period(BETA1, BETA2)[1].max())
    swing = (PERIOD - 1) * -SMALL / math.sqrt((LARGE**2 + (PERIOD - 1) * SMALL**2) / PERIOD)
    return math.sqrt(1.9 / travel * 0.1 / swing)


def _rules(alpha: float, beta2s: tuple[float, ...], members: int) -> dict[str, Rule]:
    lr = inverse_sqrt(alpha)
    sweep = torch.tensor(beta2s, dtype=torch.float64).repeat_interleave(members)
    root = math.sqrt(period(BETA1, BETA2)[1].max())
    return {
        "Adam": Adam(lr=lr, beta1=BETA1, beta2=sweep, eps=0.0, box=1.0),
        PLAIN: Adam(lr=lr, beta1=BETA1, beta2=BETA2, eps=0.0, box=1.0, variant="uncorrected"),
        "AMSGrad": AMSGrad(lr=lr, beta1=BETA1, beta2=BETA2, eps=0.0, box=1.0),
        "AdamNC": AdamNC(lr=lr, beta1=BETA1, eps=0.0, box=1.0),
        "SGD": SGD(lr=inverse_sqrt(alpha / root), box=1.0),
    }


def online(start: int, stop: int, offsets: tuple[int, ...] = OFFSETS) -> Tensor:
    """Gradients of steps ``start`` to ``stop - 1``, ``[steps, offsets]``; an offset shifts the sequence."""
    at = torch.arange(start, stop)[:, None] + torch.tensor(offsets)
    return torch.where(at % PERIOD == 0, LARGE, SMALL).double()


def random_stream(start: int, stop: int, seeds: int) -> Tensor:
    """The stochastic version: the large gradient with probability 0.01, ``[steps, seeds]``."""
    columns = [
        torch.rand(stop - start, generator=generator(seed, "stream", start)) < RANDOM_SHARE
        for seed in range(seeds)
    ]
    return torch.where(torch.stack(columns, dim=1), LARGE, SMALL).double()


def drive(
    rules: Mapping[str, Rule],
    gradients: Callable[[int, int], Tensor],
    steps: int,
    mean: float,
    progress: Progress,
    chunk: int = 100 * PERIOD,
) -> pd.DataFrame:
    """Runs every rule from x = 0 on linear losses ``g_t x`` over [-1, 1].

    Args:
        rules: By name. One with more members than there are streams takes the streams again and again.
        gradients: ``(start, stop) -> [stop - start, streams]``.
        steps: The horizon T.
        mean: The mean gradient, positive, so that -1 is the best fixed point.
        progress: Told now and then.
        chunk: Steps between two looks at the trajectories.

    Returns:
        At about 40 steps a decade, T/10 and T: the point ``x`` played at that step, the average regret so
        far against -1 (``exact``), and the same with the mean gradient in place of each (``expected``).
    """
    import pandas as pd

    kept = np.unique(np.r_[np.logspace(0, np.log10(steps), int(40 * np.log10(steps))), steps / 10, steps])
    kept = np.unique(kept.astype(int)) - 1
    width = gradients(0, 1).shape[1]
    xs = {name: {"x": torch.zeros(rule.members() or width).double()} for name, rule in rules.items()}
    states = {name: rule.init(xs[name]) for name, rule in rules.items()}
    sums = {name: torch.zeros(2, xs[name]["x"].numel()).double() for name in rules}
    tables = []
    for start in range(0, steps, chunk):
        stop = min(start + chunk, steps)
        progress(f"step {start:,} of {steps:,}")
        now = kept[(kept >= start) & (kept < stop)]
        stream = gradients(start, stop)
        for name, rule in rules.items():
            g = stream.repeat(1, xs[name]["x"].numel() // width)
            path, xs[name], states[name] = _advance(rule, g, xs[name], states[name], start)
            total = torch.stack([g * (path + 1), mean * (path + 1)]).cumsum(1) + sums[name][:, None]
            sums[name] = total[:, -1]
            at = torch.from_numpy(now - start)
            tables.append(_rows(name, rule, now + 1, path[at], total[:, at], width))
    return pd.concat(tables, ignore_index=True)


def _advance(
    rule: Rule, gradients: Tensor, x: dict[str, Tensor], state: dict[str, dict[str, Tensor]], start: int
) -> tuple[Tensor, dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    path = []
    with torch.inference_mode():  # a tenth faster, and these points are never differentiated
        for step, g in enumerate(gradients.unbind(0), start):
            path.append(x["x"])
            x, state = rule.update({"x": g}, state, x, step)
        return torch.stack(path), x, state


def _rows(
    name: str, rule: Rule, steps: NDArray[np.int64], x: Tensor, sums: Tensor, width: int
) -> pd.DataFrame:
    import pandas as pd

    members = x.shape[1]
    beta2 = np.broadcast_to(np.asarray(getattr(rule, "beta2", np.nan), dtype=np.float64), members)
    average = sums / torch.from_numpy(steps)[:, None]
    return pd.DataFrame(
        {
            "rule": name,
            "beta2": np.tile(beta2, len(steps)),
            "run": np.tile(np.arange(members) % width, len(steps)),
            "step": np.repeat(steps, members),
            "x": x.flatten().numpy(),
            "exact": average[0].flatten().numpy(),
            "expected": average[1].flatten().numpy(),
        }
    )


def theorem_1(instances: int = 100, steps: int = 3000, seed: int = 0) -> pd.DataFrame:
    """How far Adam is from the worst point +1 at the start of each period of Theorem 1's sequence, at most.

    ``C x`` at every third step, ``-x`` otherwise; beta1 = 0, beta2 = 1/(1 + C^2), start +1, and random
    C > 2 and alpha < sqrt(1 - beta2).
    """
    import pandas as pd

    u, v = torch.rand(2, instances, generator=generator(seed, "theorem 1"), dtype=torch.float64)
    large = 2 + 18 * u.clamp(min=1e-3)
    beta2 = 1 / (1 + large**2)
    alpha = 0.99 * v.clamp(min=1e-3) * (1 - beta2).sqrt()
    lr = inverse_sqrt(alpha.tolist())
    rule = Adam(lr=lr, beta1=0.0, beta2=beta2, eps=0.0, box=1.0, variant="uncorrected")
    x = {"x": torch.ones_like(large)}
    gradients = torch.stack([large if step % 3 == 0 else -torch.ones_like(large) for step in range(steps)])
    path, _, _ = _advance(rule, gradients, x, rule.init(x), 0)
    gap = (path[::3] - 1).abs().amax(0)
    return pd.DataFrame({"C": large.numpy(), "alpha": alpha.numpy(), "deviation": gap.numpy()})


_ONLINE: dict[int, pd.DataFrame] = {}


def sequence(steps: int, progress: Progress) -> pd.DataFrame:
    """The online run, which C31 and C32 judge both: done once a process."""
    if steps not in _ONLINE:
        _ONLINE[steps] = drive(_rules(RATE, BETA2S, len(OFFSETS)), online, steps, MEAN, progress)
    return _ONLINE[steps]


def horizon(lab: Lab) -> int:
    """Steps of the online run."""
    return PERIOD * lab.pick(1_300, 15_000, 50_000)


def _experiment(lab: Lab) -> Tables:
    tables = {"online": sequence(horizon(lab), lab.progress), "theorem": theorem_1()}
    steps = lab.pick(0, 3_000_000, 5_000_000)
    if steps:
        seeds = lab.replicates(10)
        rules = {n: r for n, r in _rules(RANDOM_RATE, (BETA2,), seeds).items() if n in ("Adam", "AMSGrad")}
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
            "the optimum is −1: Adam drifts to +1, the others stay at the optimum.",
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
        "The stochastic version (1010 x with probability 0.01) relaxes in about 10⁶ steps. It runs in the "
        "profiles full and paper, with α = 0.4 by the same argument.",
        "Toint (2023) gives a fixed smooth function of one variable, not convex, on which Adam with a "
        "constant step diverges; it is not run here.",
    ),
    errata=("E21",),
)
