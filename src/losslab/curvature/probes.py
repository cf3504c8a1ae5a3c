"""Random probes, and the intervals of what is estimated from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from losslab.curvature.lanczos import Symmetric
from losslab.errors import LosslabError


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean over random probes with its interval; a leading axis N where there were N points.

    Attributes:
        value: The estimate, float64.
        low: Lower end of the interval.
        high: Upper end.
        level: The chance with which such an interval holds the true value.
        probes: Random vectors used.
        products: Vectors multiplied.
    """

    value: Tensor
    low: Tensor
    high: Tensor
    level: float
    probes: int
    products: int

    def map(self, fn: Callable[[Tensor], Tensor]) -> Estimate:
        """The same with ``fn`` applied to the value and both ends."""
        return replace(self, value=fn(self.value), low=fn(self.low), high=fn(self.high))

    def __str__(self) -> str:
        if self.value.dim():
            return f"{tuple(self.value.shape)} values at {self.level:.0%}, {self.products} products"
        ends = f"[{self.low:.6g}, {self.high:.6g}]"
        return f"{self.value:.6g} {ends} at {self.level:.0%}, {self.products} products"


def estimate(samples: Tensor, level: float, products: int, known: float | Tensor = 0.0) -> Estimate:
    """The mean of one sample a probe along axis 0, by Student's t, plus what is known exactly."""
    return around(samples.mean(0) + known, samples.std(0, correction=1), level, samples.shape[0], products)


def around(mean: Tensor, spread: Tensor, level: float, probes: int, products: int) -> Estimate:
    """The interval of a mean over probes whose samples have this standard deviation."""
    half = student(level, probes - 1) * spread / math.sqrt(probes)
    return Estimate(mean, mean - half, mean + half, level, probes, products)


def student(level: float, freedom: int) -> float:
    """How many standard errors an interval reaches to either side."""
    from scipy.stats import t

    return float(t.ppf(0.5 + 0.5 * level, freedom))


def size_of(matrix: Symmetric) -> tuple[int, int]:
    """Points and coordinates."""
    shape = matrix.shape
    return (1, shape[0]) if len(shape) == 2 else (shape[0], shape[1])


def signs(matrix: Symmetric, count: int, generator: torch.Generator) -> Tensor:
    """Rademacher columns ``[P, K]``, in single precision or better."""
    _, size = size_of(matrix)
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    drawn = torch.randint(2, (count, size), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
    return drawn.to(matrix.device, dtype).mT


def multiply(matrix: Symmetric, columns: Tensor) -> Tensor:
    """Products with the same columns ``[P, K]`` at every point, or ``[N, P, K]``, in the columns' dtype."""
    if len(matrix.shape) == 3 and columns.dim() == 2:
        columns = columns.expand(matrix.shape[0], -1, -1)
    return (matrix @ columns.to(matrix.dtype)).to(columns.dtype)


def check(probes: int, level: float) -> None:
    """Refuses fewer than two probes, of which no interval could be made."""
    if probes < 2:
        raise LosslabError(f"probes is {probes}: an interval needs at least 2")
    if not 0 < level < 1:
        raise LosslabError(f"level is {level}: pass a chance between 0 and 1")
