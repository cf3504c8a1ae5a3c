"""Figures and tables of a lottery: accuracy and early stop against the share of weights left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from losslab.lecture.claim import Drawing
from losslab.lecture.figures import NEUTRAL, figure, lines, reference
from losslab.report.standalone import write_page
from losslab.tickets import comparing, stability_sentences, stability_summary
from losslab.tickets.stability import STABLE

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

SHOWN = 5
"""Levels whose validation curves are drawn."""

NAMES = {
    "dense": "dense",
    "ticket": "tickets",
    "reinit": "re-initialised",
    "random": "random masks",
    "shuffled": "shuffled weights",
    "signs": "signs kept, sizes drawn anew",
    "small dense": "small dense networks",
}
"""Arms in a reader's words."""

MEANS = (
    "Lines: means over replicates, with their 95 % t intervals. The leftmost point is the dense network; the "
    "view is that of the single networks."
)
VERDICT = (
    "a winning ticket is no worse than the dense network within the tolerance, and better than every "
    "control, each by its 95 % interval"
)
PAIRED = (
    "ticket minus opponent, paired by replicate; times as early: the opponent's early-stop step over the "
    "ticket's"
)


def write_lottery(
    path: Path,
    name: str,
    table: pd.DataFrame,
    curves: pd.DataFrame,
    tolerance: float,
    facts: dict[str, object] | None = None,
) -> None:
    """Writes the page of a lottery, finished or on its way.

    Args:
        path: The file.
        name: Of the task.
        table: `losslab.tickets.Lottery.table`.
        curves: `losslab.tickets.Lottery.curves`.
        tolerance: The plan's.
        facts: Settings and versions.
    """
    tables = {f"Level by level; {VERDICT}": leveled(table, tolerance)}
    if comparing.levels_of(table):
        tables[f"Tickets against the others: {PAIRED}"] = compared(table)
    write_page(
        path,
        f"Lottery tickets of {name}",
        "Networks that were pruned, reset and trained again, beside their controls: how good they are where "
        "the validation loss is least, and how soon that is.",
        draw_lottery(table, curves),
        comparing.sentences(table, tolerance),
        tables,
        facts,
        heading="What was found",
    )


def write_instability(
    path: Path, name: str, found: pd.DataFrame, facts: dict[str, object] | None = None
) -> None:
    """Writes the page of an instability analysis, from the table of `losslab.tickets.instability`."""
    shown = stability_summary(found)
    measure = str(shown.columns[2])
    drawn = figure("Instability", "step k at which runs part", measure.replace("_", " "))
    axis = {"type": "category", "categoryorder": "array", "categoryarray": [str(k) for k in shown.k]}
    drawn.update_xaxes(**axis)
    places = shown.assign(k=shown.k.astype(str))
    lines(drawn, places, "k", measure, band=("low", "high"), mode="lines+markers", name="mean")
    single = found[found.measure == measure.removesuffix("_barrier")].assign(k=lambda t: t.k.astype(str))
    lines(drawn, single, "k", "instability", mode="markers", name="each pair")
    if measure.startswith("error"):
        reference(drawn, STABLE, f"stable below {STABLE:.0%}")
    write_page(
        path,
        f"Instability of {name}",
        "Two runs share their first k steps and then see batches in other orders: the barrier on the segment "
        "between their ends tells whether they ended in one linearly connected basin.",
        [Drawing(drawn, "Each pair, and the mean with its 95 % t interval over pairs.")],
        stability_sentences(found),
        {"Barrier: the highest on the segment minus the mean of its ends": shown},
        facts,
        heading="What was found",
    )


def draw_lottery(table: pd.DataFrame, curves: pd.DataFrame) -> list[Drawing]:
    """Score and early stop against P_m, the tickets' validation curves, and those of one level's arms."""
    drawings = [draw_score(table), draw_stop(table), _by_level(table, curves)]
    controlled = [k for k in comparing.levels_of(table) if _arms(table, k) != ["ticket"]]
    return [*drawings, _of_level(table, curves, _near(table, controlled))] if controlled else drawings


