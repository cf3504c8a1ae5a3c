"""``losslab landscape`` and ``losslab connect``: slices of weight space, and paths through it."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losslab.cli.runs import saved_points
from losslab.cli.terminal import terminal
from losslab.errors import LosslabError

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from losslab import paths as room
    from losslab.cli.commands import Connect, Landscape
    from losslab.engine import Points
    from losslab.lecture.claim import Drawing
    from losslab.tasks import Task

SIDE = 31
"""Points along each axis of a plane that is drawn beside paths."""


def landscape(command: Landscape) -> None:
    """Measures the slice, prints what stands where, writes the page and the table."""
    from losslab import paths
    from losslab.tasks import load_task

    task = load_task(command.task, folder=command.data)
    points = saved_points(task, command.run_folder)
    where = _slice(command, points)
    begun = time.perf_counter()
    land = paths.Landscape(task, batch_norm=command.batch_norm)
    axes = where.axes(command.points, command.margin)
    grid = paths.measure_slice(land, where, *axes, out=command.keep)
    seconds = time.perf_counter() - begun
    told = _sentences(grid)
    console = terminal()
    console.print(_printed(grid.marked, f"{task.name}: {where.dimensions}-dimensional slice"))
    for sentence in told:
        console.print(f"• {sentence}", highlight=False)
    measured = next(iter(grid.values.values())).numel()
    console.print(f"{measured} points in {seconds:.1f} s", style="dim")
    if command.out is not None:
        from losslab.report.landscapes import draw_grid

        _write(command.out, f"Landscape of {task.name}", command, draw_grid(grid), told, grid.marked)
        console.print(f"open [bold]{command.out}[/bold]")


def _slice(command: Landscape, points: Points) -> room.Slice:
    from losslab import paths

    members = list(command.members) or list(range(min(points.members, 3)))
    chosen = paths.as_points(points, members)
    if command.random is None and chosen.members > 1:
        if chosen.members > 3:
            raise LosslabError(f"{chosen.members} members were named: pass two for a line, three for a plane")
        return paths.through(points, members)
    if chosen.members > 1 and command.members:
        raise LosslabError("random directions start from one network: pass one member with --random")
    return paths.random_slice(chosen.select([0]), command.random or 2, command.seed, command.normalise)


def _sentences(grid: room.Grid) -> list[str]:
    from losslab.paths import barrier

    told = []
    if grid.slice.dimensions == 1 and len(grid.slice.marks) == 2:
        inside = (grid.axes[0] >= 0) & (grid.axes[0] <= 1)
        for name, values in grid.values.items():
            found = barrier(values[inside], grid.axes[0][inside].clamp(0, 1))
            told.append(
                f"{name.replace('_', ' ').capitalize()}: barrier {float(found.over_chord):.4g} above the "
                f"chord at {float(found.chord_place):.2f} of the way, {float(found.over_mean):.4g} above the "
                "ends' mean."
            )
    return told


def connect(command: Connect) -> None:
    """Finds the paths, prints lengths and barriers, writes the page."""
    from losslab import paths
    from losslab.tasks import load_task

    task = load_task(command.task, folder=command.data)
    points = saved_points(task, command.run_folder)
    members = list(command.members) or list(range(min(points.members, 4)))
    points = paths.as_points(points, members)
    begun = time.perf_counter()
    pairs = list(combinations(range(points.members), 2))
    land = paths.Landscape(task, batch_norm=command.batch_norm)
    matched: dict[str, pd.DataFrame] = {}
    kinds = {"": points}
    if command.align:
        kinds["aligned "], matched = _aligned(task, points, members)
    found: dict[tuple[str, str], room.Path] = {}
    for kind, where in kinds.items():
        for method in dict.fromkeys(("linear", command.method)):
            settings = _settings(command, method)
            for (a, b), path in zip(
                pairs, paths.connect(land, pairs, points=where, method=method, **settings), strict=True
            ):
                found[f"{members[a]} to {members[b]}", kind + method] = path
    seconds = time.perf_counter() - begun
    summary = _summary(found)
    console = terminal()
    few = [c for c in summary if str(c).startswith(("pair", "method", "found", "length", *_first(found)))]
    console.print(_printed(summary[few], f"{task.name}: {len(pairs)} pairs"))
    named = {", ".join(label): path for label, path in found.items()}
    told = [f"{label}: {path.note}." for label, path in named.items() if path.note]
    for sentence in told:
        console.print(f"• {sentence}", highlight=False)
    console.print(f"{len(found)} paths in {seconds:.1f} s", style="dim")
    if command.out is not None:
        from losslab.report.landscapes import draw_paths

        title = f"Paths between networks of {task.name}"
        drawings = [*draw_paths(found), *_plane(command, land, found)]
        _write(command.out, title, command, drawings, told, summary, matched)
        console.print(f"open [bold]{command.out}[/bold]")


def _plane(command: Connect, land: room.Landscape, found: dict[tuple[str, str], room.Path]) -> list[Drawing]:
    """The plane through two networks and the bend between them, with the curve on it."""
    from losslab import paths
    from losslab.report.landscapes import draw_grid

    path = next(path for (_, method), path in found.items() if method == command.method)
    if not command.plane:
        return []
    if path.frame.members != 3:
        raise LosslabError("--plane needs one bend: pass --method polychain or bezier with --bends 1")
    plane = paths.through(path.frame.select([0, 2, 1]))
    plane = replace(plane, labels=("one end", "the other", "the bend"))
    grid = paths.measure_slice(land, plane, *plane.axes(SIDE))
    return draw_grid(grid, plane.project(path.points)[0], command.method)


def _settings(command: Connect, method: str) -> dict[str, Any]:
    from losslab.rules import make

    if method == "linear":
        return {}
    settings: dict[str, Any] = {
        "steps": command.steps,
        "batch_size": command.batch_size,
        "seed": command.seed,
    }
    if method in ("polychain", "bezier"):
        settings["bends"] = command.bends
    if command.level is not None:
        if method != "dss":
            raise LosslabError("--level is what strings stay below: pass it with --method dss")
        settings["level"] = command.level
    if command.lr is not None:
        if method == "autoneb":
            raise LosslabError("autoneb has a rate for each of its cycles: leave out --lr")
        settings["rule"] = make("sgd" if method == "dss" else "adam", lr=command.lr)
    return settings


def _aligned(task: Task, points: Points, members: list[int]) -> tuple[Points, dict[str, pd.DataFrame]]:
    """The networks in the order of units of the first, and what was matched."""
    from losslab import paths

    spec = paths.permutation_spec(task)
    first, moved, tables = points.select([0]), [points.select([0])], {}
    for k in range(1, points.members):
        found = paths.match_weights(spec, first, points.select([k]), restarts=4)
        moved.append(found.points)
        tables[f"Units of network {members[k]} matched with those of {members[0]}"] = found.table
    return paths.joined(*moved), tables


def _first(found: dict[tuple[str, str], room.Path]) -> list[str]:
    """What a terminal has room for: the first loss and the last measurement."""
    names = list(next(iter(found.values())).values)
    return [names[0], names[-1]]


def _summary(found: dict[tuple[str, str], room.Path]) -> pd.DataFrame:
    """One row a path: its length and, of each measurement, ends, maximum and barrier."""
    import pandas as pd

    rows = []
    for (pair, method), path in found.items():
        told = path.summary
        row: dict[str, Any] = {"pair": pair, "method": method, "found": "yes" if path.found else "no"}
        row["length"] = told["normalised_length"]
        for name in path.values:
            row |= {f"{name} {part}": told[f"{name}_{part}"] for part in ("highest", "barrier")}
        rows.append(row)
    return pd.DataFrame(rows)


def _printed(table: pd.DataFrame, title: str) -> Table:
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for column in table.columns:
        left = table[column].dtype == object
        shown.add_column(str(column).replace("_", " "), justify="left" if left else "right")
    for row in table.itertuples(index=False):
        shown.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row))
    return shown


def _write(
    out: Path,
    title: str,
    command: Any,
    drawings: list[Any],
    sentences: list[str],
    table: pd.DataFrame,
    more: dict[str, pd.DataFrame] | None = None,
) -> None:
    from losslab import provenance
    from losslab.report import write_page

    settings = {k: v for k, v in asdict(command).items() if v not in (None, ()) and k != "out"}
    write_page(
        out,
        title,
        "Losses and errors in weight space: where networks stand, and what lies between them.",
        drawings,
        sentences,
        {"What was measured": table} | (more or {}),
        settings | provenance.machine(),
        heading="In short",
    )
