"""C24: AdaGrad's rates fall, and whether that stops the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from losslab.engine import Population, train
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, decided_by
from losslab.lecture.figures import figure, lines, reference
from losslab.lecture.section_6_3.driving import drive, pulled
from losslab.lecture.statistics import bootstrap_interval, fit_power_law
from losslab.lecture.tuning import rates, tune
from losslab.lecture.verdicts import bound, count, identity, law, paired
from losslab.rules import AdaGrad, RMSProp, Rule
from losslab.tasks import Task, digits_task, mlp

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray
    from plotly.graph_objects import Figure

EXACT = "rate η/(|g| √t) under a constant |g|"
FALLING = "a rate never rises"
SLOPE = "slope of the rate on digits"
STOPPED = "weights have stopped while gradients have not, on digits"
RECOVERY = "log of AdaGrad's recovery time over RMSProp's after a jump at step 10 000"
DEFAULTS = "the same at torch's default rates"
LONGER = "AdaGrad's recovery time grows as the root of the time of the jump"
WORSE = "log10 of AdaGrad's final training loss over RMSProp's on digits"

RATES: dict[str, tuple[type[Rule], str, list[float]]] = {
    "AdaGrad": (AdaGrad, "s", rates(3e-3, 0.3)),
    "RMSProp": (RMSProp, "v", rates(1e-4, 1e-2)),
}
"""The two arms on digits: the rule, the slot that its rate is made of, and the rates tried first."""

JUMP_RATES = {"AdaGrad": rates(0.03, 3.0), "RMSProp": rates(1e-3, 0.1)}
TORCH_DEFAULT = 0.01  # of torch's Adagrad and of its RMSprop
JUMPS = (100, 1000, 10_000)


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
    """The largest relative rise of any weight's rate between two steps, on random problems."""
    import pandas as pd

    gradient, start = pulled(instances, 6, steps, seed=25)
    worst = torch.zeros(instances, dtype=torch.float64)
    before = None
    for move in drive(AdaGrad(lr=0.1), gradient, start, steps):
        rate = (move.before - move.after) / move.gradient
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
    """Median rate over the weights, norms of update and gradient, and training loss, one row a (step, seed)."""
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
        pd.DataFrame({"step": step, "seed": list(seeds), "rate": rate.double()}) for step, rate in seen.items()
    ]
    return table.merge(pd.concat(medians), how="left", on=["step", "seed"])


def network_runs(seeds: Sequence[int], steps: int, tuning_steps: int, width: int = 16) -> dict[str, pd.DataFrame]:
    """Both arms on digits for a long time, each at the rate with the best validation loss after a shorter one."""
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
    return {"network": pd.concat(runs, ignore_index=True), "network_tuning": pd.concat(tunings, ignore_index=True)}


# -- an optimum that jumps ----------------------------------------------------------------------------------


class Jumping:
    """``|x - c|^2 / 2`` in ten dimensions with standard normal gradient noise, whose optimum c jumps once.

    Args:
        seeds: One a member: draws the two optima and the noise.
        jumps: The step of each member's jump.
        steps: How long a run may be.
    """

    def __init__(self, seeds: Sequence[int], jumps: Sequence[int], steps: int, dimension: int = 10) -> None:
        self.jumps = torch.tensor(jumps)
        names = sorted(set(seeds))
        which = torch.tensor([names.index(seed) for seed in seeds])
        drawn = []
        for seed in names:
            generator = torch.Generator().manual_seed(seed)
            drawn.append(torch.randn(steps + 2, dimension, generator=generator, dtype=torch.float64))
        numbers = torch.stack(drawn, dim=1)
        self.optima, self.noise, self.which = numbers[:2, which], numbers[2:], which

    def run(self, rule: Rule, steps: int) -> Tensor:
        """The loss without noise of every member before each step, ``[steps, N]``."""
        moves = drive(rule, self._gradient, torch.zeros_like(self.optima[0]), steps)
        return torch.stack([(move.before - self._optimum(move.step)).square().sum(1) / 2 for move in moves])

    def _gradient(self, x: Tensor, step: int) -> Tensor:
        return x - self._optimum(step) + self.noise[step][self.which]

    def _optimum(self, step: int) -> Tensor:
        return torch.where((step < self.jumps)[:, None], *self.optima)


