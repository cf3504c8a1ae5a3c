"""C62: independently trained minima are connected by simple paths of nearly the same loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from losslab.engine import Population
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, decided_by
from losslab.lecture.figures import contours_with_paths, figure, lines, spread
from losslab.lecture.section_6_6.pairs import (
    Pair,
    between,
    couples,
    courses,
    landscape_of,
    minima,
    summaries,
)
from losslab.lecture.verdicts import count, paired_family
from losslab.paths import Band, Slopes, measure_slice, relax, stretched, through, walk_bands

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 64
"""Hidden width at which the claim is decided."""

LEFT = 0.05
"""Share of the straight barrier that may be left."""

METHODS = ("straight", "polychain", "bezier", "autoneb", "dss")
CURVES = {"polychain": "one bend", "bezier": "Bezier"}


class Sizes(NamedTuple):
    """How much work to do: widths, pairs, training, curves; pairs and steps of the bands and strings."""

    widths: tuple[int, ...]
    pairs: int
    training: int
    curve: int
    few: int
    band: int
    string: int
    grid: int


def paths_of(run: Population, sizes: Sizes, width: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Summaries and courses of the paths of one width, and the plane of the first trained bend."""
    import pandas as pd

    landscape, pairs = landscape_of(run), couples(sizes.pairs)
    told, ways, plane = [], [], pd.DataFrame()
    steps = {"polychain": sizes.curve, "bezier": sizes.curve, "autoneb": sizes.band, "dss": sizes.string}
    for method in METHODS if width == WIDTH else METHODS[:2]:
        chosen = pairs[: sizes.few] if method in ("autoneb", "dss") else pairs
        found = between(landscape, run.points, chosen, method, steps.get(method))
        told.append(summaries(found).assign(method=method, width=width))
        ways.append(courses(found).assign(method=method, width=width))
        if width == WIDTH and method == "polychain":
            where = through(found[0].frame.select([0, 2, 1]))
            grid = measure_slice(landscape, where, *where.axes(sizes.grid, 0.3))
            plane = grid.table.set_axis(["x", "y", *grid.values], axis=1).assign(kind="grid")
            marks = grid.marked.drop(columns="label").set_axis(["x", "y", *grid.at_marks], axis=1)
            plane = pd.concat([plane, marks.assign(kind="mark")], ignore_index=True)
    return pd.concat(told), pd.concat(ways), plane


def settling(run: Population, pair: Pair, steps: Mapping[int, str], images: int = 13) -> pd.DataFrame:
    """An elastic band on its way down: the loss along it after so many steps."""
    import pandas as pd

    slopes = Slopes(run.task, 128, execution="stacked")
    landscape, tables = landscape_of(run), []

    def look(step: int, bands: list[Band]) -> None:
        if step in steps:
            (path,) = walk_bands(landscape, bands, between=4, loss_only=True)
            (loss,) = path.values.values()
            tables.append(pd.DataFrame({"place": path.places.numpy(), "loss": loss.numpy(), "step": step}))

    relax(slopes, stretched(run.points, [pair], images), steps=max(steps) + 1, watch=look)
    return pd.concat(tables, ignore_index=True)


STEPS = {0: "straight", 2: "2", 5: "5", 10: "10", 30: "30", 100: "100"}


def evidence(lab: Lab, sizes: Sizes) -> Tables:
    """Paths between pairs of networks of several widths."""
    import pandas as pd

    told, ways, plane = [], [], pd.DataFrame()
    band = pd.DataFrame()
    for width in sizes.widths:
        lab.progress(f"connecting networks of width {width}")
        run = minima(width, sizes.pairs, sizes.training)
        summary, course, seen = paths_of(run, sizes, width)
        told.append(summary)
        if width == WIDTH:
            plane, band = seen, settling(run, (0, 1), STEPS)
            ways.append(course)
    return {
        "paths": pd.concat(told, ignore_index=True),
        "courses": pd.concat(ways, ignore_index=True),
        "plane": plane,
        "band": band,
    }


def experiment(lab: Lab) -> Tables:
    """The settings of the claim."""
    return evidence(
        lab,
        Sizes(
            widths=lab.pick((2, 8, WIDTH), (2, 4, 8, 16, 32, WIDTH, 256)),
            pairs=lab.replicates(10),
            training=lab.pick(200, 1000),
            curve=lab.pick(200, 1000),
            few=lab.pick(3, 10),
            band=lab.pick(200, 1600),
            string=lab.pick(200, 500),
            grid=lab.pick(31, 51),
        ),
    )


def names(width: int, method: str) -> tuple[str, str, str]:
    """The three findings about one kind of path at one width."""
    told = f"width {width}, {CURVES[method]}"
    return (
        f"{told}: share of the straight barrier removed",
        f"{told}: room below 1.1 × the ends' loss + 0.01",
        f"{told}: test accuracy kept to within a point",
    )


