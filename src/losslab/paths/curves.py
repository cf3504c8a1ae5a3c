"""Curves between minima whose bends are trained so that the loss is low all along (Garipov et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from losslab.engine import Points, checkpoints, randomness
from losslab.errors import LosslabError, unknown
from losslab.paths.combinations import combine
from losslab.paths.landscape import Landscape
from losslab.paths.path import STATIONS, Path, ends_of, settled, stations, walk
from losslab.paths.slopes import Mover, Slopes
from losslab.paths.work import Kept, Out, Work


def hats(t: Tensor, count: int) -> Tensor:
    """The piecewise-linear basis: t ``[...]`` -> ``[..., count]``, one hat a control point, evenly spaced.

    Example:
        >>> hats(torch.tensor([0.0, 0.25, 1.0]), 3)
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000],
                [0.0000, 0.0000, 1.0000]])
    """
    place = t.unsqueeze(-1) * (count - 1)
    return (1 - (place - torch.arange(count, dtype=t.dtype, device=t.device)).abs()).clamp(min=0)


def bernstein(t: Tensor, count: int) -> Tensor:
    """The basis of a Bezier curve, ``C(n, j) t^j (1 - t)^(n - j)`` with n = count - 1.

    Example:
        >>> bernstein(torch.tensor([0.0, 0.5]), 3)
        tensor([[1.0000, 0.0000, 0.0000],
                [0.2500, 0.5000, 0.2500]])
    """
    from math import comb

    n = count - 1
    columns = [comb(n, j) * t**j * (1 - t) ** (n - j) for j in range(count)]
    return torch.stack(columns, -1)


BASES: dict[str, Callable[[Tensor, int], Tensor]] = {"polychain": hats, "bezier": bernstein}


@dataclass(frozen=True)
class Curve:
    """``phi(t) = sum_j b_j(t) theta_j``: a polychain through its control points, or the Bezier curve of them.

    Attributes:
        kind: ``"polychain"`` or ``"bezier"``.
        control: The points theta_j, ends included.
        history: The loss along the curve at each training step, a mean over t and the batch, ``[steps]``.

    Example:
        >>> control = Points({"w": torch.tensor([[0.0], [1.0], [0.0]])}, {})
        >>> Curve("bezier", control).at(torch.tensor([0.0, 0.5]))["w"].flatten()
        tensor([0.0000, 0.5000])
    """

    kind: str
    control: Points
    history: Tensor = field(default_factory=lambda: torch.empty(0))

    def coefficients(self, t: Tensor) -> Tensor:
        """What the control points are combined with at parameters t: ``[T] -> [T, K]``, float64."""
        return BASES[self.kind](t.double(), self.control.members)

    def at(self, t: Tensor) -> Points:
        """The points at parameters t ``[T]``; 0 and 1 are the ends bit for bit."""
        return combine(self.control, self.coefficients(t))


def train_curves(
    slopes: Slopes,
    points: Points,
    pairs: Sequence[tuple[int, int]],
    *,
    kind: str = "polychain",
    bends: int = 1,
    rule: Any = None,
    steps: int = 500,
    samples: int = 4,
    seed: int = 0,
    out: Out = None,
) -> list[Curve]:
    """Trains a curve for each pair of minima, all together as one population.

    Minimises ``E_{t ~ U(0, 1)} L(phi(t))`` over the bends, the ends stay fixed. Each step draws one t from
    each of ``samples`` equal parts of [0, 1], for each pair its own: the same expectation as one uniform t,
    with less noise. The bends start evenly on the segment.

    Args:
        slopes: What is minimised, with batch size and weight decay (of the points along the curve, as
            Garipov et al. have it).
        points: The minima.
        pairs: Which of them to connect.
        kind: ``"polychain"`` or ``"bezier"``.
        bends: Control points between the ends; one makes a quadratic Bezier curve.
        rule: A losslab or torch update rule; Adam with rate 0.01 by default. Members are the bends, pair by
            pair.
        steps: Updates.
        samples: t drawn a step and pair.
        seed: Of the draws of t; a pair's depend on its two ends, not on the other pairs.
        out: Where to keep unfinished work, see `Work`.

    Returns:
        One curve a pair. A curve that diverged has bends that are not finite.

    Raises:
        LosslabError: An unknown kind, a pair that does not exist, fewer than one bend or sample.
    """
    if kind not in BASES:
        raise unknown("curve", kind, BASES)
    if bends < 1 or samples < 1 or steps < 0:
        raise LosslabError(
            f"a curve of {bends} bends, {samples} samples and {steps} steps was asked for: pass at least 1, "
            "1 and 0"
        )
    ends = torch.stack([pair.matrix() for pair in ends_of(points, pairs)])  # [Q, 2, P]
    asked = {
        "curve": kind,
        "bends": bends,
        "samples": samples,
        "draws": seed,
        "rule": rule,
        "pairs": list(pairs),
    }
    asked |= {**slopes.describe(), "points": checkpoints.digest(points, "")}
    with Work.of(out).begin(asked, f"training {len(pairs)} curves", steps, len(pairs)) as kept:
        found, told = _trained(
            slopes, ends, _keys(seed, pairs), kept, points, kind, bends, samples, rule, steps
        )
    return [Curve(kind, _control(points, pair, found[q]), told[q].clone()) for q, pair in enumerate(pairs)]


def _trained(
    slopes: Slopes,
    ends: Tensor,
    keys: Tensor,
    kept: Kept,
    points: Points,
    kind: str,
    bends: int,
    samples: int,
    rule: Any,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """The bends ``[Q, bends, P]`` and the losses along the way ``[Q, steps]``."""
    share = stations(bends + 2)[1:-1].to(ends)
    inner = ((1 - share)[:, None] * ends[:, :1] + share[:, None] * ends[:, 1:]).flatten(0, 1).contiguous()
    mover, like = Mover(rule, inner), points.select([0])
    history = torch.full((len(ends), steps), torch.nan, dtype=torch.float64)
    begun = min(kept.meta.get("step", 0), steps)
    if begun:
        mover.load(kept.tensors)
        history[:, :begun] = kept.tensors["history"][:, :begun]
    for step in range(begun, steps):
        basis = BASES[kind](_strata(keys, step, samples), bends + 2).to(ends)  # [Q, S, K]
        bent = basis[..., 1:-1]
        theta = basis[..., [0, -1]] @ ends + bent @ mover.theta.unflatten(0, (len(ends), bends))
        values, slope = slopes(like, theta.flatten(0, 1), step)
        slope = bent.transpose(1, 2) @ slope.unflatten(0, bent.shape[:2]) / samples
        history[:, step] = values.unflatten(0, bent.shape[:2]).mean(1)
        mover.move(slope.flatten(0, 1).contiguous(), step)
        kept.tell(step + 1, history[:, step])
        if kept.due():
            kept.write({**mover.tensors(), "history": history[:, : step + 1]}, step=step + 1)
    if steps > begun:
        kept.write({**mover.tensors(), "history": history}, step=steps)
    return mover.theta.detach().unflatten(0, (len(ends), bends)), history


def straight(
    landscape: Landscape, points: Points, pairs: Sequence[tuple[int, int]], count: int = STATIONS
) -> list[Path]:
    """The segments between minima, measured at ``count`` even points each, all in one pass over the data.

    Example:
        >>> from losslab.tasks import double_well, function_task
        >>> landscape = Landscape(function_task(double_well))
        >>> minima = Points({"x": torch.tensor([[-1.0, 0.0], [1.0, 0.0]])}, {})
        >>> (path,) = straight(landscape, minima, [(0, 1)], 5)
        >>> path["loss"], float(path.barrier().over_chord), path.length
        (tensor([0.0000, 0.5625, 1.0000, 0.5625, 0.0000], dtype=torch.float64), 1.0, 2.0)
    """
    t = stations(count)
    frames = ends_of(points, pairs)
    return walk(landscape, frames, [hats(t, 2)] * len(frames), [t] * len(frames), "straight")


def walk_curves(landscape: Landscape, curves: Sequence[Curve], count: int = STATIONS) -> list[Path]:
    """Measures curves at ``count`` even parameters each, all in one pass over the data."""
    t = stations(count)
    told = [curve.coefficients(t) for curve in curves]
    paths = walk(landscape, [c.control for c in curves], told, [t] * len(told), curves[0].kind)
    return [
        replace(path, settled=settled(curve.history), note=_lost(curve))
        for path, curve in zip(paths, curves, strict=True)
    ]


def _lost(curve: Curve) -> str:
    """Where a curve diverged, if it did."""
    bad = torch.nonzero(~torch.isfinite(curve.history)).flatten()
    return f"diverged at step {int(bad[0])}: lower the rate" if len(bad) else ""


def _keys(seed: int, pairs: Sequence[tuple[int, int]]) -> Tensor:
    return torch.tensor([randomness.key(seed, "curve", a, b) for a, b in pairs], dtype=torch.int64)


def _strata(keys: Tensor, step: int, samples: int) -> Tensor:
    """One uniform t in each of so many equal parts of [0, 1], ``[Q, S]``, float64."""
    draws = randomness.uniform(randomness.fold(keys, step), (samples,)).double()
    return (torch.arange(samples, dtype=torch.float64) + draws) / samples


def _control(points: Points, pair: tuple[int, int], bends: Tensor) -> Points:
    """Ends and bends in order; the bends' buffers lie evenly between those of the ends."""
    both = points.select(list(pair))
    frame = combine(both, hats(stations(len(bends) + 2), 2))
    moved = both.at(bends)
    for name, w in frame.weights.items():
        w[1:-1] = moved.weights[name]
    return frame
