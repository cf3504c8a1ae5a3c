"""Alignment: the order of one network's units in which it looks most like another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from losslab.engine import Points, randomness
from losslab.errors import LosslabError
from losslab.paths.permutations import Axis, Permutations, Spec, axis_of_label, names_of_labels
from losslab.paths.slopes import Mover, Slopes
from losslab.paths.tracing import traced
from losslab.tasks.nest import map_nest

if TYPE_CHECKING:
    import pandas as pd

SWEEPS = 100
"""The most sweeps over all groups."""

GAIN = 1e-12
"""A sweep that gains less than this share of the largest possible similarity is the last."""

ROWS = 4096
"""Values a unit from which activations are compared."""


@dataclass(frozen=True)
class Alignment:
    """What was matched with what.

    Attributes:
        points: The second network with its units in the order found.
        permutations: The order: unit i of `points` is unit ``permutations[group][i]`` of the network given.
        similarity: What was maximised, before and after, as a cosine between the two networks.
        by_group: The same for each group alone: the cosine of what touches its units, before and after.
        converged: Whether the last sweep gained nothing.
        sweeps: How many there were, in the best start.
        starts: The similarity that each start reached; the first starts at the order given.
        history: Of the straight-through estimator, the loss at the midpoint at each step.
    """

    points: Points
    permutations: dict[str, Tensor]
    similarity: tuple[float, float]
    by_group: dict[str, tuple[float, float]]
    converged: bool
    sweeps: int
    starts: tuple[float, ...]
    history: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def table(self) -> pd.DataFrame:
        """One row a group: its units, how many of them moved, the similarity before and after."""
        import pandas as pd

        return pd.DataFrame(
            {
                "group": name,
                "units": len(order),
                "moved": int((order != torch.arange(len(order))).sum()),
                "before": self.by_group[name][0],
                "after": self.by_group[name][1],
            }
            for name, order in self.permutations.items()
        )


@dataclass(frozen=True)
class _Pair:
    """The same tensor of both networks, with its axes; a large inner product is what is wanted."""

    a: Tensor
    b: Tensor
    axes: tuple[Axis, ...]

    def groups(self) -> set[str]:
        return set().union(*(axis.groups() for axis in self.axes))

    def moved(self, order: Permutations, but: int | None = None) -> Tensor:
        """The second tensor with all axes permuted, or all but one."""
        t = self.b
        for k, axis in enumerate(self.axes):
            if k != but and axis.groups():
                t = t.index_select(k, axis.order(order))
        return t


def match_weights(
    spec: Spec,
    first: Points,
    second: Points,
    *,
    restarts: int = 1,
    seed: int = 0,
    sweeps: int = SWEEPS,
    start: Permutations | None = None,
) -> Alignment:
    """Weight matching (Ainsworth et al. 2023, Algorithm 1): the order that brings the weights closest.

    Maximises ``<theta_A, pi(theta_B)>``, which minimises ``||theta_A - pi(theta_B)||``, by coordinate ascent:
    the best order of one group given those of the others is a linear assignment problem. Sweeps over the
    groups, in random order, go on until one gains nothing. That is a local optimum: with several groups in a
    row, and in residual networks above all, even a planted permutation is often missed, so there are restarts
    from random orders, and the best is kept.

    Args:
        spec: The symmetries.
        first: The network to look like, one point.
        second: The network whose units move, one point.
        restarts: Starts in all; the first begins with the order given, the others with random ones.
        seed: Of the random starts and the order of the groups.
        sweeps: The most sweeps a start.
        start: Where the first start begins.

    Raises:
        LosslabError: More than one network a side, networks of several architectures, or no start.
    """
    _check(first, second, restarts)
    pairs = []
    for name, w in first.weights.items():
        if name in spec.axes:
            pairs.append(_Pair(w[0].double().cpu(), second.weights[name][0].double().cpu(), spec.axes[name]))
    return _matched(spec, pairs, second, restarts, seed, sweeps, start)


def match_activations(
    spec: Spec,
    first: Points,
    second: Points,
    module: nn.Module,
    examples: Any,
    *,
    run: Callable[[nn.Module, Any], Any] = lambda module, x: module(x),
    correlation: bool = True,
    restarts: int = 1,
    seed: int = 0,
    sweeps: int = SWEEPS,
) -> Alignment:
    """Activation matching: the order in which the units respond most alike to the examples.

    Compares what each layer reads, in evaluation mode: the sum over units of the correlation (or covariance)
    over examples and positions. Groups that share no layer's input are solved exactly, one by one.

    Args:
        spec: The symmetries, derived from the module's own code.
        first: The network to look like, one point.
        second: The network whose units move, one point.
        module: A network of the architecture, for its code.
        examples: A batch of inputs.
        run: ``run(module, batch)``.
        correlation: Whether each unit counts alike, as Jordan et al. (2023) have it, or by its variance
            (Ainsworth et al. 2023).
        restarts: As in `match_weights`.
        seed: As in `match_weights`.
        sweeps: As in `match_weights`.

    Raises:
        LosslabError: As in `match_weights`, or no layer of the module reads units of the spec.
    """
    _check(first, second, restarts)
    reads = []
    for points in (first, second):
        network = points.load_into(copy.deepcopy(module), 0).double().eval()
        batch = map_nest(lambda t: t.double() if t.is_floating_point() else t, examples)
        with randomness.spared():
            named, trace = traced(network, run, batch, keep=True)
        called = names_of_labels(spec, named)
        reads.append([(axis_of_label(label, called), _features(t, correlation)) for label, t in trace.read])
    pairs = []
    for (axis, a), (_, b) in zip(*reads, strict=True):
        if axis.groups():
            pairs.append(_Pair(a, b, (Axis(a.shape[0]), axis)))
    if not pairs:
        raise LosslabError("no layer reads units of the spec: derive the spec from this module")
    return _matched(spec, pairs, second, restarts, seed, sweeps, None)


def match_straight_through(
    spec: Spec,
    slopes: Slopes,
    first: Points,
    second: Points,
    *,
    steps: int = 100,
    rule: Any = None,
    seed: int = 0,
) -> Alignment:
    """The straight-through estimator (Ainsworth et al. 2023, Algorithm 3): the order with a low midpoint.

    Free weights, at first those of network A, are moved so that the loss falls at the midpoint of A and the
    order of B that is nearest to them; the gradient passes through the choice of the order as if it were
    none. The order with the lowest midpoint seen is kept.

    Args:
        spec: The symmetries.
        slopes: What is minimised; its batch is that of a step.
        first: Network A, one point.
        second: Network B, one point.
        steps: Updates of the free weights.
        rule: A losslab or torch update rule; Adam with rate 0.01 by default.
        seed: Of the order of the groups in the matchings.

    Raises:
        LosslabError: As in `match_weights`.
    """
    _check(first, second, 1)
    goal, free = first.matrix(), Mover(rule, first.matrix().clone())
    found = match_weights(spec, first, second, seed=seed)
    best, lowest, history = found, float("inf"), []
    for step in range(steps):
        near = first.at(free.theta)
        found = match_weights(spec, near, second, seed=seed + step, start=found.permutations)
        middle = 0.5 * (goal + found.points.matrix())
        values, slope = slopes(first, middle, step)
        history.append(float(values[0]))
        if history[-1] < lowest:
            best, lowest = found, history[-1]
        free.move(0.5 * slope, step)
    close = match_weights(spec, first, second, start=best.permutations, sweeps=0)
    return Alignment(
        close.points, close.permutations, close.similarity, close.by_group, True, steps, close.starts,
        torch.tensor(history),
    )  # fmt: skip


# -- coordinate ascent -------------------------------------------------------------------------------------


def _matched(
    spec: Spec,
    pairs: Sequence[_Pair],
    second: Points,
    restarts: int,
    seed: int,
    sweeps: int,
    start: Permutations | None,
) -> Alignment:
    still = {n: torch.arange(size) for n, size in spec.groups.items()}
    begun = still | dict(start or {})
    spec.check(begun)
    scale = _scale(pairs)
    before = _similarity(pairs, still)
    best: tuple[float, dict[str, Tensor], bool, int] | None = None
    reached = []
    for number in range(restarts):
        order = dict(begun) if number == 0 else spec.random(randomness.key(seed, "restart", number) >> 1)
        draw = randomness.generator(seed, "sweeps", number)
        converged, count = _ascend(pairs, order, draw, sweeps, scale)
        value = _similarity(pairs, order)
        reached.append(value / scale)
        if best is None or value > best[0]:
            best = (value, order, converged, count)
    assert best is not None
    value, order, converged, count = best
    by_group = {n: (_cosine(pairs, still, n), _cosine(pairs, order, n)) for n in spec.groups}
    points = spec.permute(second, order)
    shown = (before / scale, value / scale)
    return Alignment(points, order, shown, by_group, converged, count, tuple(reached))


def _ascend(
    pairs: Sequence[_Pair], order: dict[str, Tensor], draw: torch.Generator, sweeps: int, scale: float
) -> tuple[bool, int]:
    """Improves an order group by group, in place; whether it settled, and after how many sweeps."""
    names = list(order)
    touching = {n: [p for p in pairs if n in p.groups()] for n in names}
    for sweep in range(sweeps):
        gained = 0.0
        for i in torch.randperm(len(names), generator=draw).tolist():
            gained += _improve(touching[names[i]], order, names[i])
        if gained <= GAIN * scale:
            return True, sweep + 1
    return False, sweeps


def _improve(pairs: Sequence[_Pair], order: dict[str, Tensor], group: str) -> float:
    """The best order of one group, the others given; what it gains."""
    from scipy.optimize import linear_sum_assignment

    cost = gains(pairs, order, group)
    _, found = linear_sum_assignment(cost.numpy(), maximize=True)
    new, every = torch.as_tensor(found), torch.arange(len(cost))
    gain = float(cost[every, new].sum() - cost[every, order[group]].sum())
    if gain <= 0:
        return 0.0
    old, before = order[group], _similarity(pairs, order)
    order[group] = new
    if _similarity(pairs, order) <= before:  # a group on two axes of one tensor: the gain was a guess
        order[group] = old
        return 0.0
    return gain


def gains(pairs: Sequence[_Pair], order: Permutations, group: str) -> Tensor:
    """How alike unit i of the first and unit j of the second network are, ``[n, n]``, summed over tensors."""
    total: Tensor | None = None
    for pair in pairs:
        for k, axis in enumerate(pair.axes):
            if group not in axis.groups():
                continue
            entries = axis.entries(group)
            others = {n: o for n, o in order.items() if n != group}
            b = pair.moved(order, but=k).index_select(k, axis.order(others))
            rows = [_units(t, k, entries) for t in (pair.a, b)]
            here = rows[0] @ rows[1].T
            total = here if total is None else total + here
    assert total is not None
    return total


def _units(t: Tensor, axis: int, entries: Tensor) -> Tensor:
    """What belongs to each unit, ``[n, ...]`` as one row a unit."""
    picked = t.movedim(axis, 0).index_select(0, entries.flatten())
    return picked.reshape(len(entries), -1)


def _similarity(pairs: Sequence[_Pair], order: Permutations) -> float:
    return sum(float((p.a * p.moved(order)).sum()) for p in pairs)


def _scale(pairs: Sequence[_Pair]) -> float:
    """The largest similarity that two such networks could have."""
    a, b = (
        sum(float(t.square().sum()) for t in ts) ** 0.5
        for ts in zip(*((p.a, p.b) for p in pairs), strict=True)
    )
    return max(a * b, torch.finfo(torch.float64).tiny)


def _cosine(pairs: Sequence[_Pair], order: Permutations, group: str) -> float:
    own = [p for p in pairs if group in p.groups()]
    return _similarity(own, order) / _scale(own) if own else float("nan")


def _features(t: Tensor, correlation: bool) -> Tensor:
    """Values ``[rows, units]``, centred, so that inner products are covariances, or correlations."""
    if len(t) > ROWS:
        t = t[torch.randperm(len(t), generator=randomness.generator(0, "activations"))[:ROWS]]
    centred = (t.double() - t.double().mean(0)).cpu()
    if not correlation:
        return centred / len(t) ** 0.5
    size = centred.norm(dim=0)
    alive = size > 1e-12 * size.max()
    return torch.where(alive, centred / size.where(alive, torch.ones_like(size)), torch.zeros_like(centred))


def _check(first: Points, second: Points, restarts: int) -> None:
    for points in (first, second):
        if points.members != 1:
            raise LosslabError(f"{points.members} networks were given on one side: pass points.select([i])")
    shapes = [{n: tuple(t.shape) for n, t in points.items()} for points in (first, second)]
    if shapes[0] != shapes[1]:
        odd = min(set(shapes[0].items()) ^ set(shapes[1].items()))[0]
        raise LosslabError(f"the networks differ at {odd!r}: align networks of one architecture")
    for points in (first, second):
        if not torch.isfinite(points.matrix()).all():
            raise LosslabError("a network is not finite: leave out members that diverged")
    if restarts < 1:
        raise LosslabError(f"restarts is {restarts}: pass at least 1")


__all__ = ["Alignment", "match_activations", "match_straight_through", "match_weights"]