def draw_score(table: pd.DataFrame) -> Drawing:
    """Accuracy at early stop (or what tickets are judged by instead) against P_m."""
    name, factor = _told(table)
    drawn = _against_size(table, f"{name[0].upper()}{name[1:]}", name, factor)
    return Drawing(drawn, f"Where the validation loss is least. {MEANS}")


def draw_stop(table: pd.DataFrame) -> Drawing:
    """Early-stop step against P_m."""
    drawn = _against_size(table, "Early-stop step", "updates to the least validation loss")
    return Drawing(drawn, f"{MEANS} Both are taken by the logarithm.")


def leveled(table: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """One row an arm of a level, for readers."""
    import pandas as pd

    name, factor = _told(table)
    levels = comparing.levels_of(table)
    said = {k: comparing.decide(comparing.compare(table, k), tolerance) for k in levels}
    rows = []
    for row in comparing.summary(table).to_dict("records"):
        ticket = row["arm"] == "ticket"
        told = {"level": row["level"], "networks": NAMES[row["arm"]], "n": row["n"]}
        told |= {"weights": f"{row['kept']:,}".replace(",", " "), "left": f"{100 * row['remaining']:.2f} %"}
        told |= {name: _digits(factor * row["score"], factor)}
        told |= {"95 %": _ends(factor * row["low"], factor * row["high"], factor)}
        told |= {"early stop": _whole(row["stop"]), "95 % of it": _ends(row["stop_low"], row["stop_high"])}
        rows.append(told | {"verdict": said[row["level"]] if ticket else ""})
    return pd.DataFrame(rows)


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """One row an opponent of a level's tickets, for readers."""
    import pandas as pd

    factor = _told(table)[1]
    unit = "points" if factor == 100 else "difference"
    rows = []
    for level in comparing.levels_of(table):
        for row in comparing.compare(table, level).to_dict("records"):
            told = {
                "level": level,
                "left": f"{100 * row['remaining']:.2f} %",
                "against": NAMES[row["opponent"]],
            }
            told |= {"pairs": row["n"], unit: _digits(factor * row["difference"], factor, "+")}
            told |= {"95 %": _ends(factor * row["low"], factor * row["high"], factor, "+")}
            told |= {"times as early": _digits(row["faster"], 100)}
            rows.append(told | {"95 % of it": _ends(row["faster_low"], row["faster_high"], 100)})
    return pd.DataFrame(rows)


# -- figures -------------------------------------------------------------------------------------------


def _against_size(table: pd.DataFrame, title: str, axis: str, factor: float = 0.0) -> Figure:
    """Every arm's score (with a factor) or early stop against the share of weights left."""
    log = not factor
    columns = ["stop", "stop_low", "stop_high"] if log else ["score", "low", "high"]
    drawn = figure(title, "weights left, %", axis, log_x=True, log_y=log)
    rows = comparing.summary(table)
    rows[columns] *= factor or 1.0
    rows["percent"] = 100 * rows.remaining
    for arm in dict.fromkeys(["ticket", *rows.arm]):
        # The dense network is where tickets come from: it is level 0 of their line.
        mine = rows[rows.arm.isin(["ticket", "dense"])] if arm == "ticket" else rows[rows.arm == arm]
        if arm != "dense":
            band = (columns[1], columns[2]) if arm == "ticket" else None
            lines(drawn, mine, "percent", columns[0], None, band, "lines+markers", NAMES[str(arm)])
        if arm not in ("ticket", "dense"):  # at a level or two a band would be too thin to see
            middle, low, high = (mine[c].to_numpy() for c in columns)
            drawn.data[-1].error_y = {"array": high - middle, "arrayminus": middle - low, "thickness": 1.5}
    dense = rows[rows.arm == "dense"]
    if len(dense):
        reference(drawn, float(dense[columns[0]].iloc[0]), "dense")
    _percent_axis(drawn, rows.percent.min())
    _frame(drawn, table, factor)
    return drawn


def _percent_axis(drawn: Figure, least: float) -> None:
    """Per cent from 100 down, as the field draws it."""
    every = (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if least < 25 else (100, 80, 60, 50, 40, 30)
    ticks = [t for t in every if t >= 0.9 * least]
    drawn.update_xaxes(
        tickvals=ticks,
        ticktext=[f"{t:g}" for t in ticks],
        range=[math.log10(112), math.log10(min(least, 95.0) / 1.12)],
    )


def _frame(drawn: Figure, table: pd.DataFrame, factor: float) -> None:
    """A view of what was measured: intervals of two replicates may be far wider, and leave it."""
    import numpy as np

    values = (
        table[comparing.score_of(table.columns)] * factor
        if factor
        else np.log10(table.stop_step.clip(lower=1))
    )
    values = values[np.isfinite(values)]
    if len(values):
        low, high = float(values.min()), float(values.max())
        room = 0.35 * (high - low) or 0.05 * abs(high) or 1.0
        drawn.update_yaxes(range=[low - room, high + room])


def _by_level(table: pd.DataFrame, curves: pd.DataFrame) -> Drawing:
    """The validation loss of tickets as they train, for a few levels from the dense network to the last."""
    levels = [0, *comparing.levels_of(table)]
    count = min(SHOWN, len(levels))
    shown = [levels[round(k * (len(levels) - 1) / max(1, count - 1))] for k in range(count)]
    drawn = figure("Validation loss, level by level", "updates", "validation loss", log_y=True)
    for level in shown:
        arm = "ticket" if level else "dense"
        share = comparing.arm_of(table, level, arm).remaining.mean()
        _curve(drawn, curves[(curves.level == level) & (curves.arm == arm)], f"{100 * share:.1f} %")
    return Drawing(drawn, "Tickets by the share of their weights, 100 % the dense networks; means.")


def _of_level(table: pd.DataFrame, curves: pd.DataFrame, level: int) -> Drawing:
    share = comparing.arm_of(table, level, "ticket").remaining.mean()
    title = f"Validation loss with {100 * share:.1f} % of the weights"
    drawn = figure(title, "updates", "validation loss", log_y=True)
    for arm in _arms(table, level):
        _curve(drawn, curves[(curves.level == level) & (curves.arm == arm)], NAMES[arm])
    _curve(drawn, curves[curves.arm == "dense"], NAMES["dense"], grey=True)
    return Drawing(drawn, "Tickets, their controls, and the dense networks; means over replicates.")


def _curve(drawn: Figure, rows: pd.DataFrame, name: str, grey: bool = False) -> None:
    middle = rows.groupby("step", as_index=False)["validation_loss"].mean()
    middle = middle[middle.validation_loss > 0]
    lines(drawn, middle, "step", "validation_loss", name=name)
    if grey:
        drawn.data[-1].line.color = NEUTRAL
        drawn.data[-1].marker.color = NEUTRAL


def _arms(table: pd.DataFrame, level: int) -> list[str]:
    return [str(arm) for arm in table[table.level == level].arm.unique()]


def _near(table: pd.DataFrame, levels: Sequence[int], share: float = 0.21) -> int:
    """The level nearest to a share of the weights, by the logarithm."""
    left = {k: comparing.arm_of(table, k, "ticket").remaining.mean() for k in levels}
    return min(levels, key=lambda k: abs(math.log(left[k] / share)))


# -- words ---------------------------------------------------------------------------------------------


def _told(table: pd.DataFrame) -> tuple[str, float]:
    """The score in words, and what it is multiplied by."""
    score = comparing.score_of(table.columns)
    name = score.replace("_", " ")
    return (f"{name}, %", 100.0) if score.endswith("accuracy") else (name, 1.0)


def _digits(value: float, factor: float, sign: str = "") -> str:
    if math.isnan(value):
        return "–"
    return f"{value:{sign}.2f}" if factor == 100 else f"{value:{sign}.4g}"


def _whole(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.0f}".replace(",", " ")


def _ends(low: float, high: float, factor: float | None = None, sign: str = "") -> str:
    if math.isnan(low):
        return ""
    if factor is None:
        return f"{_whole(low)} to {_whole(high)}"
    return f"{_digits(low, factor, sign)} to {_digits(high, factor, sign)}"


__all__ = [
    "compared",
    "draw_lottery",
    "draw_score",
    "draw_stop",
    "leveled",
    "write_instability",
    "write_lottery",
]
