"""What a lottery's table says: means of each arm, tickets against the others pair by pair, verdicts.

Everything here reads the table alone (`Lottery.table`, or ``table.csv`` of a folder), so that a page, the
terminal and a finished folder say the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

WINS, LOSES, OPEN = "winning ticket", "no winning ticket", "undecided"
SCORES = ("test_accuracy", "validation_accuracy", "test_loss", "validation_loss")


def score_of(columns: Iterable[str]) -> str:
    """The column that tickets are judged by: test accuracy, or minus what there is instead."""
    there = set(columns)
    return next(name for name in SCORES if name in there)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % t interval over replicates; NaN ends for a single value.

    Example:
        >>> [round(v, 3) for v in interval([1.0, 2.0, 3.0])]
        [2.0, -0.484, 4.484]
    """
    from scipy.special import stdtrit

    n = len(values)
    mean = sum(values) / n if n else math.nan
    if n < 2 or not math.isfinite(mean):
        return mean, math.nan, math.nan
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    wide = float(stdtrit(n - 1, 0.975)) * spread
    return mean, mean - wide, mean + wide


def by_logarithm(values: Sequence[float]) -> tuple[float, float, float]:
    """The same of positive values by their logarithms: a geometric mean and its interval."""
    mean, low, high = (math.exp(v) for v in interval([math.log(v) for v in values]))
    return mean, low, high


def arm_of(table: pd.DataFrame, level: int, arm: str) -> pd.DataFrame:
    """The networks of one arm at one level, by replicate; the dense networks are level 0's."""
    return table[(table.level == level) & (table.arm == arm)].set_index("replicate").sort_index()


def versus(mine: pd.DataFrame, others: pd.DataFrame, score: str) -> dict[str, Any]:
    """Two arms, pair by pair of a replicate.

    Args:
        mine: Rows of `arm_of`.
        others: The opponent's.
        score: The column to compare; the sign of losses is turned.

    Returns:
        ``n`` pairs and how many of them have a network that ``diverged``; the mean ``difference`` (mine minus
        the other's) with its 95 % t interval ``low`` to ``high``; how many times as early mine stops
        (``faster``, the other's early-stop step over mine) with its interval by the logarithm. A network that
        diverged keeps its score, that of its best look before; it has no early stop.
    """
    pairs = mine.merge(others, left_index=True, right_index=True, suffixes=("", "_other"))
    sign = -1.0 if score.endswith("loss") else 1.0
    mean, low, high = interval((sign * (pairs[score] - pairs[f"{score}_other"])).tolist())
    sound = pairs[(pairs.diverged < 0) & (pairs.diverged_other < 0)]
    # A best look before the first update counts as one update.
    ratio = sound.stop_step_other.clip(lower=1) / sound.stop_step.clip(lower=1)
    faster = dict(zip(("faster", "faster_low", "faster_high"), by_logarithm(ratio.tolist()), strict=True))
    told: dict[str, Any] = {"n": len(pairs), "diverged": len(pairs) - len(sound)}
    return told | {"difference": mean, "low": low, "high": high} | faster


def compare(table: pd.DataFrame, level: int) -> pd.DataFrame:
    """Tickets of a level against the dense networks and each control: a row an opponent, see `versus`."""
    import pandas as pd

    score, mine = score_of(table.columns), arm_of(table, level, "ticket")
    others = {"dense": arm_of(table, 0, "dense")}
    here = table[table.level == level]
    others |= {str(arm): arm_of(table, level, arm) for arm in here.arm.unique() if arm != "ticket"}
    place = {"level": level, "remaining": float(mine.remaining.mean())}
    return pd.DataFrame(
        [place | {"opponent": arm} | versus(mine, theirs, score) for arm, theirs in others.items()]
    )


def decide(compared: pd.DataFrame, tolerance: float) -> str:
    """The verdict on rows of `compare`: see `losslab.tickets.Lottery.verdict`."""
    limits = [-tolerance if arm == "dense" else 0.0 for arm in compared.opponent]
    if any(high < limit for high, limit in zip(compared.high, limits, strict=True)):
        return LOSES
    won = all(low > limit for low, limit in zip(compared.low, limits, strict=True))
    return WINS if won and len(limits) > 1 else OPEN


def levels_of(table: pd.DataFrame) -> list[int]:
    """The levels that have tickets."""
    return sorted(int(k) for k in table[table.arm == "ticket"].level.unique())


