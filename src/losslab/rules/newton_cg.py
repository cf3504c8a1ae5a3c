"""Newton's method without a matrix: conjugate gradients on Hessian-vector products."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from losslab.rules.curvature import Landscape, ask, backtracked
from losslab.rules.rule import Hyper, Rule, cast


@dataclass(frozen=True, kw_only=True, eq=False)
class NewtonCG(Rule):
    """Truncated Newton: Newton's system solved roughly by conjugate gradients, then a line search.

    ``H d = -g`` by conjugate gradients from 0 until ``|H d + g| <= min(1/2, sqrt(|g|)) |g|``, or until a
    direction p of negative curvature, ``p^T (H + damping I) p <= 0``, where the last d is kept (``-g`` if it
    is the first). Then ``x = x + lr 2^-k d`` with the least k for which the loss falls by 1e-4 of what the
    gradient promises.

    It asks for products of the Hessian with vectors, never for the matrix, so any size of network will do.

    Args:
        lr: Length of the first step tried.
        damping: Added to the diagonal of the Hessian.
        iterations: Products an update at most.

    Source: Nocedal & Wright, Numerical Optimization (2006), algorithm 7.1 (line-search Newton-CG). Neither
    torch nor optax has it; scipy's "Newton-CG" is this method for one vector.

    Example:
        >>> class Bowl:
        ...     def products(self, v):
        ...         return v * torch.tensor([2.0, 200.0])
        ...     def value(self, x):
        ...         return (x * x * torch.tensor([1.0, 100.0])).sum(1)
        >>> w = {"x": torch.tensor([[1.0, 0.0]])}
        >>> g = {"x": torch.tensor([[2.0, 0.0]])}
        >>> rule = NewtonCG()
        >>> rule.update(g, rule.init(w), w, step=0, curvature=Bowl())[0]["x"]
        tensor([[0., 0.]])
    """

    lr: Hyper = 1.0
    damping: Hyper = 0.0
    iterations: int = 50

    name: ClassVar[str] = "newton-cg"
    title: ClassVar[str] = "Truncated Newton (Newton-CG)"
    equation: ClassVar[str] = "(H + damping I) d ≈ -g by conjugate gradients\nx ← x + lr · 2⁻ᵏ d (Armijo)"
    source: ClassVar[str] = "Nocedal & Wright 2006, alg. 7.1; Martens 2010"
    notes: ClassVar[str] = (
        "The notes' objection to Newton's method, the inverse, does not concern this form: it needs products "
        "only. Not in torch or optax; scipy's Newton-CG is the same for one vector."
    )
    full_batch: ClassVar[bool] = True
    whole_vector: ClassVar[bool] = True
    needs_curvature: ClassVar[bool] = True
    largest: ClassVar[int] = 2**62  # no matrix is kept

    def asks(self) -> tuple[str, ...]:
        """Products and values."""
        return ("products", "value")

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The equation on the whole vectors ``[N, P]``."""
        step = cast(h.lr, x) * self.direction(h.curvature, g, h.damping)
        return x + backtracked(partial(ask, h.curvature, "value"), x, step, (g * step).sum(1)), s

    def direction(self, curvature: Landscape, g: Tensor, damping: Any) -> Tensor:
        """The truncated solution of Newton's system for each member, ``[N, P]``."""
        norm = torch.linalg.vector_norm(g, dim=1)
        enough = torch.minimum(0.5 * torch.ones_like(norm), norm.sqrt()) * norm
        d, residual = torch.zeros_like(g), g
        p, squared = -g, g.square().sum(1)
        going = torch.isfinite(norm) & (norm > 0)
        for k in range(self.iterations):
            if not bool(going.any()):
                break
            # Members that are done ask for the product of a zero vector.
            asked = torch.where(going[:, None], p, 0.0)
            hp = ask(curvature, "products", asked) + cast(damping, g) * asked
            bend = (asked * hp).sum(1)
            negative = going & ~(bend > 0)
            if k == 0:
                d = torch.where(negative[:, None], -g, d)
            going = going & ~negative
            length = torch.where(going, squared / bend, 0.0)[:, None]
            d = torch.where(going[:, None], d + length * p, d)
            residual = torch.where(going[:, None], residual + length * hp, residual)
            newer = residual.square().sum(1)
            going = going & (newer.sqrt() > enough)
            p = torch.where(going[:, None], -residual + (newer / squared)[:, None] * p, p)
            squared = torch.where(going, newer, squared)
        return torch.where(torch.isfinite(norm)[:, None], d, torch.nan)
