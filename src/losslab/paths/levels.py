"""Walks on a level of the loss: how far one gets from a minimum without climbing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from losslab.engine import Points
from losslab.errors import LosslabError
from losslab.paths.combinations import joined
from losslab.paths.curves import hats
from losslab.paths.landscape import Landscape
from losslab.paths.path import Path, stations, walk

SHORTEST = 1e-5
"""Share of the first stride below which a walk is stuck."""

LONGEST = 0.05
"""Share of the distance asked for that one stride may cover."""


@dataclass
class _Walkers:
    """Where N walkers stand ``[N, P]``, where each heads ``[N, P]``, how long its next stride is ``[N]``."""

    theta: Tensor
    heading: Tensor
    stride: Tensor
    going: Tensor


def walk_level(
    landscape: Landscape,
    points: Points,
    headings: Tensor,
    *,
    rise: float,
    reach: float | Sequence[float] | Tensor,
    steps: int = 200,
    corrections: int = 10,
    between: int = 1,
) -> list[Path]:
    """Walks away from each point as far as asked without the loss rising by more than ``rise``.

    A stride goes straight on; where it ends too high, Newton's method for the one equation
    ``L(theta) = L(start) + rise / 2`` brings it down along the gradient, ``theta - (L - goal) g / |g|^2``, a
    few times over. The gradient of a narrow valley lies across it, so this turns the walk along the valley,
    and the next stride goes on in the direction of the last. A stride that cannot be mended is halved, one
    that went well is followed by one a quarter longer. All walkers are evaluated as one stack, no Hessian is
    needed, and the loss is that on all training data.

    A point from which no walk gets far may still not be isolated: another heading may do.

    Args:
        landscape: The loss, and what else is measured along the way.
        points: N starts, float64 where ``rise`` is small.
        headings: The first direction of each, ``[N, P]``, of any length: an eigenvector of little curvature,
            say, or a random one.
        rise: How far above its start's loss a walk may get.
        reach: The distance from the start at which a walk ends, one number or one each.
        steps: Strides tried at most.
        corrections: Newton steps a stride.
        between: Points measured inside of each stride.

    Returns:
        One path a walker, through all places visited, measured there and between. ``found`` tells whether it
        got as far as asked and all that was measured lies at or below the level; the note tells how far it
        got. The distance from the start is that of the ends, ``path.length / path.normalised_length``.

    Raises:
        LosslabError: Headings of another shape or without a direction, a rise or reach that is not positive.

    Example:
        >>> from losslab.tasks import function_task, saddle
        >>> start = Points({"x": torch.tensor([[2.0, 0.0]], dtype=torch.float64)}, {})
        >>> landscape = Landscape(function_task(saddle))
        >>> (path,) = walk_level(landscape, start, torch.tensor([[-1.0, 0.0]]), rise=0.1, reach=1.0)
        >>> path.found
        True
    """
    theta = points.matrix().detach().clone()
    far = torch.as_tensor(reach, dtype=theta.dtype, device=theta.device).expand(len(theta))
    walkers = _begun(theta, headings, rise, far)
    if steps < 1 or corrections < 0 or between < 0:
        raise LosslabError(
            f"steps={steps}, corrections={corrections}, between={between}: pass at least 1, 0 and 0"
        )
    start, low = theta.clone(), landscape.train.gradient(points)[0].to(theta)
    visited = [[start[i]] for i in range(len(start))]
    for _ in range(steps):
        rows = walkers.going.nonzero().flatten()
        if not len(rows):
            break
        there, good = _stride(landscape, points, walkers, rows, low[rows], rise, corrections)
        _advance(walkers, rows, there, good, far)
        for i in rows[good].tolist():
            visited[i].append(walkers.theta[i].clone())
        away = (walkers.theta - start).norm(dim=1)
        walkers.going &= (away < far) & (walkers.stride > SHORTEST * LONGEST * far)
    return _measured(landscape, points, visited, low, rise, far, between)


def _begun(theta: Tensor, headings: Tensor, rise: float, far: Tensor) -> _Walkers:
    if headings.shape != theta.shape:
        raise LosslabError(
            f"headings of shape {tuple(headings.shape)}, wanted {list(theta.shape)}: one direction a point, "
            "in the coordinates of Points.matrix()"
        )
    if not rise > 0 or not bool((far > 0).all()):
        raise LosslabError(f"rise is {rise} and reach {far.min():g} at least: pass positive numbers")
    length = headings.to(theta).norm(dim=1, keepdim=True)
    if not bool((torch.isfinite(length) & (length > 0)).all()):
        raise LosslabError("a heading is zero or not finite: pass directions")
    going = torch.ones(len(theta), dtype=torch.bool, device=theta.device)
    return _Walkers(theta, headings.to(theta) / length, LONGEST * far / 4, going)


def _stride(
    landscape: Landscape,
    points: Points,
    walkers: _Walkers,
    rows: Tensor,
    low: Tensor,
    rise: float,
    corrections: int,
) -> tuple[Tensor, Tensor]:
    """Where the walkers in ``rows`` get by one stride ``[n, P]``, and who may stay there ``[n]``."""
    heading, stride = walkers.heading[rows], walkers.stride[rows, None]
    like = points.select(rows)
    there = walkers.theta[rows] + stride * heading
    for k in range(corrections + 1):
        value, slope = landscape.train.gradient(like.at(there))
        above = value.to(there) - low
        if k == corrections or not bool((above > rise).any()):
            break
        g = slope.matrix()
        down = (above - rise / 2) / g.square().sum(1).clamp(min=torch.finfo(g.dtype).tiny)
        there = torch.where((above > rise)[:, None], there - down[:, None] * g, there)
    ahead = ((there - walkers.theta[rows]) * heading).sum(1)
    # A correction that takes back half of the stride is a wall and no bend.
    return there, (above <= rise) & (ahead > stride[:, 0] / 2) & torch.isfinite(above)


def _advance(walkers: _Walkers, rows: Tensor, there: Tensor, good: Tensor, far: Tensor) -> None:
    took = rows[good]
    moved = there[good] - walkers.theta[took]
    walkers.theta[took] = there[good]
    walkers.heading[took] = moved / moved.norm(dim=1, keepdim=True)
    walkers.stride[took] = torch.minimum(1.25 * walkers.stride[took], LONGEST * far[took])
    walkers.stride[rows[~good]] /= 2


def _measured(
    landscape: Landscape,
    points: Points,
    visited: Sequence[Sequence[Tensor]],
    low: Tensor,
    rise: float,
    far: Tensor,
    between: int,
) -> list[Path]:
    frames, shares, ts = [], [], []
    for i, places in enumerate(visited):
        own = points.select([i])
        stayed = [*places, places[0]] if len(places) == 1 else places
        frames.append(joined(*(own.at(place[None]) for place in stayed)))
        ts.append(stations((len(stayed) - 1) * (between + 1) + 1))
        shares.append(hats(ts[-1], len(stayed)))
    paths = walk(landscape, frames, shares, ts, "level walk")
    return [
        _told(path, places, float(low[i]), rise, float(far[i]))
        for i, (path, places) in enumerate(zip(paths, visited, strict=True))
    ]


def _told(path: Path, places: Sequence[Tensor], low: float, rise: float, far: float) -> Path:
    values = path.values.get("train_loss", next(iter(path.values.values())))
    highest, away = float(values.max()), float((places[-1] - places[0]).norm())
    level = low + rise
    # A loss is known to its last digits, whatever its sign; that must not hide a rise of small size.
    below = highest <= level + 1e-6 * rise + 16 * torch.finfo(values.dtype).eps * abs(low)
    note = f"{len(places) - 1} strides, {away:.3g} from the start, the loss is at most {highest:.4g}"
    if not below:
        note += f", above the level {level:.4g} between two places"
    elif away < far:
        note += f"; stopped short of {far:.3g}"
    return replace(path, found=below and away >= far, note=note)
