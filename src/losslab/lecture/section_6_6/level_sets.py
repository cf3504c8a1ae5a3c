"""C64: minima of networks with weights to spare are no isolated points."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from losslab.curvature import Hessian, minimise, refine
from losslab.engine import Objective, Points
from losslab.engine.randomness import generator
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, decided_by
from losslab.lecture.figures import colour, figure, lines, reference, spread
from losslab.lecture.numbers import number
from losslab.lecture.section_6_1.small_networks import regression_of_classes, starts_of
from losslab.lecture.training import one_thread
from losslab.lecture.verdicts import count
from losslab.paths import Landscape, Path, walk_level
from losslab.tasks import Data, Task, digits, mlp

if TYPE_CHECKING:
    import pandas as pd

INPUTS = 20
"""Principal components of the digits: with all 64 pixels some weights would see no example at all."""

FLAT = 1e-3
"""Eigenvalues below this share of the largest count as flat."""

HALF = 0.5
"""Share of the eigenvalues that must be flat, and of the weights' length that a walk must cover."""

RISE = 1e-3
"""Rise of the loss that a walk is allowed."""

ARRIVED = 1e-8
"""Length of the gradient from which a point counts as a minimum."""

KERNEL = 1e-6
"""Share of the largest eigenvalue up to which directions are as flat as the flattest."""

ALL_OF_TEN = 0.69
REACH = 1.0
BINS = 41


class Arm(NamedTuple):
    """A network 20-h-1 on so many examples, with a penalty of ``penalty |theta|^2 / 2``."""

    width: int
    examples: int
    penalty: float

    @property
    def parameters(self) -> int:
        """Weights of the network."""
        return (INPUTS + 2) * self.width + 1

    @property
    def name(self) -> str:
        """Weights per example, in words."""
        return f"{self.parameters / self.examples:.2g} weights per example"


SPARE, SCARCE = Arm(24, 200, 0.0), Arm(8, 1000, 1e-3)


class Sizes(NamedTuple):
    """How much work to do: seeds, steps of L-BFGS, strides of a walk."""

    seeds: int
    steps: int
    strides: int


def task_of(arm: Arm) -> Task:
    """Tell odd from even digits, targets -1 and 1, from the first principal components of the images."""
    splits = digits()
    (x, y), (unseen, truth) = splits.train.all(), splits.test.all()
    x, y = x[: arm.examples].double(), y[: arm.examples]
    middle = x.mean(0)
    _, _, ways = torch.linalg.svd(x - middle, full_matrices=False)
    seen, unseen = ((z - middle) @ ways[:INPUTS].T for z in (x, unseen.double()))
    size = seen.square().mean().sqrt()
    model = mlp(INPUTS, arm.width, 1, activation="tanh").to(torch.float64)
    train, test = (
        Data((z / size, (1 - 2 * (t % 2)).double()[:, None])) for z, t in ((seen, y), (unseen, truth))
    )
    return Task(model, regression_of_classes(arm.penalty), train, test, name="odd digits")


def minima(task: Task, sizes: Sizes) -> Points:
    """L-BFGS from torch's own initial weights, with Newton's method at the end where it has not arrived."""
    objective = Objective(task, execution="stacked")
    down = minimise(objective, starts_of(task, sizes.seeds), tolerance=ARRIVED, steps=sizes.steps)
    return refine(objective, down.points, tolerance=ARRIVED, steps=10).points


def flattest(values: Tensor, vectors: Tensor, seed: int) -> Tensor:
    """A direction out of the flattest, ``[P]``: a random one of those that are no flatter than each other.

    Args:
        values: Eigenvalues ``[P]``.
        vectors: Eigenvectors, one a column.
        seed: Of the draw; the eigenvectors of a kernel of many dimensions are rounding.

    Example:
        >>> flattest(torch.tensor([0.0, 2.0]), torch.eye(2), 0).abs()
        tensor([1., 0.])
    """
    size = values.abs()
    some = vectors[:, size <= torch.maximum(KERNEL * size.max(), size.min())]
    draw = torch.randn(len(values), generator=generator(seed, "heading"), dtype=torch.float64).to(vectors)
    heading = some @ (some.T @ draw)
    return heading / heading.norm()


def outputs(module: nn.Module, points: Points, x: Tensor) -> Tensor:
    """What each network says on some inputs, ``[N, n]``."""
    with torch.no_grad():
        rows = [points.load_into(module, i)(x).flatten() for i in range(points.members)]
    return torch.stack(rows)


def change(task: Task, path: Path) -> float:
    """Root mean square of the change of the test outputs along a path, as a share of the outputs' own."""
    ends = path.frame.select([0, path.frame.members - 1])
    assert task.test is not None
    first, last = outputs(task.model(), ends, task.test.all()[0])
    return float((last - first).norm() / first.norm())


