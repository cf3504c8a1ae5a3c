"""How smooth the loss is along its gradient: how far the slope at a point can be trusted.

Santurkar, Tsipras, Ilyas and Madry, How Does Batch Normalization Help Optimization? (2018), section 3.1 and
Fig. 4. From the weights a step is taken against the gradient of one batch, and everything on the way is
measured on the same batch: the spread over several rates, or the difference of two batches' gradients, which
also go by these names, mix the noise of the data with the shape of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from losslab.engine import Objective, Points, Population
from losslab.engine.points import Stack
from losslab.errors import LosslabError
from losslab.signals.flows import examples_of

if TYPE_CHECKING:
    import pandas as pd

RAW = tuple(0.05 * k for k in range(1, 9))
"""Rates eta: steps of ``eta g``, up to 0.4 times the gradient."""

RELATIVE = tuple(0.0025 * k for k in range(1, 9))
"""Ratios r: steps along ``-g`` of length ``r ||theta||``, up to 2 % of the weights."""

MODES = ("batch", "running")
EXAMPLES = 128

_ELEMENTS = 1 << 22  # of the weights that are evaluated together; more only strain the caches


@dataclass(frozen=True)
class Walk:
    """What was met on the way down one gradient, for N members and S steps.

    Attributes:
        mode: The batch-norm policy under which everything was measured.
        kind: ``"raw"`` or ``"relative"``.
        step: The rates or the ratios ``[S]``.
        length: ``||Delta theta||``, ``[N, S]``.
        losses: ``L(theta + Delta theta)``, ``[N, S]``.
        change: ``||grad L(theta + Delta theta) - grad L(theta)||``, ``[N, S]``; NaN where not asked for.
        loss: ``L(theta)``, ``[N]``.
        gradient_norm: ``||g||``, ``[N]``.
        weight_norm: ``||theta||``, ``[N]``.
        curvature: ``g^T H g / ||g||^2``, ``[N]``; NaN where it was not asked for.
    """

    mode: str
    kind: str
    step: Tensor
    length: Tensor
    losses: Tensor
    change: Tensor
    loss: Tensor
    gradient_norm: Tensor
    weight_norm: Tensor
    curvature: Tensor

    @property
    def error(self) -> Tensor:
        """First-order error ``|L(theta + d) - L(theta) - g^T d| / |g^T d|``, ``[N, S]``.

        Along the gradient ``g^T d = -||g|| ||d||``.
        """
        slope = self.gradient_norm[:, None] * self.length
        return (self.losses - self.loss[:, None] + slope).abs() / slope

    @property
    def path(self) -> Tensor:
        """Losses from the weights on, ``[N, 1 + S]``; what overflows on the way counts as infinite."""
        path = torch.cat([self.loss[:, None], self.losses], dim=1)
        sound = self.loss.isfinite() & self.gradient_norm.isfinite()
        return torch.where(sound[:, None] & path.isnan(), torch.inf, path)

    @property
    def variation(self) -> Tensor:
        """Range of the loss from the weights to the longest step, ``[N]``."""
        return self.path.amax(1) - self.path.amin(1)

    @property
    def beta(self) -> Tensor:
        """Effective smoothness ``max ||Delta g|| / ||Delta theta||`` over the steps, ``[N]``."""
        return (self.change / self.length).amax(1)


@dataclass(frozen=True)
class Smoothness:
    """The walks of all members, as tables.

    Attributes:
        walks: One a batch-norm mode and kind of step.
    """

    walks: tuple[Walk, ...]

    @property
    def table(self) -> pd.DataFrame:
        """One row a (member, mode, kind, step): length, loss, gradient_change, first_order_error."""
        return _table(self._rows())

    @property
    def summary(self) -> pd.DataFrame:
        """One row a (member, mode, kind).

        ``loss``, ``gradient_norm``, ``weight_norm`` and ``curvature`` (``g^T H g / ||g||^2``) at the weights;
        over the steps: the loss's ``low``, ``high`` and ``variation`` (their difference), ``gradient_change``
        (largest), ``beta`` and ``first_order_error`` (mean).
        """
        return _table(self._summaries())

    def _rows(self) -> Iterator[dict[str, Any]]:
        for walk in self.walks:
            members, steps = walk.length.shape
            yield {
                "member": torch.arange(members).repeat_interleave(steps),
                "mode": walk.mode,
                "kind": walk.kind,
                "step": walk.step.repeat(members),
                "length": walk.length.flatten(),
                "loss": walk.losses.flatten(),
                "gradient_change": walk.change.flatten(),
                "first_order_error": walk.error.flatten(),
            }

    def _summaries(self) -> Iterator[dict[str, Any]]:
        for walk in self.walks:
            yield {
                "member": torch.arange(len(walk.loss)),
                "mode": walk.mode,
                "kind": walk.kind,
                "loss": walk.loss,
                "gradient_norm": walk.gradient_norm,
                "weight_norm": walk.weight_norm,
                "curvature": walk.curvature,
                "low": walk.path.amin(1),
                "high": walk.path.amax(1),
                "variation": walk.variation,
                "gradient_change": walk.change.amax(1),
                "beta": walk.beta,
                "first_order_error": walk.error.mean(1),
            }


def smoothness(
    objective: Objective | Population,
    points: Points | None = None,
    *,
    raw: Sequence[float] = RAW,
    relative: Sequence[float] = RELATIVE,
    modes: Sequence[str] | None = None,
    gradients: bool = True,
    curvature: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Smoothness:
    """The loss and its gradient along the gradient, for all members and step lengths as one stack of points.

    With ``g = grad L(theta)`` of the objective's own examples, the points ``theta - eta g`` and
    ``theta - r ||theta|| g / ||g||`` are evaluated on these same examples: the variation of the loss, the
    change of the gradient ("gradient predictiveness"), the effective smoothness
    ``beta = max ||Delta g|| / ||Delta theta||``, the error of the first-order model of the loss, and the
    curvature ``g^T H g / ||g||^2`` at theta itself. Raw steps compare networks only as they are
    parametrised: with batch norm, scaling the weights by a changes nothing but divides the gradient by a.
    Relative steps do not see the scale.

    Batch norm is measured in each of ``modes``: with the statistics of the batch, as in training, or with
    the running ones, as in use. The network and its running statistics stay as they are.

    Args:
        objective: The loss on the examples of one batch; or a population, whose task is then measured on 128
            examples of its training data, drawn once.
        points: Where; the population's own points if None.
        raw: Rates eta.
        relative: Ratios r.
        modes: ``"batch"``, ``"running"``, ``"re-estimate"``; by default the first two for a network with
            batch norm and one of them for others.
        gradients: Whether to measure gradients along the way; without them a walk costs a third.
        curvature: Whether to measure the curvature at the weights.
        dtype: Of the measurement. In single precision a first-order error is rounding where the gradient is
            small.

    Returns:
        Tables; what is not finite (an overflow on the way, a diverged member, a gradient of zero) is kept.

    Raises:
        LosslabError: No points, no steps, or a step that is not positive.

    Example:
        >>> from losslab.tasks import quadratic, function_task
        >>> task = function_task(quadratic([1.0, 3.0], rotate=False))
        >>> found = smoothness(Objective(task), Points.from_modules([task.model()]), raw=[0.1])
        >>> found.summary[["kind", "curvature", "beta"]].round(6).values.tolist()
        [['raw', 2.8, 2.863564], ['relative', 2.8, 2.863564]]
    """
    if isinstance(objective, Population):
        points = objective.points if points is None else points
        objective = _objective(objective)
    if points is None:
        raise LosslabError("smoothness was given an objective and no points: pass Points, or a population")
    grids = {"raw": raw, "relative": relative}
    if not any(len(grid) for grid in grids.values()):
        raise LosslabError("smoothness was given no steps: pass rates as raw=, or ratios as relative=")
    for name, grid in grids.items():
        if not all(0 < step < float("inf") for step in grid):
            raise LosslabError(f"the {name} steps are {tuple(grid)}: pass positive numbers")
    if modes is None:
        modes = MODES if objective.normalised else MODES[:1]
    points = points.to(dtype=dtype)
    walks = []
    for mode in modes:
        here = objective if mode == objective.batch_norm else objective.under(mode)
        loss, gradient = here.gradient(points)
        start = _Start(here, points, loss, gradient, _curvature(here, points, gradient, curvature))
        walks += [start.walk(kind, grid, gradients) for kind, grid in grids.items() if len(grid)]
    return Smoothness(tuple(walks))


@dataclass
class SmoothnessRecorder:
    """Measures the smoothness while a population trains, on one fixed batch.

    Args:
        objective: As for `smoothness`; by default that of the first population it is shown.
        settings: Options of `smoothness`.

    Example:
        >>> from losslab.engine import train
        >>> from losslab.tasks import digits_task
        >>> seen = SmoothnessRecorder(settings={"raw": [0.1], "relative": [], "curvature": False})
        >>> _ = train(digits_task(), "sgd", seeds=2, steps=20, record=10, watch=seen, evaluate=None)
        >>> seen.summary.groupby("updates").size().to_dict()
        {1: 2, 11: 2}
    """

    objective: Objective | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seen: dict[int, Smoothness] = field(default_factory=dict)

    def __call__(self, population: Population) -> None:
        """Measures the population at its step."""
        if self.objective is None:
            self.objective = _objective(population)
        self.seen[population.step] = smoothness(self.objective, population.points, **self.settings)

    @property
    def table(self) -> pd.DataFrame:
        """`Smoothness.table` of all measurements, with the updates done as the column ``updates``."""
        import pandas as pd

        return pd.concat([s.table.assign(updates=t) for t, s in self.seen.items()], ignore_index=True)

    @property
    def summary(self) -> pd.DataFrame:
        """`Smoothness.summary` of all measurements, with the updates done as the column ``updates``."""
        import pandas as pd

        return pd.concat([s.summary.assign(updates=t) for t, s in self.seen.items()], ignore_index=True)


@dataclass
class _Start:
    """N points with their gradients, from which walks begin."""

    objective: Objective
    points: Points
    loss: Tensor
    gradient: Points
    curvature: Tensor

    def walk(self, kind: str, grid: Sequence[float], gradients: bool) -> Walk:
        step = torch.tensor(list(grid), dtype=self.loss.dtype, device=self.loss.device)
        slope, size = _norm(self.gradient.weights), _norm(self.points.weights)
        rates = step.expand(self.points.members, -1)
        if kind == "relative":
            rates = rates * (size / slope)[:, None]
        parts = max(1, _ELEMENTS // max(1, self.points.members * self.points.parameters))
        found = [self._at(part, gradients) for part in rates.split(parts, dim=1)]
        losses, change = (torch.cat(tensors, dim=1) for tensors in zip(*found, strict=True))
        return Walk(
            self.objective.batch_norm,
            kind,
            step.cpu(),
            (rates * slope[:, None]).cpu(),
            losses.cpu(),
            change.cpu(),
            self.loss.cpu(),
            slope.cpu(),
            size.cpu(),
            self.curvature.cpu(),
        )

    def _at(self, rates: Tensor, gradients: bool) -> tuple[Tensor, Tensor]:
        """Losses at ``theta - rate g`` and changes of the gradient, ``[N, S]`` each."""
        members, steps = rates.shape
        theta, g = self.points.weights, self.gradient.weights
        moved = {
            n: (w[:, None] - rates.reshape(members, steps, *[1] * (w.dim() - 1)) * g[n][:, None]).flatten(
                0, 1
            )
            for n, w in theta.items()
        }
        there = Points(moved, {n: b.repeat_interleave(steps, 0) for n, b in self.points.buffers.items()})
        if not gradients:
            losses = self.objective.value(there).view(members, steps)
            return losses, torch.full_like(losses, torch.nan)
        losses, after = self.objective.gradient(there)
        difference = {n: a.unflatten(0, (members, steps)) - g[n][:, None] for n, a in after.weights.items()}
        change = _norm({n: d.flatten(0, 1) for n, d in difference.items()})
        return losses.view(members, steps), change.view(members, steps)


def _curvature(objective: Objective, points: Points, gradient: Points, wanted: bool) -> Tensor:
    g = gradient.matrix()
    if not wanted:
        return torch.full_like(g[:, 0], torch.nan)
    return (objective.hvp(points, g) * g).sum(1) / g.square().sum(1)


def _norm(weights: Stack) -> Tensor:
    """Euclidean norm of each member's whole vector, ``[N]``."""
    squares = [w.reshape(w.shape[0], -1).square().sum(1) for w in weights.values()]
    return torch.stack(squares).sum(0).sqrt()


def _objective(population: Population) -> Objective:
    batch = examples_of(population.task, EXAMPLES)
    return Objective.of(population, data="train" if batch is None else batch)


def _table(parts: Iterator[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    frames = [
        pd.DataFrame({n: v.numpy() if isinstance(v, Tensor) else v for n, v in part.items()})
        for part in parts
    ]
    return pd.concat(frames, ignore_index=True)
