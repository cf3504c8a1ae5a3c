"""C25 and C26: RMSProp's update, and how it weighs past gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from losslab.engine import train
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, decided_by
from losslab.lecture.driving import drive, drive_torch, member_errors, path_of, pulled
from losslab.lecture.figures import figure, lines
from losslab.lecture.section_6_3.decay import rate_slope
from losslab.lecture.statistics import fit_power_law
from losslab.lecture.verdicts import count, identity, law
from losslab.rules import AdaGrad, RMSProp, Rule
from losslab.tasks import digits_task

if TYPE_CHECKING:
    import pandas as pd

EQUATION = "v = βv + (1 − β)g², x ← x − η g / (√v + ε)"
TORCH = "equal to torch's RMSprop"
STEADY = "power of t with which the rate changes, constant gradients"
NOISY = "power of t with which the rate changes, random gradients"
FIRST = "first step η/√(1 − β)"
FLOOR = "what noise leaves of the loss is proportional to η"
PRINTED = "runs on digits that the update as printed, without ε, keeps finite"

# -- C25 ------------------------------------------------------------------------------------------------


def updates(instances: int, steps: int, dimension: int = 6) -> pd.DataFrame:
    """The rule against the equation on its own gradients, against torch's optimizer, and its first step."""
    import pandas as pd

    gradient, start = pulled(instances, dimension, steps, seed=26)
    rng = np.random.default_rng(26)
    lr = torch.from_numpy(10 ** rng.choice(np.linspace(-3, -1, 5), instances))
    beta = torch.from_numpy(rng.choice([0.0, 0.5, 0.9, 0.99, 0.999], instances))
    moves = list(drive(RMSProp(lr=lr, beta=beta, eps=1e-8), gradient, start, steps))
    g = torch.stack([move.gradient for move in moves]).numpy()
    decay, mean, x, by_hand = beta.numpy()[:, None], np.zeros(start.shape), start.numpy(), []
    for row in g:
        mean = decay * mean + (1 - decay) * row**2
        x = x - lr.numpy()[:, None] * row / (np.sqrt(mean) + 1e-8)
        by_hand.append(x)
    theirs = drive_torch(torch.optim.RMSprop, {"lr": lr, "alpha": beta}, gradient, start, steps)
    # Without eps, which is nothing of the law.
    (first,) = drive(RMSProp(lr=lr, beta=beta, variant="lecture"), gradient, start, 1)
    ratio = (first.before - first.after).abs() * (1 - beta).sqrt()[:, None] / lr[:, None]
    return pd.DataFrame(
        {
            "equation": member_errors(path_of(iter(moves))[1:], torch.from_numpy(np.stack(by_hand))),
            "torch": member_errors(path_of(iter(moves)), theirs),
            "first": (ratio - 1).abs().amax(1).numpy(),
        }
    )


def rates_over_time(steps: int, runs: int, weights: int = 30) -> pd.DataFrame:
    """The rate, step over gradient, of RMSProp and AdaGrad under gradients of constant and of random size.

    The rate of a run is the geometric mean over its weights.
    """
    import pandas as pd

    generator = torch.Generator().manual_seed(27)
    sizes = torch.logspace(-1, 1, runs, dtype=torch.float64)[:, None].expand(-1, weights)
    noise = torch.randn(steps, runs, weights, generator=generator, dtype=torch.float64)
    kinds = ["constant"] * runs + ["random"] * runs
    rules: dict[str, Rule] = {"RMSProp": RMSProp(lr=0.01), "AdaGrad": AdaGrad(lr=0.01)}
    when = {int(k) for k in np.geomspace(1, steps, 60)} - {steps} | {0}

    def gradient(x: Tensor, step: int) -> Tensor:
        return torch.cat([sizes, sizes * noise[step]])

    tables = []
    for name, rule in rules.items():
        for move in drive(rule, gradient, torch.zeros(2 * runs, weights, dtype=torch.float64), steps):
            if move.step in when:
                rate = ((move.before - move.after) / move.gradient).log().mean(1).exp()
                table = pd.DataFrame({"gradients": kinds, "run": range(2 * runs), "rate": rate.numpy()})
                tables.append(table.assign(rule=name, step=move.step))
    return pd.concat(tables, ignore_index=True)


