"""The density of a matrix's eigenvalues by stochastic Lanczos quadrature, with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from losslab.curvature.lanczos import Symmetric
from losslab.curvature.probes import Estimate, check, estimate, multiply, signs, size_of
from losslab.engine.memory import free_memory
from losslab.engine.randomness import generator as seeded_generator
from losslab.errors import LosslabError


@dataclass(frozen=True, eq=False)
class Density:
    """Quadrature rules of the eigenvalues' distribution, one a probe (a leading axis N at N points).

    Each probe's nodes and weights integrate any polynomial of degree ``2 steps - 1`` against the probe's own
    distribution of eigenvalues exactly; the mean over probes is that of the matrix.

    Attributes:
        nodes: ``[probes, steps]``, float64.
        weights: ``[probes, steps]``, each row sums to one.
        size: P.
        products: Vectors multiplied.
        level: Of the intervals.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    products: int
    level: float

    def __call__(self, grid: Tensor | None = None, width: float | None = None) -> tuple[Tensor, Estimate]:
        """The density convolved with a Gaussian: on a grid of 400 points around all nodes by default.

        Args:
            grid: Where, ``[G]``.
            width: The Gaussian's standard deviation, by default 1 % of the distance between the ends.

        Returns:
            The grid and the density there ``[G]`` (``[N, G]``), whose integral is one; intervals, over the
            probes, stop at zero.
        """
        low, high = float(self.nodes.min()), float(self.nodes.max())
        reach = (high - low) or abs(high) or 1.0
        sigma = 0.01 * reach if width is None else width
        if not sigma > 0:
            raise LosslabError(
                f"width is {sigma}, the standard deviation of a Gaussian: pass a positive number"
            )
        if grid is None:
            grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, 400, dtype=torch.float64)
        z = (grid.to(self.nodes)[:, None] - self.nodes[..., None, :]) / sigma
        bells = torch.exp(-0.5 * z.square()) / (sigma * math.sqrt(2 * math.pi))
        found = self._estimate((bells * self.weights[..., None, :]).sum(-1))
        return grid, replace(found, low=found.low.clamp_min(0))

    def share(self, low: float = -math.inf, high: float = math.inf) -> Estimate:
        """The share of eigenvalues in ``[low, high]``, resolved as finely as the nodes lie there."""
        inside = (self.nodes >= low) & (self.nodes <= high)
        found = self._estimate((self.weights * inside).sum(-1, keepdim=True)).map(lambda t: t[..., 0])
        return replace(found, low=found.low.clamp(0, 1), high=found.high.clamp(0, 1))

    def moment(self, power: int = 1) -> Estimate:
        """``tr H^power / P``: the mean of the eigenvalues for 1, of their squares for 2."""
        return self._estimate((self.weights * self.nodes**power).sum(-1, keepdim=True)).map(
            lambda t: t[..., 0]
        )

    def _estimate(self, samples: Tensor) -> Estimate:
        """Mean and interval over the probes of samples ``[..., probes, G]``."""
        return estimate(samples.movedim(-2, 0), self.level, self.products)


def density(
    matrix: Symmetric,
    probes: int = 4,
    steps: int = 40,
    *,
    level: float = 0.95,
    generator: torch.Generator | None = None,
) -> Density:
    """The eigenvalue density from random probes and Lanczos steps (Ubaru, Chen and Saad, 2017).

    Each probe's Krylov basis is kept orthogonal, so that no eigenvalue is counted twice.

    Args:
        matrix: An `Operator`, or a dense symmetric tensor.
        probes: Random vectors; more narrow the intervals.
        steps: Products a probe; more resolve finer structure.
        level: Of the intervals.
        generator: For the probes; a fixed one by default.

    Raises:
        LosslabError: Fewer than two probes, fewer than one step, or products that are not finite.

    Example:
        >>> import torch
        >>> found = density(torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0])))
        >>> round(float(found.share(0.5, 2.0).value), 4)
        0.25
    """
    check(probes, level)
    if steps < 1:
        raise LosslabError(f"steps is {steps}: pass at least one")
    draws = seeded_generator(0, "density") if generator is None else generator
    members, size = size_of(matrix)
    steps = min(steps, size)
    columns = signs(matrix, probes, draws)
    held = members * steps * size * columns.element_size()
    together = max(1, min(probes, int(0.25 * free_memory(matrix.device) / held)))
    rules = [_chains(matrix, part, steps) for part in columns.split(together, dim=1)]
    nodes, weights = (torch.cat(parts, dim=1) for parts in zip(*rules, strict=True))
    if len(matrix.shape) == 2:
        nodes, weights = nodes[0], weights[0]
    return Density(nodes, weights, size, probes * steps, level)


def _chains(matrix: Symmetric, columns: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights ``[N, K, steps]`` of the Krylov spaces of columns ``[P, K]``."""
    members, size = size_of(matrix)
    count = columns.shape[1]
    row = (columns.mT / math.sqrt(size)).expand(members, count, size).contiguous()
    basis = row.new_empty(members, count, steps, size)
    tri = torch.zeros(members, count, steps, steps, dtype=torch.float64, device=row.device)
    for step in range(steps):
        basis[:, :, step] = row
        block = row.mT if len(matrix.shape) == 3 else row[0].mT
        row = multiply(matrix, block).mT.reshape(members, count, size)
        known = basis[:, :, : step + 1]
        across = row[..., None, :] @ known.mT  # rows first: six times faster, and rounds less
        tri[:, :, step, step] = across[..., 0, -1].double()
        if step + 1 == steps:
            break
        row = row - (across @ known)[..., 0, :]
        length = torch.linalg.vector_norm(row, dim=2, dtype=torch.float64)
        scale = tri.abs().amax((2, 3))
        # Past an invariant space the chain goes on with zeros, which get no weight.
        alive = length > 64 * torch.finfo(row.dtype).eps * scale
        length = torch.where(alive, length, 0.0)
        tri[:, :, step, step + 1] = tri[:, :, step + 1, step] = length
        row = torch.where(alive[..., None], row / length.to(row.dtype)[..., None], 0.0)
    if not tri.isfinite().all():
        raise LosslabError(
            "a product is not finite: take the points out at which the weights or the loss are not"
        )
    nodes, vectors = torch.linalg.eigh(tri)
    return nodes, vectors[..., 0, :].square()


__all__ = ["Density", "density"]
