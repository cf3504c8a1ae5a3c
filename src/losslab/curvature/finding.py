"""Finding critical points: minima, saddles, and whatever else has no gradient, N searches at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from losslab.curvature.products import Hessian
from losslab.engine import Objective, Points
from losslab.errors import LosslabError

Height = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Coordinates ``[n, P]`` of the members ``[n]`` -> heights ``[n]`` and slopes ``[n, P]``."""

LARGEST = 3000
"""Most weights for the searches that decompose a Hessian."""


@dataclass(frozen=True)
class Found:
    """Where N searches ended.

    Attributes:
        points: The N points.
        value: The loss there, ``[N]``.
        gradient_norm: Length of the gradient there, ``[N]``.
        converged: Whether it is at most the tolerance asked for, ``[N]``.
        steps: Steps of each search, ``[N]``.
    """

    points: Points
    value: Tensor
    gradient_norm: Tensor
    converged: Tensor
    steps: Tensor

    def __str__(self) -> str:
        done, total = int(self.converged.sum()), len(self.converged)
        return (
            f"{done} of {total} searches converged in at most {int(self.steps.max())} steps, "
            f"largest gradient {float(self.gradient_norm.max()):.1e}"
        )


def minimise(
    objective: Objective, points: Points, tolerance: float = 1e-8, steps: int = 2000, memory: int = 20
) -> Found:
    """L-BFGS from each point, all of them as one program.

    A limited-memory quasi-Newton method with the memory of each member its own; the step is halved until the
    loss falls by 1e-4 of what the gradient promises or, where the loss changes by less than its rounding,
    until the slope along it has shrunk (Hager & Zhang's approximate Wolfe condition), so that gradients of
    1e-10 can be reached in float64. Deterministic objectives only: one that draws a new batch has no
    minimum.

    Args:
        objective: The loss on fixed examples.
        points: N starts; float64 is advised.
        tolerance: Length of the gradient at which a search ends.
        steps: Steps at most.
        memory: Pairs of differences kept.

    Source: Nocedal 1980; Liu & Nocedal 1989; Hager & Zhang 2005, equation 4.1.

    Example:
        >>> from losslab.tasks import function_task, rosenbrock
        >>> objective = Objective(function_task(rosenbrock))
        >>> start = Points({"x": torch.tensor([[-1.2, 1.0], [2.0, -1.0]], dtype=torch.float64)}, {})
        >>> minimise(objective, start).points["x"].round(decimals=6)
        tensor([[1., 1.],
                [1., 1.]], dtype=torch.float64)
    """

    def height(matrix: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = objective.gradient(placed(points, matrix, members))
        return value, gradient.matrix()

    matrix, count = _lbfgs(
        height, points.matrix().detach(), lambda h, g: g.norm(dim=1), tolerance, steps, memory
    )
    return _found(objective, placed(points, matrix), count, tolerance)


def flatten(
    objective: Objective, points: Points, tolerance: float = 1e-8, steps: int = 2000, memory: int = 20
) -> Found:
    """Minimises ``|gradient|^2 / 2`` from each point by L-BFGS: minima, maxima and saddles alike end it.

    The slope of that height is the Hessian times the gradient, one product a step. It has local minima of its
    own, where a gradient that is not zero lies in the Hessian's kernel; such a search has not converged. Far
    from a critical point this is slow, because it squares the condition number; near one `refine` is faster.

    Args:
        objective: The loss on fixed examples.
        points: N starts; float64 is advised.
        tolerance: Length of the gradient at which a search ends.
        steps: Steps at most.
        memory: Pairs of differences kept.

    Source: the method by which Pennington & Bahri 2017 and Sagun et al. 2014 find saddles of networks.

    Example:
        >>> from losslab.tasks import function_task, saddle
        >>> objective = Objective(function_task(saddle))
        >>> start = Points({"x": torch.tensor([[1.0, 0.2], [1.0, 0.9]], dtype=torch.float64)}, {})
        >>> flatten(objective, start).points["x"].abs().round(decimals=6)
        tensor([[0., 0.],
                [0., 1.]], dtype=torch.float64)
    """

    def height(matrix: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        here = placed(points, matrix, members)
        gradient = objective.gradient(here)[1].matrix()
        return gradient.square().sum(1) / 2, objective.hvp(here, gradient)

    matrix, count = _lbfgs(
        height, points.matrix().detach(), lambda h, g: (2 * h).sqrt(), tolerance, steps, memory
    )
    return _found(objective, placed(points, matrix), count, tolerance)


def refine(objective: Objective, points: Points, tolerance: float = 1e-10, steps: int = 30) -> Found:
    """Newton's method on the gradient: to the critical point nearby, whatever its kind.

    ``d = -H (H^2 + mu I)^-1 g`` with mu adapted so that each step shortens the gradient (Levenberg-Marquardt
    on the equations ``g = 0``). With mu small beside the eigenvalues this is Newton's step; along directions
    in which the loss is flat it does not move, so manifolds of critical points are met at their nearest.

    Args:
        objective: The loss on fixed examples.
        points: N starts, near critical points; at most 3000 weights, float64.
        tolerance: Length of the gradient at which a search ends.
        steps: Steps at most, a Hessian each.

    Raises:
        LosslabError: Too many weights to decompose a Hessian.

    Example:
        >>> from losslab.tasks import function_task, saddle
        >>> objective = Objective(function_task(saddle))
        >>> start = Points({"x": torch.tensor([[0.1, 0.3], [-0.2, -1.2]], dtype=torch.float64)}, {})
        >>> refine(objective, start).points["x"].round(decimals=9) + 0.0
        tensor([[ 0.,  0.],
                [ 0., -1.]], dtype=torch.float64)
    """

    def step(values: Tensor, along: Tensor, damping: Tensor) -> Tensor:
        return -values * along / (values.square() + damping)

    return _decomposed(objective, points, step, tolerance, steps, downhill=True)


def follow(
    objective: Objective, points: Points, index: int = 1, tolerance: float = 1e-10, steps: int = 200
) -> Found:
    """Eigenvector following: uphill along the ``index`` lowest eigenvectors, downhill along all others.

    ``d = sum_i s_i (v_i g) / |l_i| v_i`` with s_i = +1 for the lowest eigenvalues and -1 for the rest, no
    longer than a trusted length: it climbs the softest valley, to a saddle of that index if there is one on
    the way.

    Args:
        objective: The loss on fixed examples.
        points: N starts; at most 3000 weights, float64.
        index: Negative eigenvalues wanted; 0 is a damped Newton descent.
        tolerance: Length of the gradient at which a search ends.
        steps: Steps at most, a Hessian each.

    Source: Cerjan & Miller 1981; Wales, Energy Landscapes (2003), section 6.2.

    Raises:
        LosslabError: Too many weights to decompose a Hessian.

    Example:
        >>> from losslab.tasks import double_well, function_task
        >>> objective = Objective(function_task(double_well))
        >>> start = Points({"x": torch.tensor([[0.6, 0.1]], dtype=torch.float64)}, {})
        >>> follow(objective, start).points["x"].abs().round(decimals=9)
        tensor([[0., 0.]], dtype=torch.float64)
    """

    def step(values: Tensor, along: Tensor, damping: Tensor) -> Tensor:
        size = values.abs().amax(1, keepdim=True)
        move = -along / torch.maximum(values.abs(), 1e-6 * size)
        move[:, :index] *= -1
        length = move.norm(dim=1, keepdim=True)
        return move * torch.clamp(damping / length.clamp(min=1e-300), max=1.0)

    return _decomposed(objective, points, step, tolerance, steps, downhill=False)


def placed(points: Points, matrix: Tensor, members: Tensor | None = None) -> Points:
    """Coordinates ``[n, P]`` as points with the buffers of these members."""
    names = {n: w.shape[1:] for n, w in points.weights.items()}
    parts = matrix.split([math.prod(s) for s in names.values()], dim=1)
    weights = {n: p.reshape(len(matrix), *s) for p, (n, s) in zip(parts, names.items(), strict=True)}
    buffers = points.buffers if members is None else {n: b[members] for n, b in points.buffers.items()}
    return Points(weights, buffers)


def _found(objective: Objective, points: Points, steps: Tensor, tolerance: float) -> Found:
    value, gradient = objective.gradient(points)
    norm = gradient.matrix().norm(dim=1)
    return Found(points, value, norm, norm <= tolerance, steps)


# -- L-BFGS ----------------------------------------------------------------------------------------------


class _Memory:
    """Differences of points and slopes of n members: the two-loop recursion."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pairs: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def keep(self, rows: Tensor) -> None:
        self.pairs = [(s[rows], y[rows], r[rows], t[rows]) for s, y, r, t in self.pairs]

    def add(self, s: Tensor, y: Tensor) -> None:
        bend = (s * y).sum(1)
        # A pair without positive curvature would make the metric indefinite: it counts for nothing.
        good = bend > 1e-14 * s.norm(dim=1) * y.norm(dim=1)
        self.pairs.append((s, y, torch.where(good, 1 / bend, 0.0), bend / y.square().sum(1)))
        del self.pairs[: -self.size]

    def direction(self, slope: Tensor) -> Tensor:
        q, kept = slope.clone(), []
        scale = 1 / slope.norm(dim=1).clamp(min=1.0)
        for s, y, r, _ in reversed(self.pairs):
            a = r * (s * q).sum(1)
            q -= a[:, None] * y
            kept.append(a)
        for _, _, r, newest in self.pairs:
            scale = torch.where(r > 0, newest, scale)
        q *= scale[:, None]
        for (s, y, r, _), a in zip(self.pairs, reversed(kept), strict=True):
            q += (a - r * (y * q).sum(1))[:, None] * s
        return -q


def _lbfgs(
    height: Height,
    start: Tensor,
    measure: Callable[[Tensor, Tensor], Tensor],
    tolerance: float,
    steps: int,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Ends ``[N, P]`` and steps ``[N]`` of N searches; those that are done leave the stack."""
    ends, counts = start.clone(), torch.full((len(start),), steps, device=start.device)
    active = torch.arange(len(start), device=start.device)
    x, memory = start, _Memory(size)
    h, g = height(x, active)
    stuck = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for count in range(steps):
        done = (measure(h, g) <= tolerance) | stuck | ~torch.isfinite(h)
        if bool(done.any()):
            ends[active[done]], counts[active[done]] = x[done], count
            rows = (~done).nonzero().flatten()
            active, x, h, g = active[rows], x[rows], h[rows], g[rows]
            memory.keep(rows)
        if not len(active):
            break
        d = memory.direction(g)
        uphill = ~((d * g).sum(1) < 0)
        d = torch.where(uphill[:, None], -g, d)
        moved, h, new, stuck = _searched(height, active, x, h, g, d)
        memory.add(moved - x, new - g)
        x, g = moved, new
    ends[active] = x
    return ends, counts


def _searched(
    height: Height, members: Tensor, x: Tensor, h: Tensor, g: Tensor, d: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The points, heights and slopes after a line search, and who found no step."""
    slope = (d * g).sum(1)
    slack = 4 * torch.finfo(h.dtype).eps * h.abs()
    rate, done = torch.ones_like(h), torch.zeros_like(h, dtype=torch.bool)
    moved, height_there, slope_there = x.clone(), h.clone(), g.clone()
    open_ = torch.arange(len(x), device=x.device)
    for _ in range(40):
        trial = x[open_] + rate[open_, None] * d[open_]
        high, steep = height(trial, members[open_])
        along = (steep * d[open_]).sum(1)
        enough = high <= h[open_] + 1e-4 * rate[open_] * slope[open_]
        flat = (
            (high <= h[open_] + slack[open_]) & (along <= -0.8 * slope[open_]) & (along >= 0.9 * slope[open_])
        )
        good = (enough | flat) & torch.isfinite(steep).all(1)
        took = open_[good]
        moved[took], height_there[took], slope_there[took] = trial[good], high[good], steep[good]
        done[took] = True
        # Where the parabola through the heights has its minimum, within a tenth and a half.
        bend = high - h[open_] - rate[open_] * slope[open_]
        shrink = (-rate[open_] * slope[open_] / (2 * bend)).nan_to_num(0.1, 0.1, 0.1).clamp(0.1, 0.5)
        rate[open_] = rate[open_] * shrink
        open_ = open_[~good]
        if not len(open_):
            break
    return moved, height_there, slope_there, ~done


# -- searches that decompose the Hessian -----------------------------------------------------------------


def _decomposed(
    objective: Objective,
    points: Points,
    step: Callable[[Tensor, Tensor, Tensor], Tensor],
    tolerance: float,
    steps: int,
    downhill: bool,
) -> Found:
    """Steps in the Hessian's eigenbasis; ``downhill`` wants each to shorten the gradient.

    The damping is that of `refine`, or the trusted length of `follow`; both halve and double.
    """
    if points.parameters > LARGEST:
        raise LosslabError(
            f"the network has {points.parameters} weights and its Hessian would be decomposed, which is "
            f"meant for at most {LARGEST}: use minimise or flatten, which need products only"
        )
    ends = points.matrix().detach().clone()
    counts = torch.full((len(ends),), steps, device=ends.device)
    active = torch.arange(len(ends), device=ends.device)
    g = objective.gradient(points)[1].matrix()
    damping: Tensor | None = None
    for count in range(steps + 1):
        going = (g.norm(dim=1) > tolerance) & torch.isfinite(g).all(1)
        counts[active[~going]] = count
        active, g = active[going], g[going]
        damping = None if damping is None else damping[going]
        if not len(active) or count == steps:
            break
        values, vectors = torch.linalg.eigh(dense(objective, placed(points, ends[active], active)))
        if damping is None:
            top = values.abs().amax(1, keepdim=True)
            damping = (
                1e-6 * top.square()
                if downhill
                else 0.1 * ends[active].norm(dim=1, keepdim=True).clamp(min=1.0)
            )
        along = (vectors.mT @ g[:, :, None]).squeeze(2)
        before, tries = g.norm(dim=1), 12 if downhill else 1
        better = torch.zeros_like(before, dtype=torch.bool)
        for _ in range(tries):
            rows = (~better).nonzero().flatten()
            d = (vectors[rows] @ step(values[rows], along[rows], damping[rows])[:, :, None]).squeeze(2)
            there = ends[active[rows]] + d
            slope = objective.gradient(placed(points, there, active[rows]))[1].matrix()
            good = (slope.norm(dim=1) < before[rows]) if downhill else torch.ones_like(rows, dtype=torch.bool)
            took = rows[good]
            ends[active[took]], g[took] = there[good], slope[good]
            better[took] = True
            if not downhill:
                shorter = slope.norm(dim=1, keepdim=True) < before[rows, None]
                damping = damping * torch.where(shorter, 2.0, 0.5)
                break
            damping[took] /= 10
            damping[rows[~good]] *= 10
            if bool(better.all()):
                break
        if downhill and not bool(better.all()):  # twelve decades of damping did not help: rounding
            counts[active[~better]] = count
            active, g, damping = active[better], g[better], damping[better]
    return _found(objective, placed(points, ends), counts, tolerance)


def dense(objective: Objective, points: Points) -> Tensor:
    """Hessians ``[N, P, P]``, symmetric, as many points at a time as fit a moderate memory."""
    size = points.parameters
    each = max(1, int(2**27 / (size * size * 8)))
    parts = []
    for a in range(0, points.members, each):
        few = placed(points, points.matrix()[a : a + each], torch.arange(a, min(a + each, points.members)))
        matrix = Hessian(objective, few).dense()
        parts.append(matrix if matrix.dim() == 3 else matrix[None])
    return torch.cat(parts)
