"""C5: the units of a layer in another order give the same loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from losslab.engine import Objective, Points
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, decided_by
from losslab.lecture.figures import colour, figure, lines, reference
from losslab.lecture.section_6_1.certified import normal_starts
from losslab.lecture.training import one_thread
from losslab.lecture.verdicts import count, identity
from losslab.paths import Axis, Spec, joined, permutation_spec
from losslab.tasks import Data, Task, mlp, supervised

if TYPE_CHECKING:
    import pandas as pd

ROUNDING = 1e-12
"""Relative change of the loss that counts as rounding."""

CHANGED = 1e-6
"""Relative change of the loss that counts as one."""

EXAMPLES, CLASSES = 40, 5
WHOLE, INCOMING = "units moved whole", "incoming weights alone"


def convolutional() -> nn.Module:
    """Two convolutions and a linear layer on pictures of 6 x 6 pixels."""
    layers = nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(32, CLASSES)).double()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "tanh": (mlp(8, 16, 16, CLASSES, activation="tanh").to(torch.float64), (8,), "running"),
    "ReLU": (mlp(8, 16, 16, CLASSES).to(torch.float64), (8,), "running"),
    "convolutional": (convolutional, (2, 6, 6), "running"),
    "batch norm, running": (mlp(8, 16, 16, CLASSES, batch_norm=True).to(torch.float64), (8,), "running"),
    "batch norm, batch": (mlp(8, 16, 16, CLASSES, batch_norm=True).to(torch.float64), (8,), "batch"),
}
"""Name -> network, shape of an input, policy of batch norm."""


def task_of(network: str) -> Task:
    """Normal inputs and random labels."""
    model, shape, _ = NETWORKS[network]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(EXAMPLES, *shape, generator=generator, dtype=torch.float64)
    return supervised(model, Data((x, torch.randint(CLASSES, (EXAMPLES,), generator=generator))))


def random_networks(like: Points, count: int, generator: torch.Generator) -> Points:
    """Networks of an architecture with normal weights, and running statistics where it has any."""
    weights = normal_starts(like, np.ones(count), generator).weights

    def drawn(b: Tensor) -> Tensor:
        if not b.is_floating_point():
            return b.expand(count, *b.shape[1:]).clone()
        return 0.5 + torch.rand(count, *b.shape[1:], generator=generator, dtype=torch.float64)

    return Points(weights, {name: drawn(b) for name, b in like.buffers.items()})


def incoming(spec: Spec) -> Spec:
    """What one might take for the symmetry: a layer's rows move, and nothing that reads them."""
    axes = {name: (first, *(Axis(a.size) for a in rest)) for name, (first, *rest) in spec.axes.items()}
    return Spec(spec.groups, axes)


def instances(network: str, number: int) -> pd.DataFrame:
    """Losses of random networks before and after: one row a network."""
    import pandas as pd

    task = task_of(network)
    objective = Objective(task, batch_norm=NETWORKS[network][2], execution="stacked")
    spec = permutation_spec(task)
    generator = torch.Generator().manual_seed(len(network))
    points = random_networks(Points.from_modules([task.model()]), number, generator)
    before = objective.value(points).numpy()
    rows = {"before": before}
    for name, symmetry in ((WHOLE, spec), (INCOMING, incoming(spec))):
        moved = joined(*(symmetry.permute(points.select([i]), spec.random(i)) for i in range(number)))
        rows[name] = objective.value(moved).numpy()
    return pd.DataFrame(rows).assign(network=network)


def copies(widths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)) -> pd.DataFrame:
    """How many points one hidden layer's symmetries make of one, in decades."""
    import pandas as pd
    from scipy.special import gammaln

    n = np.array(widths, dtype=float)
    orders = gammaln(n + 1) / np.log(10)
    signs = orders + n * np.log10(2)
    tables = [
        pd.DataFrame({"width": widths, "decades": decades, "symmetry": name})
        for name, decades in (("order of the units, n!", orders), ("and signs of tanh units, 2ⁿ n!", signs))
    ]
    return pd.concat(tables, ignore_index=True)


def evidence(number: int) -> Tables:
    """Random networks of five kinds, and the number of their equals."""
    import pandas as pd

    tables = [instances(network, number) for network in NETWORKS]
    return {"instances": pd.concat(tables, ignore_index=True), "copies": copies()}


def experiment(lab: Lab) -> Tables:
    """The settings of the claim."""
    lab.progress("permuting the units of random networks")
    with one_thread():
        return evidence(lab.pick(100, 1000))


def title(network: str) -> str:
    """The finding about one kind of network."""
    return f"{network}: change of the loss"


def changes(rows: pd.DataFrame, after: str) -> pd.Series:
    """Relative changes of the loss."""
    return (rows[after] - rows.before).abs() / rows.before.abs()


def judge(tables: Tables) -> list[Finding]:
    """V1 for each kind of network; beside it, that incoming weights moved alone do change the loss."""
    rows = tables["instances"]
    groups = list(rows.groupby("network", sort=False))
    findings = [identity(title(str(name)), changes(some, WHOLE), tolerance=ROUNDING) for name, some in groups]
    moved = int((changes(rows, INCOMING) > CHANGED).sum())
    control = count("incoming weights alone: networks whose loss changes", moved, len(rows), at_least=0.95)
    return [*findings, control]


def figures(tables: Tables) -> list[Drawing]:
    """How much the loss changes, and how many copies a minimum has."""
    rows = tables["instances"]
    drawn = figure("Change of the loss", "relative change", "", log_x=True)
    for index, arm in enumerate((WHOLE, INCOMING)):
        drawn.add_scatter(
            x=np.maximum(changes(rows, arm), 1e-17),
            y=rows.network.to_numpy(),
            mode="markers",
            name=arm,
            meta="series",
            marker={"color": colour(index, 0.4), "size": 7},
        )
    drawn.update_yaxes(title_text="network", type="category")
    reference(drawn, ROUNDING, "rounding", axis="x")
    many = figure("Copies of one minimum", "width n of the hidden layer", "number of points", log_x=True)
    lines(many, tables["copies"], "width", "decades", by="symmetry", mode="lines+markers")
    ticks = [0, 200, 400, 600, 800, 1000, 1200]
    many.update_yaxes(tickvals=ticks, ticktext=[f"10<sup>{k}</sup>" for k in ticks])
    return [
        Drawing(
            drawn,
            "Random networks, one dot each. Moving units whole changes the loss by rounding (no change "
            "is drawn at 10⁻¹⁷); moving what comes in and leaving what goes out makes another function.",
        ),
        Drawing(many, "Points of equal loss that the symmetries of one hidden layer make of each point."),
    ]


C5 = Claim(
    id="C5",
    section="6.1",
    title="Permuting the units of a layer keeps the loss",
    statement="Permuting the order of the neurons in a layer gives the same loss.",
    source="Notes §6.1",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=decided_by(*(title(network) for network in NETWORKS)),
    caveats=(
        "A unit moves with its incoming weights, its bias, its outgoing weights and, under batch norm, its "
        "statistics; with its incoming weights alone the loss changes.",
        "There are further symmetries: tanh units may change sign, ReLU units may be rescaled by any "
        "positive number.",
    ),
    errata=("E4",),
)
