"""Linear least squares as the quadratic that it is: its spectrum, and gradient descent on it step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from losslab.lecture.driving import drive
from losslab.rules import GD

ZERO = 1e-12
"""The share of the largest eigenvalue below which an eigenvalue is zero: a direction that no example has."""


@dataclass(frozen=True)
class Regressions:
    """N problems ``f(W) = mean_i |W^T u_i - y_i|^2 / 2`` of one size, with ``u_i = (x_i, 1)``.

    The Hessian is ``mean_i u_i u_i^T`` for each of the k outputs, and W = 0 is where every descent starts.

    Attributes:
        hessian: ``[N, d + 1, d + 1]``, float64.
        slope: ``mean_i u_i y_i^T``, ``[N, d + 1, k]``: minus the gradient at the start.
        values: The eigenvalues, ascending, ``[N, d + 1]``; those of directions without data are exactly 0.
        vectors: The eigenvectors, ``[N, d + 1, d + 1]``.
    """

    hessian: Tensor
    slope: Tensor
    values: Tensor
    vectors: Tensor

    @staticmethod
    def of(inputs: Sequence[Tensor], targets: Sequence[Tensor], bias: bool = True) -> Regressions:
        """The problems of N data sets, inputs ``[n, d]`` and targets ``[n, k]``."""
        hessians, slopes = [], []
        for x, y in zip(inputs, targets, strict=True):
            u = x.double()
            u = torch.cat([u, torch.ones(len(u), 1, dtype=u.dtype)], dim=1) if bias else u
            hessians.append(u.T @ u / len(u))
            slopes.append(u.T @ y.double() / len(u))
        hessian = torch.stack(hessians)
        values, vectors = torch.linalg.eigh(hessian)
        values = values.where(values > ZERO * values[:, -1:], 0.0)
        return Regressions(hessian, torch.stack(slopes), values, vectors)

    @property
    def largest(self) -> Tensor:
        """The largest eigenvalue of each, ``[N]``."""
        return self.values[:, -1]

    @property
    def condition(self) -> Tensor:
        """The largest eigenvalue over the smallest that is not zero, ``[N]``."""
        return self.largest / self.values.where(self.values > 0, torch.inf).amin(1)

    @property
    def optimum(self) -> Tensor:
        """The minimum closest to the start, ``[N, d + 1, k]``."""
        inverse = torch.where(self.values > 0, 1 / self.values, 0.0)
        return self.vectors @ (inverse[:, :, None] * (self.vectors.mT @ self.slope))

    def slowest(self) -> Regressions:
        """The same Hessians with one output, whose optimum lies along the direction of least curvature.

        Descent then has nothing to do but the slowest component: the worst start there is.
        """
        place = self.values.where(self.values > 0, torch.inf).argmin(1)
        rows = torch.arange(len(place))
        direction = self.vectors[rows, :, place]
        slope = self.values[rows, place][:, None] * direction
        return Regressions(self.hessian, slope[:, :, None], self.values, self.vectors)

    def predicted(self, target: float) -> Tensor:
        """Steps after which the excess loss is at most ``target`` of that at the start, ``[N]``, float64.

        At the rate 1/L, L the largest eigenvalue, the error along eigenvector i shrinks by ``1 - l_i / L`` a
        step, so the excess at step t is ``sum_i l_i c_i^2 (1 - l_i / L)^(2 t) / 2``.
        """
        share = (self.vectors.mT @ self.optimum).square().sum(2) * self.values
        share = share / share.sum(1, keepdim=True)
        shrink = torch.log1p(-(self.values / self.largest[:, None]).clamp(max=1.0))
        low, high = torch.zeros_like(self.largest), torch.full_like(self.largest, 2.0**50)
        while bool((high - low > 1).any()):
            middle = ((low + high) / 2).floor()
            done = (share * (2 * middle[:, None] * shrink).exp()).sum(1) <= target
            low, high = low.where(done, middle), middle.where(done, high)
        return high

    def descend(self, steps: int, scale: Tensor | float = 1.0) -> Tensor:
        """The excess loss along gradient descent from 0 by the package's own rule, ``[steps + 1, N]``.

        Args:
            steps: Updates.
            scale: Rates in units of 1/L, one number or ``[N]``.

        Returns:
            In units of the excess at the start.
        """
        members, size, outputs = self.slope.shape
        best = self.optimum.mT  # [N, k, d + 1]

        def gradient(x: Tensor, step: int) -> Tensor:
            return ((x.view(members, outputs, size) - best) @ self.hessian).flatten(1)

        start = torch.zeros(members, outputs * size, dtype=torch.float64)
        rule = GD(lr=torch.as_tensor(scale, dtype=torch.float64) / self.largest)
        target = best.flatten(1)
        path = [
            ((move.before - target) * move.gradient).sum(1)
            for move in drive(rule, gradient, start, steps + 1)
        ]
        return torch.stack(path) / path[0]


def steps_to(curves: Tensor, target: float) -> Tensor:
    """The first step of each run with an excess of at most ``target``, ``[T, N] -> [N]``; inf for never.

    Example:
        >>> steps_to(torch.tensor([[1.0, 1.0], [0.1, 0.5], [0.01, 0.3]]), 0.2).tolist()
        [1.0, inf]
    """
    there = curves <= target
    return torch.where(there.any(0), there.double().argmax(0).double(), torch.inf)
