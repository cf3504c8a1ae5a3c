"""Where the commands about paths stand: the networks of a run, the landscape, unfinished work."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from losslab.cli.runs import member_names
from losslab.errors import LosslabError

if TYPE_CHECKING:
    from losslab import paths as room
    from losslab.cli.commands import Connect, Landscape
    from losslab.engine import Points
    from losslab.tasks import Task


@dataclass(frozen=True)
class Chosen:
    """The networks of a run that were asked for.

    Attributes:
        points: The networks.
        members: Their numbers in the run.
        names: What they are called.
        told: Which were chosen and why, or nothing if they were named.
    """

    points: Points
    members: list[int]
    names: list[str]
    told: list[str]


@contextmanager
def work(command: Landscape | Connect) -> Iterator[room.Work]:
    """Where unfinished work is kept: in a folder beside the page, which goes when the page is written."""
    from losslab.files import write_atomically
    from losslab.paths import Work

    if command.out is None:
        if command.resume:
            raise LosslabError("--resume was given without --out: name the page that was to be written")
        with _notices():
            yield Work(None, command.checkpoint_every, None)
        return
    folder = command.out.with_name(f"{command.out.name}.kept")
    begun = folder.is_dir() and any(folder.rglob("*.safetensors"))
    if begun and not command.resume:
        raise LosslabError(f"{folder} holds unfinished work: go on with it by --resume, or delete it")
    if command.resume and not begun:
        print(f"losslab: {folder} holds no unfinished work: it was started anew", file=sys.stderr)
    write_atomically(folder / "about.txt", b"Unfinished work of losslab; it goes when the page is written.\n")
    with _notices():
        yield Work(folder, command.checkpoint_every, None)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _notices() -> Iterator[None]:
    """What the library warns of goes to standard error, each notice once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for notice in dict.fromkeys(str(w.message) for w in caught):
                print(f"losslab: {notice}", file=sys.stderr)


def land(task: Task, points: Points, batch_norm: str, work: room.Work) -> room.Landscape:
    """The landscape, run in the way that is faster; a resumed run takes that of the first."""
    from losslab.engine import checkpoints
    from losslab.paths import Landscape

    kept = None if work.path is None else work.path / "execution.safetensors"
    if kept is not None and kept.exists():
        how = checkpoints.read(kept)[1]["execution"]
    else:
        train = Landscape(task, batch_norm=batch_norm).train
        few = points.select(list(range(min(points.members, 4))))
        execution, _, _ = next(iter(train.pieces(train.settled(few))))
        how = "loop" if execution.backend.name == "loop" else "stacked"
        if kept is not None:
            checkpoints.write(kept, {}, {"execution": how})
    return Landscape(task, batch_norm=batch_norm, execution=how)


def choose(command: Landscape | Connect, land: room.Landscape, points: Points, most: int) -> Chosen:
    """The members that were named, or the best that are finite, by their training loss."""
    import torch

    from losslab.paths import as_points

    names = member_names(command.run_folder, points.members)
    members = list(command.members)
    if len(set(members)) < len(members):
        raise LosslabError(f"--members names {members}, one of them twice: name each once")
    if members:
        chosen = as_points(points, members)
        lost = [
            m for m, row in zip(members, chosen.matrix(), strict=True) if not bool(torch.isfinite(row).all())
        ]
        if lost:
            raise LosslabError(f"member {lost[0]} diverged, its weights are not finite: leave it out")
        return Chosen(chosen, members, [names[m] for m in members], [])
    losses = land.loss(points)
    whole = [m for m in range(points.members) if bool(torch.isfinite(losses[m]))]
    if not whole:
        raise LosslabError(f"none of the {points.members} members has a finite loss: train at a lower rate")
    members = sorted(sorted(whole, key=lambda m: float(losses[m]))[:most])
    told = []
    if len(members) < points.members:
        heights = ", ".join(f"{float(losses[m]):.4g}" for m in members)
        who = f"Members {', '.join(map(str, members))}" if len(members) > 1 else f"Member {members[0]}"
        left = points.members - len(whole)
        lost_too = f"; {left} of {points.members} diverged" if left else ""
        told = [f"{who} of 0 to {points.members - 1} taken, lowest training loss ({heights}){lost_too}."]
    return Chosen(points.select(members), members, [names[m] for m in members], told)


def check_ends(chosen: Chosen) -> None:
    """Refuses a single network, and two that are one."""
    if len(chosen.members) < 2:
        raise LosslabError("a path needs two ends and there is one network: train with --seeds 2")
    matrix = chosen.points.matrix()
    for a, b in combinations(range(len(chosen.members)), 2):
        if bool((matrix[a] == matrix[b]).all()):
            raise LosslabError(
                f"members {chosen.members[a]} and {chosen.members[b]} have the same weights: name "
                "others with --members"
            )
