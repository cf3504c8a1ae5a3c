"""Points as combinations of a few others: the arithmetic of slices, curves and bands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from losslab.engine import Points, Population
from losslab.errors import LosslabError

Where = Points | Population | nn.Module | Sequence[nn.Module]


def as_points(where: Where, members: Sequence[int] | None = None) -> Points:
    """The points that somebody means by points, a population, a module or modules.

    Args:
        where: One of these.
        members: Only these, in this order; all by default.

    Raises:
        LosslabError: It is nothing of the kind, modules of several architectures, or there is no such member.

    Example:
        >>> as_points([nn.Linear(2, 1), nn.Linear(2, 1)], members=[1]).members
        1
    """
    if isinstance(where, Points):
        points = where
    elif isinstance(where, Population):
        points = where.points
    elif isinstance(where, nn.Module):
        points = Points.from_modules([where])
    elif isinstance(where, Sequence) and all(isinstance(m, nn.Module) for m in where):
        points = Points.from_modules(where)
    else:
        raise LosslabError(
            f"a {type(where).__name__} is no place in weight space: pass points, a population or modules"
        )
    if members is None:
        return points
    for member in members:
        if not 0 <= member < points.members:
            raise LosslabError(
                f"there is no member {member} among {points.members}: pass numbers from 0 to "
                f"{points.members - 1}"
            )
    return points.select(members)


def joined(*parts: Points) -> Points:
    """Stacks of points of one architecture, one after another.

    Raises:
        LosslabError: They are of different architectures.
    """
    first = {n: tuple(t.shape[1:]) for n, t in parts[0].items()}
    for part in parts[1:]:
        shapes = {n: tuple(t.shape[1:]) for n, t in part.items()}
        if shapes != first:
            odd = min(set(shapes.items()) ^ set(first.items()))[0]
            raise LosslabError(f"the points differ at {odd!r}: pass checkpoints of one architecture")
    return Points(
        {n: torch.cat([p.weights[n] for p in parts]) for n in parts[0].weights},
        {n: torch.cat([p.buffers[n] for p in parts]) for n in parts[0].buffers},
    )


def combine(frame: Points, coefficients: Tensor) -> Points:
    """``theta_m = sum_k c_mk theta_k``: frame of K points, coefficients ``[M, K]`` -> M points.

    Weights and floating buffers are combined; other buffers are those of the frame's first point. A point
    with coefficient 1 and nothing beside it comes out bit for bit. What is not finite in the frame makes NaN
    of the points that it is part of, and of no others.

    Example:
        >>> frame = Points({"w": torch.tensor([[1.0], [3.0]])}, {})
        >>> combine(frame, torch.tensor([[0.5, 0.5], [-1.0, 2.0]]))["w"].flatten()
        tensor([2., 5.])
    """
    if coefficients.dim() != 2 or coefficients.shape[1] != frame.members:
        raise LosslabError(
            f"coefficients of shape {tuple(coefficients.shape)}, wanted [points, {frame.members}]: "
            "one column a point of the frame"
        )
    if coefficients.shape[0] == 0:
        raise LosslabError("no coefficients were given: pass at least one row")

    def mixed(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t[:1].expand(len(coefficients), *t.shape[1:]).clone()
        flat, c = t.reshape(len(t), -1), coefficients.to(t.device, t.dtype)
        lost = ~torch.isfinite(flat)
        if not lost.any():
            return (c @ flat).reshape(len(c), *t.shape[1:])
        # Zero times NaN is NaN: a point of the frame that is lost must not take along those without it.
        rows = c @ flat.masked_fill(lost, 0.0)
        touched = (c != 0).to(t.dtype) @ lost.to(t.dtype) > 0
        return rows.masked_fill(touched, torch.nan).reshape(len(c), *t.shape[1:])

    return frame.map(mixed)


def lengths(frame: Points) -> Tensor:
    """Distances in weight space between consecutive points, ``[N - 1]``, in float64; buffers do not count.

    Example:
        >>> lengths(Points({"w": torch.tensor([[0.0], [3.0], [4.0]])}, {}))
        tensor([3., 1.], dtype=torch.float64)
    """
    squares = torch.zeros(frame.members - 1, dtype=torch.float64)
    for w in frame.weights.values():
        step = (w[1:] - w[:-1]).reshape(len(w) - 1, -1)
        squares += step.double().square().sum(1).cpu()
    return squares.sqrt()
