"""Rules from the Gauss-Newton matrix: Levenberg-Marquardt, and LeCun's diagonal form of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from losslab.rules.curvature import ask, usable
from losslab.rules.rule import Hyper, Rule, cast

TRUSTED, DOUBTED = 0.75, 0.25
"""Shares of the model's promised fall above which the damping shrinks and below which it grows."""

FACTOR = 4.0


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussNewton(Rule):
    """Gauss-Newton and Levenberg-Marquardt: Newton's step with the Hessian's part that is never negative.

    ``x = x - lr (G + damping I)^-1 g``, ``G = J^T H_out J``, J the Jacobian of the network's outputs and
    ``H_out`` the Hessian of the loss in them. For a convex criterion G is positive semidefinite, so the step
    goes downhill; it is Newton's where the outputs fit or are linear in the weights.

    Args:
        lr: Length of the step.
        damping: Levenberg's lambda; with ``"adaptive"`` the value it starts from.
        variant: ``"fixed"``: the equation at a given damping. ``"adaptive"``: after each step the fall of
            the loss is compared with the fall that the model ``g d + d^T G d / 2`` promised for the step d:
            above 3/4 of it the damping is divided by 4, below 1/4 multiplied by 4, and a step that does not
            lower the loss is not taken. It needs ``curvature.value`` too.

    Source: Levenberg 1944; Marquardt 1963; the ratio test as in Nocedal & Wright, Numerical Optimization
    (2006), algorithm 4.1; Efficient BackProp (LeCun et al. 1998), section 6. Not in torch or optax.

    Example:
        >>> class Line:  # one output, 3 x, squared and halved, target 6
        ...     def gauss_newton(self):
        ...         return torch.tensor([[[9.0]]])
        >>> w, g = {"x": torch.tensor([[0.0]])}, {"x": torch.tensor([[-18.0]])}
        >>> rule = GaussNewton(damping=0.0)
        >>> rule.update(g, rule.init(w), w, step=0, curvature=Line())[0]["x"]
        tensor([[2.]])
    """

    lr: Hyper = 1.0
    damping: Hyper = 1e-2
    variant: str = "fixed"

    name: ClassVar[str] = "gauss-newton"
    title: ClassVar[str] = "Gauss-Newton (Levenberg-Marquardt)"
    equation: ClassVar[str] = "G = Jᵀ H_out J\nx ← x - lr · (G + damping I)⁻¹ g"
    source: ClassVar[str] = "Levenberg 1944; Marquardt 1963; LeCun et al. 1998, §6"
    notes: ClassVar[str] = (
        "Marquardt scales the damping by the diagonal of G, Levenberg does not; this is Levenberg's form "
        "with the damping adapted as Marquardt does. Not in torch or optax."
    )
    variants: ClassVar[dict[str, str]] = {
        "fixed": "the equation at a given damping",
        "adaptive": "damping divided or multiplied by 4 by how well the model foretold the fall; no step up",
    }
    full_batch: ClassVar[bool] = True
    whole_vector: ClassVar[bool] = True
    needs_curvature: ClassVar[bool] = True

    def asks(self) -> tuple[str, ...]:
        """The Gauss-Newton matrix, and values where the damping adapts."""
        return ("gauss_newton", "value") if self.variant == "adaptive" else ("gauss_newton",)

    def slots(self) -> tuple[str, ...]:
        """The damping, ``[N, 1]``, where it adapts."""
        return ("damping",) if self.variant == "adaptive" else ()

    def initial(self, slot: str, x: Tensor) -> Tensor:
        """The damping given."""
        return torch.zeros_like(x[:, :1]) + cast(self.at(0).damping, x)

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The equation on the whole vectors ``[N, P]``."""
        matrix, good = usable(ask(h.curvature, "gauss_newton"), g)
        given = cast(h.damping, matrix)
        damping = s["damping"].to(matrix)[:, :, None] if s else given
        shifted = matrix + damping * torch.eye(g.shape[1], dtype=matrix.dtype, device=matrix.device)
        solution, failed = torch.linalg.solve_ex(shifted, g.to(matrix)[:, :, None])
        good = (good & (failed == 0))[:, None]
        step = -cast(h.lr, x) * torch.where(good, solution.squeeze(2), torch.nan).to(x)
        if not s:
            return x + step, s
        bend = (matrix @ step.to(matrix)[:, :, None]).squeeze(2).to(x)
        promised = (g * step).sum(1) + (step * bend).sum(1) / 2
        before, after = (ask(h.curvature, "value", at) for at in (x, x + step))
        ratio = ((after - before) / promised)[:, None]
        factor = torch.where(ratio > TRUSTED, 1 / FACTOR, torch.where(ratio < DOUBTED, FACTOR, 1.0))
        refused = ~(after < before)[:, None] & torch.isfinite(step).all(1, keepdim=True)
        factor = torch.where(torch.isfinite(ratio), factor, FACTOR)
        return torch.where(refused, x, x + step), {"damping": s["damping"] * factor.to(x)}


@dataclass(frozen=True, kw_only=True, eq=False)
class DiagonalLM(Rule):
    """Stochastic diagonal Levenberg-Marquardt: a rate for each weight from its own second derivative.

    ``d = (1 - gamma) d + gamma diag(G)``, ``x = x - lr g / (d + mu)``, G the Gauss-Newton matrix of the
    batch. ``d`` starts at the first batch's diagonal, so that no rate is taken from a half-filled average.

    Args:
        lr: The global rate.
        mu: Keeps the rate finite where the second derivative is small.
        gamma: Share of the newest batch in the running average.

    Source: LeCun et al., Efficient BackProp (1998), sections 7.1 and 9.1; LeCun 1987. There the diagonal is
    propagated backwards from layer to layer, leaving out what couples two units; here it is exact, from the
    matrix itself, which limits the size of the network. Not in torch or optax.

    Example:
        >>> class Bowl:
        ...     def gauss_newton(self):
        ...         return torch.tensor([[[2.0, 0.5], [0.5, 200.0]]])
        >>> w, g = {"x": torch.tensor([[1.0, 1.0]])}, {"x": torch.tensor([[2.0, 200.0]])}
        >>> rule = DiagonalLM(lr=0.5, mu=0.0)
        >>> rule.update(g, rule.init(w), w, step=0, curvature=Bowl())[0]["x"]
        tensor([[0.5000, 0.5000]])
    """

    lr: Hyper = 1e-2
    mu: Hyper = 0.1
    gamma: Hyper = 0.1

    name: ClassVar[str] = "diagonal-lm"
    title: ClassVar[str] = "Stochastic diagonal Levenberg-Marquardt"
    equation: ClassVar[str] = "d = (1 - γ) d + γ diag(G)\nx ← x - lr · g / (d + μ)"
    source: ClassVar[str] = "LeCun et al. 1998 (Efficient BackProp), §7.1, §9.1"
    notes: ClassVar[str] = (
        "The paper propagates the diagonal backwards without the terms that couple units and starts the "
        "average on a few hundred examples; here the diagonal is exact and starts at the first batch's."
    )
    whole_vector: ClassVar[bool] = True
    needs_curvature: ClassVar[bool] = True
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"gamma": (0.0, 1.0 + 1e-9)}

    def asks(self) -> tuple[str, ...]:
        """The Gauss-Newton matrix."""
        return ("gauss_newton",)

    def slots(self) -> tuple[str, ...]:
        """The running diagonal (d); below zero before the first batch."""
        return ("d",)

    def initial(self, slot: str, x: Tensor) -> Tensor:
        """A mark for "nothing seen yet"."""
        return torch.full_like(x, -1.0)

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The equation on the whole vectors ``[N, P]``."""
        new = ask(h.curvature, "gauss_newton").diagonal(dim1=1, dim2=2).to(x)
        gamma = cast(h.gamma, x)
        d = torch.where(s["d"] < 0, new, (1 - gamma) * s["d"] + gamma * new)
        return x - cast(h.lr, x) * g / (d + cast(h.mu, x)), {"d": d}
