"""Networks whose copies with two units exchanged are provably cut off: what stands between, for C6.

Two such networks and, beside each, the same with one unit more, where the proof does not apply.

**Three points on a circle, 120 degrees apart, each to be mapped to the next, by 2-3-2 ReLU units without
biases** (Freeman and Bruna 2017, appendix on a disconnection). Let A, 3 x 3, hold the hidden units at the
three points and Y, 2 x 3, the targets; the network gives ``W_2 A``. If A is singular, its rows lie in a plane
with a unit normal n, and the squared error is at least ``|Y n|^2 = (3 - (1 n)^2) / 2``. The plane can be
chosen to hold two independent vectors without negative entries, since the rows of A have none, and that
leaves ``(1 n)^2 < 2``. So wherever ``det A = 0`` the loss is above 1/12; exchanging two units changes the
sign of det A; every path between the two climbs above 1/12.

**Exclusive or by 2-2-1 units of one increasing activation** (the example of Draxler et al. 2018, section 5).
If a first-layer weight is zero, one unit does not see that input, and the outputs on the two sides of it
differ with one and the same sign, where the targets want two; the same if a unit has no outgoing weight. Half
the mean squared error is then at least 1/16. Below that level no such weight changes its sign. Two units with
the same signs would make outputs that grow along both inputs, or along one and fall along the other, and the
loss is at least 1/16 again; so exchanging the units changes a sign, and every path climbs to 1/16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from losslab.curvature import minimise
from losslab.engine import Objective, Points
from losslab.lecture.claim import Drawing, Finding, Tables
from losslab.lecture.figures import NEUTRAL, colour, contours_with_paths, figure, reference
from losslab.lecture.numbers import number
from losslab.lecture.section_6_1.certified import normal_starts
from losslab.lecture.verdicts import count
from losslab.paths import (
    Landscape,
    Path,
    Slopes,
    joined,
    measure_slice,
    permutation_spec,
    relax,
    stretched,
    strings,
    through,
    walk_bands,
)
from losslab.rules import Adam
from losslab.tasks import Data, Task, half_mse, mlp, supervised

if TYPE_CHECKING:
    import pandas as pd

SOLVED = 1e-8
"""Loss below which a start has found a solution."""

IMAGES = 31
SEARCHED = 0.9
"""Level of the strings of beads, as a share of the height of the wall."""


LOWEST = 1e-2
"""Loss, in units of the wall, from which the bands are drawn."""


class Walled(NamedTuple):
    """A network: its task, the height of the wall, its unit count, and what has a sign on each side."""

    task: Task
    height: float
    sides: Callable[[Points], Tensor] | None


class Effort(NamedTuple):
    """How much work to do: starts, pairs, steps of a band and of a bead, cells along a side of the plane."""

    starts: int
    pairs: int
    band: int
    bead: int
    grid: int


def circle() -> Data:
    """Three points of the unit circle, each with the next as its target."""
    angle = 2 * math.pi * torch.arange(3, dtype=torch.float64) / 3
    x = torch.stack([angle.cos(), angle.sin()], 1)
    return Data((x, x.roll(-1, 0)))


def exclusive_or() -> Data:
    """Two bits and whether they differ."""
    x = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
    return Data((x, (x[:, :1] != x[:, 1:]).double()))


def determinants(points: Points) -> Tensor:
    """``det A`` of 2-3-2 networks, A the hidden units at the three points, ``[N, 1]``."""
    x, _ = circle().all()
    return torch.linalg.det((points["0.weight"] @ x.T).relu())[:, None]


def signs(points: Points) -> Tensor:
    """The weights that cannot change sign below the wall of exclusive or, ``[N, 6]``."""
    return torch.cat([points["0.weight"].flatten(1), points["2.weight"].flatten(1)], 1)


def networks() -> dict[str, Walled]:
    """Name -> network; those with a unit to spare have no sides."""
    ring, bits = circle(), exclusive_or()

    def rotation(units: int) -> Task:
        return supervised(mlp(2, units, 2, bias=False).to(torch.float64), ring, criterion=half_mse)

    def parity(units: int) -> Task:
        model = mlp(2, units, 1, activation="tanh").to(torch.float64)
        return supervised(model, bits, criterion=half_mse)

    return {
        "three points, 2-3-2": Walled(rotation(3), 1 / 12, determinants),
        "three points, 2-4-2": Walled(rotation(4), 1 / 12, None),
        "exclusive or, 2-2-1": Walled(parity(2), 1 / 16, signs),
        "exclusive or, 2-3-1": Walled(parity(3), 1 / 16, None),
    }


def solutions(task: Task, starts: int) -> Points:
    """Where L-BFGS from standard normal weights fits the data."""
    objective = Objective(task, execution="stacked")
    like = Points.from_modules([task.model()])
    generator = torch.Generator().manual_seed(1)
    points = normal_starts(like, np.ones(starts), generator, fan_in=False)
    found = minimise(objective, points, tolerance=1e-6, steps=200)
    return found.points.select((found.value < SOLVED).nonzero().flatten())


def exchanged(task: Task, points: Points) -> Points:
    """The same networks with their first two hidden units exchanged."""
    spec = permutation_spec(task)
    (group,) = spec.groups
    return spec.permute(points, spec.swap(group, 0, 1))


def apart(walled: Walled, points: Points, copies: Points) -> np.ndarray:
    """Whether a network and its copy lie on different sides, ``[N]``; NaN where there is no wall."""
    if walled.sides is None:
        return np.full(points.members, np.nan)
    differ = walled.sides(points).sign() != walled.sides(copies).sign()
    return differ.any(1).double().numpy()


def searched(name: str, effort: Effort) -> tuple[pd.DataFrame, pd.DataFrame, list[Path]]:
    """Ways from solutions to their copies: one row a pair, the courses of the bands, the bands themselves."""
    import pandas as pd

    walled = networks()[name]
    task = walled.task
    own = solutions(task, effort.starts)
    own = own.select(list(range(min(effort.pairs, own.members))))
    copies, count = exchanged(task, own), own.members
    ends, pairs = joined(own, copies), [(i, count + i) for i in range(count)]
    landscape, slopes = Landscape(task, execution="stacked"), Slopes(task, None, execution="stacked")
    bands = walk_bands(landscape, relax(slopes, stretched(ends, pairs, IMAGES), steps=effort.band))
    beads = strings(
        slopes, landscape, ends, pairs, level=SEARCHED * walled.height, rule=Adam(lr=0.02), steps=effort.bead
    )  # fmt: skip
    rows = pd.DataFrame(
        {
            "network": name,
            "pair": range(count),
            "height": walled.height,
            "highest": [float(path.barrier().highest) for path in bands],
            "connected": [path.found for path in beads],
            "apart": apart(walled, own, copies),
        }
    )
    courses = [
        pd.DataFrame({"place": p.places.numpy(), "loss": p["train_loss"].numpy(), "pair": i, "network": name})
        for i, p in enumerate(bands)
    ]
    return rows, pd.concat(courses, ignore_index=True), bands


def plane(bands: list[Path], grid: int) -> pd.DataFrame:
    """The plane through a solution, its copy and the band between them, with det A on it.

    Of all bands the one with the lowest top, and of its images the one farthest from the straight way; the
    band itself, projected on the plane, has the kind ``"band"``.
    """
    import pandas as pd

    walled = networks()["three points, 2-3-2"]
    path = min(bands, key=lambda path: float(path.barrier().highest))
    theta = path.frame.matrix()
    away, chord = theta - theta[:1], theta[-1:] - theta[:1]
    aside = away - (away @ chord.T) / chord.square().sum() * chord
    landscape = Landscape(walled.task, execution="stacked")
    where = through(path.frame.select([0, len(theta) - 1, int(aside.norm(dim=1).argmax())]))
    found = measure_slice(landscape, where, *where.axes(grid, 0.4))
    cells = found.table.set_axis(["x", "y", *found.values], axis=1).assign(kind="grid")
    coordinates = torch.tensor(cells[["x", "y"]].to_numpy().tolist(), dtype=torch.float64)
    cells["wall"] = determinants(where.at(coordinates))[:, 0].numpy()
    band = pd.DataFrame(where.project(path.frame)[0].numpy(), columns=["x", "y"]).assign(kind="band")
    return pd.concat([cells, band], ignore_index=True)


def evidence(effort: Effort) -> dict[str, pd.DataFrame]:
    """All four networks, and the plane of the first."""
    import pandas as pd

    found = {name: searched(name, effort) for name in networks()}
    bands = found["three points, 2-3-2"][2]
    return {
        "walls": pd.concat([rows for rows, _, _ in found.values()], ignore_index=True),
        "courses": pd.concat([courses for _, courses, _ in found.values()], ignore_index=True),
        "plane": plane(bands, effort.grid),
    }


def wall_title(network: str) -> str:
    """The finding about what lies between solutions and copies."""
    return f"{network}: solutions that a string of beads connects to their copy below the wall"


def side_title(network: str) -> str:
    """The finding about the certificate."""
    return f"{network}: solutions on another side of the wall than their copy"


def judge_wall(network: str, rows: pd.DataFrame) -> list[Finding]:
    """V2 on the strings of beads and, where there is a wall, on the sides of the ends."""
    height = float(rows.height.iloc[0])
    told = f"wall at {number(height)}; tops of the elastic bands {number(rows.highest.min())} to "
    told += number(rows.highest.max())
    reached, walled = int(rows.connected.sum()), bool(rows.apart.notna().all())
    if not walled:
        return [count(wall_title(network), reached, len(rows), at_least=0.5, note=told)]
    below = int((rows.highest < height).sum())
    told += f"; bands below the wall {below}, which would refute the proof"
    crossed = int(rows.apart.sum())
    return [
        count(side_title(network), crossed, len(rows), at_least=0.69),
        count(wall_title(network), reached, len(rows), at_most=0.31, note=told),
    ]


def draw_plane(rows: pd.DataFrame) -> Drawing:
    """The wall between two halves of weight space."""
    cells, band = rows[rows.kind == "grid"], rows[rows.kind == "band"][["x", "y"]].to_numpy()
    table = cells.pivot_table(index="y", columns="x", values="train_loss", dropna=False)
    drawn = contours_with_paths(
        "A solution, its copy and the wall", table.columns, table.index, table,
        {"straight": band[[0, -1]], "elastic band": band},
        "distance in weight space", "distance across", log=True,
    )  # fmt: skip
    wall = cells.pivot_table(index="y", columns="x", values="wall", dropna=False)
    drawn.add_contour(
        x=wall.columns.to_numpy(),
        y=wall.index.to_numpy(),
        z=wall.to_numpy(),
        contours={"start": 0, "end": 0, "size": 1, "coloring": "lines"},
        line={"width": 4},
        colorscale=[[0, NEUTRAL], [1, NEUTRAL]],
        showscale=False,
        hoverinfo="skip",
        name="det A = 0",
    )
    drawn.add_scatter(
        x=[None], y=[None], mode="lines", name="the wall, det A = 0", line={"color": NEUTRAL, "width": 4}
    )
    drawn.update_yaxes(scaleanchor="x")
    return Drawing(
        drawn,
        "Loss of 2-3-2 on three points, in the plane of a solution (ring), its copy with two units exchanged "
        "(dot) and an image of the band between them; the band is projected. The thick line is where det A "
        "is zero: there the loss is above 1/12 in every plane, and the two solutions have different signs.",
    )


def draw_courses(tables: Tables) -> Drawing:
    """The losses along all bands, in units of the walls' heights."""
    known = {str(network): some for network, some in tables["walls"].groupby("network", sort=False)}
    problems = list(dict.fromkeys(network.split(",")[0] for network in known))
    drawn = figure("Loss along elastic bands", "no spare unit", "loss / height of the wall", log_y=True)
    for network, rows in tables["courses"].groupby("network", sort=False):
        problem, told = str(network).split(",")[0], known[str(network)]
        free, height = bool(told["apart"].isna().all()), float(told.height.iloc[0])
        for pair, one in rows.groupby("pair"):
            drawn.add_scatter(
                x=one.place.to_numpy(),
                y=np.maximum(one.loss.to_numpy() / height, LOWEST),
                xaxis="x2" if free else "x",
                mode="lines",
                name=problem,
                legendgroup=problem,
                showlegend=bool(pair == 0 and not free),
                hovertext=str(network),
                line={"width": 1.2, "color": colour(problems.index(problem))},
            )
    drawn.update_layout(
        xaxis={"domain": [0, 0.48], "range": [0, 1]},
        xaxis2={"domain": [0.52, 1], "range": [0, 1], "title": {"text": "one spare unit"}},
    )
    drawn.update_yaxes(range=[np.log10(LOWEST), 1.3], dtick=1)
    reference(drawn, 1.0, "proven wall")
    drawn.update_shapes(xref="paper")  # across both panels
    return Drawing(
        drawn,
        "From solutions to their copies with two units exchanged, along the bands' length, drawn from a "
        "hundredth of the wall. Without a unit to spare every band must climb over the height that is "
        "proven; with one more nothing forces it to.",
    )
