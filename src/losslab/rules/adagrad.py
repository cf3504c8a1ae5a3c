"""AdaGrad: rates from all gradients so far, one a weight (diagonal) or as a whole matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from losslab.errors import LosslabError
from losslab.rules.rule import Hyper, Rule, cast


@dataclass(frozen=True, kw_only=True, eq=False)
class AdaGrad(Rule):
    """AdaGrad: each weight's rate is divided by the root of the sum of its squared gradients.

    ``s = s + g^2``, ``H = eps + sqrt(s)``, ``x = soft(x - lr g/H, lr l1/H)``, where
    ``soft(u, k) = sign(u) max(|u| - k, 0)`` changes nothing while ``l1`` is 0.

    Args:
        lr: Learning rate (the paper's eta).
        eps: Added to the root, outside of it (the paper's delta).
        l1: Weight of the penalty ``l1 |x|_1``, handled by its proximal step and not by its gradient, so that
            weights become exactly 0.
        initial_sum: Start of the sum of squares (torch's ``initial_accumulator_value``).
        variant: ``"mirror"``: composite mirror descent, the equation above.
            ``"dual"``: regularised dual averaging; with ``z`` the sum of all gradients and ``x0`` the start,
            ``x = soft(x0 - lr z/H, lr t l1/H)``. The paper starts at ``x0 = 0``; here its proximal function
            is centred at the start, so that a network need not start at 0. ``x`` itself is never read, so
            decoupled weight decay is refused.
            ``"lecture"``: the notes to the letter: ``H`` is the root of ``t - 1`` times the *current* squared
            gradient, no eps; the first step divides by 0. ``"lecture-past"``: what they meant: the sum of
            the past squares without the current one, no eps; the first step divides by 0 all the same.

    Raises:
        LosslabError: ``l1`` with a lecture variant, or decoupled weight decay with ``"dual"``.

    Source: Duchi, Hazan & Singer 2011, equations 3 (dual) and 4 (mirror); lecture notes 6.3.1.
    Torch's Adagrad equals ``"mirror"`` with ``l1 = 0``, eps 1e-10 (its ``lr_decay`` is a schedule of ``lr``);
    optax's starts the sum at 0.1 and adds its eps 1e-7 inside of the root. Neither has the proximal
    step or dual averaging.

    The paper's corollary: with ``lr = D/sqrt(2)`` the regret of ``"mirror"`` is at most
    ``sqrt(2) D sum_i |g_i|`` on every sequence of convex losses, ``D`` the largest distance from the optimum
    in any coordinate and ``|g_i|`` the norm of all gradients of coordinate ``i``.

    Example:
        >>> w = {"x": torch.tensor([[1.0, 0.05]])}
        >>> rule = AdaGrad(lr=0.1, l1=1.0)
        >>> rule.update({"x": torch.tensor([[2.0, 2.0]])}, rule.init(w), w, step=0)[0]["x"]
        tensor([[0.8500, 0.0000]])
    """

    lr: Hyper = 1e-2
    eps: Hyper = 1e-10
    l1: Hyper = 0.0
    initial_sum: Hyper = 0.0
    variant: str = "mirror"

    name: ClassVar[str] = "adagrad"
    title: ClassVar[str] = "AdaGrad"
    equation: ClassVar[str] = "s = s + g²\nH = eps + √s\nx ← soft(x - lr · g/H, lr · l1/H)"
    source: ClassVar[str] = "Duchi, Hazan & Singer 2011, eq. 3-4; notes §6.3.1"
    notes: ClassVar[str] = (
        "The notes sum the current gradient's square t-1 times where past gradients are meant, leave out the "
        "current one and eps: their first step divides by zero. Torch is the mirror form without l1; optax "
        "starts the sum at 0.1 and has eps inside of the root."
    )
    variants: ClassVar[dict[str, str]] = {
        "mirror": "composite mirror descent (torch when l1 = 0)",
        "dual": "regularised dual averaging: x ← soft(x₀ - lr Σg/H, lr t l1/H)",
        "lecture": "the notes to the letter: H = √((t-1)g²), no eps",
        "lecture-past": "the notes as meant: H² sums the past squares without the current one, no eps",
    }
    torch_names: ClassVar[dict[str, str]] = {"s": "sum"}

    def __post_init__(self) -> None:
        """Refuses the combinations that would silently do nothing."""
        super().__post_init__()
        if self.variant.startswith("lecture") and self.penalised:
            raise LosslabError(
                f"adagrad got l1 = {self.l1} with variant {self.variant!r}, which has no proximal step: "
                "take variant 'mirror' or 'dual'"
            )
        if self.variant == "dual" and self.decay == "decoupled":
            raise LosslabError(
                "adagrad's variant 'dual' never reads the current weights and got decay 'decoupled', "
                "which would have no effect: take decay 'l2'"
            )

    @property
    def penalised(self) -> bool:
        """Whether there is an l1 penalty."""
        return callable(self.l1) or bool((torch.as_tensor(self.l1) != 0).any())

    def slots(self) -> tuple[str, ...]:
        """Sum of squares (s); for dual averaging also the sum of gradients (z) and the start."""
        return {"dual": ("s", "z", "start"), "lecture": ()}.get(self.variant, ("s",))

    def initial(self, slot: str, x: Tensor) -> Tensor:
        """The sum of squares starts at ``initial_sum``, the start is the weights themselves."""
        if slot == "start":
            return x.detach().clone(memory_format=torch.contiguous_format)
        zero = super().initial(slot, x)
        return zero + cast(self.at(0).initial_sum, zero) if slot == "s" else zero

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """AdaGrad's equation on one stacked tensor."""
        lr = cast(h.lr, x)
        if self.variant == "lecture":
            return x - lr * g / ((t - 1) * g * g).sqrt(), {}
        total = s["s"] + g * g
        if self.variant == "lecture-past":
            return x - lr * g / s["s"].sqrt(), {"s": total}
        scale = total.sqrt() + cast(h.eps, x)
        if self.variant == "mirror":
            return self._soft(x - lr * g / scale, lr / scale, h), {"s": total}
        z = s["z"] + g
        x = self._soft(s["start"] - lr * z / scale, t * lr / scale, h)
        return x, {"s": total, "z": z, "start": s["start"]}

    def _soft(self, u: Tensor, rate: Tensor, h: Any) -> Tensor:
        """The minimum of ``|x - u|^2 / (2 rate) + l1 |x|`` in each coordinate."""
        if not self.penalised:
            return u
        threshold = rate * cast(h.l1, u)
        return u - torch.clamp(u, -threshold, threshold)


@dataclass(frozen=True, kw_only=True, eq=False)
class FullAdaGrad(Rule):
    """AdaGrad with the full matrix: the root of the sum of outer products of a member's whole gradient.

    ``S = S + g g^T``, ``x = x - lr (eps I + S^(1/2))^-1 g``, with ``g`` the vector of all ``P`` weights.

    Memory is ``P^2`` numbers a member and time ``P^3`` an update: at most 5000 weights. The root is taken by
    an eigendecomposition; float64 is advised. A member whose gradients are not finite becomes NaN.

    Args:
        lr: Learning rate.
        eps: Added to the root's eigenvalues (the paper's delta).
        box: As in every rule a clip of each weight, which is not the projection in this rule's metric.

    Source: Duchi, Hazan & Singer 2011 (their full-matrix proximal function). Neither torch nor optax
    has it.

    Example:
        >>> w = {"x": torch.tensor([[1.0, 1.0]])}
        >>> rule = FullAdaGrad(lr=0.5)
        >>> rule.update({"x": torch.tensor([[3.0, 4.0]])}, rule.init(w), w, step=0)[0]["x"]
        tensor([[0.7000, 0.6000]])
    """

    lr: Hyper = 1e-2
    eps: Hyper = 1e-6

    name: ClassVar[str] = "adagrad-full"
    title: ClassVar[str] = "AdaGrad, full matrix"
    equation: ClassVar[str] = "S = S + g gᵀ\nx ← x - lr · (eps I + S^½)⁻¹ g, g the whole gradient"
    source: ClassVar[str] = "Duchi, Hazan & Singer 2011"
    notes: ClassVar[str] = "The notes have the diagonal rule only; so have torch and optax."
    whole_vector: ClassVar[bool] = True

    def slots(self) -> tuple[str, ...]:
        """Sum of outer products (S), ``[N, P, P]``."""
        return ("S",)

    def initial(self, slot: str, x: Tensor) -> Tensor:
        """Zeros ``[N, P, P]`` for weights ``[N, P]``."""
        return x.new_zeros(x.shape[0], x.shape[1], x.shape[1])

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The equation on the whole vectors ``[N, P]``."""
        total = s["S"] + g[:, :, None] * g[:, None, :]
        finite = torch.isfinite(total).all(dim=2).all(dim=1)[:, None]
        values, vectors = torch.linalg.eigh(torch.where(finite[:, :, None], total, 0.0))
        scale = values.clamp(min=0).sqrt() + cast(h.eps, values)
        direction = (vectors @ ((vectors.mT @ g[:, :, None]) / scale[:, :, None])).squeeze(2)
        return x - cast(h.lr, x) * torch.where(finite, direction, torch.nan), {"S": total}
