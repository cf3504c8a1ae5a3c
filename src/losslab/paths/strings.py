"""Dynamic String Sampling: a chain of beads below a level of the loss, or an honest "not found"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from losslab.engine import Points, checkpoints
from losslab.errors import LosslabError, unknown
from losslab.paths.combinations import combine, joined
from losslab.paths.curves import hats
from losslab.paths.landscape import Landscape
from losslab.paths.path import Path, ends_of, stations, walk
from losslab.paths.slopes import Mover, Slopes
from losslab.paths.work import Kept, Out, Work
from losslab.rules import make

SPLITS = ("top", "middle")

CHECKED = 10
"""Updates between two looks at the beads' loss on all data."""


@dataclass
class _String:
    """The search for one pair: beads in order, and which segments are not yet below the level."""

    beads: list[Points]
    level: float
    depth: list[int]
    open: list[bool]
    failed: str = ""

    def todo(self) -> list[int]:
        return [] if self.failed else [i for i, is_open in enumerate(self.open) if is_open]


def strings(
    slopes: Slopes,
    landscape: Landscape,
    points: Points,
    pairs: Sequence[tuple[int, int]],
    *,
    level: float | Sequence[float] | None = None,
    alpha: float = 0.9,
    depth: int = 6,
    rule: Any = None,
    steps: int = 500,
    samples: int = 15,
    split: str = "top",
    out: Out = None,
) -> list[Path]:
    """Dynamic String Sampling (Freeman and Bruna 2017, Algorithm 1) for many pairs together.

    A segment on which the loss exceeds the level L0 gets a bead: the point of the segment where the loss is
    highest (or the middle), trained until its loss is at most ``alpha L0``. Both halves are treated alike,
    until all segments lie below L0. All beads that are trained at one time are one population.

    Success is evidence at the points looked at, which the note counts; between them the loss is not known.
    Failure proves nothing: another level, depth or rate may connect what this one did not.

    Args:
        slopes: What the beads are trained on.
        landscape: What is measured; its first loss decides.
        points: The minima.
        pairs: Which of them to connect.
        level: L0, one number or one a pair; by default 1.1 times the higher end's loss plus 0.01.
        alpha: How far below the level a bead is trained, in (0, 1).
        depth: How often a segment may be halved.
        rule: A losslab or torch update rule; plain gradient steps of rate 0.1 by default.
        steps: The most updates of a bead.
        samples: Even points inside of each segment at which the loss is looked at.
        split: ``"top"`` or ``"middle"``.
        out: Where to keep unfinished work, see `Work`.

    Returns:
        One path a pair, through its beads, measured at the ends and the samples of all segments. ``found``
        tells whether all lie at or below the level; if not, the note says what went wrong. A pair with an end
        above its level is not searched for, and says so.

    Raises:
        LosslabError: Every pair has an end above its level, alpha outside of (0, 1), a pair that does not
            exist.
    """
    if split not in SPLITS:
        raise unknown("way to split", split, SPLITS)
    if not 0 < alpha < 1 or depth < 0 or samples < 1 or steps < 1:
        raise LosslabError(
            f"alpha={alpha}, depth={depth}, samples={samples}, steps={steps}: pass alpha in (0, 1), depth 0 "
            "or more, samples and steps 1 or more"
        )
    for given in [] if level is None else [level] if isinstance(level, (int, float)) else level:
        if not math.isfinite(given):
            raise LosslabError(f"the level is {given}: pass a finite loss, above that of the ends")
    ends = ends_of(points, pairs)
    asked = {"level": level, "alpha": alpha, "depth": depth, "samples": samples, "split": split, "rule": rule}
    asked |= {**slopes.describe(), "pairs": list(pairs), "points": checkpoints.digest(points, "")}
    with Work.of(out).begin(
        {**asked, "steps": steps}, f"training beads of {len(pairs)} strings", steps
    ) as kept:
        searches = _restored(kept, points) or _begun(landscape, ends, level)
        while any(search.todo() for search in searches):
            kept.hold(*_told(searches))
            starts = _look(landscape, searches, depth, samples, split)
            if starts:
                beads = _descend(slopes, landscape, searches, starts, alpha, rule, steps, kept)
                kept.forget()
                _insert(searches, starts, beads)
    inside = samples + 1
    ts = [stations((len(s.beads) - 1) * inside + 1) for s in searches]
    told = [hats(t, len(s.beads)) for t, s in zip(ts, searches, strict=True)]
    paths = walk(landscape, [joined(*s.beads) for s in searches], told, ts, "string")
    return [_certified(path, search) for path, search in zip(paths, searches, strict=True)]


def _begun(
    landscape: Landscape, ends: Sequence[Points], level: float | Sequence[float] | None
) -> list[_String]:
    heights = landscape.loss(joined(*ends)).view(-1, 2).max(1).values.tolist()
    levels = [1.1 * h + 0.01 for h in heights] if level is None else level
    levels = [float(levels)] * len(ends) if isinstance(levels, (int, float)) else [float(x) for x in levels]
    if len(levels) != len(ends):
        raise LosslabError(
            f"{len(levels)} levels were given for {len(ends)} pairs: pass one number, or one each"
        )
    searches = [
        _String([both.select([0]), both.select([1])], wanted, [0], [True], _hopeless(height, wanted))
        for both, wanted, height in zip(ends, levels, heights, strict=True)
    ]
    if all(height > wanted for height, wanted in zip(heights, levels, strict=True)):
        raise LosslabError(f"{searches[0].failed}: pass a level that both ends are below")
    return searches


