"""``losslab landscape`` and ``losslab connect``: slices of weight space, and paths through it."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losslab.cli.places import Chosen, check_ends, choose, land, work
from losslab.cli.runs import saved_points
from losslab.cli.terminal import counted, printed, terminal
from losslab.errors import LosslabError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from losslab import paths as room
    from losslab.cli.commands import Connect, Landscape
    from losslab.engine import Points
    from losslab.lecture.claim import Drawing
    from losslab.tasks import Task

Found = dict[tuple[str, str], "room.Path"]
"""(pair, method) -> path; methods of aligned networks begin with ``"aligned "``."""

MOST_POINTS = 1_000_000
"""Points of a slice that somebody may have meant."""

LOOKS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70)
"""Steps of an elastic band that are shown, beside the end of each cycle."""


def landscape(command: Landscape) -> None:
    """Measures the slice, prints what stands where, writes the page and the table."""
    from losslab import paths
    from losslab.report.findings import of_grid
    from losslab.tasks import load_task

    _check_slice(command)
    task = load_task(command.task, folder=command.data)
    with work(command) as kept:
        points = saved_points(task, command.run_folder)
        place = land(task, points, command.batch_norm, kept)
        chosen = choose(command, place, points, 1 if command.random is not None else 3)
        where = _slice(command, chosen)
        axes = where.axes(command.points, command.margin)
        begun = time.perf_counter()
        grid = paths.measure_slice(place, where, *axes, out=kept.part("slice.safetensors"))
        seconds = time.perf_counter() - begun
        told = [*chosen.told, *_straight(place, chosen), *of_grid(grid)]
        console = terminal()
        console.print(printed(grid.marked, f"{task.name}: {where.dimensions}-dimensional slice"))
        for sentence in told:
            console.print(f"• {sentence}", highlight=False)
        measured = next(iter(grid.values.values())).numel()
        console.print(f"{measured} points in {seconds:.1f} s", style="dim")
        if command.out is not None:
            from losslab.report.landscapes import draw_grid

            _write(command.out, f"Landscape of {task.name}", command, draw_grid(grid), told, grid.marked)
            console.print(f"open [bold]{command.out}[/bold]")


def _check_slice(command: Landscape) -> None:
    if command.random is not None and command.random not in (1, 2):
        raise LosslabError(f"--random is {command.random}: pass 1 for a line or 2 for a plane")
    if not 0 <= command.margin < 1e6:
        raise LosslabError(f"--margin is {command.margin}: pass a share of the distance, 0 or more")
    if command.points > int(MOST_POINTS**0.5):
        raise LosslabError(
            f"--points is {command.points}: a plane of so many has more than {MOST_POINTS:,}, pass fewer"
        )
    if command.random is not None and len(command.members) > 1:
        raise LosslabError("random directions start from one network: pass one member with --random")
    if len(command.members) > 3:
        raise LosslabError(
            f"{len(command.members)} members were named: pass two for a line, three for a plane"
        )


def _slice(command: Landscape, chosen: Chosen) -> room.Slice:
    from losslab import paths

    if len(chosen.members) > 1:
        try:
            return paths.through(chosen.points, labels=chosen.names)
        except LosslabError as error:
            told = ", ".join(map(str, chosen.members))
            raise LosslabError(f"members {told} span no slice ({error})") from error
    where = paths.random_slice(chosen.points, command.random or 2, command.seed, command.normalise)
    return replace(where, labels=tuple(chosen.names))


def _straight(place: room.Landscape, chosen: Chosen) -> list[str]:
    """What lies straight between the networks of a slice."""
    from losslab import paths
    from losslab.report.findings import of_paths

    pairs = list(combinations(range(len(chosen.members)), 2))
    if not pairs:
        return []
    ways = paths.connect(place, pairs, points=chosen.points, method="linear")
    names = [f"{chosen.members[a]} to {chosen.members[b]}" for a, b in pairs]
    return of_paths({(name, "linear"): way for name, way in zip(names, ways, strict=True)}, "linear")


def connect(command: Connect) -> None:
    """Finds the paths, prints lengths and barriers, writes the page."""
    from losslab import paths
    from losslab.report.findings import of_paths
    from losslab.tasks import load_task

    task = load_task(command.task, folder=command.data)
    settings = _settings(command)
    with work(command) as kept:
        points = saved_points(task, command.run_folder)
        place = land(task, points, command.batch_norm, kept)
        chosen = choose(command, place, points, 4)
        check_ends(chosen)
        begun = time.perf_counter()
        pairs = list(combinations(range(len(chosen.members)), 2))
        matched: dict[str, pd.DataFrame] = {}
        kinds = {"": chosen.points}
        if command.align:
            kinds["aligned "], matched = _aligned(task, chosen)
        found: Found = {}
        for kind, where in kinds.items():
            for method in dict.fromkeys(("linear", command.method)):
                here = kept.part(kind.strip() or "as-trained")
                ways = paths.connect(
                    place,
                    pairs,
                    points=where,
                    method=method,
                    out=here,
                    **settings if method != "linear" else {},
                )
                for (a, b), path in zip(pairs, ways, strict=True):
                    found[f"{chosen.members[a]} to {chosen.members[b]}", kind + method] = path
        votes = _votes(command, place, found)
        summary = _summary(found, votes)
        told = [*chosen.told, *of_paths(found, command.method), *_voted(command, found, votes)]
        console = terminal()
        console.print(printed(summary, f"{task.name}: {counted(len(pairs), 'pair')}"))
        for sentence in told:
            console.print(f"• {sentence}", highlight=False)
        console.print(f"{counted(len(found), 'path')} in {time.perf_counter() - begun:.1f} s", style="dim")
        if command.out is not None:
            drawings = _drawings(command, place, found, votes, kept)
            _write(
                command.out,
                f"Paths between networks of {task.name}",
                command,
                drawings,
                told,
                summary,
                matched,
            )
            console.print(f"open [bold]{command.out}[/bold]")


def _settings(command: Connect) -> dict[str, Any]:
    from losslab.rules import make

    if command.plane < 0 or command.plane == 1 or command.plane > int(MOST_POINTS**0.5):
        raise LosslabError(f"--plane is {command.plane}: pass 2 to 1000 points a side, or 0 for none")
    for name, value, least in (("steps", command.steps, 1), ("batch-size", command.batch_size, 1)):
        if value is not None and value < least:
            raise LosslabError(f"--{name} is {value}: pass at least {least}")
    settings: dict[str, Any] = {
        "steps": command.steps,
        "batch_size": command.batch_size,
        "seed": command.seed,
    }
    if command.method in ("polychain", "bezier"):
        settings["bends"] = command.bends
    elif command.bends != 1:
        raise LosslabError(f"--bends is {command.bends} and {command.method} has none: leave it out")
    if command.method == "autoneb":
        settings["looks"] = LOOKS
    if command.level is not None:
        if command.method != "dss":
            raise LosslabError("--level is what strings stay below: pass it with --method dss")
        settings["level"] = command.level
    if command.lr is not None:
        if command.method in ("autoneb", "linear"):
            why = "has a rate for each of its cycles" if command.method == "autoneb" else "trains nothing"
            raise LosslabError(f"{command.method} {why}: leave out --lr")
        settings["rule"] = make("sgd" if command.method == "dss" else "adam", lr=command.lr)
    return settings


def _aligned(task: Task, chosen: Chosen) -> tuple[Points, dict[str, pd.DataFrame]]:
    """The networks in the order of units of the first, and what was matched."""
    from losslab import paths

    try:
        spec = paths.permutation_spec(task)
    except LosslabError as error:
        raise LosslabError(f"{error}, and align in Python; or leave out --align") from error
    points, members = chosen.points, chosen.members
    first, moved, tables = points.select([0]), [points.select([0])], {}
    for k in range(1, points.members):
        found = paths.match_weights(spec, first, points.select([k]), restarts=4)
        moved.append(found.points)
        tables[f"Units of network {members[k]} matched with those of {members[0]}"] = found.table
    return paths.joined(*moved), tables


# -- what is told ------------------------------------------------------------------------------------------


def _votes(command: Connect, place: room.Landscape, found: Found) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Errors of ensembles along the paths, on test data where there are any; nothing without classes."""
    from losslab import paths
    from losslab.tasks import Supervised

    task = place.task
    if not isinstance(task.loss, Supervised) or task.metrics is None:
        return {}
    on = ["train"] if task.test is None else ["test"]
    look = paths.Landscape(task, on, batch_norm=place.batch_norm, execution=place.train.execution)
    return {
        label: paths.ensemble_errors(look, path)
        for label, path in found.items()
        if label[1].removeprefix("aligned ") == command.method
    }


