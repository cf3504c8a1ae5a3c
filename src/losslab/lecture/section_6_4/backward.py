"""C37: the gradient goes through the batch's statistics, and what happens where it does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from losslab.engine import Population
from losslab.engine.randomness import generator
from losslab.layers import BatchNorm
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, Verdict, agreement
from losslab.lecture.figures import figure, lines, spread
from losslab.lecture.numbers import number
from losslab.lecture.section_6_4.forward import instance
from losslab.lecture.statistics import max_relative_error
from losslab.lecture.training import trained
from losslab.lecture.tuning import rates, tune
from losslab.lecture.verdicts import identity, paired
from losslab.rules import SGD
from losslab.tasks import Factory, Splits, digits, supervised

if TYPE_CHECKING:
    import pandas as pd

CHECKS = {
    "formula": "∂L/∂x = γ/σ (I − 11ᵀ/m − x̂x̂ᵀ/m) ∂L/∂y",
    "differences": "the same by finite differences",
    "constant": "the gradient's sum over the batch is 0",
    "projection": "the gradient is orthogonal to x̂",
    "scale": "BN((aW)u) = BN(Wu)",
    "scaled gradient": "∂L/∂(aW) = (1/a) ∂L/∂W",
}
"""What is checked on every instance: column value -> name of the finding."""

LOSS = "with constant statistics the training loss ends higher"
DRIFT = "with constant statistics the biases drift ten times as far"

WHOLE, CONSTANT = "through the statistics", "statistics held constant"
GRID = rates(0.01, 1.0)
TUNING_SEEDS = (1000, 1001, 1002)
ROUNDING = 1e-12
"""A drift that stands for none."""


class Sizes(NamedTuple):
    """The counter-experiment: replicates, updates, updates between two records, examples a batch."""

    seeds: int
    steps: int
    every: int = 10
    batch: int = 60


def gradient(layer: BatchNorm, x: Tensor, g: Tensor) -> Tensor:
    """``d(sum of g y) / dx``."""
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad((layer(leaf) * g).sum(), leaf)[0]


def errors(index: int) -> dict[str, float]:
    """The relative error of each check of `CHECKS` on one instance.

    Sums that must vanish are held against the sum of the terms' sizes.
    """
    made = instance(index, "C37")
    layer, x, g = made.layer, made.x, made.g
    found = gradient(layer, x, g)
    gamma = made.columns(made.gamma.detach())
    sigma = (x.var(made.axes, correction=0, keepdim=True) + layer.eps).sqrt()
    hat = (x - x.mean(made.axes, keepdim=True)) / sigma
    inner = g - g.mean(made.axes, keepdim=True) - hat * (hat * g).mean(made.axes, keepdim=True)
    direction = torch.randn(x.shape, generator=generator(index, "C37", 1), dtype=x.dtype) * sigma
    slope = float((found * direction).sum())
    size = float((found * direction).abs().sum())
    terms = (gamma / sigma * g).abs().sum(made.axes)

    exact = instance(index, "C37", eps=0.0)
    free = gradient(exact.layer, x, g)
    unit = (x - x.mean(made.axes, keepdim=True)) / x.std(made.axes, correction=0, keepdim=True)
    weights = (unit * gamma / sigma * g).abs().sum(made.axes)
    return {
        "formula": max_relative_error(found, gamma / sigma * inner),
        "differences": abs(slope - _slope(layer, x, g, direction)) / size,
        "constant": float((found.sum(made.axes).abs() / terms).max()),
        "projection": float(((unit * free).sum(made.axes).abs() / weights).max()),
        **_scaled(index, exact.layer),
    }


def _slope(layer: BatchNorm, x: Tensor, g: Tensor, direction: Tensor, h: float = 1e-3) -> float:
    """The derivative along a direction by the central difference of order six."""
    with torch.no_grad():
        values = {k: float((layer(x + k * h * direction) * g).sum()) for k in (-3, -2, -1, 1, 2, 3)}
    odd = {k: values[k] - values[-k] for k in (1, 2, 3)}
    return (45 * odd[1] - 9 * odd[2] + odd[3]) / (60 * h)


def _scaled(index: int, layer: BatchNorm) -> dict[str, float]:
    """The layer, with ε = 0, behind a linear layer W and behind aW."""
    g = generator(index, "C37", 2)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    u, w, back = draw(20, 7), draw(layer.features, 7), draw(20, layer.features)
    a = 10 ** float(6 * torch.rand((), generator=g) - 3)
    outputs, slopes = [], []
    for scale in (1.0, a):
        leaf = (scale * w).requires_grad_()
        y = layer(u @ leaf.T)
        outputs.append(y.detach())
        slopes.append(scale * torch.autograd.grad((y * back).sum(), leaf)[0])
    return {"scale": max_relative_error(*outputs), "scaled gradient": max_relative_error(*slopes)}


def network(detach: bool) -> Factory:
    """64-50-50-10 with ReLU, batch norm behind hidden layers that keep their biases."""

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for inputs in (64, 50):
            layers += [nn.Linear(inputs, 50), BatchNorm(50, detach=detach), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(50, 10))

    return Factory(f"64-50-50-10, detach={detach}", build)


def biases(population: Population) -> Tensor:
    """The hidden biases of every member, ``[N, 100]``, float64."""
    weights = population.points.weights
    return torch.cat([weights["0.bias"], weights["3.bias"]], 1).detach().double()


def arm(name: str, splits: Splits, sizes: Sizes) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs of one arm at its tuned rate, and the search for that rate.

    Returns:
        A row a (record, seed): updates, the loss of the last one's mini-batch (infinite once diverged), and
        the drift of the hidden biases, ``||b - b_0||``; and the search.
    """
    import pandas as pd

    task = supervised(network(name == CONSTANT), splits.train, validation=splits.validation, name=name)

    def score(lr: list[float], seeds: list[int]) -> Tensor:
        done = trained(
            task, SGD(lr=lr), seeds=seeds, steps=sizes.steps, batch_size=sizes.batch, evaluate=[sizes.steps]
        )
        values = done.log.tensors().get("validation_loss")
        return torch.full((len(seeds),), math.inf) if values is None else values[-1]

    found = tune(score, GRID, TUNING_SEEDS)
    settings = {"seeds": sizes.seeds, "batch_size": sizes.batch}
    start = biases(trained(task, SGD(lr=found.lr), steps=0, **settings))
    moved: dict[int, Tensor] = {}
    done = trained(
        task,
        SGD(lr=found.lr),
        steps=sizes.steps,
        record=range(sizes.every - 1, sizes.steps, sizes.every),
        watch=lambda population: moved.setdefault(population.step, (biases(population) - start).norm(dim=1)),
        **settings,
    )
    losses: Any = done.history.set_index(["step", "member"]).get("loss", {})
    nothing = torch.full((sizes.seeds,), math.inf)
    rows = [
        {"step": step, "seed": seed, "loss": losses.get((step - 1, seed), math.nan), "drift": float(drift)}
        for step in range(sizes.every, sizes.steps + 1, sizes.every)
        for seed, drift in enumerate(moved.get(step, nothing))
    ]
    runs = pd.DataFrame(rows).fillna(math.inf)
    search = found.table.assign(arm=name, chosen=found.lr, at_edge=found.at_edge)
    return runs.assign(arm=name, lr=found.lr), search


