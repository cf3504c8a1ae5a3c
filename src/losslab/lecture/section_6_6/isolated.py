"""C63: the straight line between minima crosses a barrier, which made them look isolated."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from losslab.engine import Population
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, decided_by
from losslab.lecture.figures import colour, figure, lines, reference, spread
from losslab.lecture.numbers import number
from losslab.lecture.section_6_6.pairs import (
    BATCH,
    RATE,
    aligned,
    between,
    couples,
    courses,
    landscape_of,
    minima,
    summaries,
)
from losslab.lecture.training import trained
from losslab.lecture.verdicts import count
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
    """How much work to do: widths, pairs, steps of training and of the bends."""

    widths: tuple[int, ...]
    pairs: int
    training: int
    curve: int


def spawned(run: Population, pairs: int, steps: int) -> Population:
    """The networks trained anew, both of a pair from the initial weights of the first."""
    blank = trained(run.task, Adam(lr=RATE), seeds=2 * pairs, steps=0, batch_size=BATCH)
    start = blank.points.select([2 * (i // 2) for i in range(2 * pairs)])
    rule = Adam(lr=RATE)
    return trained(run.task, rule, seeds=2 * pairs, steps=steps, batch_size=BATCH, start=start)


def of_width(width: int, sizes: Sizes) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Summaries and courses of all arms at one width; the bent path only where the claim is decided."""
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
    told = [summaries(paths).assign(arm=arm, width=width) for arm, paths in arms.items()]
    ways = [courses(paths).assign(arm=arm, width=width) for arm, paths in arms.items()]
    return pd.concat(told), pd.concat(ways)


def evidence(lab: Lab, sizes: Sizes) -> Tables:
    """Barriers between pairs of networks of several widths."""
    import pandas as pd

    told, ways = [], []
    for width in sizes.widths:
        lab.progress(f"crossing barriers at width {width}")
        summary, course = of_width(width, sizes)
        told.append(summary)
        if width == WIDTH:
            ways.append(course)
    return {"paths": pd.concat(told, ignore_index=True), "courses": pd.concat(ways, ignore_index=True)}


def experiment(lab: Lab) -> Tables:
    """The settings of the claim."""
    widths = lab.pick((4, 16, WIDTH, 128), (2, 4, 8, 16, 32, WIDTH, 128, 256, 512))
    return evidence(lab, Sizes(widths, lab.replicates(10), lab.pick(200, 1000), lab.pick(200, 1000)))


ISOLATED = f"width {WIDTH}: straight barrier above {HIGH:g} nat and {TIMES:g} times the bent path's"


def judge(tables: Tables) -> list[Finding]:
    """V2: every pair must have the barrier; same starts and alignment stand beside it."""
    rows = tables["paths"]
    here = rows[rows.width == WIDTH].set_index(["arm", "pair"])
    height = here.train_loss_barrier
    line, bent = height[APART], height[BENT]
    seen = (line > HIGH) & (line > TIMES * bent)
    note = f"medians {number(line.median())} and {number(bent.median())} nat"
    findings = [count(ISOLATED, int(seen.sum()), len(seen), at_least=ALL_OF_TEN, note=note)]
    error = here.test_error_barrier[TOGETHER]
    name = f"width {WIDTH}, same start, other order of examples: barrier of the test error below {STABLE:g}"
    findings.append(count(name, int((error < STABLE).sum()), len(error), at_least=0.5))
    for width in sorted(rows.width.unique()):
        some = rows[rows.width == width].pivot_table(index="pair", columns="arm", values="train_loss_barrier")
        lower = some[ORDERED] < some[APART] / 2
        told = f"medians {number(some[APART].median())} before, {number(some[ORDERED].median())} after"
        name = f"width {width}: alignment of the units halves the straight barrier"
        findings.append(count(name, int(lower.sum()), len(some), at_least=0.5, note=told))
    return findings


def figures(tables: Tables) -> list[Drawing]:
    """The notes' picture beside the measured one, and barriers against width."""
    return [_pictures(tables["courses"]), _widths(tables["paths"])]


def _pictures(rows: pd.DataFrame) -> Drawing:
    drawn = figure("Isolated minima, and what was measured", "t, along the straight line", "training loss")
    for side, arm in (("", APART), ("2", BENT)):
        for pair, some in rows[rows.arm == arm].groupby("pair"):
            drawn.add_scatter(
                x=some.t.to_numpy(),
                y=some.train_loss.to_numpy(),
                xaxis=f"x{side}",
                mode="lines",
                name=f"{arm}, pair {pair}",
                showlegend=False,
                line={"width": 1.5, "color": colour(1 if side else 0)},
            )
    drawn.update_layout(
        xaxis={"domain": [0, 0.48]},
        xaxis2={"domain": [0.52, 1], "title": {"text": "t, along the bent path"}},
    )
    return Drawing(
        drawn,
        "Left: straight lines between independent networks, where each minimum seems to sit in a hole of its "
        "own. Right: the same pairs of networks, at the same scale, along paths with one trained bend.",
    )


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
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=decided_by(ISOLATED),
    caveats=(
        "A barrier on the straight line is a fact about the line, not about the minima: most of it goes away "
        "with the order of the units where networks are wide, and none is left on a bent path.",
        "Digits, 64-h-h-10, Adam at fixed rates; weight matching from two starts, a local optimum. Averages "
        "are not repaired for the variance that they lose (Jordan et al. 2023).",
        "Ten of ten pairs are needed: with fewer pairs the interval cannot tell.",
    ),
    errata=("E40",),
)
