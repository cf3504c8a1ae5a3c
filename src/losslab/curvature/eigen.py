"""Eigenpairs of a matrix known by its products: thick-restarted block Lanczos, stopped on the residual."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from losslab.curvature.lanczos import Krylov, Symmetric
from losslab.engine.randomness import generator as seeded_generator
from losslab.errors import LosslabError, unknown

ENDS = ("largest", "smallest", "magnitude", "both ends")

HEAVY = 0.3
"""Pending rows with this share of the heaviest one's part in the residuals are multiplied with it."""


class NotConverged(UserWarning):
    """Told when the budget ran out before every eigenpair asked for had converged."""


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Approximate eigenpairs with what is known of their errors; a leading axis N where there were N points.

    Attributes:
        values: ``[k]``, float64: descending for ``"largest"``, ascending for ``"smallest"`` and ``"both
            ends"`` (there ``[2k]``), by falling magnitude for ``"magnitude"``. NaN at a point whose products
            are not finite.
        vectors: ``[P, k]``, orthonormal, in single precision or better.
        residuals: ``||H v - value v||``, ``[k]``: an eigenvalue lies within this distance, for certain.
        bounds: ``[k]``, at most the residual: ``residual^2 / gap`` and rounding where that is smaller, the
            gap being the distance to the other eigenvalues that were seen.
        converged: Whether the residual is at most ``tol`` times the largest magnitude seen, ``[k]``.
        scale: That magnitude, ``||H||`` from below, a scalar or ``[N]``.
        products: Vectors multiplied.
        which: As asked.
        tol: As asked.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    bounds: Tensor
    converged: Tensor
    scale: Tensor
    products: int
    which: str
    tol: float

    @property
    def complete(self) -> bool:
        """Whether all of them converged, at every point."""
        return bool(self.converged.all())

    @property
    def sentence(self) -> str:
        """What was found and how sure it is, for people."""
        count, total = int(self.converged.sum()), self.converged.numel()
        if self.complete:
            what = "the eigenpair" if total == 1 else f"all {total} eigenpairs"
            return f"{what} converged to {self.tol:g} |lambda_1| in {self.products} products"
        worst = float((self.residuals / self.scale[..., None]).max())
        return (
            f"{count} of {total} eigenpairs converged to {self.tol:g} |lambda_1| before the budget of "
            f"{self.products} products ran out (largest residual {worst:.1e} |lambda_1|)"
        )


