"""C63: the straight line between minima crosses a barrier, which made them look isolated."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from losslab.engine import Population
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, agreement
from losslab.lecture.figures import figure, lines, reference, spread
from losslab.lecture.numbers import number
from losslab.lecture.scenes import Panel, planes
from losslab.lecture.section_6_6.cifar_pairs import bench
from losslab.lecture.section_6_6.pairs import (
    BATCH,
    RATE,
    aligned,
    between,
    couples,
    courses,
    labelled,
    landscape_of,
    measured,
    minima,
    plane_of,
    summaries,
)
from losslab.lecture.training import trained
from losslab.lecture.verdicts import count, join_notes, paired
from losslab.paths import Landscape
from losslab.rules import Adam

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 64
"""Hidden width at which the claim is decided."""

HIGH, TIMES = 0.3, 10.0
"""Straight barrier in nats, and as a multiple of the bent path's, from which minima look isolated."""

STABLE = 0.02
"""Barrier of the test error below which two runs count as linearly connected (Frankle et al. 2020)."""

ALL_OF_TEN = 0.69
APART, TOGETHER, ORDERED, BENT = "straight", "straight, same start", "straight, aligned", "one bend"


class Sizes(NamedTuple):
    """How much work to do: widths, pairs, steps of training and of the bends, points a side of the plane."""

    widths: tuple[int, ...]
    pairs: int
    training: int
    curve: int
    grid: int