def _voted(command: Connect, found: Found, votes: dict[tuple[str, str], dict[str, Tensor]]) -> list[str]:
    from losslab.report.findings import NAMES

    if not votes:
        return []
    told = next(iter(votes.values()))
    name = next(name for name in told if name.endswith("so_far"))
    kind = name.removesuffix("_so_far")
    ends = [float(found[label][f"{kind}_error"][[0, -1]].min()) for label in votes]
    whole = [float(each[name][-1]) for each in votes.values()]
    count = len(votes)
    mean = f"on average over {count} paths, " if count > 1 else ""
    way = NAMES.get(command.method, "straight line")
    return [
        f"Ensembles: {mean}all networks along the {way} together err on {sum(whole) / count:.2%} of "
        f"the {kind} examples, the better end alone on {sum(ends) / count:.2%}.".replace("%", " %")
    ]


def _summary(found: Found, votes: dict[tuple[str, str], dict[str, Tensor]]) -> pd.DataFrame:
    """One row a path: how high, where, how long, whether it had settled, what it is worth as an ensemble."""
    import pandas as pd

    rows = []
    for label, path in found.items():
        told = path.summary
        names = list(path.values)
        row: dict[str, Any] = {"pair": label[0], "method": label[1]}
        ends = max(float(path[names[0]][0]), float(path[names[0]][-1]))
        row[f"highest {names[0]}"] = told[f"{names[0]}_highest"]
        row["times the ends"] = float(told[f"{names[0]}_highest"] or 0) / ends if ends > 0 else float("nan")
        row |= {"barrier": told[f"{names[0]}_barrier"], "at": told[f"{names[0]}_place"]}
        row |= {f"highest {n}": told[f"{n}_highest"] for n in names[1:] if n.endswith("error")}
        row |= {"length": told["length"], "times straight": told["normalised_length"]}
        row["settled"] = _answer(path)
        if votes:
            each = votes.get(label, {})
            row["ensemble error"] = next(
                (float(v[-1]) for n, v in each.items() if n.endswith("so_far")), float("nan")
            )
        rows.append(row)
    return pd.DataFrame(rows)


