"""A growing orthonormal basis and the matrix projected onto it, at N points at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

_COLUMNS = 1 << 16


class Symmetric(Protocol):
    """A matrix with products: an `Operator`, or a dense symmetric tensor ``[P, P]`` or ``[N, P, P]``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(P, P)`` or ``(N, P, P)``."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        ...

    @property
    def device(self) -> torch.device:
        """Of the products."""
        ...

    def __matmul__(self, vectors: Tensor, /) -> Tensor: ...


class Krylov:
    """Rows V, orthonormal, with ``H V^T = V^T T + Q^T E``: Q are the rows not multiplied yet.

    T ``[N, m, m]`` is the projected matrix and E ``[N, q, m]`` couples it to Q, both in float64. An
    eigenvector s of T gives the Ritz vector ``V^T s`` with the residual ``||E s||``, exactly, whatever rows
    were put into V and in which order: blocks, restarts from Ritz vectors and fresh random rows are all the
    same to it. Every new row is made orthogonal to all others twice, by matrix products.

    Args:
        matrix: H.
        start: Rows ``[N, q, P]``, neither zero nor dependent.
        limit: Rows of V that memory is taken for.
        generator: For the rows that replace what has become zero.
    """

    def __init__(self, matrix: Symmetric, start: Tensor, limit: int, generator: torch.Generator) -> None:
        self.matrix, self.generator = matrix, generator
        self.members, _, self.size = start.shape
        self.limit = min(limit, self.size)
        self.basis = start.new_zeros(self.members, self.limit, self.size)
        self.projected = self._scalars(self.limit, self.limit)
        self.filled, self.products = 0, 0
        self.sound = torch.ones(self.members, dtype=torch.bool, device=start.device)
        self.pending = start[:, :0]
        self.coupling = self._scalars(0, self.limit)
        self.pending, _ = self._orthonormal(start)
        self.coupling = self._scalars(self.pending.shape[1], self.limit)

    @property
    def room(self) -> int:
        """Rows that V can still take."""
        return self.limit - self.filled

    def expand(self, which: Sequence[int]) -> None:
        """Multiplies some of the pending rows and takes them into the basis."""
        others = [i for i in range(self.pending.shape[1]) if i not in which]
        rest, taken = self.pending[:, others], self.pending[:, list(which)]
        old, new = self.filled, self.filled + len(which)
        self.basis[:, old:new] = taken
        rows = self._multiplied(taken)
        known = self.basis[:, :new]
        across, rows = _without(known, rows)
        self.projected[:, :new, old:new] = across
        self.projected[:, old:new, :new] = across.mT
        block = across[:, old:]
        self.projected[:, old:new, old:new] = 0.5 * (block + block.mT)
        self.filled, self.pending, self.coupling = new, rest, self.coupling[:, others]
        side, rows = _without(rest, rows)
        self.coupling[:, :, old:new] = side
        fresh, lengths = self._orthonormal(rows)
        self._wait_for(fresh)
        self.coupling[:, self.coupling.shape[1] - fresh.shape[1] :, old:new] = lengths

    def refresh(self) -> None:
        """Puts a random row, orthogonal to the basis, before those that wait; they are turned to fit it."""
        waiting, coupling = self.pending, self.coupling
        self.pending, self.coupling = waiting[:, :0], coupling[:, :0]
        rows, _ = self._orthonormal(torch.cat([self._apart(self.random(1)), waiting], dim=1))
        self.pending = rows
        self.coupling = (rows @ waiting.mT).double() @ coupling

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values ``[N, m]`` ascending, eigenvectors of T ``[N, m, m]``, and residuals ``[N, m]``."""
        values, vectors = torch.linalg.eigh(self.projected[:, : self.filled, : self.filled])
        couplings = self.coupling[:, :, : self.filled] @ vectors
        return values, vectors, torch.linalg.vector_norm(couplings, dim=1)

    def restart(self, values: Tensor, vectors: Tensor) -> None:
        """Shrinks the basis to Ritz vectors: values ``[N, p]`` and eigenvectors of T ``[N, m, p]``."""
        kept = values.shape[1]
        for columns in range(0, self.size, _COLUMNS):  # in place, a few columns at a time
            part = slice(columns, columns + _COLUMNS)
            self.basis[:, :kept, part] = vectors.mT.to(self.basis.dtype) @ self.basis[:, : self.filled, part]
        self.coupling[:, :, :kept] = self.coupling[:, :, : self.filled] @ vectors
        self.coupling[:, :, kept:] = 0.0
        self.projected.zero_()
        self.projected[:, :kept, :kept] = torch.diag_embed(values)
        self.filled = kept

    def lifted(self, vectors: Tensor) -> Tensor:
        """Rows ``[N, p, P]`` from coordinates ``[N, m, p]`` in the basis."""
        return vectors.mT.to(self.basis.dtype) @ self.basis[:, : vectors.shape[1]]

    def random(self, count: int) -> Tensor:
        """Normal rows, the same at every point, so that a point in a stack is the point alone."""
        rows = torch.randn(count, self.size, generator=self.generator, dtype=self.basis.dtype)
        return rows.to(self.basis.device).expand(self.members, -1, -1)

    def _multiplied(self, rows: Tensor) -> Tensor:
        block = rows.mT.to(self.matrix.dtype)
        product = self.matrix @ (block if len(self.matrix.shape) == 3 else block[0])
        self.products += rows.shape[1]
        found = product.mT.reshape(rows.shape).to(rows.dtype)
        # A point whose products are lost goes on as a zero matrix, and is told apart at the end.
        self.sound &= found.isfinite().flatten(1).all(1)
        return torch.where(self.sound[:, None, None], found, 0.0)

    def _wait_for(self, rows: Tensor) -> None:
        self.pending = torch.cat([self.pending, rows], dim=1)
        self.coupling = torch.cat([self.coupling, self._scalars(rows.shape[1], self.limit)], dim=1)

    def _orthonormal(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Orthonormal rows Q, orthogonal to all others, and R with ``rows = R^T Q`` next to the others.

        A row that depends on the others gives way to a random one, with zeros in R: what is lost by that is
        rounding. There are fewer rows than asked for where no direction is left.
        """
        count = min(rows.shape[1], self.size - self.filled - self.pending.shape[1])
        found = rows[:, :0]
        lengths = self._scalars(count, rows.shape[1])
        for j in range(rows.shape[1]):
            across, row = _without(found, rows[:, j : j + 1])
            lengths[:, : found.shape[1], j] = across[..., 0]
            if found.shape[1] == count:
                continue
            length = _norm(row)
            scale = self._scale(rows[:, j : j + 1])
            gone = length <= 64 * torch.finfo(row.dtype).eps * scale
            row = row / length.clamp_min(torch.finfo(torch.float64).tiny)[:, :, None].to(row.dtype)
            if bool((length <= 1e-2 * scale).any()):  # what is left may be mostly rounding
                row = self._apart(row, found)
                gone |= _norm(row) < 0.5
            if bool(gone.any()):
                row = torch.where(gone[:, :, None], self._apart(self.random(1), found), row)
            lengths[:, found.shape[1], j] = torch.where(gone, 0.0, length)[:, 0]
            row = row / _norm(row)[:, :, None].to(row.dtype)
            found = torch.cat([found, row], dim=1)
        return found, lengths

    def _apart(self, rows: Tensor, *more: Tensor) -> Tensor:
        """What is left of rows when all others have been taken out."""
        for _ in range(2):
            for group in (self.basis[:, : self.filled], self.pending, *more):
                _, rows = _without(group, rows)
        return rows

    def _scale(self, row: Tensor) -> Tensor:
        """What rounding is measured against: the largest entry of T, or the row itself at the start."""
        if not self.filled:
            return _norm(row)
        return self.projected[:, : self.filled, : self.filled].abs().amax(dim=(1, 2))[:, None]

    def _scalars(self, *shape: int) -> Tensor:
        return torch.zeros(self.members, *shape, dtype=torch.float64, device=self.basis.device)


def _without(basis: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates ``[N, m, q]`` of rows in a basis, and what is left of the rows; projected twice."""
    total = torch.zeros(
        basis.shape[0], basis.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device
    )
    if basis.shape[1]:
        for _ in range(2):
            part = rows @ basis.mT  # rows first: six times faster for one row, and rounds less
            rows = rows - part @ basis
            total += part.mT.double()
    return total, rows


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=2, dtype=torch.float64)
