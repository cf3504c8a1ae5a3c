"""C24: AdaGrad's rates fall, and whether that stops the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from losslab.engine import Population, train
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, decided_by
from losslab.lecture.driving import drive, pulled
from losslab.lecture.figures import figure, lines, reference
from losslab.lecture.section_6_3.jumping import recoveries
from losslab.lecture.statistics import bootstrap_interval, fit_power_law
from losslab.lecture.tuning import rates, tune
from losslab.lecture.verdicts import bound, count, identity, paired
from losslab.rules import AdaGrad, RMSProp, Rule
from losslab.tasks import Task, digits_task, mlp

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

EXACT = "rate η/(|g| √t) under a constant |g|"
FALLING = "a rate never rises"
SLOPE = "slope of the rate on digits"
STOPPED = "weights have stopped while gradients have not, on digits"
RECOVERY = "log of AdaGrad's recovery time over RMSProp's after a jump at step 10 000"
DEFAULTS = "the same at torch's default rates"
WORSE = "log10 of AdaGrad's final training loss over RMSProp's on digits"

RATES: dict[str, tuple[type[Rule], str, list[float]]] = {
    "AdaGrad": (AdaGrad, "s", rates(3e-3, 0.3)),
    "RMSProp": (RMSProp, "v", rates(1e-4, 1e-2)),
}
"""The two arms on digits: the rule, the slot that its rate is made of, and the rates tried first."""

JUMPS = (100, 1000, 10_000)
EPS = 1e-10


# -- gradients given ------------------------------------------------------------------------------------


def constant_size(instances: int, steps: int) -> pd.DataFrame:
    """The largest relative error of eta/(G sqrt t) for gradients of size G and random sign."""
    import pandas as pd

    generator = torch.Generator().manual_seed(24)
    draw = torch.rand(2, instances, 1, generator=generator, dtype=torch.float64)
    size, lr = 10 ** (2 * draw[0]), 10 ** (draw[1] - 1)
    signs = torch.randint(0, 2, (steps, instances, 1), generator=generator).double() * 2 - 1
    moves = drive(AdaGrad(lr=lr[:, 0]), lambda x, step: size * signs[step], torch.zeros_like(size), steps)
    worst = torch.zeros(instances, dtype=torch.float64)
    for move in moves:
        rate = (move.before - move.after) / move.gradient
        error = (rate * size * (move.step + 1) ** 0.5 / lr - 1).abs()
        worst = torch.maximum(worst, error[:, 0])
    return pd.DataFrame({"error": worst.numpy()})


def rises(instances: int, steps: int) -> pd.DataFrame:
    """The largest relative rise of any weight's rate between two steps, on random problems.

    The rate is taken from the rule's state: a difference of weights over a small gradient is mostly rounding.
    """
    import pandas as pd

    gradient, start = pulled(instances, 6, steps, seed=25)
    worst = torch.zeros(instances, dtype=torch.float64)
    before = None
    for move in drive(AdaGrad(lr=0.1, eps=EPS), gradient, start, steps):
        rate = 1 / (move.state["s"].sqrt() + EPS)
        if before is not None:
            worst = torch.maximum(worst, (rate / before - 1).amax(1))
        before = rate
    return pd.DataFrame({"rise": worst.clamp(min=0).numpy()})


# -- a network --------------------------------------------------------------------------------------------


def moments(steps: int) -> list[int]:
    """The steps that are recorded: evenly in the logarithm, and the last twenty."""
    spaced = {int(k) for k in np.geomspace(1, steps - 1, 50)} | {0}
    return sorted(spaced | set(range(max(0, steps - 20), steps)))


def long_run(arm: str, task: Task, lr: float, seeds: Sequence[int], steps: int) -> pd.DataFrame:
    """Median rate over the weights, norms of update and gradient, training loss: one row a (step, seed)."""
    import pandas as pd

    rule, slot, _ = RATES[arm]
    made = rule(lr=lr)
    seen: dict[int, Tensor] = {}

    def watch(population: Population) -> None:
        kept = torch.cat([s.flatten(1) for s in population.state[slot].values()], dim=1)
        seen[population.step - 1] = (lr / (kept.sqrt() + made.eps)).median(dim=1).values  # type: ignore[attr-defined]

    when = moments(steps)
    run = train(
        task,
        made,
        seeds=seeds,
        steps=steps,
        batch_size=32,
        record=when,
        evaluate=[*when, steps],
        evaluate_on=("train",),
        progress=False,
        watch=watch,
    )
    columns = ["step", "seed", "update_norm", "gradient_norm", "train_loss"]
    table = run.history[columns].assign(arm=arm, lr=lr)
    medians = [
        pd.DataFrame({"step": step, "seed": list(seeds), "rate": rate.double()})
        for step, rate in seen.items()
    ]
    return table.merge(pd.concat(medians), how="left", on=["step", "seed"])


def network_runs(
    seeds: Sequence[int], steps: int, tuning_steps: int, width: int = 16
) -> dict[str, pd.DataFrame]:
    """Both arms on digits for a long time, at the rates with the best validation loss after a shorter one."""
    import pandas as pd

    task = digits_task(mlp(64, width, 10))
    runs, tunings = [], []
    for arm, (rule, _, grid) in RATES.items():

        def score(lrs: list[float], members: list[int], rule: type[Rule] = rule) -> Tensor:
            run = train(
                task,
                rule(lr=lrs),
                seeds=members,
                steps=tuning_steps,
                batch_size=32,
                record=[],
                evaluate=[tuning_steps],
                evaluate_on=("validation",),
                progress=False,
            )
            return torch.tensor(run.history.sort_values("member").validation_loss.tolist())

        tuning = tune(score, grid, seeds=[1000, 1001, 1002])
        tunings.append(tuning.table.assign(arm=arm, chosen=tuning.lr, at_edge=tuning.at_edge))
        runs.append(long_run(arm, task, tuning.lr, seeds, steps))
    return {
        "network": pd.concat(runs, ignore_index=True),
        "network_tuning": pd.concat(tunings, ignore_index=True),
    }


# -- the claim ----------------------------------------------------------------------------------------------


def experiment(lab: Lab) -> Tables:
    """Constant gradients, random problems, an optimum that jumps, and a long run on digits."""
    lab.progress("given gradients")
    exact = {
        "constant": constant_size(100, lab.pick(1000, 10_000)),
        "rises": rises(lab.pick(100, 1000), 200),
    }
    seeds = range(lab.replicates(10, 20))
    lab.progress("an optimum that jumps")
    jumped = recoveries(seeds, JUMPS, horizon=lab.pick(5_000, 20_000))
    lab.progress("a long run on digits")
    return {**exact, **jumped, **network_runs(seeds, 20_000, lab.pick(2_000, 20_000))}


def judge(tables: Tables) -> list[Finding]:
    """The laws of the rate, then whether it matters."""
    network, recovery = tables["network"], tables["recovery"]
    adagrad = network[network.arm == "AdaGrad"]
    tuned = recovery[recovery.choice == "tuned"]
    return [
        identity(FALLING, tables["rises"].rise),
        identity(EXACT, tables["constant"].error),
        rate_slope(SLOPE, adagrad, "seed", since=0.01, at_least=-0.6, at_most=-0.3),
        _stopped(adagrad),
        _faster(RECOVERY, tuned),
        _faster(DEFAULTS, recovery[recovery.choice == "default"]),
        _worse(network),
    ]


def rate_slope(
    name: str, runs: pd.DataFrame, by: str, since: float, at_least: float, at_most: float
) -> Finding:
    """The power of the step with which rates change, run by run, against a range.

    Args:
        name: The finding's name.
        runs: Columns ``step``, ``rate`` and ``by``.
        by: What tells the runs apart.
        since: The share of the steps from which the power is fitted.
        at_least: The lower end of the range.
        at_most: The upper end.
    """
    late = runs[(runs.step >= runs.step.max() * since) & runs.rate.notna()]
    slopes = [fit_power_law(rows.step + 1, rows.rate).slope for _, rows in late.groupby(by)]
    test = "median over runs of the slope of log rate on log step"
    middle = float(np.median(slopes))
    return bound(
        name, middle, bootstrap_interval(slopes), len(slopes), test, at_least=at_least, at_most=at_most
    )


def _stopped(runs: pd.DataFrame) -> Finding:
    """Whether the last updates are below 1/100 of the first and the gradients above 1/10 of the first."""
    # The row after the last step has a loss and no update.
    measured = runs[runs.step < runs.step.max()].set_index("seed")[["step", "update_norm", "gradient_norm"]]
    late = measured[measured.step >= measured.step.max() - 19]
    share = late.groupby("seed").median() / measured[measured.step == 0]
    both = (share.update_norm < 1e-2) & (share.gradient_norm > 1e-1)
    middle = share.median()
    return count(
        STOPPED,
        int(both.sum()),
        len(both),
        at_least=0.69,
        note=f"medians of last over first: update {middle.update_norm:.2g}, gradient "
        f"{middle.gradient_norm:.2g}",
    )


def _faster(name: str, runs: pd.DataFrame) -> Finding:
    """RMSProp's advantage after the latest jump, in logarithms; the note tells of the earlier jumps too."""
    steps = runs[runs.jump == runs.jump.max()].pivot(index="seed", columns="arm", values="steps")
    with np.errstate(invalid="ignore"):  # neither recovered
        ratio = np.log(steps["AdaGrad"]) - np.log(steps["RMSProp"])
    jumps = sorted(runs.jump.unique())
    medians = runs.groupby(["arm", "jump"]).steps.median()
    told = [f"{arm} {', '.join(f'{medians[arm, jump]:g}' for jump in jumps)}" for arm in steps]
    note = f"median steps after jumps at {', '.join(f'{jump:g}' for jump in jumps)}: {'; '.join(told)}"
    return paired(name, ratio, delta=float(np.log(5)), note=note)