def experiment(lab: Lab) -> Tables:
    """Random layers; and a digits network with and without the statistics' part of the gradient."""
    sizes = Sizes(seeds=lab.replicates(10, 30), steps=lab.pick(300, 1000))
    return evidence(lab, lab.pick(150, 2000), digits(), sizes)


def evidence(lab: Lab, instances: int, splits: Splits, sizes: Sizes) -> Tables:
    """Checks on random layers, and the runs of both arms."""
    import pandas as pd

    lab.progress("checking gradients")
    checks = [
        {"instance": i, "check": check, "error": error}
        for i in range(instances)
        for check, error in errors(i).items()
    ]
    parts = []
    for name in (WHOLE, CONSTANT):
        lab.progress(f"training with the gradient {name}")
        parts.append(arm(name, splits, sizes))
    runs, searches = (pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True))
    return {"instances": pd.DataFrame(checks), "runs": runs, "tuning": searches}


def judge(tables: Tables) -> list[Finding]:
    """V1 on every identity; V3 on the end of training: the last fifth's loss, and the drift of the biases."""
    rows = tables["instances"]
    checks = [identity(name, rows[rows.check == check].error) for check, name in CHECKS.items()]
    runs, search = tables["runs"], tables["tuning"]
    late = runs[runs.step > 0.8 * runs.step.max()].groupby(["arm", "seed"]).loss.mean()
    last = runs[runs.step == runs.step.max()].set_index(["arm", "seed"]).drift.clip(lower=ROUNDING)
    rate = search.groupby("arm").chosen.first().map(number)
    more = {name: values[CONSTANT] / values[WHOLE] for name, values in (("loss", late), ("drift", last))}
    return [
        *checks,
        paired(
            LOSS,
            _log10(more["loss"]),
            0.0,
            note=f"log₁₀ of the ratio of losses, {number(more['loss'].median())} in the median; rates "
            f"{rate[CONSTANT]} and, {WHOLE}, {rate[WHOLE]}",
        ),
        paired(
            DRIFT,
            _log10(more["drift"]),
            1.0,
            note=f"log₁₀ of the ratio; ‖b − b₀‖ is {number(last[CONSTANT].median())} against "
            f"{number(last[WHOLE].median())}",
        ),
    ]


