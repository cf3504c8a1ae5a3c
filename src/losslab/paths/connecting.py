"""One call from networks to the paths between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path as FilePath
from typing import Any

from losslab.engine import Points, Population, checkpoints
from losslab.errors import LosslabError, unknown
from losslab.paths.auto_band import SHORT, Cycle, auto_bands
from losslab.paths.combinations import joined
from losslab.paths.curves import BASES, straight, train_curves, walk_curves
from losslab.paths.landscape import Landscape
from losslab.paths.matching import Alignment, match_weights
from losslab.paths.path import STATIONS, Path, ends_of, packed, unpacked
from losslab.paths.permutations import Spec, permutation_spec
from losslab.paths.slopes import Slopes
from losslab.paths.strings import strings
from losslab.paths.work import Work

METHODS = ("linear", "polychain", "bezier", "autoneb", "dss")


def connect(
    where: Population | Landscape,
    pairs: Sequence[tuple[int, int]] | None = None,
    *,
    points: Points | None = None,
    method: str = "polychain",
    steps: int | None = None,
    batch_size: int | None = 128,
    rule: Any = None,
    seed: int = 0,
    weight_decay: float = 0.0,
    count: int = STATIONS,
    out: str | FilePath | Work | None = None,
    **options: Any,
) -> list[Path]:
    """Paths between trained networks, all pairs trained together, measured on all data sets.

    Args:
        where: A population, or a landscape together with ``points=``.
        pairs: Which members to connect; every pair by default.
        points: The networks, if they are not the population's own (aligned ones, say).
        method: ``"linear"``: the segment. ``"polychain"``, ``"bezier"``: trained curves (`train_curves`).
            ``"autoneb"``: elastic bands that grow (`auto_bands`). ``"dss"``: strings of beads (`strings`).
        steps: Updates: of a curve (500 by default), of a bead (500), or of all cycles of AutoNEB together
            (1,600).
        batch_size: Examples a batch; None for all of them.
        rule: A losslab or torch update rule, for AutoNEB a function from the rate to one; each method has its
            own by default.
        seed: Of the order of batches and of the draws of t.
        weight_decay: Of the points along the path, in what is minimised.
        count: Points at which a curve is measured.
        out: A folder that keeps unfinished work and finished paths, see `Work`.
        **options: Of the method's own function: ``bends=3``, ``level=0.1``, ...

    Raises:
        LosslabError: An unknown method, a pair that does not exist, one network only.

    Example:
        >>> import torch
        >>> from losslab.engine import train
        >>> from losslab.tasks import double_well, function_task
        >>> found = train(function_task(double_well), "gd", seeds=2, steps=1, progress=False)
        >>> moved = found.points.at(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        >>> (path,) = connect(found, points=moved, method="linear", count=3)
        >>> path["loss"]
        tensor([0., 1., 0.], dtype=torch.float64)
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    landscape = where if isinstance(where, Landscape) else Landscape.of(where)
    if points is None:
        if isinstance(where, Landscape):
            raise LosslabError("a landscape was given without points: pass points=, or a population")
        points = where.points
    chosen = list(combinations(range(points.members), 2)) if pairs is None else list(pairs)
    ends_of(points, chosen)
    slopes = Slopes(landscape.task, batch_size, seed, weight_decay, landscape.train.execution)
    if steps is not None or rule is not None:
        options |= {n: v for n, v in (("steps", steps), ("rule", rule)) if v is not None}
    asked = {**slopes.describe(), "method": method, "pairs": chosen, "count": count, "options": options}
    asked |= {"batch_norm": landscape.batch_norm, "sets": list(landscape.sets)}
    asked["points"] = checkpoints.digest(points, "")
    work = Work.of(out)
    with work.part(f"{method}-paths.safetensors").begin(asked) as kept:
        if kept.meta:
            return unpacked(kept.tensors, kept.meta["paths"], points)
        training = work.part(f"{method}-training.safetensors")
        found = _found(landscape, slopes, points, chosen, method, count, seed, training, options)
        tensors, told = packed(found)
        kept.write(tensors, paths=told)
    if training.path is not None:
        training.path.unlink(missing_ok=True)
    return found


def _found(
    landscape: Landscape,
    slopes: Slopes,
    points: Points,
    pairs: list[tuple[int, int]],
    method: str,
    count: int,
    seed: int,
    out: Work,
    options: dict[str, Any],
) -> list[Path]:
    if method == "linear":
        return straight(landscape, points, pairs, count)
    if method in BASES:
        curves = train_curves(slopes, points, pairs, kind=method, seed=seed, out=out, **options)
        return walk_curves(landscape, curves, count)
    if method == "dss":
        return strings(slopes, landscape, points, pairs, out=out, **options)
    steps = options.pop("steps", None)
    cycles = SHORT if steps is None else shortened(SHORT, steps)
    return auto_bands(slopes, landscape, points, pairs, out=out, **{"cycles": cycles, **options})


def align(
    where: Population,
    reference: int = 0,
    *,
    spec: Spec | None = None,
    restarts: int = 4,
    seed: int = 0,
) -> tuple[Points, list[Alignment]]:
    """All members of a population in the order of units in which they look most like one of them.

    Args:
        where: The population.
        reference: The member that stays as it is.
        spec: The symmetries; derived from the network by default.
        restarts: As in `match_weights`.
        seed: As in `match_weights`.

    Returns:
        The aligned networks, in the population's order, and what was matched, one for each but the reference.
    """
    points = where.points
    if not 0 <= reference < points.members:
        raise LosslabError(f"there is no member {reference} among {points.members}: pass one of them")
    found = permutation_spec(where) if spec is None else spec
    first, aligned, told = points.select([reference]), [], []
    for member in range(points.members):
        own = points.select([member])
        if member != reference:
            told.append(match_weights(found, first, own, restarts=restarts, seed=seed))
            own = told[-1].points
        aligned.append(own)
    return joined(*aligned), told


def shortened(cycles: Sequence[Cycle], steps: int) -> list[Cycle]:
    """The same cycles with so many steps in all, at least one each.

    Example:
        >>> [cycle.steps for cycle in shortened([Cycle(100, 0.1), Cycle(300, 0.01)], 40)]
        [10, 30]
    """
    total = sum(cycle.steps for cycle in cycles)
    return [replace(cycle, steps=max(1, round(cycle.steps * steps / total))) for cycle in cycles]
