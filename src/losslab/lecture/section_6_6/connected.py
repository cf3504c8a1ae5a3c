"""C62: independently trained minima are connected by simple paths of nearly the same loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from losslab.engine import Population
from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, Verdict, agreement
from losslab.lecture.figures import figure, lines, spread
from losslab.lecture.numbers import number
from losslab.lecture.scenes import moving, planes
from losslab.lecture.section_6_6.cifar_pairs import VOTING, bench
from losslab.lecture.section_6_6.pairs import (
    Pair,
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
from losslab.lecture.verdicts import count, join_notes, paired, paired_family
from losslab.paths import Band, Landscape, Slopes, relax, stretched, walk_bands

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 64
"""Hidden width at which the claim is decided."""

LEFT = 0.05
"""Share of the straight barrier that may be left."""

METHODS = ("straight", "polychain", "bezier", "autoneb", "dss")
CURVES = {"polychain": "one bend", "bezier": "Bezier"}
BANDS = {"autoneb": "AutoNEB"}


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
        told.append(summaries(found).assign(method=method))
        ways.append(courses(found).assign(method=method))
        if width == WIDTH and method == "polychain":
            plane = plane_of(Landscape.of(run, ("train",), execution="stacked"), found[0], sizes.grid)
    summary, course = (labelled(pd.concat(rows), width, f"width {width}") for rows in (told, ways))
    return summary, course, plane


def settling(run: Population, pair: Pair, steps: Sequence[int], images: int = 13) -> pd.DataFrame:
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


LOOKS = (0, 1, 2, 3, 4, 6, 8, 10, 13, 17, 22, 30, 40, 60, 100)


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
            plane, band = seen, settling(run, (0, 1), LOOKS)
            ways.append(course)
    return {
        "paths": pd.concat(told, ignore_index=True),
        "courses": pd.concat(ways, ignore_index=True),
        "plane": plane,
        "band": band,
    }


def experiment(lab: Lab) -> Tables:
    """The settings of the claim: digits, or CIFAR-10 in the paper profile where its folder is given."""
    residual = bench(lab)
    if residual is not None:
        told = {kind: residual.tables(kind, VOTING) for kind in ("paths", "courses", "ensembles")}
        return told | {"plane": residual.table("polychain", "plane")}
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
            grid=lab.pick(51, 61),
        ),
    )


def names(network: str, method: str) -> tuple[str, str, str]:
    """The three findings about one kind of path of one network."""
    told = f"{network}, {(CURVES | BANDS)[method]}"
    return (
        f"{told}: share of the straight barrier removed",
        f"{told}: room below 1.1 × the ends' loss + 0.01",
        f"{told}: test accuracy kept to within a point",
    )


def judge(tables: Tables) -> list[Finding]:
    """V3 over the pairs: barrier, highest loss, accuracy; the first network's curves decide.

    On digits that is the one of the claim's width, and the others show the limits.
    """
    rows = tables["paths"].sort_values("pair")
    widths = _decisive_first(rows)
    cells = [(widths[0], method) for method in CURVES] + [(width, "polychain") for width in widths[1:]]
    if "ensembles" in tables:
        cells += [(widths[0], method) for method in BANDS]
    findings = [
        finding for width, method in cells for finding in _kept_low(rows[rows.width == width], method)
    ]
    if "ensembles" in tables:
        findings += [_voted(rows, tables["ensembles"], method) for method in CURVES | BANDS]
    strings = rows[rows.method == "dss"]
    if len(strings):
        name = (
            f"{strings.network.iloc[0]}, strings of beads: pairs connected below 1.1 × the ends' loss + 0.01"
        )
        findings.append(count(name, int(strings.found.sum()), len(strings), at_least=0.5))
    return findings


def _decisive_first(rows: pd.DataFrame) -> list[int]:
    """The widths of the networks, the one that decides before the others."""
    return sorted(rows.width.unique(), key=lambda width: (width != WIDTH, -width))


def _kept_low(rows: pd.DataFrame, method: str) -> list[Finding]:
    """The three findings about one kind of path of the network of these rows."""
    here, line = (rows[rows.method == name].set_index("pair") for name in (method, "straight"))
    removed = 1 - here.train_loss_barrier / line.train_loss_barrier
    ends = here[["train_loss_start", "train_loss_end"]].max(axis=1)
    room = 1.1 * ends + 0.01 - here.train_loss_highest
    drop = here.test_error_highest - here[["test_error_start", "test_error_end"]].max(axis=1)
    first, second, third = names(here.network.iloc[0], method)
    least, note = int(here.least.iloc[0]), here.note.iloc[0]
    heights, errors = (_barriers(here, line, name) for name in ("train_loss", "test_error"))
    found = paired_family({first: removed}, 1 - LEFT, least, join_notes(heights, note))
    return found + paired_family({second: room, third: 0.01 - drop}, 0.0, least, errors)


def _barriers(bent: pd.DataFrame, line: pd.DataFrame, name: str) -> str:
    """Median barriers of a measurement and where they stand, in words."""
    told = []
    for rows in (bent, line):
        height, place = rows[f"{name}_barrier"].median(), rows[f"{name}_place"].median()
        told.append(f"{number(height)} at {number(place)} of the length")
    return f"median barriers of the {name.replace('_', ' ')}: {told[0]}; straight {told[1]}"


def _voted(paths: pd.DataFrame, rows: pd.DataFrame, method: str) -> Finding:
    """How much less the ensemble of all points of a path errs than the better of its ends."""
    told, here = paths[paths.method == method].set_index("pair"), rows[rows.method == method]
    alone = told[["test_error_start", "test_error_end"]].min(axis=1)
    voted = here.sort_values("t").groupby("pair").test_so_far.last()
    name = f"{told.network.iloc[0]}, {(CURVES | BANDS)[method]}: test error that the ensemble along it saves"
    note = f"median test errors {number(alone.median())} of the better end, {number(voted.median())} together"
    return paired(name, alone - voted, 0.0, int(told.least.iloc[0]), note)


def deciding(findings: Sequence[Finding]) -> Verdict:
    """The overall verdict: that of the trained curves of the first network."""
    return agreement(findings[: 3 * len(CURVES)])


def figures(tables: Tables) -> list[Drawing]:
    """The plane through two minima and the bend, losses along the paths, a band that settles or ensembles."""
    drawings = [_plane(tables), _courses(tables["courses"])]
    if "ensembles" in tables:
        return [*drawings, _ensembles(tables["ensembles"])]
    return [*drawings, _band(tables["band"])]


def _plane(tables: Tables) -> Drawing:
    title = "The plane through two minima and the bend"
    drawn = planes(title, [measured(tables["plane"])], "training loss", "distance in weight space", "across")
    rows = tables["paths"]
    network = rows.network[rows.width == _decisive_first(rows)[0]].iloc[0]
    return Drawing(
        drawn,
        f"Training loss ({network}) in the plane of two independent networks and the trained bend between "
        "them, at the same scale in both directions.",
    )


def _courses(rows: pd.DataFrame) -> Drawing:
    drawn = figure("Loss along the ways", "t, from one network to the other", "training loss", log_y=True)
    for name, label in {"straight": "straight", **CURVES, **BANDS}.items():
        some = rows[rows.method == name]
        if name in BANDS and some.groupby("pair").size().nunique() > 1:
            continue  # bands grow, each its own way: there is no median over pairs
        found = spread(some, ["t"], "train_loss").sort_values("t")
        lines(drawn, found, "t", "middle", band=("low", "high"), name=label)
    return Drawing(drawn, "Median and 80 % of the pairs: straight, and along trained paths.")


def _ensembles(rows: pd.DataFrame) -> Drawing:
    drawn = figure("Networks along the way vote", "t, up to which they vote", "test error of the ensemble")
    for name, label in {"straight": "straight", **CURVES}.items():
        found = spread(rows[rows.method == name], ["t"], "test_so_far").sort_values("t")
        lines(drawn, found, "t", "middle", band=("low", "high"), name=label)
    return Drawing(
        drawn,
        "Test error when all networks from the start up to a point vote with their mean probabilities: "
        "median and 80 % of the pairs. At 0 stands the start alone.",
    )


def _band(rows: pd.DataFrame) -> Drawing:
    drawn = figure("An elastic band settles", "share of the band's length", "training loss", log_y=True)
    moving(drawn, rows, "place", "loss", "step", "steps")
    return Drawing(
        drawn,
        "Thirteen images between two networks slide down across the band, each step on one common batch; "
        "dashed where they begin, dotted where they are last seen. Play, or move the slider.",
    )


C62 = Claim(
    id="C62",
    section="6.6.1",
    title="Independent minima are connected by simple paths of low loss",
    statement="Independently trained minima are connected by simple curves, such as chains of two straight "
    "pieces, along which the cost stays nearly the same.",
    source="Notes §6.6.1; Garipov et al. 2018; Draxler et al. 2018; Freeman & Bruna 2017",
    paper=True,
    experiment=experiment,
    judge=judge,
    figures=figures,
    combine=deciding,
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
        "The paper profile, with --data, takes CIFAR-10 (re-encoded as JPEG, without random crops and "
        "flips) in place of digits: ten ResNet-20s trained by Draxler et al.'s recipe, Garipov et al.'s "
        "curves without weight decay, as the networks had none, and AutoNEB. Its elastic bands share a "
        "batch a step, and statistics of batch norm are estimated anew at each point.",
        "Without a GPU that profile is a stated reduction: half of ResNet-20's width, images of 16×16 "
        "pixels, 1000 training and 500 test images, 400 steps a network, 500 a curve and 120 a band, at the "
        "papers' rates. Its networks have not learned the training data by heart, and half a point of "
        "accuracy is two or three images. Thresholds are those of the other profiles; five pairs are enough "
        "there.",
    ),
    errata=("E32", "E40"),
)
