"""What slices and paths say about networks, in sentences with numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from losslab.lecture.numbers import number
from losslab.paths import Barrier, Grid, Path, barrier

CONNECTED = 0.1
"""A path connects two networks if no more than this share of the straight line's barrier is left on it."""

NAMES = {"polychain": "polychain", "bezier": "Bezier curve", "autoneb": "elastic band", "dss": "string"}
"""What the methods find."""

TOLD = 4
"""Pairs told one by one; of more, only the highest and the lowest straight line."""


def of_line(name: str, values: Tensor, t: Tensor) -> str:
    """How high a measurement rises between two networks.

    Args:
        name: What was measured.
        values: ``[T]``, from end to end.
        t: Where, from 0 to 1.

    Example:
        >>> t = torch.linspace(0, 1, 3)
        >>> of_line("train_loss", torch.tensor([0.1, 2.0, 0.2]), t)
        'the train loss rises to 2 at 50 % of the way, 10 times the higher end (0.2)'
    """
    found, told = barrier(values, t), name.replace("_", " ") or "loss"
    if not math.isfinite(float(found.highest)):
        return f"the {told} is not finite all along the way"
    top = int(values.argmax())
    ends = max(float(values[0]), float(values[-1]))
    if top in (0, len(values) - 1):
        return f"the {told} is nowhere above that of the ends ({_ends(values)})"
    place = f"{100 * float(t[top]):.0f} % of the way"
    return (
        f"the {told} rises to {number(float(found.highest))} at {place}{_times(float(found.highest), ends)}"
    )


def _times(high: float, ends: float) -> str:
    return f", {number(high / ends)} times the higher end ({number(ends)})" if ends > 0 else ""


def of_paths(found: Mapping[tuple[str, str], Path], method: str) -> list[str]:
    """What was found between pairs: straight, and by a method.

    Args:
        found: (pair, method) -> path; straight ones under ``"linear"``, aligned ones with ``"aligned "``
            before the method.
        method: The method.
    """
    told, way = [], NAMES.get(method, method)
    for kind in ("", "aligned "):
        lines = {pair: path for (pair, name), path in found.items() if name == f"{kind}linear"}
        ways = {pair: path for (pair, name), path in found.items() if name == kind + method}
        if not lines:
            continue
        who = f"{kind.capitalize()}networks " if kind else "Networks "
        if len(lines) > 1 and method != "linear":
            low = sum(connected(lines[pair], path) for pair, path in ways.items())
            middle = [torch.tensor([height(p) for p in ps.values()]).median() for ps in (lines, ways)]
            told.append(
                f"{low} of {len(lines)} pairs are connected by the {way}: no more than a tenth of the "
                f"straight line's barrier is left. Median highest loss: {number(float(middle[0]))} straight, "
                f"{number(float(middle[1]))} along the {way}."
            )
        for pair in _worth_telling(lines):
            told.append(f"{who}{pair}: {_pair(lines[pair], ways[pair], way)}")
    return told


def connected(line: Path, path: Path) -> bool:
    """Whether a path connects: a string that was found, or little left of the line's barrier."""
    if path.found is not None:
        return path.found
    left, before = (float(p.barrier().over_chord) for p in (path, line))
    floor = CONNECTED * max(float(next(iter(line.values.values()))[[0, -1]].max()), 0.0)
    return left <= max(CONNECTED * before, floor)


def height(path: Path) -> float:
    """The highest first loss along a path."""
    return float(path.barrier().highest)


def _pair(line: Path, path: Path, method: str) -> str:
    name = next(iter(line.values))
    first = f"straight, {of_line(name, line[name], line.places)}"
    if method == "linear":
        return f"{first}; barrier {_barriers(line.barrier())}."
    if not math.isfinite(height(path)):
        return f"{first}; the {method} is not finite all along{_note(path)}."
    before, left = (float(p.barrier().over_chord) for p in (line, path))
    ends = float(path[name][[0, -1]].max())
    if height(path) <= 1.005 * ends:
        told = f"{first}; along the {method} it is nowhere above that of the ends"
    else:
        told = f"{first}; along the {method} it stays at or below {number(height(path))}"
        told += _times(height(path), ends)
    if path.found is not None:
        verdict = "connected below the level" if path.found else "which proves nothing"
        return f"{told}: {verdict}{_note(path)}."
    if not before > CONNECTED * max(ends, 0.0):
        return f"{told}: there is next to no barrier, even straight."
    meaning = "these minima are connected" if connected(line, path) else (
        "a lower way, but no connection yet" if left < 0.5 * before else
        "no low way was found, which does not show that there is none"
    )  # fmt: skip
    told = f"{told}, a barrier of {number(left)} in place of {number(before)}: {meaning}"
    if path.settled is False:
        told += "; its loss was still falling, so more --steps may lower it"
    return told + "."


def of_grid(grid: Grid) -> list[str]:
    """What a slice shows: its highest and lowest point, how soon the loss doubles around a single network."""
    name, values = next(iter(grid.values.items()))
    told = []
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        told.append(f"{int((~finite).sum())} of {values.numel()} points are not finite; they are left open.")
    if not bool(finite.any()):
        return told
    low, high = float(values[finite].min()), float(values[finite].max())
    known, title = grid.at_marks[name], name.replace("_", " ")
    best = float(known[torch.isfinite(known)].min()) if bool(torch.isfinite(known).any()) else math.inf
    where = "at none of the networks" if low < 0.99 * best else "no lower than the best network"
    told.append(
        f"On the slice the {title} goes from {number(low)} to {number(high)}; its lowest point lies {where} "
        f"({number(best)})."
    )
    if len(known) == 1:
        told.append(_doubling(grid, name))
    return told


def _doubling(grid: Grid, name: str) -> str:
    """How far one can go along each axis from the only mark until a measurement has doubled."""
    base, told = float(grid.at_marks[name][0]), []
    for k, axis in enumerate(grid.axes):
        rest = [int(a.abs().argmin()) for a in grid.axes]
        line = grid.values[name][tuple(slice(None) if j == k else rest[j] for j in range(len(rest)))]
        high = axis[~(line <= 2 * base)].abs()
        far = (
            f"at {number(float(high.min()))}"
            if len(high)
            else f"nowhere up to {number(float(axis.abs().max()))}"
        )
        told.append(f"{far} along {grid.slice.names[k]}")
    return f"From the network the {name.replace('_', ' ')}, {number(base)}, has doubled {' and '.join(told)}."


def _worth_telling(lines: Mapping[str, Path]) -> Sequence[str]:
    pairs = sorted(
        lines, key=lambda pair: height(lines[pair]) if math.isfinite(height(lines[pair])) else math.inf
    )
    return list(lines) if len(pairs) <= TOLD else [pairs[-1], pairs[0]]


def _note(path: Path) -> str:
    return f" ({path.note})" if path.note else ""


def _ends(values: Tensor) -> str:
    return f"{number(float(values[0]))} and {number(float(values[-1]))}"


def _barriers(found: Barrier) -> str:
    chord, mean = number(float(found.over_chord)), number(float(found.over_mean))
    return f"{chord} above the chord, {mean} above the ends' mean"


__all__ = ["NAMES", "connected", "height", "of_grid", "of_line", "of_paths"]
