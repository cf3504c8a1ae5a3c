"""Newton's method with a cubic penalty on the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from losslab.rules.curvature import ask, usable
from losslab.rules.rule import Hyper, Rule, cast


@dataclass(frozen=True, kw_only=True, eq=False)
class CubicNewton(Rule):
    """Cubic regularisation: the global minimum of a model that bounds the loss from above.

    ``x = x + lr d``, ``d = argmin g d + d^T H d / 2 + (M/6) |d|^3``.

    Where the Hessian is M-Lipschitz the model lies above the loss, so every full step lowers it, and the
    method ends only where no eigenvalue is negative: at a strict saddle the model has a minimum along the
    negative direction even though the gradient is zero. The minimiser is ``-(H + M r I / 2)^-1 g`` with r its
    own length and ``r >= -2 lambda_min / M``; r is found by bisection in the eigenbasis of H. In the hard
    case, g orthogonal to the lowest eigenvector, a multiple of that eigenvector makes up the length.

    Args:
        lr: Length of the step, 1 for the method of the paper.
        penalty: M, the Lipschitz constant of the Hessian.

    Source: Nesterov & Polyak, Cubic Regularization of Newton Method and Its Global Performance (2006),
    equations 2.4 and 5.1-5.6. Not in torch or optax.

    Example:
        >>> class Saddle:
        ...     def hessian(self):
        ...         return torch.tensor([[[1.0, 0.0], [0.0, -1.0]]])
        >>> w, g = {"x": torch.zeros(1, 2)}, {"x": torch.zeros(1, 2)}
        >>> rule = CubicNewton(penalty=2.0)
        >>> rule.update(g, rule.init(w), w, step=0, curvature=Saddle())[0]["x"].abs()
        tensor([[0., 1.]])
    """

    lr: Hyper = 1.0
    penalty: Hyper = 1.0

    name: ClassVar[str] = "cubic-newton"
    title: ClassVar[str] = "Cubic regularisation of Newton's method"
    equation: ClassVar[str] = "d = argmin g·d + dᵀHd/2 + (M/6)|d|³, M the penalty\nx ← x + lr · d"
    source: ClassVar[str] = "Nesterov & Polyak 2006, eq. 2.4"
    notes: ClassVar[str] = (
        "The notes have Newton's step only, which a saddle attracts; this one leaves it also where the "
        "gradient is zero. Not in torch or optax."
    )
    full_batch: ClassVar[bool] = True
    whole_vector: ClassVar[bool] = True
    needs_curvature: ClassVar[bool] = True
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"penalty": (1e-300, float("inf"))}

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The equation on the whole vectors ``[N, P]``."""
        matrix, good = usable(ask(h.curvature, "hessian"), g)
        values, vectors = torch.linalg.eigh(matrix)
        clean = torch.where(good[:, None], g.to(matrix), 0.0)
        along = (vectors.mT @ clean[:, :, None]).squeeze(2)
        found = cubic_step(values, along, cast(h.penalty, values) * torch.ones_like(values[:, :1]))
        step = (vectors @ found[:, :, None]).squeeze(2)
        return x + cast(h.lr, x) * torch.where(good[:, None], step, torch.nan).to(x), s


def cubic_step(values: Tensor, along: Tensor, penalty: Tensor) -> Tensor:
    """The minimiser of the cubic model in the eigenbasis, ``[N, P]``.

    Args:
        values: Eigenvalues in ascending order, ``[N, P]``.
        along: The gradient in the eigenbasis, ``[N, P]``.
        penalty: M, ``[N, 1]``.
    """
    least = (-2 * values[:, :1] / penalty).clamp(min=0.0)  # below this length the model is not convex
    # |d(r)| falls with r while r grows, and sqrt(2 |g| / M) beyond the least length it is the smaller one.
    low = least
    norm = torch.linalg.vector_norm(along, dim=1, keepdim=True)
    high = least + (2 * norm / penalty).sqrt()
    for _ in range(200):
        middle = (low + high) / 2
        d = _shifted(values, along, penalty, middle)
        longer = torch.linalg.vector_norm(d, dim=1, keepdim=True) > middle
        low, high = torch.where(longer, middle, low), torch.where(longer, high, middle)
        if bool((high - low <= 1e-16 * high).all()):
            break
    step = _shifted(values, along, penalty, high)
    missing = high.square() - step.square().sum(1, keepdim=True)
    hard = (values[:, :1] < 0) & (missing > 1e-8 * high.square())
    extra = torch.where(hard, missing.clamp(min=0.0).sqrt(), 0.0)
    return torch.cat([step[:, :1] + torch.where(step[:, :1] < 0, -extra, extra), step[:, 1:]], dim=1)


def _shifted(values: Tensor, along: Tensor, penalty: Tensor, length: Tensor) -> Tensor:
    """``-(values + penalty length / 2)^-1 along``; 0 where both are zero."""
    return torch.where(along == 0, 0.0, -along / (values + penalty * length / 2))
