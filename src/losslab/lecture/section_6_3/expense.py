"""C20: what a Newton step costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, Verdict, decided_by
from losslab.lecture.driving import Known
from losslab.lecture.figures import figure, lines
from losslab.lecture.statistics import PowerLaw, fit_power_law
from losslab.lecture.verdicts import bound
from losslab.rules import Newton
from losslab.tasks import Batch, Task, digits_task, mlp

if TYPE_CHECKING:
    import pandas as pd

SIZES = (100, 200, 400, 800, 1040, 1350, 1760, 2290, 3000)
WIDTHS = (1, 3, 5, 11, 14, 18, 23, 30, 40)
"""Hidden units of digits networks with about as many weights, 75 h + 10."""

LARGE = 800
"""Weights from which an exponent is fitted: below, fixed costs hide it."""

UPDATE = "exponent of the time of a Newton update in P"
MEMORY = "bytes of the Hessian, divided by P²"
GRADIENT = "exponent of the time of a gradient in P"


def seconds(work: Callable[[], object], budget: float) -> float:
    """The shortest of at least two runs, and of as many as begin within ``budget`` seconds."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < budget:
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread: on a busy machine two wait for each other and small sizes suffer most."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def newton_cost(sizes: Sequence[int], budget: float) -> pd.DataFrame:
    """Time of one update of the Newton rule that is handed its Hessian, and the Hessian's bytes."""
    import pandas as pd

    rows = []
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
        bowl = Known(((noise + noise.T) / size**0.5 + 4 * torch.eye(size, dtype=torch.float64))[None])
        point = {"x": torch.randn(1, size, generator=generator, dtype=torch.float64)}
        spent = seconds(partial(Newton().update, point, {}, point, 0, bowl), budget)
        rows.append({"P": size, "update": spent, "bytes": bowl.matrix.untyped_storage().nbytes()})
    return pd.DataFrame(rows)


def network_cost(widths: Sequence[int], budget: float) -> pd.DataFrame:
    """Time of a gradient and of a Hessian-vector product over the training digits, one hidden layer."""
    import pandas as pd

    data = digits_task()
    assert data.train is not None
    batch = data.train.to(dtype=torch.float64).all()
    rows = []
    for width in widths:
        task = data.replace(model=mlp(64, width, 10))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(width)
            network = task.model().double()
        size = sum(w.numel() for w in network.parameters())
        gradient = seconds(partial(_gradient, task, network, batch), budget)
        product = seconds(partial(_product, task, network, batch), budget)
        rows.append({"P": size, "gradient": gradient, "product": product})
    return pd.DataFrame(rows)


def _gradient(task: Task, network: nn.Module, batch: Batch, keep: bool = False) -> tuple[Tensor, ...]:
    return torch.autograd.grad(task.loss(network, batch), list(network.parameters()), create_graph=keep)


def _product(task: Task, network: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    weights = list(network.parameters())
    return torch.autograd.grad(_gradient(task, network, batch, keep=True), weights, weights)


def experiment(lab: Lab) -> Tables:
    """Times of updates, gradients and Hessian-vector products at growing P."""
    budget = lab.pick(0.2, 2.0)
    with one_thread():
        return {"newton": newton_cost(SIZES, budget), "network": network_cost(WIDTHS, budget / 10)}


def judge(tables: Tables) -> list[Finding]:
    """The exponent of the update's time and the memory; the gradient's exponent is context."""
    newton, network = tables["newton"], tables["network"]
    entry = newton.bytes / newton.P**2
    return [
        _exponent(UPDATE, newton, "update", at_least=2.3, at_most=3.2),
        bound(
            MEMORY,
            float(entry.median()),
            (float(entry.min()), float(entry.max())),
            len(entry),
            "median and range over P",
            at_least=8,
            at_most=8,
        ),
        _exponent(GRADIENT, network, "gradient", at_most=1.3),
    ]


def _exponent(
    name: str, table: pd.DataFrame, column: str, at_most: float, at_least: float | None = None
) -> Finding:
    """The fitted power against a range: the estimate must lie in it, else the interval says how surely."""
    fit = _fitted(table, column)
    test = f"slope of log time on log P, P ≥ {LARGE}; the estimate decides"
    at, around = (
        bound(name, fit.slope, interval, fit.n, test, at_least=at_least, at_most=at_most)
        for interval in ((fit.slope, fit.slope), fit.slope_interval)
    )
    return replace(around, verdict=at.verdict) if at.verdict is Verdict.HOLDS else around


def _fitted(table: pd.DataFrame, column: str) -> PowerLaw:
    large = table[table.P >= LARGE]
    return fit_power_law(large.P, large[column])


def figures(tables: Tables) -> list[Drawing]:
    """Time against P, with the fitted power law of the update."""
    newton, network = tables["newton"], tables["network"]
    drawn = figure("Seconds against weights", "weights P", "seconds", log_x=True, log_y=True)
    lines(drawn, newton, "P", "update", mode="markers", name="Newton update, Hessian given")
    fit = _fitted(newton, "update")
    large = newton[newton.P >= LARGE]
    curve = large.assign(fit=fit.constant * large.P**fit.slope)
    lines(drawn, curve, "P", "fit", name=f"P to the power {fit.slope:.2f}")
    lines(
        drawn, network.assign(time=network["product"] * network.P), "P", "time", name="Hessian by P products"
    )
    lines(drawn, network, "P", "product", name="one Hessian-vector product")
    lines(drawn, network, "P", "gradient", name="gradient")
    return [
        Drawing(
            drawn,
            "One update of the Newton rule against a gradient and a Hessian-vector product over 1000 digits "
            "(float64, two-layer networks). Conjugate gradients need some tens of products and no Hessian.",
        )
    ]


C20 = Claim(
    id="C20",
    section="6.3",
    title="Newton's method is expensive",
    statement="Each Newton step inverts a Hessian, which is expensive: P² numbers to hold and P³ operations.",
    source="Notes §6.3",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=decided_by(UPDATE, MEMORY),
    caveats=(
        "One solves a linear system and does not invert. Conjugate gradients on Hessian-vector products, "
        "L-BFGS and K-FAC avoid the P² numbers altogether (Martens 2010).",
        "Times are of one thread of this machine, while it may have been doing other things. At these sizes "
        "a solve does not yet reach its limit of P³, since larger matrices use the processor better.",
        "The fitted exponent decides; its interval, which widens on a busy machine, is shown.",
    ),
)