def _answer(path: room.Path) -> str:
    """Whether the method got where it wanted to."""
    if path.found is not None:
        return "found" if path.found else "not found"
    if path.method == "straight":
        return ""
    return {True: "yes", False: "no", None: "unclear"}[path.settled]


def _drawings(
    command: Connect,
    place: room.Landscape,
    found: Found,
    votes: dict[tuple[str, str], dict[str, Tensor]],
    work: room.Work,
) -> list[Drawing]:
    """The courses of all paths; of the pair with the highest straight line also plane, votes, settling."""
    from losslab.report.findings import height
    from losslab.report.landscapes import draw_ensembles, draw_paths, draw_settling

    drawings = draw_paths(found)
    lines = {pair: height(path) for (pair, method), path in found.items() if method == "linear"}
    pair = max(lines, key=lambda pair: lines[pair] if lines[pair] < float("inf") else -1.0)
    path = found[pair, command.method]
    if path.stages:
        drawings.append(draw_settling(pair, path))
    if (pair, command.method) in votes:
        drawings += draw_ensembles(pair, path, votes[pair, command.method])
    return [*drawings, *_plane(command, place, pair, path, work)]


def _plane(
    command: Connect, place: room.Landscape, pair: str, path: room.Path, work: room.Work
) -> list[Drawing]:
    """The plane through two networks and the point of a path that is farthest off the line between them."""
    from losslab import paths
    from losslab.report.landscapes import draw_grid

    if not command.plane or path.frame.members < 3:
        return []
    away = paths.through(path.frame.select([0, path.frame.members - 1])).project(path.frame)[1]
    if not float(away.max()) > 0:
        return []
    a, _, b = pair.partition(" to ")
    bend = "bend" if path.frame.members == 3 else "farthest point"
    rows = [0, path.frame.members - 1, int(away.argmax())]
    plane = paths.through(path.frame.select(rows), labels=(f"member {a}", f"member {b}", bend))
    grid = paths.measure_slice(place, plane, *plane.axes(command.plane), out=work.part("plane.safetensors"))
    way, off = plane.project(path.points)
    drawings = draw_grid(grid, way, command.method)
    apart = path.length / path.normalised_length
    far = f" The way leaves the plane by up to {float(off.max()):.3g}; its ends are {apart:.3g} apart."
    shown = f"Members {a} and {b}, the pair with the highest straight line. "
    return [
        drawing._replace(caption=shown + drawing.caption + (far if path.frame.members > 3 else ""))
        for drawing in drawings
    ]


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

    settings = {
        k: v for k, v in asdict(command).items() if v not in (None, ()) and k not in ("out", "resume")
    }
    write_page(
        out,
        title,
        "Losses and errors in weight space: where networks stand, and what lies between them.",
        drawings,
        sentences,
        {"What was measured": table} | (more or {}),
        settings | provenance.machine(),
        heading="What was found",
    )