def _worse(runs: pd.DataFrame) -> Finding:
    end = runs[runs.step == runs.step.max()].pivot(index="seed", columns="arm", values="train_loss")
    medians = ", ".join(f"{arm} {end[arm].median():.2g}" for arm in end)
    end = np.log10(end.fillna(np.inf).clip(lower=1e-12))  # a diverged run is infinitely bad
    return paired(WORSE, end["AdaGrad"] - end["RMSProp"], delta=0.0, note=f"median losses: {medians}")


def figures(tables: Tables) -> list[Drawing]:
    """Rates and norms on digits, and the recovery from a jump."""
    network = tables["network"]
    rate = figure("Rates on digits", "step", "median rate over the weights", log_x=True, log_y=True)
    shown = network[network.rate.notna()].assign(step=network.step + 1)
    columns = ["rate", "update_norm", "gradient_norm"]
    middle = shown.groupby(["arm", "step"], sort=False, as_index=False)[columns].median()
    lines(rate, middle, "step", "rate", by="arm")
    anchor = middle[middle.arm == "AdaGrad"]
    root = anchor.assign(root=anchor.rate.iloc[0] * (anchor.step / anchor.step.iloc[0]) ** -0.5)
    lines(rate, root, "step", "root", name="falling as 1/√t")

    norms = figure("AdaGrad's updates and gradients", "step", "share of the first", log_x=True, log_y=True)
    for column, name in (
        ("update_norm", "norm of the update"),
        ("gradient_norm", "norm of the batch's gradient"),
    ):
        lines(norms, anchor.assign(share=anchor[column] / anchor[column].iloc[0]), "step", "share", name=name)
    reference(norms, 1e-2, "stopped: update below")
    reference(norms, 1e-1, "while gradient above")
    return [
        Drawing(
            rate,
            "Medians over seeds, each arm at its tuned rate. The third line is that of gradients of constant "
            "size. Where gradients vanish AdaGrad's sum stops growing, and RMSProp's rate η/(√v + ε) rises "
            "towards η/ε.",
        ),
        Drawing(
            norms,
            "Medians over seeds. Weights that stopped because of their rates would have small updates while "
            "the gradients are still large.",
        ),
        Drawing(
            _recovery_figure(tables["recovery_trace"]),
            "The optimum of a noisy quadratic jumps at step 10 000. Rates tuned on the time before the "
            "jump, and torch's default of 0.01; one seed.",
        ),
    ]