def recoveries(seeds: Sequence[int], jumps: Sequence[int], horizon: int) -> dict[str, pd.DataFrame]:
    """Steps after the jump until the excess loss is below a tenth of what the jump made it.

    Each arm runs at the rate with the least mean excess over the longest time before a jump, tuned on other
    seeds, and at torch's default. A run that takes longer than ``horizon`` has not recovered: inf.
    """
    import pandas as pd

    tables, tunings, traces = [], [], []
    for arm, (rule, _, _) in RATES.items():
        calm = max(jumps)

        def score(lrs: list[float], members: list[int], rule: type[Rule] = rule, calm: int = calm) -> Tensor:
            return Jumping(members, [calm] * len(members), calm).run(rule(lr=lrs), calm).mean(0)

        tuning = tune(score, JUMP_RATES[arm], seeds=[1000, 1001, 1002])
        tunings.append(tuning.table.assign(arm=arm, chosen=tuning.lr, at_edge=tuning.at_edge))
        choices = {"tuned": tuning.lr, "default": TORCH_DEFAULT}
        settings = [(choice, lr, jump, s) for choice, lr in choices.items() for jump in jumps for s in seeds]
        table = pd.DataFrame(settings, columns=["choice", "lr", "jump", "seed"]).assign(arm=arm)
        problem = Jumping(table.seed.tolist(), table.jump.tolist(), calm + horizon)
        excess = problem.run(rule(lr=table.lr.tolist()), calm + horizon).numpy()
        tables.append(table.assign(steps=_recovered(excess, table.jump.to_numpy(), horizon)))
        shown = np.arange(max(0, calm - 200), calm + min(horizon, 2000), 10)
        for choice in choices:
            (member, *_) = table.index[(table.choice == choice) & (table.jump == calm)]
            trace = pd.DataFrame({"since": shown - calm, "excess": excess[shown, member]})
            traces.append(trace.assign(arm=arm, choice=choice))
    return {
        "recovery": pd.concat(tables, ignore_index=True),
        "recovery_trace": pd.concat(traces, ignore_index=True),
        "recovery_tuning": pd.concat(tunings, ignore_index=True),
    }


def _recovered(excess: NDArray[np.float64], jumps: NDArray[np.int64], horizon: int) -> list[float]:
    times = []
    for member, jump in enumerate(jumps):
        after = excess[jump : jump + horizon, member]
        low = np.flatnonzero(after < after[0] / 10)
        times.append(float(low[0]) if low.size else float("inf"))
    return times


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
    growing = tuned[(tuned.arm == "AdaGrad") & np.isfinite(tuned.steps)]
    fit = fit_power_law(growing.jump, growing.steps)
    return [
        identity(FALLING, tables["rises"].rise),
        identity(EXACT, tables["constant"].error),
        _slope(adagrad),
        _stopped(adagrad),
        _faster(RECOVERY, tuned),
        _faster(DEFAULTS, recovery[recovery.choice == "default"]),
        law(LONGER, fit.slope, fit.slope_interval, theory=0.5, n=fit.n, note="at tuned rates"),
        _worse(network),
    ]


def _slope(runs: pd.DataFrame) -> Finding:
    """The power of the step by which the median rate falls over the last two decades, seed by seed."""
    late = runs[(runs.step >= runs.step.max() / 100) & runs.rate.notna()]
    slopes = [fit_power_law(rows.step + 1, rows.rate).slope for _, rows in late.groupby("seed")]
    test = "median over seeds of the slope of log rate on log step, last two decades"
    return bound(
        SLOPE, float(np.median(slopes)), bootstrap_interval(slopes), len(slopes), test, at_least=-0.6, at_most=-0.3
    )


def _stopped(runs: pd.DataFrame) -> Finding:
    """Whether the last updates are below 1/100 of the first while the gradients are above 1/10 of the first."""
    measured = runs[runs.update_norm.notna()].sort_values("step")
    first = measured.groupby("seed")[["update_norm", "gradient_norm"]].first()
    last = measured.groupby("seed")[["update_norm", "gradient_norm"]].apply(lambda rows: rows.tail(20).median())
    share = last / first
    both = (share.update_norm < 1e-2) & (share.gradient_norm > 1e-1)
    middle = share.median()
    return count(
        STOPPED,
        int(both.sum()),
        len(both),
        at_least=0.69,
        note=f"medians of last over first: update {middle.update_norm:.2g}, gradient {middle.gradient_norm:.2g}",
    )