def judge(tables: Tables) -> list[Finding]:
    """V3 over the pairs: barrier, highest loss, accuracy; the widest decides, the others show the limits."""
    rows = tables["paths"].sort_values("pair")
    cells = [(WIDTH, method) for method in CURVES]
    cells += [(int(w), "polychain") for w in sorted(rows.width.unique(), reverse=True) if w != WIDTH]
    findings = []
    for width, method in cells:
        here = rows[(rows.width == width) & (rows.method == method)]
        line = rows[(rows.width == width) & (rows.method == "straight")]
        removed = 1 - here.train_loss_barrier.to_numpy() / line.train_loss_barrier.to_numpy()
        ends = here[["train_loss_start", "train_loss_end"]].max(axis=1)
        room = 1.1 * ends + 0.01 - here.train_loss_highest
        drop = here.test_error_highest - here[["test_error_start", "test_error_end"]].max(axis=1)
        first, second, third = names(width, method)
        findings += paired_family({first: removed}, delta=1 - LEFT)
        findings += paired_family({second: room, third: 0.01 - drop}, delta=0.0)
    strings = rows[rows.method == "dss"]
    name = f"width {WIDTH}, strings of beads: pairs connected below 1.1 × the ends' loss + 0.01"
    return [*findings, count(name, int(strings.found.sum()), len(strings), at_least=0.5)]


def figures(tables: Tables) -> list[Drawing]:
    """The plane through two minima and the bend, losses along the paths, a band as it settles."""
    return [_plane(tables["plane"]), _courses(tables["courses"]), _band(tables["band"])]


def _plane(rows: pd.DataFrame) -> Drawing:
    cells, marks = rows[rows.kind == "grid"], rows[rows.kind == "mark"][["x", "y"]].to_numpy()
    table = cells.pivot_table(index="y", columns="x", values="train_loss", dropna=False)
    # The plane goes through the first end, the second end and the bend, in this order of marks.
    ways = {"straight": marks[[0, 1]], "one bend": marks[[0, 2, 1]]}
    drawn = contours_with_paths(
        "The plane through two minima and the bend", table.columns, table.index, table, ways,
        "distance in weight space", "distance across", log=True,
    )  # fmt: skip
    drawn.update_yaxes(scaleanchor="x")
    return Drawing(
        drawn,
        "Training loss of 64-64-64-10 on digits in the plane of two independent networks (ring and dot) and "
        "the trained bend between them, contours even in its logarithm. The straight way crosses a hill, "
        "the bent one goes round it.",
    )


def _courses(rows: pd.DataFrame) -> Drawing:
    drawn = figure("Loss along the ways", "t, from one network to the other", "training loss", log_y=True)
    for name, label in {"straight": "straight", **CURVES}.items():
        found = spread(rows[rows.method == name], ["t"], "train_loss").sort_values("t")
        lines(drawn, found, "t", "middle", band=("low", "high"), name=label)
    return Drawing(drawn, "Median and 80 % of the pairs: straight, and along two trained paths.")


def _band(rows: pd.DataFrame) -> Drawing:
    drawn = figure("An elastic band settles", "share of the band's length", "training loss", log_y=True)
    for step, some in rows.groupby("step", sort=True):
        label = "straight" if step == 0 else f"{step} steps"
        lines(drawn, some, "place", "loss", name=label)
    return Drawing(
        drawn,
        "Thirteen images between two networks slide down across the band, each step on one common batch; the "
        "hill of the straight way is gone within tens of steps.",
    )


C62 = Claim(
    id="C62",
    section="6.6.1",
    title="Independent minima are connected by simple paths of low loss",
    statement="Independently trained minima are connected by simple curves, such as chains of two straight "
    "pieces, along which the cost stays nearly the same.",
    source="Notes §6.6.1; Garipov et al. 2018; Draxler et al. 2018; Freeman & Bruna 2017",
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=decided_by(*(name for method in CURVES for name in names(WIDTH, method))),
    caveats=(
        "Digits, 64-64-64-10, Adam at the fixed rates 0.003 for the networks and 0.01 for the bends; each "
        "network is in one pair only.",
        "Narrower networks stand beside it, to show where the paths break down. Two points of the same loss "
        "can be disconnected altogether, as Freeman and Bruna's network with three hidden units shows.",
        "Garipov et al. train for hundreds of epochs on CIFAR-10: with VGG-16 the test error along their "
        "Bezier curve lies between 6.79 and 7.75 %, along the chain with one bend between 6.79 and 8.08 %, "
        "at the ends between 6.79 and 6.94 %.",
        "The elastic bands and the strings of beads get few steps in the quick profile, and three pairs; a "
        "string that was not found proves nothing.",
    ),
    errata=("E32", "E40"),
)
