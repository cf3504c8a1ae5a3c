"""Newton's method, plain and saddle-free, for networks small enough to hold their Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from losslab.rules.curvature import ask, backtracked, usable
from losslab.rules.rule import Hyper, Rule, cast


@dataclass(frozen=True, kw_only=True, eq=False)
class Newton(Rule):
    """Newton's method: the step to the critical point of the loss's quadratic model.

    ``x = x - lr (H + damping I)^-1 g``, with ``H`` the Hessian ``[N, P, P]`` of each member's loss.

    The system is solved, never inverted. Memory is ``8 P^2`` bytes a member in float64 and time ``P^3`` an
    update: at most 5000 weights; float64 is advised. On a quadratic ``lr = 1`` arrives in one step whatever
    the conditioning, a smaller rate leaves an error of ``(1-lr)^t``. A saddle or a maximum attracts Newton's
    method as a minimum does. A member whose matrix is singular or not finite becomes NaN and disturbs no
    other.

    Args:
        lr: Length of the step, 1 for the pure method.
        damping: Added to the diagonal of the Hessian (Levenberg-Marquardt).
        box: As in every rule a clip of each weight, which is not the projection in this rule's metric.
        variant: ``"full"``: the equation. ``"searched"``: the step is halved until the batch's loss falls
            by 1e-4 of what the gradient promises (Armijo's condition); where Newton's step points uphill, the
            gradient is followed instead. It needs ``curvature.value`` beside the Hessian.

    Source: lecture notes 6.3; Nocedal & Wright, Numerical Optimization (2006), algorithms 3.1 and 3.2 for the
    search. Torch and optax have no exact Newton rule.

    Example:
        >>> class Bowl:
        ...     def hessian(self):
        ...         return torch.tensor([[[2.0, 0.0], [0.0, 200.0]]])
        >>> w = {"x": torch.tensor([[1.0, 1.0]])}
        >>> g = {"x": torch.tensor([[2.0, 200.0]])}
        >>> rule = Newton()
        >>> rule.update(g, rule.init(w), w, step=0, curvature=Bowl())[0]["x"]
        tensor([[0., 0.]])
    """

    lr: Hyper = 1.0
    damping: Hyper = 0.0
    variant: str = "full"

    name: ClassVar[str] = "newton"
    title: ClassVar[str] = "Newton's method"
    equation: ClassVar[str] = "x ← x - lr · (H + damping I)⁻¹ g, H the Hessian"
    source: ClassVar[str] = "notes §6.3; Nocedal & Wright 2006, alg. 3.1-3.2"
    notes: ClassVar[str] = (
        "The notes invert the Hessian; here the system is solved, which is cheaper and more accurate. Torch "
        "and optax have no exact Newton rule (their L-BFGS is a quasi-Newton method)."
    )
    variants: ClassVar[dict[str, str]] = {
        "full": "the step of the equation",
        "searched": "the step halved until the loss falls enough (Armijo); downhill by -g where H is not",
    }
    full_batch: ClassVar[bool] = True
    whole_vector: ClassVar[bool] = True
    needs_curvature: ClassVar[bool] = True

    def asks(self) -> tuple[str, ...]:
        """The Hessian, and values for the search."""
        return ("hessian", "value") if self.variant == "searched" else ("hessian",)

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The equation on the whole vectors ``[N, P]``."""
        step = -cast(h.lr, x) * _solved(ask(h.curvature, "hessian"), g, h.damping).to(x)
        if self.variant == "searched":
            slope = (g * step).sum(1)
            uphill = ~(slope < 0) & torch.isfinite(slope)
            step = torch.where(uphill[:, None], -cast(h.lr, x) * g, step)
            step = backtracked(partial(ask, h.curvature, "value"), x, step, (g * step).sum(1))
        return x + step, s


def _solved(matrix: Tensor, g: Tensor, damping: Any) -> Tensor:
    """``(matrix + damping I)^-1 g``, NaN for a member where there is none."""
    matrix = matrix + torch.diag_embed(torch.ones_like(g).to(matrix)) * cast(damping, matrix)
    solution, failed = torch.linalg.solve_ex(matrix, g.to(matrix)[:, :, None])
    good = ((failed == 0) & torch.isfinite(matrix).all(dim=2).all(dim=1))[:, None]
    return torch.where(good, solution.squeeze(2), torch.nan)


@dataclass(frozen=True, kw_only=True, eq=False)
class SaddleFree(Rule):
    """Saddle-free Newton: Newton's step with the eigenvalues of the Hessian made positive.

    ``x = x - lr (|H| + damping I)^-1 g``, ``|H| = V |L| V^T`` for ``H = V L V^T``.

    Along negative curvature Newton's step climbs to the saddle; this one leaves it, at the same pace on
    every scale. The step minimises the first-order model where the second-order one may be trusted, within
    the distance ``d^T |H| d``. The eigenvalues are found exactly (the paper, for large networks, works in a
    Krylov subspace), so the limits are Newton's.

    Args:
        lr: Length of the step.
        damping: Added to every |eigenvalue|; without it a flat direction has an unbounded step.

    Source: Dauphin et al., Identifying and Attacking the Saddle Point Problem (2014), algorithm 1. Not in
    torch or optax.

    Example:
        >>> class Saddle:
        ...     def hessian(self):
        ...         return torch.tensor([[[2.0, 0.0], [0.0, -1.0]]])
        >>> w, g = {"x": torch.tensor([[1.0, 0.5]])}, {"x": torch.tensor([[2.0, -0.5]])}
        >>> rule = SaddleFree(damping=0.0)
        >>> rule.update(g, rule.init(w), w, step=0, curvature=Saddle())[0]["x"]
        tensor([[0., 1.]])
    """

    lr: Hyper = 1.0
    damping: Hyper = 1e-3

    name: ClassVar[str] = "saddle-free"
    title: ClassVar[str] = "Saddle-free Newton"
    equation: ClassVar[str] = "H = V Λ Vᵀ\nx ← x - lr · V (|Λ| + damping)⁻¹ Vᵀ g"
    source: ClassVar[str] = "Dauphin et al. 2014, alg. 1"
    notes: ClassVar[str] = (
        "The paper works in a Krylov subspace and chooses the damping by trial; here the whole spectrum is "
        "used and the damping is given. Not in torch or optax."
    )
    full_batch: ClassVar[bool] = True
    whole_vector: ClassVar[bool] = True
    needs_curvature: ClassVar[bool] = True

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The equation on the whole vectors ``[N, P]``."""
        matrix, good = usable(ask(h.curvature, "hessian"), g)
        values, vectors = torch.linalg.eigh(matrix)
        along = (vectors.mT @ g.to(matrix)[:, :, None]).squeeze(2)
        along = along / (values.abs() + cast(h.damping, values))
        step = (vectors @ along[:, :, None]).squeeze(2)
        return x - cast(h.lr, x) * torch.where(good[:, None], step, torch.nan).to(x), s