def verdicts(table: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """One row a level: P_m, score and early-stop step of tickets (means), and the verdict."""
    import pandas as pd

    score, told = score_of(table.columns), []
    for level in [0, *levels_of(table)]:
        rows = arm_of(table, level, "ticket" if level else "dense")
        said = decide(compare(table, level), tolerance) if level else "dense"
        means = {name: float(rows[name].mean()) for name in ("remaining", score, "stop_step")}
        told.append({"level": level} | means | {"verdict": said})
    return pd.DataFrame(told)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row an arm of a level: its mean score and early stop with 95 % intervals over replicates.

    Columns: ``level``, ``arm``, ``n``, ``kept`` (the least), ``remaining``, ``score``, ``low``, ``high``,
    ``stop``, ``stop_low``, ``stop_high`` (by the logarithm, without networks that diverged), ``diverged``,
    and ``cut_short``: how many have their least validation loss at the very end.
    """
    import pandas as pd

    score, told = score_of(table.columns), []
    for (level, arm), rows in table.groupby(["level", "arm"], sort=False):
        sound = rows[rows.diverged < 0]
        mean, low, high = interval(rows[score].tolist())
        stop, stop_low, stop_high = by_logarithm(sound.stop_step.clip(lower=1).tolist())
        at_the_end = sound.validation_loss == sound.final_validation_loss
        row: dict[str, Any] = {"level": level, "arm": arm, "n": len(rows), "kept": int(rows.kept.min())}
        row |= {"remaining": float(rows.remaining.mean()), "score": mean, "low": low, "high": high}
        row |= {"stop": stop, "stop_low": stop_low, "stop_high": stop_high}
        told.append(row | {"diverged": len(rows) - len(sound), "cut_short": int(at_the_end.sum())})
    return pd.DataFrame(told)


def sentences(table: pd.DataFrame, tolerance: float) -> list[str]:
    """What was found, in sentences."""
    levels = levels_of(table)
    if not levels:
        return ["Only the dense networks have trained so far."]
    rows = {level: compare(table, level) for level in levels}
    said = {level: decide(found, tolerance) for level, found in rows.items()}
    score, place = (
        score_of(table.columns),
        {level: float(found.remaining[0]) for level, found in rows.items()},
    )
    limit = _points(tolerance, score)
    told = [_winners(said, place, rows, limit)]
    equal = [k for k, found in rows.items() if found.low[0] > -tolerance]
    told.append(
        f"The smallest ticket shown to lose at most {limit} against the dense network has "
        f"{_percent(place[equal[-1]])} of the weights."
        if equal
        else f"No ticket is shown to lose at most {limit} against the dense network."
    )
    controlled = [k for k, found in rows.items() if len(found) > 1] or levels
    shown = [k for k in controlled if said[k] == WINS] or controlled
    told += [_against(row, score) for row in rows[shown[-1]].to_dict("records")]
    return told + _reservations(table)


def _winners(said: dict[int, str], place: dict[int, float], rows: dict[int, pd.DataFrame], limit: str) -> str:
    won = [k for k, word in said.items() if word == WINS]
    if all(len(found) == 1 for found in rows.values()):
        return "Without controls no ticket can win: what would a network of other weights have done?"
    rule = (
        f"shown to lose at most {limit} against the dense network and to do better than every control "
        "(95 % intervals of paired differences, level by level)"
    )
    if won:
        names = ", ".join(_percent(place[k]) for k in won)
        return f"Winning tickets at {names} of the weights: {rule}."
    lost = sum(word == LOSES for word in said.values())
    rest = f"{lost} of {len(said)} levels are shown not to, the others are undecided"
    return f"No ticket is {rule}; {rest}."


def _against(row: dict[Any, Any], score: str) -> str:
    better = _points(abs(row["difference"]), score)
    low, high = (_points(v, score, signed=True) for v in (row["low"], row["high"]))
    word = "better" if row["difference"] >= 0 else "worse"
    told = (
        f"With {_percent(row['remaining'])} of the weights tickets do {better} {word} than {row['opponent']}"
    )
    told += "" if math.isnan(row["low"]) else f" ({low} to {high})"
    if math.isnan(row["faster"]):
        return told + "."
    told += f" and stop {row['faster']:.2f} times as early"
    return told + (
        "." if math.isnan(row["faster_low"]) else f" ({row['faster_low']:.2f} to {row['faster_high']:.2f})."
    )


def _reservations(table: pd.DataFrame) -> list[str]:
    arms, told = summary(table), []
    total, cut, diverged = (int(arms[name].sum()) for name in ("n", "cut_short", "diverged"))
    if cut:
        told.append(
            f"{cut} of {total} trainings have their least validation loss at the last look: trained for "
            "longer they may stop later and do better."
        )
    if idle := int(((table.stop_step == 0) & (table.diverged < 0)).sum()):
        told.append(f"{idle} of {total} trainings never got below the validation loss they started from.")
    if diverged:
        told.append(
            f"{diverged} of {total} trainings diverged: they count with their best look before, have no "
            "early stop, and what is pruned by their weights is arbitrary."
        )
    if int(arms.n.max()) == 1:
        told.append("One replicate has no intervals: pass more to decide anything.")
    return told


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(value: float, score: str, signed: bool = False) -> str:
    """A difference in words: points of accuracy, or of the loss."""
    sign = "+" if signed else ""
    if score.endswith("accuracy"):
        return f"{100 * value:{sign}.2f}" + ("" if signed else " points")
    return f"{value:{sign}.3g}"