def _faster(name: str, runs: pd.DataFrame) -> Finding:
    """RMSProp's advantage after the latest jump, in logarithms."""
    steps = runs[runs.jump == runs.jump.max()].pivot(index="seed", columns="arm", values="steps")
    with np.errstate(invalid="ignore"):
        ratio = np.log(steps["AdaGrad"]) - np.log(steps["RMSProp"])
    medians = ", ".join(f"{arm} {steps[arm].median():g}" for arm in steps)
    return paired(name, ratio, delta=float(np.log(5)), note=f"median steps: {medians}")


def _worse(runs: pd.DataFrame) -> Finding:
    end = runs[runs.step == runs.step.max()].pivot(index="seed", columns="arm", values="train_loss")
    ratio = np.log10(end["AdaGrad"]) - np.log10(end["RMSProp"])
    medians = ", ".join(f"{arm} {end[arm].median():.2g}" for arm in end)
    return paired(WORSE, ratio, delta=0.0, note=f"median losses: {medians}")


def figures(tables: Tables) -> list[Drawing]:
    """Rates and norms on digits, and the recovery from a jump."""
    network = tables["network"]
    rate = figure("Rates on digits", "step", "median rate over the weights", log_x=True, log_y=True)
    shown = network[network.rate.notna()].assign(step=network.step + 1)
    middle = shown.groupby(["arm", "step"], sort=False, as_index=False)[["rate", "update_norm", "gradient_norm"]]
    middle = middle.median()
    lines(rate, middle, "step", "rate", by="arm")
    anchor = middle[middle.arm == "AdaGrad"]
    root = anchor.assign(root=anchor.rate.iloc[0] * (anchor.step / anchor.step.iloc[0]) ** -0.5)
    lines(rate, root, "step", "root", name="falling as 1/√t")

    norms = figure("AdaGrad's updates and gradients", "step", "share of the first", log_x=True, log_y=True)
    for column, name in (("update_norm", "norm of the update"), ("gradient_norm", "norm of the batch's gradient")):
        lines(norms, anchor.assign(share=anchor[column] / anchor[column].iloc[0]), "step", "share", name=name)
    reference(norms, 1e-2, "stopped: update below")
    reference(norms, 1e-1, "while gradient above")
    return [
        Drawing(
            rate,
            "Effective rates on digits over 20 000 steps, each arm at its tuned rate: AdaGrad's falls at first "
            "as under constant gradients and flattens as the gradients vanish; RMSProp's rises then.",
        ),
        Drawing(norms, "Medians over seeds. The gradients vanish with the loss, so small updates are not the rate's doing."),
        Drawing(_recovery_figure(tables["recovery_trace"]), "The optimum of a noisy quadratic jumps at step 10 000; rates tuned on the time "
        "before, and torch's default of 0.01; one seed."),
    ]


def _recovery_figure(trace: pd.DataFrame) -> Figure:
    drawn = figure("After the optimum jumps", "steps since the jump", "excess loss", log_y=True)
    named = trace.assign(run=[f"{arm}, {choice}" for arm, choice in zip(trace.arm, trace.choice, strict=True)])
    lines(drawn, named, "since", "excess", by="run")
    return drawn


C24 = Claim(
    id="C24",
    section="6.3.2",
    title="AdaGrad's rates shrink until the weights stop",
    statement=(
        "AdaGrad only ever adds to the sum that divides its rates, so they may become so small that the weights "
        "essentially stop changing."
    ),
    source="Notes §6.3.2; Duchi, Hazan & Singer 2011",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=decided_by(FALLING, SLOPE, STOPPED, RECOVERY),
    caveats=(
        "A rate that falls as 1/√t is what gives the O(√T) regret on convex problems; under a constant gradient "
        "the distance travelled still grows as √t, so AdaGrad is never quite frozen.",
        "How slow is slow depends on η: a rate tuned for ten thousand steps is large enough to leave AdaGrad "
        "mobile at their end, the default of the libraries is not.",
        "The rates on digits are tuned by the validation loss after a tenth of the steps in the quick profile.",
    ),
    errata=("E13",),
)