def eigenpairs(
    matrix: Symmetric,
    k: int = 1,
    which: str = "largest",
    *,
    tol: float = 1e-3,
    max_products: int | None = None,
    block: int = 1,
    basis: int | None = None,
    start: Tensor | None = None,
    second_look: bool = True,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """The k eigenpairs at one end of the spectrum (or at each), at N points at once.

    Thick-restarted block Lanczos (Wu and Simon, 2000): the basis is kept orthonormal by matrix products, the
    projected matrix is in float64, and it ends when every residual is at most ``tol |lambda_1|``. A single
    Krylov space holds one vector of an eigenvalue however often that occurs. So the second look starts anew
    from a random vector orthogonal to what was found, until Chebyshev's polynomial on the spectrum it
    has met would have raised a typical component of what is wanted, ``1 / sqrt(P)``, into sight (Saad, 1980),
    or half of the basis is filled. Copies and neighbours that were missed are taken in, and it looks again.

    Args:
        matrix: An `Operator`, or a dense symmetric tensor ``[P, P]`` or ``[N, P, P]``.
        k: How many, at each end asked for.
        which: ``"largest"``, ``"smallest"``, ``"magnitude"`` or ``"both ends"``.
        tol: Residual wanted, relative to the largest magnitude in the spectrum.
        max_products: Budget, 300 or 40 an eigenpair by default.
        block: Vectors multiplied together.
        basis: Vectors held at most; by default four an eigenpair and at least 30 more than are wanted.
        start: ``[P]`` or ``[P, s]`` (``[N, P, s]``): vectors rich in what is sought, such as those found
            nearby. More than k of them follow eigenvalues that cross.
        second_look: Whether to look again. Without it a pair of small residual may be taken for the end of
            the spectrum although the end has not been met; for warm starts near a pair that is known.
        generator: For the random start; a fixed one by default.

    Returns:
        The pairs; unconverged ones are flagged and told of by a `NotConverged` warning.

    Raises:
        LosslabError: k is not between 1 and P, an unknown end, or a setting out of range.

    Example:
        >>> import torch
        >>> found = eigenpairs(torch.diag(torch.tensor([3.0, 1.0, -5.0, 3.0])), 2)
        >>> found.values.round(decimals=5), found.complete
        (tensor([3., 3.], dtype=torch.float64), True)
    """
    members, size = (1, matrix.shape[0]) if len(matrix.shape) == 2 else matrix.shape[:2]
    wanted = _checked(k, which, tol, block, size)
    budget = max(300, 40 * wanted) if max_products is None else max_products
    generator = seeded_generator(0, "eigenpairs") if generator is None else generator
    limit = max(4 * wanted, wanted + 30) + block if basis is None else basis
    if limit < wanted + 2 * block + 2 and limit < size:
        raise LosslabError(
            f"the basis holds {limit} vectors and {wanted} are wanted: "
            f"give it at least {wanted + 2 * block + 2}"
        )
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    rows = _start(start, block, members, size, dtype, matrix.device, generator)
    search = _Search(Krylov(matrix, rows, limit, generator), k, which, tol, budget)
    search.run()
    while second_look and search.converged and search.again():
        search.run()
    return search.result(squeeze=len(matrix.shape) == 2)


class _Search:
    """The state of one call."""

    def __init__(self, space: Krylov, k: int, which: str, tol: float, budget: int) -> None:
        self.space, self.k, self.which, self.tol, self.budget = space, k, which, tol, budget
        self.wanted = 2 * k if which == "both ends" else k
        self.scale = torch.zeros(space.members, dtype=torch.float64, device=space.basis.device)
        self.converged = False

    def run(self) -> None:
        """Expands and restarts until all that is wanted has converged or the budget is spent."""
        space = self.space
        while True:
            self.look()
            rows = self.open_rows()[: self.budget - space.products]
            if self.converged or not rows:
                return
            if space.room < len(rows):
                self.shrink()
            space.expand(rows[: space.room])

    def open_rows(self) -> list[int]:
        """The pending rows in which the residuals of what has not converged lie."""
        space = self.space
        if space.filled < self.wanted:
            return list(range(space.pending.shape[1]))
        first = self.order[:, : self.wanted]
        open_ = self.residuals.gather(1, first) > self.tol * self.scale[:, None]
        picked = self.vectors.gather(2, first[:, None, :].expand(-1, space.filled, -1)) * open_[:, None, :]
        return self._heavy(picked, space.coupling[:, :, : space.filled])

    @staticmethod
    def _heavy(vectors: Tensor, coupling: Tensor) -> list[int]:
        """Rows with a share of the residuals of vectors ``[N, m, r]``, the heaviest first."""
        weights = (coupling @ vectors).abs().amax(dim=(0, 2))
        order = weights.argsort(descending=True).tolist()
        return [i for i in order if weights[i] >= HEAVY * weights[order[0]]]

    def look(self) -> None:
        """Ritz values, and whether they will do."""
        space = self.space
        if space.filled < self.wanted:
            return
        self.values, self.vectors, residuals = space.ritz()
        self.scale = torch.maximum(self.scale, self.values.abs().amax(1))
        # No residual is known better than the products are.
        floor = 64 * torch.finfo(space.basis.dtype).eps * self.scale
        self.residuals = torch.hypot(residuals, floor[:, None])
        self.order = _ranked(self.values, self.which)
        first = self.residuals.gather(1, self.order[:, : self.wanted])
        enough = first <= self.tol * self.scale[:, None]
        self.converged = bool((enough.all(1) | ~space.sound).all())

    def shrink(self, kept: int | None = None) -> None:
        """Keeps the Ritz vectors nearest to what is wanted."""
        space = self.space
        if kept is None:
            kept = self.wanted + (space.limit - self.wanted) // 2
            kept = max(self.wanted, min(kept, space.limit - space.pending.shape[1] - 1))
        chosen = self.order[:, : min(kept, space.filled)]
        picked = chosen[:, None, :].expand(-1, space.filled, -1)
        space.restart(self.values.gather(1, chosen), self.vectors.gather(2, picked))

    def again(self) -> bool:
        """The second look; whether it came upon something that is wanted."""
        space, before = self.space, self._wanted_values()
        if space.room < (space.limit - self.wanted) // 2:
            self.shrink(self.wanted + (space.limit - self.wanted) // 4)
        begin = space.filled
        space.refresh()
        row = 0
        while space.room and space.products < self.budget and space.pending.shape[1]:
            space.expand([row])
            self.look()
            seen, row = self._seen(begin)
            moved = (self._wanted_values() - before).abs() > self.tol * self.scale[:, None]
            if not self.converged or bool((moved & space.sound[:, None]).any()):
                return True
            if seen:
                break
        return False

    def _wanted_values(self) -> Tensor:
        return self.values.gather(1, self.order[:, : self.wanted])

    def _seen(self, begin: int) -> tuple[bool, int]:
        """Whether the rows from ``begin`` on have met what is left of the spectrum; else the row to take."""
        space = self.space
        chain = slice(begin, space.filled)
        values, vectors = torch.linalg.eigh(space.projected[:, chain, chain])
        couplings = space.coupling[:, :, chain]
        residuals = torch.linalg.vector_norm(couplings @ vectors, dim=1)
        ends = _ranked(values, self.which)[:, : 2 if self.which == "both ends" else 1]
        first, error = values.gather(1, ends), residuals.gather(1, ends)
        last = self.values.gather(1, self.order[:, self.wanted - ends.shape[1] : self.wanted])
        if self.which == "magnitude":
            short = last.abs() - first.abs()
        else:
            short = torch.where(ends == 0, first - last, last - first)
        met = (error <= short) & (_growth(short - error, values, chain) >= space.size**0.5)
        # Where all that is left is one eigenvalue, the chain has no width; its residual is rounding.
        exact = error <= 64 * torch.finfo(space.basis.dtype).eps * self.scale[:, None]
        done = met | exact | ~space.sound[:, None]
        picked = vectors.gather(2, ends[:, None, :].expand(-1, vectors.shape[1], -1)) * ~done[:, None, :]
        return bool(done.all()), (self._heavy(picked, couplings) or [0])[0]

    def result(self, squeeze: bool) -> Eigenpairs:
        """The pairs in the order asked for."""
        space = self.space
        if space.filled < self.wanted:
            raise LosslabError(
                f"the budget of {self.budget} products is less than the {self.wanted} eigenpairs wanted: "
                "raise it"
            )
        chosen = self.order[:, : self.wanted]
        if self.which == "both ends":
            chosen = chosen.sort(1).values
        values, residuals = self.values.gather(1, chosen), self.residuals.gather(1, chosen)
        vectors = space.lifted(self.vectors.gather(2, chosen[:, None, :].expand(-1, space.filled, -1))).mT
        rounding = 8 * torch.finfo(space.basis.dtype).eps * self.scale[:, None]
        bounds = torch.minimum(residuals, residuals.square() / self._gaps().gather(1, chosen) + rounding)
        lost = ~space.sound[:, None]
        values, residuals, bounds = (t.masked_fill(lost, torch.nan) for t in (values, residuals, bounds))
        converged = (residuals <= self.tol * self.scale[:, None]) & ~lost
        parts = (values, vectors, residuals, bounds, converged, self.scale)
        if squeeze:
            parts = tuple(t[0] for t in parts)  # type: ignore[assignment]
        found = Eigenpairs(*parts, products=space.products, which=self.which, tol=self.tol)
        if not bool((converged | lost).all()):
            warnings.warn(found.sentence, NotConverged, stacklevel=3)
        return found

    def _gaps(self) -> Tensor:
        """Distance from each Ritz value to where the next one's eigenvalue may lie, ``[N, m]``."""
        apart = (self.values[:, :, None] - self.values[:, None, :]).abs() - self.residuals[:, None, :]
        apart = apart + torch.diag_embed(torch.full_like(self.values, torch.inf))
        return apart.amin(2).clamp_min(torch.finfo(torch.float64).tiny)


def _growth(short: Tensor, values: Tensor, chain: slice) -> Tensor:
    """How far a chain has raised what lies s beyond its own spectrum of width w: ``T_{q-1}(1 + 2 s / w)``."""
    width = (values[:, -1:] - values[:, :1]).clamp_min(torch.finfo(torch.float64).tiny)
    ratio = (1 + 2 * short.clamp_min(0) / width).clamp_max(1e6)
    steps = chain.stop - chain.start - 1
    return torch.cosh((steps * torch.acosh(ratio)).clamp_max(300))


def _ranked(values: Tensor, which: str) -> Tensor:
    """Indices of ascending values ``[N, m]``, what is wanted most first."""
    count = values.shape[1]
    up = torch.arange(count, device=values.device)
    if which == "magnitude":
        return values.abs().argsort(dim=1, descending=True, stable=True)
    if which == "both ends":
        order = torch.stack([up, up.flip(0)], dim=1).flatten()[:count]
    else:
        order = up if which == "smallest" else up.flip(0)
    return order.expand_as(values)


def _checked(k: int, which: str, tol: float, block: int, size: int) -> int:
    if which not in ENDS:
        raise unknown("end of the spectrum", which, ENDS)
    wanted = 2 * k if which == "both ends" else k
    if k < 1 or wanted > size:
        raise LosslabError(f"{wanted} eigenpairs of a matrix of size {size}: ask for 1 to {size}")
    if not 0 < tol < 1:
        raise LosslabError(f"tol is {tol}, a residual relative to |lambda_1|: pass a number between 0 and 1")
    if not 1 <= block <= size:
        raise LosslabError(f"block is {block}: pass 1 to {size} vectors")
    return wanted


def _start(
    start: Tensor | None,
    block: int,
    members: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Tensor:
    """Rows ``[N, block, P]``: random, with the vectors given mixed in."""
    noise = torch.randn(block, size, generator=generator, dtype=dtype).to(device)
    noise = noise.expand(members, -1, -1)
    if start is None:
        return noise
    flat = start.to(device, dtype)
    lead = () if members == 1 and start.dim() < 3 else (members,)
    if start.shape[: len(lead) + 1] != (*lead, size) or start.dim() > len(lead) + 2:
        wanted = ", ".join(map(str, (*lead, size)))
        raise LosslabError(f"start has shape {tuple(start.shape)}, wanted [{wanted}] or [{wanted}, s]")
    flat = flat.reshape(members, size, -1).mT
    lengths = torch.linalg.vector_norm(flat, dim=2, keepdim=True)
    given = torch.where(lengths > 0, flat / lengths, 0.0)
    mixed = [given[:, j::block].sum(1) for j in range(min(block, given.shape[1]))]
    mixed += [torch.zeros_like(mixed[0])] * (block - len(mixed))
    rows = torch.stack(mixed, dim=1).nan_to_num()
    own = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
    share = torch.where(own > 0, 0.05 * own, 1.0)
    return rows + share * noise / torch.linalg.vector_norm(noise, dim=2, keepdim=True)


__all__ = ["Eigenpairs", "NotConverged", "eigenpairs"]
