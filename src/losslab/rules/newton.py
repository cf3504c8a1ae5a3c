"""Newton's method, for networks small enough to hold their Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

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

    Source: lecture notes 6.3. Torch and optax have no exact Newton rule.

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

    name: ClassVar[str] = "newton"
    title: ClassVar[str] = "Newton's method"
    equation: ClassVar[str] = "x ← x - lr · (H + damping I)⁻¹ g, H the Hessian"
    source: ClassVar[str] = "notes §6.3"
    notes: ClassVar[str] = (
        "The notes invert the Hessian; here the system is solved, which is cheaper and more accurate. Torch "
        "and optax have no exact Newton rule (their L-BFGS is a quasi-Newton method)."
    )
    full_batch: ClassVar[bool] = True
    whole_vector: ClassVar[bool] = True
    needs_curvature: ClassVar[bool] = True

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The equation on the whole vectors ``[N, P]``."""
        matrix = h.hessian + torch.diag_embed(torch.ones_like(g).to(h.hessian)) * cast(h.damping, h.hessian)
        solution, failed = torch.linalg.solve_ex(matrix, g.to(matrix)[:, :, None])
        usable = ((failed == 0) & torch.isfinite(matrix).all(dim=2).all(dim=1))[:, None]
        return x - cast(h.lr, x) * torch.where(usable, solution.squeeze(2), torch.nan).to(x), s
