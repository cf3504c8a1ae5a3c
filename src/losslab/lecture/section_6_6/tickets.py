"""C65 to C68: lottery tickets, and what they say about the size of networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from losslab.lecture.claim import Claim, Drawing, Finding, Lab, Tables, decided_by
from losslab.lecture.figures import figure, intervals, lines, reference, spread
from losslab.lecture.section_6_6.ticket_runs import (
    BATCH,
    CONV,
    CONV_NOTE,
    MATCHED,
    RATE,
    TWENTY_ONE,
    convolutional,
    fine_tuned,
    runs,
)
from losslab.lecture.verdicts import paired

if TYPE_CHECKING:
    import pandas as pd

LOSS = {"digits": 0.5, "mnist": 0.2, "cifar10": 0.5}
"""Points of accuracy that a ticket may lose and still match."""

SMALL = 0.3
"""The same where sizes from 15 % down to 1 % are judged."""

LEAST = {"digits": 10, "mnist": 5, "cifar10": 5}
MATCHES = "the ticket of 21 % matches the dense network"
FINE = "pruned to 9 % and fine-tuned, a network matches itself"


def arm(rows: pd.DataFrame, name: str, level: int) -> pd.DataFrame:
    """One arm at one level, by replicate."""
    return rows[(rows.arm == name) & (rows.level == level)].set_index("replicate").sort_index()


def first_below(rows: pd.DataFrame, share: float) -> int:
    """The first level with at most so many weights left."""
    mine = rows[(rows.arm == "ticket") & (rows.remaining <= share)]
    return int(mine.level.min()) if len(mine) else int(rows.level.max())


def no_worse(name: str, rows: pd.DataFrame, level: int, loss: float) -> Finding:
    """Ticket minus dense, shifted by what may be lost."""
    mine, dense = arm(rows, "ticket", level), arm(rows, "dense", 0)
    gap = mine.accuracy - dense.accuracy
    note = (
        f"{mine.remaining.mean():.2%} of the weights: ticket minus dense {gap.median():+.2f} points; "
        f"the estimate is this plus the {loss:g} that may be lost"
    )
    return paired(name, gap + loss, delta=0.0, least=_least(rows), note=note)


def _least(rows: pd.DataFrame) -> int:
    return LEAST[str(rows["data"].iloc[0])]


def judge_matching(tables: Tables) -> list[Finding]:
    """C65: at 21 %; at 3.6 %, and for a convolutional network, as context."""
    rows = tables["runs"]
    loss = LOSS[str(rows["data"].iloc[0])]
    later = first_below(rows, 0.04)
    told = [
        no_worse(MATCHES, rows, TWENTY_ONE, loss),
        no_worse("the ticket of 4 % matches the dense network", rows, later, loss),
    ]
    if "conv" in tables:
        told.append(no_worse(f"{CONV}: the last ticket matches", tables["conv"], MATCHED, LOSS["cifar10"]))
    return told


def judge_speed(tables: Tables) -> list[Finding]:
    """C66: early-stop steps against dense and re-initialised networks, accuracy against the latter."""
    rows, least = tables["runs"], _least(tables["runs"])
    mine, dense = arm(rows, "ticket", TWENTY_ONE), arm(rows, "dense", 0)
    fresh = arm(rows, "reinit", TWENTY_ONE)
    step = mine.stop_step.clip(lower=1)
    earlier, slower = 1 - step / dense.stop_step.clip(lower=1), fresh.stop_step / step - 1
    note = f"median steps: ticket {step.median():.0f}, dense {dense.stop_step.median():.0f}"
    return [
        paired("share of the dense network's steps saved", earlier, delta=0.2, least=least, note=note),
        paired(
            "steps of the re-initialised network beyond the ticket's, as a share of these",
            slower,
            delta=0.5,
            least=least,
            note=f"median steps, re-initialised: {fresh.stop_step.median():.0f}",
        ),
        paired("points of accuracy above re-initialised", mine.accuracy - fresh.accuracy, 0.0, least),
    ]


def judge_sizes(tables: Tables) -> list[Finding]:
    """C67: at 15 % and at 1 %."""
    rows = tables["runs"]
    return [
        no_worse(
            f"the ticket of {share:.0%} loses at most {SMALL:g} points", rows, first_below(rows, share), SMALL
        )
        for share in (0.15, 0.01)
    ]


def judge_necessity(tables: Tables) -> list[Finding]:
    """C68: pruning after training; a ticket against a dense network of its size."""
    tuned, rows = tables["tuned"], tables["runs"]
    loss, least = LOSS[str(rows["data"].iloc[0])], _least(rows)
    gap = arm(tuned, "pruned and fine-tuned", 1).accuracy - arm(tuned, "dense", 0).accuracy
    mine, small = arm(rows, "ticket", MATCHED), arm(rows, "small dense", MATCHED)
    note = (
        f"median change {gap.median():+.2f} points; the estimate is this plus the {loss:g} that may be lost"
    )
    sizes = f"{int(mine.kept.median())} and {int(small.kept.median())} weights"
    return [
        paired(FINE, gap + loss, delta=0.0, least=least, note=note),
        paired(
            "points of a ticket above a dense network of its size",
            mine.accuracy - small.accuracy,
            delta=0.3,
            least=least,
            note=sizes,
        ),
    ]


def experiment(lab: Lab) -> Tables:
    """The lottery."""
    return runs(lab)


def experiment_matching(lab: Lab) -> Tables:
    """The lottery, and in the paper profile that of a convolutional network."""
    return {**runs(lab), **convolutional(lab)}


def experiment_necessity(lab: Lab) -> Tables:
    """The lottery, and pruning after training."""
    return {**runs(lab), "tuned": fine_tuned(lab)}


def _against_size(rows: pd.DataFrame, column: str, title: str, y_title: str, log_y: bool = False) -> Drawing:
    """A measurement of every arm against the share of weights left."""
    drawn = figure(title, "share of the weights left", y_title, log_x=True, log_y=log_y)
    dense = rows[rows.arm == "dense"]
    tickets = rows[rows.arm.isin(["ticket", "dense"])].assign(arm="ticket")
    every = spread(
        tickets.groupby(["level", "arm", "replicate"]).first().reset_index(),
        ["level", "arm"],
        column,
        0.0,
        1.0,
    )
    size = rows.groupby(["level", "arm"]).remaining.mean()
    every["remaining"] = [float(rows[rows.level == k].remaining.max()) for k in every.level]
    lines(drawn, every, "remaining", "middle", by="arm", band=("low", "high"), mode="lines+markers")
    others = rows[~rows.arm.isin(["ticket", "dense"])]
    if len(others):
        told = spread(others, ["level", "arm"], column, 0.0, 1.0)
        told["remaining"] = [float(size[(k, a)]) for k, a in zip(told.level, told.arm, strict=True)]
        lines(drawn, told, "remaining", "middle", by="arm", band=("low", "high"), mode="lines+markers")
    reference(drawn, float(dense[column].median()), "dense")
    drawn.update_xaxes(autorange="reversed")
    return Drawing(drawn, "Medians with the range over replicates; the dense network is the leftmost point.")


def figures_matching(tables: Tables) -> list[Drawing]:
    """Accuracy against size."""
    shown = {"runs": "Accuracy at early stop", "conv": CONV}
    return [
        _against_size(tables[name], "accuracy", title, "test accuracy, %")
        for name, title in shown.items()
        if name in tables
    ]


def figures_speed(tables: Tables) -> list[Drawing]:
    """Early-stop step against size, and the validation curves at 21 %."""
    curves = tables["curves"]
    rows = spread(curves, ["step", "arm"], "validation_loss", 0.25, 0.75)
    drawn = figure("Validation loss, 21 % of the weights", "updates", "validation loss", log_y=True)
    lines(drawn, rows.sort_values("step"), "step", "middle", by="arm", band=("low", "high"))
    title = "Step of the least validation loss"
    return [
        _against_size(
            tables["runs"].assign(stop_step=lambda t: t.stop_step.clip(lower=1)),
            "stop_step",
            title,
            "updates",
            True,
        ),
        Drawing(
            drawn, "Medians and quartiles over replicates. The least point of each curve is its early stop."
        ),
    ]


def figures_sizes(tables: Tables) -> list[Drawing]:
    """What tickets lose, by size."""
    rows = tables["runs"]
    dense = arm(rows, "dense", 0).accuracy
    mine = rows[rows.arm == "ticket"].copy()
    mine["gap"] = mine.accuracy - mine.replicate.map(dense)
    told = spread(mine, ["remaining"], "gap", 0.1, 0.9)
    drawn = figure("What tickets lose", "share of the weights left", "ticket minus dense, points", log_x=True)
    lines(drawn, told, "remaining", "middle", band=("low", "high"), mode="lines+markers", name="ticket")
    reference(drawn, -SMALL, f"−{SMALL:g} points")
    drawn.update_xaxes(autorange="reversed")
    return [
        Drawing(drawn, "Median and 80 % of the replicates; below the dashed line more is lost than allowed.")
    ]


def figures_necessity(tables: Tables) -> list[Drawing]:
    """Networks of nine per cent, and the whole ones."""
    rows, tuned = tables["runs"], tables["tuned"]
    shown = {"dense, whole": arm(rows, "dense", 0), "ticket, 9 %": arm(rows, "ticket", MATCHED)}
    shown |= {"pruned, fine-tuned": arm(tuned, "pruned and fine-tuned", 1)}
    shown |= {
        "small dense network": arm(rows, "small dense", MATCHED),
        "re-initialised": arm(rows, "reinit", MATCHED),
    }
    drawn = figure("Nine per cent of the weights", "test accuracy, %", "network")
    accuracy = {name: part.accuracy for name, part in shown.items()}
    intervals(
        drawn,
        list(accuracy),
        [a.median() for a in accuracy.values()],
        [a.min() for a in accuracy.values()],
        [a.max() for a in accuracy.values()],
    )
    return [Drawing(drawn, "Median and range over replicates of networks with about equally many weights.")]


SOURCE = "Notes §6.6.2; Frankle & Carbin 2019"
COMMON = (
    f"Settings are the paper's and not tuned: Glorot normal weights, Adam at {RATE:g}, batches of {BATCH}, "
    "20 % of each layer and 10 % of the output layer a round. Quick and full run 64-300-100-10 on digits for "
    "600 and 1,500 updates and look every 10, the paper profile LeNet-300-100 on MNIST for 50,000, looking "
    "every 100. Networks whose early stop would come later than the last update are cut short.",
    "The early stop is the look with the least validation loss, found afterwards; test accuracy is read "
    "there. The digits' test set has 500 images, so one image is 0.2 points.",
)

C65 = Claim(
    id="C65",
    section="6.6.2",
    title="A pruned network, reset to its first weights, matches the whole one",
    statement="A sub-network found by pruning, reset to its original weights and trained alone, matches the "
    "full network.",
    source=SOURCE,
    paper=True,
    experiment=experiment_matching,
    judge=judge_matching,
    figures=figures_matching,
    combine=decided_by(MATCHES),
    caveats=(
        *COMMON,
        "Deep networks at large rates need weights from some steps into training instead of the first ones "
        "(Frankle et al. 2020); a digits network does not test that.",
        f"The paper profile adds, as context: {CONV_NOTE}",
    ),
)
C66 = Claim(
    id="C66",
    section="6.6.2",
    title="The first weights matter: tickets learn faster than re-initialised networks",
    statement="The weights to which a ticket is reset matter: drawn anew it learns slower and less well.",
    source=SOURCE,
    paper=True,
    experiment=experiment,
    judge=judge_speed,
    figures=figures_speed,
    caveats=(
        *COMMON,
        "Zhou et al. (2019) found that much of what the first weights give lies in their signs.",
    ),
)
C67 = Claim(
    id="C67",
    section="6.6.2",
    title="Tickets of 15 % to 1 % of the size do as well",
    statement="Tickets have anywhere from 15 % to 1 % of the network's weights and reach similar results.",
    source=SOURCE,
    paper=True,
    experiment=experiment,
    judge=judge_sizes,
    figures=figures_sizes,
    caveats=(*COMMON, "The notes' range is across architectures; here one network is asked for both ends."),
)
C68 = Claim(
    id="C68",
    section="6.6.2",
    title="Networks are larger than they need to be",
    statement="Models are much more complex than is in principle necessary.",
    source="Notes §6.6.2; Han et al. 2015; Frankle & Carbin 2019",
    paper=True,
    experiment=experiment_necessity,
    judge=judge_necessity,
    figures=figures_necessity,
    combine=decided_by(FINE),
    caveats=(
        *COMMON,
        "Pruning after training is one cut to 9 % and as many updates again at the same rate; Han et al. cut "
        "step by step. The second finding tells whether it takes sparsity or a smaller dense network does; "
        "it does not decide the verdict.",
        "Nothing here finds the small network without training the large one first.",
    ),
)

CLAIMS = [C65, C66, C67, C68]