def straight_rise(objective: Objective, points: Points, shares: Tensor) -> Tensor:
    """Rise of the loss along a random direction, ``[N, T]``, at shares of the weights' length."""
    theta, start = points.matrix(), objective.value(points)
    draw = torch.randn(theta.shape, generator=generator(0, "straight"), dtype=torch.float64)
    way = draw / draw.norm(dim=1, keepdim=True) * theta.norm(dim=1, keepdim=True)
    return torch.stack([objective.value(points.at(theta + t * way)) - start for t in shares.tolist()], 1)


def of_arm(arm: Arm, sizes: Sizes) -> dict[str, pd.DataFrame]:
    """Minima, their spectra, and the walks from them."""
    import pandas as pd

    task = task_of(arm)
    objective = Objective(task, execution="stacked")
    points = minima(task, sizes)
    told, gradient = objective.gradient(points)
    theta, seeds = points.matrix(), range(points.members)
    found = [torch.linalg.eigh(Hessian(objective, points.select([i])).dense()) for i in seeds]
    headings = torch.stack([flattest(values, vectors, i) for i, (values, vectors) in enumerate(found)])
    values = torch.stack([values for values, _ in found])
    shares = values / values[:, -1:]
    norms = theta.norm(dim=1)
    landscape = Landscape(task, execution="stacked")
    walks = walk_level(landscape, points, headings, rise=RISE, reach=REACH * norms, steps=sizes.strides)
    rows = pd.DataFrame(
        {
            "seed": seeds,
            "loss": told.numpy(),
            "gradient": gradient.matrix().norm(dim=1).numpy(),
            "smallest": shares[:, 0].numpy(),
            "largest": values[:, -1].numpy(),
            "flat": (shares.abs() < FLAT).double().mean(1).numpy(),
            "norm": norms.numpy(),
            "parameters": arm.parameters,
            "examples": arm.examples,
            "highest": [float(w["train_loss"].max() - w["train_loss"][0]) for w in walks],
            "length": [w.length for w in walks],
            "change": [change(task, w) for w in walks],
            "test_start": [float(w["test_loss"][0]) for w in walks],
            "test_end": [float(w["test_loss"][-1]) for w in walks],
        }
    )
    ways = pd.concat([course(path, float(norms[i])).assign(seed=i) for i, path in enumerate(walks)])
    rows["distance"] = [float(some.distance.max()) for _, some in ways.groupby("seed")]
    grid = torch.linspace(0, REACH, BINS, dtype=torch.float64)
    risen = straight_rise(objective, points, grid)
    lines_ = pd.DataFrame({"distance": grid.repeat(len(risen)).numpy(), "rise": risen.flatten().numpy()})
    lines_ = lines_.assign(seed=np.repeat(np.arange(len(risen)), BINS))
    ranks = np.tile((np.arange(arm.parameters) + 0.5) / arm.parameters, len(shares))
    spectra = pd.DataFrame({"rank": ranks, "eigenvalue": shares.abs().sort(1).values.flatten().numpy()})
    return {"minima": rows, "walks": ways, "straight": lines_, "spectra": spectra}


def course(path: Path, norm: float) -> pd.DataFrame:
    """Distance from the start, in units of the weights' length there, and the rise of the loss so far."""
    import pandas as pd

    theta = path.points.matrix()
    rise = path["train_loss"] - path["train_loss"][0]
    away = (theta - theta[:1]).norm(dim=1) / norm
    return pd.DataFrame({"distance": away.numpy(), "rise": rise.numpy(), "walked": path.places.numpy()})


def evidence(lab: Lab, arms: tuple[Arm, ...], sizes: Sizes) -> Tables:
    """Networks with weights to spare, and with few."""
    import pandas as pd

    tables: dict[str, list[pd.DataFrame]] = {}
    for arm in arms:
        lab.progress(f"walking from minima with {arm.name}")
        for name, table in of_arm(arm, sizes).items():
            tables.setdefault(name, []).append(table.assign(arm=arm.name))
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}


def experiment(lab: Lab) -> Tables:
    """The settings of the claim."""
    sizes = Sizes(lab.replicates(10), lab.pick(1500, 5000), lab.pick(200, 1000))
    with one_thread():
        return evidence(lab, (SPARE, SCARCE), sizes)


def title(arm: Arm) -> str:
    """The finding about one arm."""
    return f"{arm.name}: most eigenvalues flat, and a walk to more than half the weights' length away"