def _recovery_figure(trace: pd.DataFrame) -> Figure:
    drawn = figure("After the optimum jumps", "steps since the jump", "excess loss", log_y=True)
    named = trace.assign(
        run=[f"{arm}, {choice}" for arm, choice in zip(trace.arm, trace.choice, strict=True)]
    )
    lines(drawn, named, "since", "excess", by="run")
    return drawn


C24 = Claim(
    id="C24",
    section="6.3.2",
    title="AdaGrad's rates shrink until the weights stop",
    statement=(
        "AdaGrad only ever adds to the sum that divides its rates, so they may become so small that the "
        "weights essentially stop changing."
    ),
    source="Notes §6.3.2; Duchi, Hazan & Singer 2011",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=decided_by(FALLING, SLOPE, STOPPED, RECOVERY),
    caveats=(
        "A rate that falls as 1/√t is what gives the O(√T) regret on convex problems; under a constant "
        "gradient the distance travelled still grows as √t, so AdaGrad is never quite frozen.",
        "How slow is slow depends on η: a rate tuned for ten thousand steps is large enough to leave AdaGrad "
        "mobile at their end, the default of the libraries is not.",
        "The rates on digits are tuned by the validation loss after a tenth of the steps in the quick "
        "profile.",
    ),
    errata=("E13",),
)
