"""Rules driven by hand: the package's own updates on gradients in closed form, many runs as one stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from losslab.lecture.statistics import max_relative_error
from losslab.rules import Rule, State

Gradient = Callable[[Tensor, int], Tensor]
"""Points ``[N, d]`` and the step -> gradients ``[N, d]``."""

Hessian = Callable[[Tensor], Tensor]
"""Points ``[N, d]`` -> Hessians ``[N, d, d]``."""


class Move(NamedTuple):
    """One update of N runs.

    Attributes:
        step: Updates done before it.
        before: The points it left, ``[N, d]``.
        gradient: The gradients it used, ``[N, d]``.
        after: The points it reached, ``[N, d]``.
        state: The rule's state after it, slot -> ``[N, d]``.
    """

    step: int
    before: Tensor
    gradient: Tensor
    after: Tensor
    state: Mapping[str, Tensor]


class Known(NamedTuple):
    """A Hessian that is known already, as the curvature that a second-order rule asks for."""

    matrix: Tensor

    def hessian(self) -> Tensor:
        """The matrix ``[N, d, d]``."""
        return self.matrix


def drive(
    rule: Rule, gradient: Gradient, start: Tensor, steps: int, hessian: Hessian | None = None, first: int = 0
) -> Iterator[Move]:
    """Updates N points by a rule, yielding every move.

    Args:
        rule: With one value a member where members differ.
        gradient: Evaluated at the points of every step.
        start: ``[N, d]``.
        steps: Updates.
        hessian: For rules that need it.
        first: What the first update counts as; 0 is the first of a run.

    Example:
        >>> from losslab.rules import GD
        >>> moves = drive(GD(lr=0.5), lambda x, t: x, torch.ones(1, 2), steps=2)
        >>> [move.after.tolist() for move in moves]
        [[[0.5, 0.5]], [[0.25, 0.25]]]
    """
    x = start
    state: State = rule.init({"x": x})
    for step in range(first, first + steps):
        g = gradient(x, step)
        curvature = None if hessian is None else Known(hessian(x))
        weights, state = rule.update({"x": g}, state, {"x": x}, step, curvature)
        after = weights["x"]
        yield Move(step, x, g, after, {slot: next(iter(kept.values())) for slot, kept in state.items()})
        x = after


def drive_torch(
    optimizer: type[torch.optim.Optimizer],
    hyper: Mapping[str, Tensor],
    gradient: Gradient,
    start: Tensor,
    steps: int,
) -> Tensor:
    """The path of N points under a torch optimizer, ``[steps + 1, N, d]``.

    Args:
        optimizer: Its class.
        hyper: Arguments, name -> one value a member; members with equal values share a parameter group.
        gradient: As for `drive`.
        start: ``[N, d]``.
        steps: Updates.
    """
    rows = torch.stack([value.double() for value in hyper.values()], dim=1)
    settings, which = rows.unique(dim=0, return_inverse=True)
    places = [(which == k).nonzero().flatten() for k in range(len(settings))]
    parts = [torch.nn.Parameter(start[place].clone()) for place in places]
    groups: list[dict[str, Any]] = [
        {"params": [part], **dict(zip(hyper, row, strict=True))}
        for part, row in zip(parts, settings.tolist(), strict=True)
    ]
    torch_rule = optimizer(groups, lr=1.0)  # type: ignore[call-arg]  # every group has its own
    path = [start]
    for step in range(steps):
        g = gradient(path[-1], step)
        for part, place in zip(parts, places, strict=True):
            part.grad = g[place]
        torch_rule.step()
        x = torch.empty_like(start)
        for part, place in zip(parts, places, strict=True):
            x[place] = part.detach()
        path.append(x)
    return torch.stack(path)


def path_of(moves: Iterator[Move]) -> Tensor:
    """All points of a drive, the start included, ``[steps + 1, N, d]``."""
    first = next(moves)
    return torch.stack([first.before, first.after, *(move.after for move in moves)])


def member_errors(a: Tensor, b: Tensor) -> list[float]:
    """For each member the largest relative difference of two paths ``[T, N, d]``."""
    return [max_relative_error(a[:, i].numpy(), b[:, i].numpy()) for i in range(a.shape[1])]


def pulled(members: int, dimension: int, steps: int, seed: int) -> tuple[Gradient, Tensor]:
    """A random problem for comparing update rules: gradients that depend on the point and on the step.

    The gradient of member n at step t is ``a_n (x - c_nt)``, with ``a_n`` log-uniform in [0.1, 10] by
    coordinate and ``c_nt`` standard normal, so an error made early is carried along.

    Returns:
        The gradient and a start, both float64.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (members, dimension)
    scale = 10 ** (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1)
    targets = torch.randn((steps, *shape), generator=generator, dtype=torch.float64)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    return lambda x, step: scale * (x - targets[step]), start