def floors(lrs: Sequence[float], runs: int, steps: int) -> pd.DataFrame:
    """The mean of ``|x|^2 / 2`` over the later half of a run on that loss, with standard normal noise."""
    import pandas as pd

    generator = torch.Generator().manual_seed(28)
    noise = torch.randn(steps, runs, 10, generator=generator, dtype=torch.float64)
    names = [(lr, run) for lr in lrs for run in range(runs)]
    start = torch.zeros(len(names), 10, dtype=torch.float64)
    total = torch.zeros(len(names), dtype=torch.float64)

    def gradient(x: Tensor, step: int) -> Tensor:
        return x + noise[step].repeat(len(lrs), 1)

    for move in drive(RMSProp(lr=[lr for lr, _ in names]), gradient, start, steps):
        if move.step >= steps // 2:
            total = total + move.after.square().sum(1) / 2
    mean = total / (steps - steps // 2)
    return pd.DataFrame(names, columns=["lr", "run"]).assign(loss=mean.numpy())


def printed_runs(seeds: Sequence[int]) -> pd.DataFrame:
    """Whether a network's weights are finite after two updates with and without eps in the denominator."""
    import pandas as pd

    tables = []
    for variant in ("outside", "lecture"):
        run = train(
            digits_task(),
            RMSProp(lr=1e-3, variant=variant),
            seeds=list(seeds),
            steps=2,
            record=[],
            evaluate=None,
            progress=False,
        )
        finite = torch.stack([torch.isfinite(w).flatten(1).all(1) for w in run.points.weights.values()]).all(
            0
        )
        tables.append(pd.DataFrame({"variant": variant, "seed": run.seeds, "finite": finite.numpy()}))
    return pd.concat(tables, ignore_index=True)


def update_experiment(lab: Lab) -> Tables:
    """The rule on random problems, its rate over time, the floor under noise, and the update as printed."""
    return {
        "updates": updates(lab.pick(100, 1000), 200),
        "rates": rates_over_time(lab.pick(5000, 20_000), 10),
        "floors": floors(
            np.geomspace(1e-3, 0.03, 5).tolist(), lab.replicates(10, 30), lab.pick(5000, 20_000)
        ),
        "printed": printed_runs(range(lab.replicates(10))),
    }


def update_judge(tables: Tables) -> list[Finding]:
    """The equation, the constancy of the rate and the printed form; first step and floor are context."""
    runs, paths, floor = tables["updates"], tables["rates"], tables["floors"]
    paths = paths[paths.rule == "RMSProp"]
    fit = fit_power_law(floor.lr, floor.loss)
    printed = tables["printed"]
    finite = printed.groupby("variant").finite.sum()
    seeds = printed.seed.nunique()
    return [
        identity(EQUATION, runs.equation),
        identity(TORCH, runs.torch),
        *(
            rate_slope(name, paths[paths.gradients == kind], "run", since=0.02, at_least=-0.02, at_most=0.02)
            for name, kind in ((STEADY, "constant"), (NOISY, "random"))
        ),
        identity(FIRST, runs["first"]),
        law(
            FLOOR,
            fit.slope,
            fit.slope_interval,
            theory=1.0,
            n=fit.n,
            note="a constant rate does not converge",
        ),
        count(
            PRINTED,
            int(finite["lecture"]),
            seeds,
            at_least=0.5,
            note=f"0/0 where a gradient is exactly 0; with ε {finite['outside']} of {seeds}",
        ),
    ]


def update_figures(tables: Tables) -> list[Drawing]:
    """Rates over time, and the floor."""
    runs = tables["rates"]
    relative = runs.assign(
        step=runs.step + 1, rate=runs.rate / runs.groupby(["rule", "run"]).rate.transform("first")
    )
    relative = relative.groupby(["rule", "gradients", "step"], sort=False, as_index=False)[["rate"]].median()
    labels = [
        f"{rule}, {kind} gradients" for rule, kind in zip(relative.rule, relative.gradients, strict=True)
    ]
    drawn = figure("Rates over time", "step", "rate, share of the first", log_x=True, log_y=True)
    lines(drawn, relative.assign(series=labels), "step", "rate", by="series")

    floor = tables["floors"]
    left = figure("What noise leaves", "learning rate η", "mean loss", log_x=True, log_y=True)
    lines(left, floor, "lr", "loss", mode="markers", name="runs")
    fit = fit_power_law(floor.lr, floor.loss)
    curve = floor[["lr"]].drop_duplicates()
    lines(
        left, curve.assign(fit=fit.constant * curve.lr**fit.slope), "lr", "fit", name=f"power {fit.slope:.2f}"
    )
    return [
        Drawing(
            drawn,
            "Step over gradient, medians over runs: RMSProp's rate falls while its average fills and then "
            "stays, AdaGrad's falls as 1/√t.",
        ),
        Drawing(
            left, "RMSProp on a quadratic with gradient noise: at a constant rate the loss stays above 0."
        ),
    ]


C25 = Claim(
    id="C25",
    section="6.3.2",
    title="RMSProp's update",
    statement=(
        "RMSProp replaces AdaGrad's sum by an exponentially weighted average, v ← βv + (1 − β)(∇f)², and so "
        "its rates do not decay."
    ),
    source="Notes §6.3.2; Tieleman & Hinton 2012, lecture 6e",
    experiment=update_experiment,
    judge=update_judge,
    figures=update_figures,
    combine=decided_by(EQUATION, TORCH, STEADY, NOISY, PRINTED),
    caveats=(
        "There is no bias correction: the first step is η/√(1 − β), 3.16 η at β = 0.9 and 10 η at 0.99.",
        "A rate that does not decay does not converge under noise either, only to a neighbourhood of size ∝ "
        "η.",
        "The notes leave out ε: a weight whose gradient is exactly 0, as at the constant pixels of the "
        "digits, then becomes 0/0.",
        "The slope under random gradients is averaged over 30 weights a run; one weight a run, tried first, "
        "left it undecided.",
    ),
    errata=("E12", "E14", "E17", "E22"),
)


# -- C26 ------------------------------------------------------------------------------------------------

WEIGHTS = "the gradient of k steps ago has the weight (1 − β)β^k in RMSProp, 1 in AdaGrad"
TOTAL = "the weights of t gradients add up to 1 − β^t"
ANY = "v is the weighted sum of any past gradients' squares"
LIMIT = "with β = 1 − 1/t it is AdaGrad's sum divided by t"


def final_state(rule: Rule, stream: Tensor) -> Tensor:
    """The rule's state after the gradients ``[T, N, 1]``, ``[N]``."""
    *_, last = drive(rule, lambda x, step: stream[step], torch.zeros_like(stream[0]), len(stream))
    return next(iter(last.state.values()))[:, 0]


def impulses(betas: Sequence[float], steps: int) -> pd.DataFrame:
    """The state after one gradient of 1 among zeros, by its age, and after gradients that are all 1."""
    import pandas as pd

    table = pd.DataFrame([(beta, lag) for beta in betas for lag in range(steps)], columns=["beta", "lag"])
    stream = torch.zeros(steps, len(table), 1, dtype=torch.float64)
    stream[steps - 1 - torch.tensor(table.lag.tolist()), torch.arange(len(table)), 0] = 1.0
    beta = table.beta.to_numpy()
    rmsprop, adagrad = RMSProp(beta=beta.tolist()), AdaGrad()
    whole = torch.ones(steps, len(betas), 1, dtype=torch.float64)
    total = dict(zip(betas, final_state(RMSProp(beta=list(betas)), whole).tolist(), strict=True))
    return table.assign(
        rmsprop=final_state(rmsprop, stream).numpy(),
        adagrad=final_state(adagrad, stream).numpy(),
        expected=(1 - beta) * beta**table.lag,
        total=[total[b] for b in table.beta],
        expected_total=1 - beta**steps,
    )


def sequences(instances: int, steps: int) -> pd.DataFrame:
    """The state after random gradients against the weighted sum, and AdaGrad's as a schedule of beta."""
    import pandas as pd

    generator = torch.Generator().manual_seed(29)
    stream = torch.randn(steps, instances, 1, generator=generator, dtype=torch.float64)
    beta = 0.999 * torch.rand(instances, generator=generator, dtype=torch.float64)
    age = torch.arange(steps - 1, -1, -1, dtype=torch.float64)[:, None]
    expected = ((1 - beta) * beta**age * stream[:, :, 0].square()).sum(0)
    mean = final_state(RMSProp(beta=lambda step: 1 - 1 / (step + 1)), stream)
    summed = final_state(AdaGrad(), stream)
    return pd.DataFrame(
        {
            "weighted": (final_state(RMSProp(beta=beta), stream) / expected - 1).abs().numpy(),
            "limit": (mean * steps / summed - 1).abs().numpy(),
        }
    )


def weight_experiment(lab: Lab) -> Tables:
    """Impulse responses and random sequences."""
    return {
        "impulses": impulses((0.5, 0.9, 0.99), 100),
        "sequences": sequences(lab.pick(200, 2000), 200),
    }


def weight_judge(tables: Tables) -> list[Finding]:
    """All are identities."""
    impulse, sequence = tables["impulses"], tables["sequences"]
    weights = np.maximum((impulse.rmsprop / impulse.expected - 1).abs(), (impulse.adagrad - 1).abs())
    return [
        identity(WEIGHTS, weights),
        identity(TOTAL, (impulse.total / impulse.expected_total - 1).abs()),
        identity(ANY, sequence.weighted),
        identity(LIMIT, sequence.limit),
    ]


def weight_figures(tables: Tables) -> list[Drawing]:
    """The share of each past gradient."""
    runs = tables["impulses"]
    drawn = figure("Weights of past gradients", "age of the gradient", "share of the weight", log_y=True)
    for beta, rows in runs.groupby("beta"):
        lines(
            drawn, rows.assign(share=rows.rmsprop / rows.total), "lag", "share", name=f"RMSProp, β = {beta:g}"
        )
    rows = runs[runs.beta == runs.beta.min()]
    lines(drawn, rows.assign(share=rows.adagrad / rows.adagrad.sum()), "lag", "share", name="AdaGrad")
    drawn.update_yaxes(range=[-8, 0])
    return [Drawing(drawn, "After 100 steps, measured by gradients that are 0 but for one.")]


C26 = Claim(
    id="C26",
    section="6.3.2",
    title="β weighs recent gradients more",
    statement=(
        "The decay β gives recent gradients more weight than old ones, while AdaGrad weighs all of them "
        "equally."
    ),
    source="Notes §6.3.2",
    experiment=weight_experiment,
    judge=weight_judge,
    figures=weight_figures,
    caveats=(
        "It is a smaller β that gives recent gradients more weight. A β near 1 does not by itself give "
        "AdaGrad: that takes β = 1 − 1/t and a rate that falls as 1/√t.",
    ),
    errata=("E14",),
)

CLAIMS = [C25, C26]