def judge(tables: Tables) -> list[Finding]:
    """V2 on the seeds: a minimum counts as no isolated point where spectrum and walk both say so."""
    rows = tables["minima"]
    findings = []
    for arm in (SPARE, SCARCE):
        some = rows[rows.arm == arm.name]
        arrived = (some.gradient <= ARRIVED) & (some.highest <= RISE)
        seen = arrived & (some.flat > HALF) & (some.distance > HALF)
        note = f"medians {number(some.flat.median())} flat, {number(some.distance.median())} of the length; "
        note += f"largest gradient {number(some.gradient.max())}"
        least, most = (ALL_OF_TEN, None) if arm == SPARE else (None, 1 - ALL_OF_TEN)
        name = title(arm)
        findings.append(count(name, int(seen.sum()), len(some), at_least=least, at_most=most, note=note))
    wide = rows[rows.arm == SPARE.name]
    exact = wide.loss < 1e-12
    told = f"test outputs change by {number(wide.change.median())} of their size on the way (median)"
    name = f"{SPARE.name}: minima that fit every example exactly"
    return [*findings, count(name, int(exact.sum()), len(wide), at_least=ALL_OF_TEN, note=told)]


def figures(tables: Tables) -> list[Drawing]:
    """Spectra, the walks, and how far they get."""
    return [_spectra(tables["spectra"]), _walks(tables), _reached(tables["minima"])]


def _spectra(rows: pd.DataFrame) -> Drawing:
    drawn = figure("Spectra at the minima", "share of the eigenvalues", "|eigenvalue| / largest", log_y=True)
    for arm, some in rows.groupby("arm", sort=False):
        found = spread(some.assign(eigenvalue=some.eigenvalue.clip(lower=1e-16)), ["rank"], "eigenvalue")
        lines(drawn, found, "rank", "middle", band=("low", "high"), name=str(arm))
    reference(drawn, FLAT, "flat")
    return Drawing(
        drawn,
        "Eigenvalues of the exact Hessian, in order (median and 80 % of the seeds). With more weights than "
        "examples most are zero to rounding, as many as weights exceed examples; no symmetry forces them.",
    )


def _walks(tables: Tables) -> Drawing:
    drawn = figure("Away from a minimum", "distance / length of the weights", "rise of the loss", log_y=True)
    arms = list(dict.fromkeys(tables["walks"].arm))
    for k, (kind, table) in enumerate((("walk", tables["walks"]), ("straight on", tables["straight"]))):
        for index, arm in enumerate(arms):
            for seed, some in table[table.arm == arm].groupby("seed"):
                drawn.add_scatter(
                    x=some.distance.to_numpy(),
                    y=some.rise.clip(lower=1e-7).to_numpy(),
                    mode="lines",
                    name=f"{kind}, {arm}",
                    legendgroup=f"{kind}, {arm}",
                    showlegend=bool(seed == 0),
                    line={"width": 1.2, "color": colour(index), "dash": "dot" if k else "solid"},
                )
    reference(drawn, RISE, "allowed")
    return Drawing(
        drawn,
        "Walks that start along the flattest direction and are turned so that the loss rises by no more than "
        "the dashed line allows, one a seed (drawn from 10⁻⁷), beside straight lines in random directions "
        "from the same minima.",
    )


def _reached(rows: pd.DataFrame) -> Drawing:
    drawn = figure(
        "How far, and how much changes", "distance / length of the weights", "change of test outputs",
    )  # fmt: skip
    lines(drawn, rows, "distance", "change", by="arm", mode="markers")
    reference(drawn, HALF, "half the length", axis="x")
    return Drawing(
        drawn,
        "Where each walk ended, and the change of the outputs on test digits as a share of their size. The "
        "networks at its two ends fit the training data alike; the change tells whether the way leads "
        "through other functions.",
    )


C64 = Claim(
    id="C64",
    section="6.6.1",
    title="Minima are not isolated points",
    statement="Minima are no isolated points: one can move away from them without the loss rising.",
    source="Notes §6.6.1; Draxler et al. 2018",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=decided_by(title(SPARE)),
    caveats=(
        "Tanh networks 20-h-1 that tell odd digits from even ones by the mean squared error, from 20 "
        "principal components: pixels that are constant, or linear combinations of pixels that no example "
        "varies, would give flat directions for nothing. Tanh has no continuous symmetry; ReLU units can be "
        "rescaled by any positive number, so that their minima are never isolated.",
        "One output, so that weights per example are weights per label. With more labels than weights there "
        "is no surface of error zero; the control has 0.18 weights per example, and a penalty of "
        "0.0005 |θ|², without which its searches reached no minimum. The penalty bends every direction by "
        "0.001, so the control's minima are isolated in part because of it.",
        "One output, 20 components and the penalty were settled over first trials, in which networks with "
        "ten outputs did not come close enough to a minimum. That more than half of the eigenvalues vanish "
        "follows from counting where an error of zero is reached; the walk is what is tested.",
        "The walk is a search: it shows what it reached. Cross-entropy has no minimum at all on separable "
        "data, and its valley leads to infinity.",
    ),
    errata=("E40",),
)
