"""Objectives in closed form at a stack of points: value, gradient and Hessian of N runs at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from losslab.lecture.driving import drive
from losslab.rules import Rule
from losslab.tasks import quadratic


@dataclass(frozen=True)
class Bowls:
    """N convex quadratics ``f(x) = (x - centre)^T A (x - centre) / 2``, one a member.

    Attributes:
        A: ``[N, d, d]``, float64, symmetric and positive definite.
        centre: The minima, ``[N, d]``.
        start: Where runs begin, ``[N, d]``.
        mu: Smallest eigenvalues, ``[N]``.
        L: Largest eigenvalues, ``[N]``.
        stiff: The eigenvector of L, ``[N, d]``.
    """

    A: Tensor
    centre: Tensor
    start: Tensor
    mu: Tensor
    L: Tensor
    stiff: Tensor

    @staticmethod
    def of(conditions: Iterable[float], seeds: Iterable[int], dimension: int, spread: float = 0.0) -> Bowls:
        """Random rotations of spectra spaced evenly in the logarithm from 1 to the condition number.

        The start is ``centre + A^(-1/2) z`` with z standard normal: every eigenvector has the same expected
        share in f, whatever the condition number.

        Args:
            conditions: Condition number of each member.
            seeds: Seed of each member; draws the rotation, the start and the centre.
            dimension: d.
            spread: Standard deviation of the centre's coordinates.
        """
        matrices, centres, starts = [], [], []
        for condition, seed in zip(conditions, seeds, strict=True):
            a = quadratic(dimension=dimension, condition=condition, seed=seed).A
            rng = np.random.default_rng([seed, 1])
            values, vectors = torch.linalg.eigh(a)
            z = torch.from_numpy(rng.standard_normal(dimension))
            matrices.append(a)
            centres.append(torch.from_numpy(spread * rng.standard_normal(dimension)))
            starts.append(centres[-1] + vectors @ (z / values.sqrt()))
        stack = torch.stack(matrices)
        values, vectors = torch.linalg.eigh(stack)
        return Bowls(
            stack,
            torch.stack(centres),
            torch.stack(starts),
            values[:, 0],
            values[:, -1],
            vectors[:, :, -1],
        )

    def value(self, x: Tensor) -> Tensor:
        """The function at each member's point, ``[N]``."""
        return ((x - self.centre) * self.gradient(x)).sum(1) / 2

    def gradient(self, x: Tensor, step: int = 0) -> Tensor:
        """``A (x - centre)``, ``[N, d]``."""
        return (self.A @ (x - self.centre)[:, :, None]).squeeze(2)

    def hessian(self, x: Tensor) -> Tensor:
        """``A``, ``[N, d, d]``."""
        return self.A

    def crossings(self, rule: Rule, levels: Sequence[float], limit: int) -> Tensor:
        """Updates until f / f(start) is first below each level, ``[levels, N]``; inf where it never is."""
        wanted = torch.tensor(levels, dtype=torch.float64)[:, None] * self.value(self.start)
        found = torch.full(wanted.shape, torch.inf, dtype=torch.float64)
        hessian = self.hessian if rule.needs_curvature else None
        for move in drive(rule, self.gradient, self.start, limit + 1, hessian):
            # The gradient is that of the point before: no need for another product.
            value = ((move.before - self.centre) * move.gradient).sum(1) / 2
            found = torch.where((value < wanted) & (found == torch.inf), float(move.step), found)
            if bool((found < torch.inf).all()):
                break
        return found


@dataclass(frozen=True)
class Surface:
    """Any function ``[N, d] -> [N]`` of each member's own point, with the derivatives of autograd."""

    f: Callable[[Tensor], Tensor]

    def value(self, x: Tensor) -> Tensor:
        """The function at each point, ``[N]``."""
        return self.f(x)

    def gradient(self, x: Tensor, step: int = 0) -> Tensor:
        """Gradients ``[N, d]``."""
        at = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self.f(at).sum(), at)[0]

    def hessian(self, x: Tensor) -> Tensor:
        """Hessians ``[N, d, d]``, one backward pass a row."""
        at = x.detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(self.f(at).sum(), at, create_graph=True)
            rows = [torch.autograd.grad(row.sum(), at, retain_graph=True)[0] for row in g.unbind(1)]
        return torch.stack(rows, dim=1)


@dataclass(frozen=True)
class Softmax:
    """Softmax regression with a ridge: mean cross-entropy of ``W x + b`` plus ``ridge |(W, b)|^2 / 2``.

    Attributes:
        inputs: ``[n, d]`` with a last column of ones, float64.
        labels: One-hot, ``[n, classes]``, float64.
        ridge: Weight of the penalty.

    A point is ``(W, b)`` with one row a class, flat: ``[N, classes d]``.
    """

    inputs: Tensor
    labels: Tensor
    ridge: float

    @staticmethod
    def of(x: Tensor, y: Tensor, ridge: float) -> Softmax:
        """From inputs ``[n, d]`` and class indices ``[n]``."""
        inputs = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
        return Softmax(inputs, torch.nn.functional.one_hot(y).double(), ridge)

    @property
    def parameters(self) -> int:
        """P."""
        return self.inputs.shape[1] * self.labels.shape[1]

    def value(self, x: Tensor) -> Tensor:
        """The objective, ``[N]``."""
        entropy = -(self._logits(x).log_softmax(-1) * self.labels).sum(-1).mean(-1)
        return entropy + self.ridge / 2 * x.square().sum(1)

    def gradient(self, x: Tensor, step: int = 0) -> Tensor:
        """Gradients ``[N, P]``."""
        wrong = (self._logits(x).softmax(-1) - self.labels) / len(self.inputs)
        return (wrong.mT @ self.inputs).flatten(1) + self.ridge * x

    def hessian(self, x: Tensor) -> Tensor:
        """Hessians ``[N, P, P]``: blocks ``X^T diag(p_a (1[a=b] - p_b)) X / n`` for the classes a, b."""
        p = self._logits(x).softmax(-1)
        (members, n, classes), width = p.shape, self.inputs.shape[1]
        whole = torch.zeros(members, classes, width, classes, width, dtype=x.dtype)
        for a in range(classes):
            weights = -p * p[:, :, a : a + 1]
            weights[:, :, a] += p[:, :, a]
            spread = weights.mT[:, a:, :, None] * self.inputs  # [N, classes - a, n, d]
            block = (spread.mT @ self.inputs / n).transpose(1, 2)
            whole[:, a, :, a:] = block
            whole[:, a:, :, a] = block.permute(0, 2, 1, 3)
        square = whole.view(members, classes * width, classes * width)
        return square + self.ridge * torch.eye(classes * width, dtype=x.dtype)

    def _logits(self, x: Tensor) -> Tensor:
        return self.inputs @ x.view(len(x), self.labels.shape[1], -1).mT
