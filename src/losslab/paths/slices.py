"""Affine slices of weight space: lines, planes and more, through checkpoints or along directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from losslab.engine import Points, Population, randomness
from losslab.errors import LosslabError, unknown
from losslab.paths.combinations import Where, as_points, combine, joined

NORMALISATIONS = ("filter", "layer", "global", "unit")

DEPENDENT = 1e-6
"""A direction whose part outside of the others is shorter than this share of it depends on them."""


@dataclass(frozen=True)
class Slice:
    """The points ``theta(c) = origin + sum_k c_k direction_k`` of weight space.

    Attributes:
        frame: The origin and the K directions, K + 1 members; running statistics have directions too, so
            that a slice through checkpoints passes through theirs.
        names: What the coordinates are called.
        marks: Coordinates ``[M, K]`` of what the slice was made from: checkpoints, the origin, a trajectory.
        labels: What the marks are called, if they have names.
        explained: The share of a trajectory's variance along each direction, for principal components.

    Example:
        >>> a = Points({"w": torch.tensor([[0.0, 0.0], [3.0, 4.0]])}, {})
        >>> line = through(a)
        >>> line.at([[0.5], [2.0]])["w"]
        tensor([[1.5000, 2.0000],
                [6.0000, 8.0000]])
    """

    frame: Points
    names: tuple[str, ...]
    marks: Tensor
    labels: tuple[str, ...] = ()
    explained: tuple[float, ...] = field(default=())

    @property
    def dimensions(self) -> int:
        """K."""
        return self.frame.members - 1

    def coefficients(self, coordinates: Tensor | Sequence[Sequence[float]]) -> Tensor:
        """What the frame is combined with: coordinates ``[M, K]`` -> ``[M, 1 + K]``, float64."""
        c = torch.as_tensor(coordinates, dtype=torch.float64)
        if c.dim() != 2 or c.shape[1] != self.dimensions:
            raise LosslabError(
                f"coordinates of shape {tuple(c.shape)}, wanted [points, {self.dimensions}]: "
                "one column a direction"
            )
        return torch.cat([torch.ones(len(c), 1, dtype=torch.float64), c], 1)

    def at(self, coordinates: Tensor | Sequence[Sequence[float]]) -> Points:
        """The points at coordinates ``[M, K]``."""
        return combine(self.frame, self.coefficients(coordinates))

    def project(self, points: Points) -> tuple[Tensor, Tensor]:
        """The nearest point of the slice to each of N points.

        Returns:
            Coordinates ``[N, K]`` and the distances to the slice ``[N]``, float64.

        Example:
            >>> line = through(Points({"w": torch.tensor([[0.0, 0.0], [2.0, 0.0]])}, {}))
            >>> line.project(Points({"w": torch.tensor([[1.0, 3.0]])}, {}))
            (tensor([[0.5000]], dtype=torch.float64), tensor([3.], dtype=torch.float64))
        """
        frame = self.frame.matrix().double()
        away = points.matrix().double() - frame[0]
        basis, inverse = torch.linalg.qr(frame[1:].T)
        inside = away @ basis
        found = torch.linalg.solve_triangular(inverse, inside.T, upper=True).T
        rest = away - inside @ basis.T
        return found.cpu(), rest.norm(dim=1).cpu()

    def axes(self, points: int = 51, margin: float = 0.25) -> tuple[Tensor, ...]:
        """An even axis for each coordinate that covers the marks and a margin beyond, in shares of the width.

        A coordinate in which the marks do not differ gets [-1, 1].
        """
        if points < 2:
            raise LosslabError(f"an axis of {points} points was wanted: pass at least 2")
        known = self.marks[torch.isfinite(self.marks).all(1)].double()
        axes = []
        for k in range(self.dimensions):
            low, high = (float(known[:, k].min()), float(known[:, k].max())) if len(known) else (0.0, 0.0)
            if not high > low:
                low, high = -1.0, 1.0
            else:
                low, high = low - margin * (high - low), high + margin * (high - low)
            axes.append(torch.linspace(low, high, points, dtype=torch.float64))
        return tuple(axes)


def along(origin: Where, directions: Tensor | Points, names: Sequence[str] = ()) -> Slice:
    """The slice along given directions: eigenvectors of the Hessian, gradients, steps.

    Args:
        origin: One point.
        directions: ``[K, P]`` in the coordinates of `Points.matrix`, or K of them as points.
        names: What the coordinates are called.

    Raises:
        LosslabError: Directions of another length, not finite, or linearly dependent.

    Example:
        >>> origin = Points({"w": torch.zeros(1, 3)}, {})
        >>> along(origin, torch.eye(3)[:2]).at([[1.0, 2.0]])["w"]
        tensor([[1., 2., 0.]])
    """
    start = as_points(origin)
    if start.members != 1:
        raise LosslabError(f"an origin of {start.members} points was given: pass one, points.select([i])")
    ways = (directions.matrix() if isinstance(directions, Points) else directions).detach()
    if ways.dim() != 2 or ways.shape[1] != start.parameters:
        raise LosslabError(
            f"directions of shape {tuple(ways.shape)}, wanted [directions, {start.parameters}]: "
            "one row a direction, in the coordinates of Points.matrix()"
        )
    _check_independent(ways)
    like = next(iter(start.weights.values()))
    moved = start.at(ways.to(like)).weights
    buffers = {
        n: torch.zeros_like(b).repeat(len(ways), *[1] * (b.dim() - 1)) for n, b in start.buffers.items()
    }
    frame = joined(start.clone(), Points(moved, buffers))
    return Slice(frame, _named(names, len(ways)), torch.zeros(1, len(ways), dtype=torch.float64))


def through(where: Where, members: Sequence[int] | None = None, labels: Sequence[str] = ()) -> Slice:
    """The slice through K + 1 checkpoints: two make a line, three a plane.

    On a line the coordinate is 0 at the first and 1 at the second. Beyond that the coordinates are lengths
    along orthonormal directions, the first from checkpoint 0 to 1, the next towards checkpoint 2 and across
    the first, and so on (Garipov et al. 2018, section 3.3); `Slice.marks` are the checkpoints' coordinates.
    Running statistics are combined like weights.

    Args:
        where: The checkpoints.
        members: Only these, in this order; all by default.
        labels: What the checkpoints are called; by default members of a population by their number, seed and
            what else they differ in, other points by their number.

    Raises:
        LosslabError: Fewer than two checkpoints, several architectures, or checkpoints on a common line
            (plane, ...).

    Example:
        >>> plane = through(Points({"w": torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0]])}, {}))
        >>> plane.marks.round(decimals=6)
        tensor([[0., 0.],
                [2., 0.],
                [1., 3.]], dtype=torch.float64)
    """
    points = as_points(where, members)
    if points.members < 2:
        raise LosslabError("a slice through checkpoints needs two or more, there is one: train with seeds=2")
    count = points.members - 1
    edges = torch.cat([-torch.ones(count, 1), torch.eye(count)], 1).double()
    matrix = points.matrix().double().cpu()
    if not torch.isfinite(matrix).all():
        lost = [i for i, row in enumerate(matrix) if not torch.isfinite(row).all()]
        raise LosslabError(f"checkpoint {lost[0]} is not finite: leave out members that diverged")
    ways = matrix[1:] - matrix[0]
    _check_independent(ways)
    marks = torch.cat([torch.zeros(1, count, dtype=torch.float64), torch.eye(count, dtype=torch.float64)])
    if count > 1:
        _, upper = torch.linalg.qr(ways.T)
        upper = upper * torch.sign(torch.diagonal(upper))[:, None]
        # ways = upper^T basis, so the basis as combinations of the checkpoints:
        edges = torch.linalg.solve_triangular(upper.T, edges, upper=False)
        marks[1:] = upper.T
    origin = torch.zeros(1, points.members, dtype=torch.float64)
    origin[0, 0] = 1.0
    frame = combine(points, torch.cat([origin, edges]))
    told = tuple(labels) or _labels(where, members or range(points.members))
    if len(told) != points.members:
        raise LosslabError(f"{len(told)} labels were given for {points.members} checkpoints: pass one each")
    return Slice(frame, ("share of the way",) if count == 1 else _named((), count), marks, told)


def _labels(where: Where, members: Sequence[int]) -> tuple[str, ...]:
    if not isinstance(where, Population):
        return tuple(f"network {i}" for i in members)
    return tuple(member_label(i, where.seeds, where.hyperparameters) for i in members)


def member_label(member: int, seeds: Sequence[int], hyper: Mapping[str, Sequence[Any]]) -> str:
    """What a member of a population is called: its number, seed and what else it differs in.

    Example:
        >>> member_label(1, [0, 0], {"lr": [0.1, 0.3]})
        'member 1, seed 0, lr 0.3'
    """
    told = [f"member {member}", f"seed {seeds[member]}"]
    values = {name: each[member] for name, each in hyper.items()}
    told += [f"{n} {v:g}" if isinstance(v, float) else f"{n} {v}" for n, v in values.items()]
    return ", ".join(told)


def random_slice(
    origin: Where,
    dimensions: int = 2,
    seed: int = 0,
    normalise: str = "filter",
    orthogonal: bool = True,
) -> Slice:
    """The slice along random Gaussian directions.

    Lengths mean little where a layer can be scaled against the next, so the directions are brought to the
    weights' own scale (Li et al. 2018, section 4). They are orthogonal within each normalised part, so that
    both hold exactly: the norms, and the right angle.

    Args:
        origin: One point.
        dimensions: How many directions.
        seed: Of the draw.
        normalise: ``"filter"``: each filter (row of a weight) of a direction is as long as that of the
            weights, vectors (biases, batch norm) stay where they are; filters smaller than the number of
            directions are taken together. ``"layer"``: the same with whole weights. ``"global"``: the
            direction is as long as all weights together. ``"unit"``: it has length one.
        orthogonal: Whether they are made orthogonal.

    Raises:
        LosslabError: An unknown normalisation, or more directions than coordinates.
    """
    if normalise not in NORMALISATIONS:
        raise unknown("normalisation", normalise, NORMALISATIONS)
    start = as_points(origin)
    draw = randomness.generator(seed, "slice")
    if dimensions < 1 or dimensions > start.parameters:
        raise LosslabError(
            f"{dimensions} directions were wanted in {start.parameters} dimensions: pass 1 to "
            f"{start.parameters}"
        )
    if normalise in ("global", "unit"):
        flat = start.matrix()[:1].double().cpu()
        unit = torch.full_like(flat, flat.shape[1] ** -0.5)
        ways = _scaled(flat if normalise == "global" else unit, dimensions, draw, orthogonal)
    else:
        parts = [
            _scaled(_units(w[0], normalise, dimensions), dimensions, draw, orthogonal)
            if w.dim() > 2
            else torch.zeros(dimensions, w[0].numel(), dtype=torch.float64)
            for w in start.weights.values()
        ]
        ways = torch.cat(parts, 1)
    found = along(start.select([0]), ways)
    return Slice(found.frame, tuple(f"random direction {k + 1}" for k in range(dimensions)), found.marks)


def _units(weight: Tensor, normalise: str, least: int) -> Tensor:
    rows = weight.double().cpu().reshape(len(weight), -1)
    return rows.reshape(1, -1) if normalise == "layer" or rows.shape[1] < least else rows


def _scaled(units: Tensor, count: int, draw: torch.Generator, orthogonal: bool) -> Tensor:
    """Random directions, each unit as long as that of the weights: ``[units, size] -> [count, numel]``."""
    raw = torch.randn(*units.shape, count, dtype=torch.float64, generator=draw)
    ways = torch.linalg.qr(raw)[0] if orthogonal else raw / raw.norm(dim=1, keepdim=True)
    ways = ways * units.norm(dim=1)[:, None, None]
    return ways.permute(2, 0, 1).reshape(count, -1)


def principal(trajectory: Where, dimensions: int = 2, origin: str = "last") -> Slice:
    """The slice along the principal components of a training trajectory ``[T points]``.

    The components are those of ``theta_t - origin`` (Li et al. 2018, section 7.2), orthonormal; the marks are
    the trajectory.

    Args:
        trajectory: Points in order, as `Trajectory.points` gives them.
        dimensions: How many components.
        origin: ``"last"`` or ``"mean"``.

    Raises:
        LosslabError: Fewer points than components need, points that are not finite, or a trajectory that does
            not move in as many dimensions.
    """
    if origin not in ("last", "mean"):
        raise unknown("origin", origin, ("last", "mean"))
    points = as_points(trajectory)
    matrix = points.matrix().double().cpu()
    if not torch.isfinite(matrix).all():
        raise LosslabError("the trajectory is not finite: end it before the run diverged")
    count = points.members
    if count <= dimensions:
        raise LosslabError(
            f"{count} points have at most {count - 1} principal components, {dimensions} were wanted: "
            "record more points"
        )
    first = torch.zeros(1, count, dtype=torch.float64)
    first[0] = 1.0 / count
    if origin == "last":
        first = torch.eye(count, dtype=torch.float64)[-1:]
    centred = matrix - first @ matrix
    squares, vectors = torch.linalg.eigh(centred @ centred.T)  # T x T: P is the large side
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    if not squares[dimensions - 1] > DEPENDENT**2 * squares[0]:
        raise LosslabError(
            f"the trajectory does not move in {dimensions} dimensions: ask for fewer, or record more points"
        )
    sizes = squares[:dimensions].sqrt()
    mix = (vectors[:, :dimensions] / sizes).T
    ways = mix - mix.sum(1, keepdim=True) * first
    frame = combine(points, torch.cat([first, ways]))
    shares = tuple(float(s) for s in squares[:dimensions] / squares.sum())
    names = tuple(f"component {k + 1} ({share:.0%})" for k, share in enumerate(shares))
    return Slice(frame, names, vectors[:, :dimensions] * sizes, explained=shares)


class Trajectory:
    """Keeps where a population has been: pass it as ``train(watch=..., record=...)``.

    Training tells of itself after its first update; call the trajectory with the population before it where
    the start matters.

    Example:
        >>> from losslab.engine import train
        >>> from losslab.tasks import double_well, function_task
        >>> been = Trajectory()
        >>> _ = train(function_task(double_well), "gd", steps=3, record=1, watch=been, progress=False)
        >>> been.steps, been.points(0).members
        ([1, 2, 3], 3)
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._kept: list[Points] = []

    def __call__(self, population: Population) -> None:
        """Keeps a copy of the population's points."""
        if not self.steps or population.step > self.steps[-1]:
            self.steps.append(population.step)
            self._kept.append(population.points.clone())

    def points(self, member: int) -> Points:
        """One member's way, ``[T]`` points.

        Raises:
            LosslabError: Nothing was kept.
        """
        if not self._kept:
            raise LosslabError("the trajectory is empty: pass it as watch= to train, with record=")
        return joined(*(points.select([member]) for points in self._kept))


def _check_independent(ways: Tensor) -> None:
    """Refuses directions that are not finite, zero, or combinations of the ones before."""
    if not torch.isfinite(ways).all():
        raise LosslabError("a direction is not finite: pass finite ones")
    sizes = ways.double().norm(dim=1)
    upper = torch.linalg.qr(ways.double().T / sizes.clamp(min=torch.finfo(torch.float64).tiny)).R
    left = torch.diagonal(upper).abs()
    bad = [i for i in range(len(ways)) if i >= len(left) or not left[i] > DEPENDENT or not sizes[i] > 0]
    if bad:
        why = "is zero" if not sizes[bad[0]] > 0 else "is a combination of the others"
        raise LosslabError(f"direction {bad[0]} {why}: pass linearly independent directions")


def _named(names: Sequence[str], count: int) -> tuple[str, ...]:
    if names and len(names) != count:
        raise LosslabError(f"{len(names)} names were given for {count} directions: pass one a direction")
    return tuple(names) or tuple(f"direction {k + 1}" for k in range(count))
