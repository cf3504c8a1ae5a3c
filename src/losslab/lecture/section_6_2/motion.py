"""Rules driven by hand on functions whose gradient is known, with additive noise where that is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from losslab.lecture.driving import drive
from losslab.rules import Rule

if TYPE_CHECKING:
    from numpy.typing import NDArray

Map = Callable[[Tensor], Tensor]
"""A function of stacked points ``[N, d]``."""


def gradient_of(function: Map) -> Map:
    """The gradient ``[N, d] -> [N, d]`` of a function ``[N, d] -> [N]``, by autograd."""

    def gradient(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(function(leaf).sum(), leaf)[0]

    return gradient


def walk(
    rule: Rule, gradient: Map, start: Tensor, steps: int, noise: float | Tensor = 0.0, seed: int = 0
) -> Iterator[Tensor]:
    """The points x_0, ..., x_steps that a rule visits, all members at once.

    Each gradient is ``gradient(x) + noise * z`` with independent standard normal z.

    Args:
        rule: Its hyperparameters may differ between members.
        gradient: ``[N, d] -> [N, d]``.
        start: x_0, ``[N, d]``.
        steps: The number of updates.
        noise: The standard deviation in each coordinate: a number, or a tensor that broadcasts to ``[N, d]``.
        seed: Of the noise.

    Example:
        >>> from losslab.rules import GD
        >>> [x.item() for x in walk(GD(lr=0.5), lambda x: x, torch.tensor([[8.0]]), 3)]
        [8.0, 4.0, 2.0, 1.0]
    """
    generator = torch.Generator().manual_seed(seed)
    noisy = bool(torch.as_tensor(noise).ne(0).any())

    def observed(x: Tensor, step: int) -> Tensor:
        g = gradient(x)
        return g + noise * torch.randn(g.shape, dtype=g.dtype, generator=generator) if noisy else g

    yield start
    for move in drive(rule, observed, start, steps):
        yield move.after


def first_passage(points: Iterable[Tensor], reached: Callable[[Tensor], Tensor]) -> NDArray[np.float64]:
    """For each member the first step at which ``reached`` (``[N, d] -> [N]``) is true; infinite for never.

    It stops reading ``points`` once all members have arrived.

    Example:
        >>> from losslab.rules import GD
        >>> points = walk(GD(lr=0.5), lambda x: x, torch.tensor([[8.0], [0.5], [99.0]]), 3)
        >>> first_passage(points, lambda x: x[:, 0] <= 1).tolist()
        [3.0, 0.0, inf]
    """
    steps: Tensor | None = None
    for step, x in enumerate(points):
        if steps is None:
            steps = torch.full((len(x),), math.inf, dtype=torch.float64)
        steps = torch.where(reached(x) & steps.isinf(), float(step), steps)
        if bool(steps.isfinite().all()):
            break
    assert steps is not None
    return steps.numpy()


def growth_time(distance: float, factor: float) -> float:
    """Steps until a component that grows by ``factor`` a step has grown ``distance``-fold.

    Example:
        >>> round(growth_time(1e8, 1.1), 2)
        193.27
    """
    return math.log(distance) / math.log(factor)


def deviation(steps: NDArray[np.float64], rate: float, growth: float, noise: float) -> NDArray[np.float64]:
    """Standard deviation of y_t = growth y_{t-1} - rate noise z_t from y_0 = 0, z standard normal."""
    return rate * noise * np.sqrt(np.expm1(2 * steps * np.log(growth)) / (growth**2 - 1))


def escaped(
    steps: NDArray[np.float64], rate: float, curvature: float, noise: float, radius: float
) -> NDArray[np.float64]:
    """The share of SGD runs that t steps have taken to a distance of ``radius`` along an unstable direction.

    The coordinate starts at 0 on ``-curvature y^2 / 2`` and each gradient carries normal noise, so y_t is
    normal with the standard deviation of `deviation`, and the share is P(abs(y_t) >= radius). Once the radius
    is large beside one noisy step, hardly a run comes back, and this is also P(first passage <= t).

    Example:
        >>> escaped(np.array([0.0, 40.0, 400.0]), 0.1, 1.0, 0.01, 1.0).round(3).tolist()
        [0.0, 0.0, 1.0]
    """
    from scipy.special import erfc

    spread = deviation(steps, rate, 1 + rate * curvature, noise)
    with np.errstate(divide="ignore"):
        return erfc(radius / (math.sqrt(2) * spread))


def mean_escape(rate: float, curvature: float, noise: float, radius: float) -> float:
    """The mean first passage of SGD: ``sum over t >= 0 of P(T > t)``, with P from `escaped`.

    Example:
        >>> round(mean_escape(0.1, 1.0, 0.01, 1.0), 1)
        71.5
    """
    # P(T > t) falls like the growth^-t, so 40 time constants past the typical time nothing is left of it.
    horizon = growth_time(radius / (rate * noise), 1 + rate * curvature) + 40 / math.log1p(rate * curvature)
    return float(
        (1 - escaped(np.arange(math.ceil(horizon), dtype=np.float64), rate, curvature, noise, radius)).sum()
    )