def spawned(run: Population, pairs: int, steps: int) -> Population:
    """The networks trained anew, both of a pair from the initial weights of the first."""
    blank = trained(run.task, Adam(lr=RATE), seeds=2 * pairs, steps=0, batch_size=BATCH)
    start = blank.points.select([2 * (i // 2) for i in range(2 * pairs)])
    rule = Adam(lr=RATE)
    return trained(run.task, rule, seeds=2 * pairs, steps=steps, batch_size=BATCH, start=start)


def of_width(width: int, sizes: Sizes) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Summaries and courses of all arms at one width, the bent path only up to where the claim is decided.

    Where it is decided, also the plane through the first two networks and the bend.
    """
    import pandas as pd

    run, pairs = minima(width, sizes.pairs, sizes.training), couples(sizes.pairs)
    landscape = landscape_of(run)
    arms = {
        APART: between(landscape, run.points, pairs, "straight"),
        TOGETHER: between(landscape, spawned(run, sizes.pairs, sizes.training).points, pairs, "straight"),
        ORDERED: between(landscape, aligned(run, pairs), pairs, "straight"),
    }
    if width <= WIDTH:
        arms[BENT] = between(landscape, run.points, pairs, "polychain", sizes.curve)
    told, ways = (
        labelled(
            pd.concat([table(paths).assign(arm=arm) for arm, paths in arms.items()]), width, f"width {width}"
        )
        for table in (summaries, courses)
    )
    if width != WIDTH:
        return told, ways, pd.DataFrame()
    seen = Landscape.of(run, ("train",), execution="stacked")
    return told, ways, plane_of(seen, arms[BENT][0], sizes.grid)


def evidence(lab: Lab, sizes: Sizes) -> Tables:
    """Barriers between pairs of networks of several widths."""
    import pandas as pd

    told, tables = [], {}
    for width in sizes.widths:
        lab.progress(f"crossing barriers at width {width}")
        summary, course, plane = of_width(width, sizes)
        told.append(summary)
        if width == WIDTH:
            tables = {"courses": course.reset_index(drop=True), "plane": plane}
    return {"paths": pd.concat(told, ignore_index=True), **tables}


ARMS = {"straight": APART, "same start": TOGETHER, "aligned": ORDERED, "polychain": BENT}
"""What the stages of the networks on CIFAR-10 are called here."""


def experiment(lab: Lab) -> Tables:
    """The settings of the claim: digits, or CIFAR-10 in the paper profile where its folder is given."""
    residual = bench(lab)
    if residual is not None:
        found = {kind: residual.tables(kind, list(ARMS)) for kind in ("paths", "courses")}
        tables = {kind: rows.assign(arm=rows.method.map(ARMS)) for kind, rows in found.items()}
        return tables | {"plane": residual.table("polychain", "plane")}
    widths = lab.pick((4, 16, WIDTH, 128), (2, 4, 8, 16, 32, WIDTH, 128, 256, 512))
    steps = lab.pick(200, 1000)
    return evidence(lab, Sizes(widths, lab.replicates(10), steps, steps, lab.pick(51, 61)))


def looks_isolated(network: str) -> str:
    """The finding that decides."""
    return f"{network}: straight barrier above {HIGH:g} nat and {TIMES:g} times the bent path's"


def judge(tables: Tables) -> list[Finding]:
    """Every pair must have the barrier (V2; V3 on CIFAR-10); same starts and alignment stand beside it."""
    rows = tables["paths"]
    decides = WIDTH if (rows.width == WIDTH).any() else rows.width.max()
    here = rows[rows.width == decides].set_index(["arm", "pair"])
    network, least, about = (here[name].iloc[0] for name in ("network", "least", "note"))
    height = here.train_loss_barrier
    line, bent = height[APART], height[BENT]
    where = number(here.train_loss_place[APART].median())
    note = f"medians {number(line.median())} nat, at {where} of the line, and {number(bent.median())} nat"
    note, name = join_notes(note, about), looks_isolated(network)
    if least < 10:
        margin = np.minimum(line - HIGH, line - TIMES * bent)
        findings = [paired(f"{name}: margin", margin, 0.0, int(least), note)]
    else:
        seen = (line > HIGH) & (line > TIMES * bent)
        findings = [count(name, int(seen.sum()), len(seen), at_least=ALL_OF_TEN, note=note)]
    error = here.test_error_barrier[TOGETHER]
    name = f"{network}, same start, other order of examples: barrier of the test error below {STABLE:g}"
    note = f"median {number(error.median())}, independent {number(here.test_error_barrier[APART].median())}"
    findings.append(count(name, int((error < STABLE).sum()), len(error), at_least=0.5, note=note))
    for _, some in rows.groupby("width"):
        barriers = some.pivot_table(index="pair", columns="arm", values="train_loss_barrier")
        lower = barriers[ORDERED] < barriers[APART] / 2
        told = (
            f"medians {number(barriers[APART].median())} before, {number(barriers[ORDERED].median())} after"
        )
        name = f"{some.network.iloc[0]}: alignment of the units halves the straight barrier"
        findings.append(count(name, int(lower.sum()), len(barriers), at_least=0.5, note=told))
    return findings


def figures(tables: Tables) -> list[Drawing]:
    """The notes' picture beside the measured one, losses along the ways, and barriers against width."""
    drawings = [_pictures(tables["plane"]), _courses(tables["courses"])]
    if tables["paths"].width.nunique() == 1:
        return [*drawings, _arms(tables["paths"])]
    return [*drawings, _widths(tables["paths"])]


def imagined(panel: Panel) -> Panel:
    """The picture that is wrong: holes at the same places, and a plateau between them (notes, figure 6.3).

    Nothing is measured: the height is a product of wells whose floor and rim are those that were measured.
    """
    x, y = np.meshgrid(np.asarray(panel.x), np.asarray(panel.y))
    places = np.array(list(panel.marks.values()))
    radius = 0.2 * float(np.linalg.norm(places[1] - places[0]))
    apart = np.stack([((x - a) ** 2 + (y - b) ** 2) / radius**2 for a, b in places])
    share = np.prod(1 - np.exp(-apart), axis=0)
    known = np.asarray(panel.values, dtype=np.float64)
    low, rim = np.nanmin(known), np.nanquantile(known, 0.95)
    return panel._replace(values=low * (rim / low) ** share, ways={}, title="as it was imagined")


def _pictures(plane: pd.DataFrame) -> Drawing:
    seen = measured(plane)
    title = "Isolated minima, as imagined and as measured"
    drawn = planes(title, [imagined(seen), seen], "training loss", "distance in weight space", "across")
    return Drawing(
        drawn,
        "Above: a drawing, not a measurement, of three minima in holes of their own, as they were thought to "
        "be (figure 6.3 of the notes). Below: the loss in the plane of two independent networks and the "
        "bend of a path trained between them.",
    )


def _courses(rows: pd.DataFrame) -> Drawing:
    drawn = figure("Loss along the ways", "t, from one network to the other", "training loss", log_y=True)
    for arm in (APART, ORDERED, TOGETHER, BENT):
        found = spread(rows[rows.arm == arm], ["t"], "train_loss").sort_values("t")
        lines(drawn, found, "t", "middle", band=("low", "high"), name=arm)
    return Drawing(
        drawn,
        "Median and 80 % of the pairs: straight lines between independent networks, with the units of one "
        "brought into the order of the other, between networks from one start, and paths with one trained "
        "bend.",
    )


def _arms(rows: pd.DataFrame) -> Drawing:
    drawn = figure("Barriers of the pairs", "pair", "barrier of the training loss, nat", log_y=True)
    for arm in (APART, ORDERED, TOGETHER, BENT):
        lines(
            drawn,
            rows[rows.arm == arm].sort_values("pair"),
            "pair",
            "train_loss_barrier",
            mode="markers",
            name=arm,
        )
    reference(drawn, HIGH, "looks isolated")
    drawn.update_xaxes(dtick=1)
    return Drawing(drawn, "Each pair's barriers. Below the dashed line a barrier does not look like one.")


def _widths(rows: pd.DataFrame) -> Drawing:
    drawn = figure("Barrier against width", "hidden width", "barrier of the training loss, nat", log_x=True)
    for arm in (APART, ORDERED, TOGETHER, BENT):
        found = spread(rows[rows.arm == arm], ["width"], "train_loss_barrier").sort_values("width")
        lines(drawn, found, "width", "middle", band=("low", "high"), mode="lines+markers", name=arm)
    reference(drawn, HIGH, "looks isolated")
    return Drawing(
        drawn,
        "Median and 80 % of the pairs. Bringing the units of one network into the order of the other lowers "
        "the straight barrier the more, the wider the networks are; a bend removes it.",
    )


C63 = Claim(
    id="C63",
    section="6.6.1",
    title="Straight lines between minima cross a barrier",
    statement="That minima are connected is surprising: they were thought to be isolated, and straight lines "
    "between them cross a barrier.",
    source="Notes §6.6.1; Frankle et al. 2020; Entezari et al. 2022; Ainsworth et al. 2023",
    paper=True,
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=lambda findings: agreement(findings[:1]),
    caveats=(
        "A barrier on the straight line is a fact about the line, not about the minima: most of it goes away "
        "with the order of the units where networks are wide, and none is left on a bent path.",
        "Digits, 64-h-h-10, Adam at fixed rates; weight matching from two starts, a local optimum. Averages "
        "are not repaired for the variance that they lose (Jordan et al. 2023).",
        "Ten of ten pairs are needed: with fewer pairs the interval cannot tell. The paper profile, which "
        "has five pairs, compares pair by pair instead: all five must be above both thresholds. That rule "
        "was set while the first such run was on its way, before a bent path had been measured.",
        "The paper profile, with --data, takes C62's networks and its reduction where there is no GPU.",
    ),
    errata=("E40",),
)