def _hopeless(height: float, level: float) -> str:
    """Why a string cannot be found, if so."""
    if height != height:
        return "an end is not finite"
    return f"an end has loss {height:.4g}, above the level {level:.4g}" if height > level else ""


def _told(searches: Sequence[_String]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The searches as what a file holds."""
    tensors = {f"{s}/{n}": t for s, each in enumerate(searches) for n, t in joined(*each.beads).items()}
    told = [{"level": s.level, "depth": [*s.depth], "open": [*s.open], "failed": s.failed} for s in searches]
    return tensors, {"strings": told}


def _restored(kept: Kept, points: Points) -> list[_String]:
    """The searches that `_told` told; none if nothing is kept."""
    found = []
    for s, told in enumerate(kept.meta.get("strings", [])):
        weights, buffers = (
            {n: kept.tensors[f"{s}/{n}"] for n in part} for part in (points.weights, points.buffers)
        )
        beads = Points(weights, buffers)
        found.append(_String([beads.select([i]) for i in range(beads.members)], **told))
    return found


def _look(
    landscape: Landscape, searches: Sequence[_String], depth: int, samples: int, split: str
) -> dict[tuple[int, int], Points]:
    """Closes the segments that are below the level, and says where the others get a bead."""
    todo = [(s, i) for s, search in enumerate(searches) for i in search.todo()]
    shares = hats(stations(samples + 2)[1:-1], 2)
    inside = [combine(joined(*searches[s].beads[i : i + 2]), shares) for s, i in todo]
    losses = landscape.loss(joined(*inside)).view(len(todo), samples)
    starts: dict[tuple[int, int], Points] = {}
    for (s, i), found, here in zip(todo, losses, inside, strict=True):
        search = searches[s]
        search.open[i] = not bool((found <= search.level).all())
        if not search.open[i] or search.failed:
            continue
        if not torch.isfinite(found).all():
            search.failed = "the loss between two beads is not finite"
        elif search.depth[i] >= depth:
            search.failed = (
                f"a segment halved {depth} times still reaches a loss of {float(found.max()):.4g}: "
                "allow more depth, or a higher level"
            )
        else:
            starts[s, i] = here.select([int(found.argmax()) if split == "top" else samples // 2])
    return {place: bead for place, bead in starts.items() if not searches[place[0]].failed}


def _descend(
    slopes: Slopes,
    landscape: Landscape,
    searches: Sequence[_String],
    starts: dict[tuple[int, int], Points],
    alpha: float,
    rule: Any,
    steps: int,
    kept: Kept,
) -> list[Points]:
    """Trains all beads together, each to its own level; one that does not get there fails its string."""
    stack = joined(*starts.values())
    goals = torch.tensor([alpha * searches[s].level for s, _ in starts], dtype=torch.float64)
    like = stack.select([0])
    mover = Mover(make("sgd", lr=0.1) if rule is None else rule, stack.matrix().clone())
    reached, down = torch.zeros(len(goals), dtype=torch.bool), mover.theta.clone()
    if "theta" in kept.tensors:
        mover.load(kept.tensors)
        reached, down = kept.tensors["reached"], kept.tensors["down"].to(down)
    for step in range(kept.meta.get("step", 0), steps + 1):
        if step % CHECKED == 0 or step == steps:
            losses = landscape.loss(like.at(mover.theta))
            fresh = (losses <= goals) & ~reached
            down[fresh] = mover.theta[fresh]
            reached |= fresh
            kept.tell(step, losses)
            if reached.all():
                break
        _, slope = slopes(like, mover.theta, step)
        mover.move(slope.contiguous(), step)
        if kept.due():
            kept.write({**mover.tensors(), "reached": reached, "down": down}, step=step + 1)
    for (s, _), there, goal in zip(starts, reached.tolist(), goals.tolist(), strict=True):
        if not there:
            searches[s].failed = f"a bead did not get down to {goal:.4g} in {steps} steps: allow more"
    moved = like.at(down).weights
    return [Points({n: w[[b]] for n, w in moved.items()}, _row(stack, b)) for b in range(len(goals))]


def _row(stack: Points, row: int) -> dict[str, Tensor]:
    return {n: t[[row]] for n, t in stack.buffers.items()}


def _insert(
    searches: Sequence[_String], starts: dict[tuple[int, int], Points], beads: Sequence[Points]
) -> None:
    # From the end, so that the segments before keep their numbers.
    for (s, i), bead in sorted(zip(starts, beads, strict=True), key=lambda pair: pair[0], reverse=True):
        search = searches[s]
        if search.failed:
            continue
        search.beads.insert(i + 1, bead)
        search.depth[i : i + 1] = [search.depth[i] + 1] * 2
        search.open[i : i + 1] = [True, True]


def _certified(path: Path, search: _String) -> Path:
    losses = next(iter(path.values.values()))
    highest = float(losses.max())
    beads = f"{len(search.beads) - 2} beads"
    if search.failed:
        return replace(path, found=False, note=f"not found, {search.failed} ({beads} so far)")
    if not bool((losses <= search.level * (1 + 1e-6)).all()):
        return replace(path, found=False, note=f"not found, a second look saw a loss of {highest:.4g}")
    widest = float(path.places.diff().max()) * path.length
    return replace(
        path,
        found=True,
        note=f"{beads}; at {len(losses)} points, {widest:.3g} or less apart, the loss is at most "
        f"{highest:.4g}, and the level {search.level:.4g}",
    )