def _log10(ratio: pd.Series) -> pd.Series:
    # Where both arms have diverged neither is worse.
    return ratio.fillna(1.0).map(math.log10)


def combine(findings: Sequence[Finding]) -> Verdict:
    """Every identity counts; of the two consequences, one is enough."""
    consequences = [f for f in findings if f.name in (LOSS, DRIFT)]
    identities = [f for f in findings if f not in consequences]
    shown = [f for f in consequences if f.verdict is Verdict.HOLDS]
    return agreement([*identities, *(shown or consequences)])


def figures(tables: Tables) -> list[Drawing]:
    """Loss and drift of both arms."""
    drawings = []
    runs = tables["runs"]
    for column, title, caption in (
        (
            "loss",
            "mini-batch loss",
            "Digits, 64-50-50-10 with batch norm, each arm at its own tuned rate (median and 80 % of the "
            "seeds). Both arms compute the same outputs; only their gradients differ.",
        ),
        (
            "drift",
            "‖b − b₀‖",
            "The hidden biases, which batch norm subtracts again. Statistics that are held constant hide "
            "that from the gradient: the biases are pushed along without ever changing an output. Through "
            "the statistics only rounding moves them.",
        ),
    ):
        drawn = figure(title.capitalize(), "updates", title, log_y=True)
        shown = runs[(runs[column] > 0) & (runs[column] < math.inf)]
        rows = spread(shown, ["arm", "step"], column)
        lines(drawn, rows, "step", "middle", by="arm", band=("low", "high"))
        drawings.append(Drawing(drawn, caption))
    return drawings


C37 = Claim(
    id="C37",
    section="6.4.1",
    title="Back-propagation takes the normalisation into account",
    statement="The gradient is taken through the batch's mean and variance, not past them.",
    source="Notes §6.4.1; Ioffe & Szegedy 2015, sections 2, 3 and 3.3",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=combine,
    caveats=(
        "The counter-experiment holds mean and variance constant in the backward pass only. It counts as "
        "shown if the loss ends higher or the biases drift ten times as far; both are judged, one is enough.",
        "The biases stand before the normalisation on purpose; practice leaves them out, and then it is "
        "the weights that feel the missing terms.",
        "The loss is that of the mini-batches, in training mode, averaged over the last fifth of the run.",
    ),
)
