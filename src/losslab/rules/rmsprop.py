"""RMSProp: AdaGrad that forgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from losslab.rules.rule import Hyper, Rule, cast


@dataclass(frozen=True, kw_only=True, eq=False)
class RMSProp(Rule):
    """RMSProp: each weight's rate is divided by the root of a running mean of its squared gradients.

    ``v = beta v + (1-beta) g^2``, ``x = x - lr g / (sqrt(v) + eps)``.

    There is no bias correction: the first step is ``lr / sqrt(1-beta)`` long, 3.16 lr at 0.9, 10 lr at 0.99.

    Args:
        lr: Learning rate.
        beta: Decay of the mean; torch calls it alpha and starts from 0.99.
        eps: Keeps the denominator from 0.
        momentum: Decay of a sum of the scaled gradients, ``b = momentum b + g/(sqrt(v) + eps)``,
            ``x = x - lr b`` (torch's). 0 keeps no such sum.
        centred: Subtracts the square of a running mean ``m`` of the gradient from ``v``: an estimate of the
            variance (Graves 2013). A difference below 0 from rounding counts as 0 (torch lets it become NaN).
        variant: ``"outside"``: eps outside of the root (torch). ``"inside"``: ``sqrt(v + eps)`` (optax).
            ``"lecture"``: the notes, no eps; a gradient that was always 0 gives 0/0 = NaN.

    Source: Tieleman & Hinton 2012, lecture 6e (beta 0.9); lecture notes 6.3.2. Torch's RMSprop equals
    ``"outside"``, optax's ``rmsprop`` (decay 0.9) ``"inside"``.

    Example:
        >>> w = {"x": torch.tensor([[1.0]])}
        >>> rule = RMSProp(lr=0.1, beta=0.99)
        >>> rule.update({"x": torch.tensor([[4.0]])}, rule.init(w), w, step=0)[0]["x"]
        tensor([[0.]])
    """

    lr: Hyper = 1e-2
    beta: Hyper = 0.9
    eps: Hyper = 1e-8
    momentum: Hyper = 0.0
    centred: bool = False
    variant: str = "outside"

    name: ClassVar[str] = "rmsprop"
    title: ClassVar[str] = "RMSProp"
    equation: ClassVar[str] = "v = βv + (1-β)g²\nx ← x - lr · g/(√v + eps)"
    source: ClassVar[str] = "Tieleman & Hinton 2012, lecture 6e; notes §6.3.2"
    notes: ClassVar[str] = (
        "The notes leave out eps. Torch's decay (alpha) is 0.99, so its first step is 10 lr; optax's is 0.9, "
        "first step 3.16 lr, with eps inside of the root."
    )
    variants: ClassVar[dict[str, str]] = {
        "outside": "√v + eps (torch)",
        "inside": "√(v + eps) (optax)",
        "lecture": "√v: the notes, no eps",
    }
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"beta": (0.0, 1.0), "momentum": (0.0, 1.0)}
    torch_names: ClassVar[dict[str, str]] = {"v": "square_avg", "m": "grad_avg", "b": "momentum_buffer"}

    @property
    def rolling(self) -> bool:
        """Whether there is momentum."""
        return callable(self.momentum) or bool((torch.as_tensor(self.momentum) != 0).any())

    def slots(self) -> tuple[str, ...]:
        """Mean of squares (v), mean of gradients (m) when centred, sum of steps (b) with momentum."""
        return ("v", *(["m"] if self.centred else []), *(["b"] if self.rolling else []))

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """RMSProp's equation on one stacked tensor."""
        beta, rest = cast(h.beta, g), cast(1 - h.beta, g)
        new = {"v": beta * s["v"] + rest * (g * g)}
        square = new["v"]
        if self.centred:
            new["m"] = beta * s["m"] + rest * g
            square = (square - new["m"] * new["m"]).clamp(min=0)
        if self.variant == "inside":
            direction = g / (square + cast(h.eps, g)).sqrt()
        else:
            direction = g / (square.sqrt() + (0.0 if self.variant == "lecture" else cast(h.eps, g)))
        if self.rolling:
            direction = new["b"] = cast(h.momentum, g) * s["b"] + direction
        return x - cast(h.lr, x) * direction, new
