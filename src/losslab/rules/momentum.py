"""Momentum: Polyak's heavy ball and Nesterov's acceleration, each in its two parametrisations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from losslab.rules.rule import Hyper, Rule, cast


@dataclass(frozen=True, kw_only=True, eq=False)
class Momentum(Rule):
    """Momentum: gradient descent on a decaying sum of the gradients so far.

    ``b = beta b + (1 - dampening) g``, ``x = x - lr b``.

    With constant ``lr`` and no dampening this is Polyak's heavy ball, ``x + beta (x - x_before) - lr g``.
    On a quadratic with eigenvalues from ``mu`` to ``L`` it converges for ``lr < 2 (1 + beta)/L``, fastest at
    ``lr = 4/(sqrt L + sqrt mu)^2``, ``beta = ((sqrt k - 1)/(sqrt k + 1))^2`` with ``k = L/mu``.

    Args:
        lr: Learning rate.
        beta: Decay of the sum (torch's ``momentum``); a constant gradient grows ``1/(1-beta)`` fold.
        dampening: Takes ``1 - dampening`` of each new gradient but, as in torch, all of the first.
        variant: ``"polyak"``: the rate stands outside of the sum, and a new rate acts on old gradients too
            (the notes, torch, optax). ``"sutskever"``: the rate stands inside, ``v = beta v + lr g``,
            ``x = x - v`` (Sutskever et al. 2013); equal while ``lr`` is constant.

    Source: Polyak 1964; lecture notes 6.3.3, whose ``v`` is ``-b``. Torch's SGD with momentum and optax's
    ``sgd(momentum=)`` (which has no dampening) equal ``"polyak"``.

    Example:
        >>> import torch
        >>> w = {"x": torch.tensor([[1.0]])}
        >>> g = {"x": torch.tensor([[1.0]])}
        >>> rule = Momentum(lr=0.1, beta=0.5)
        >>> w, state = rule.update(g, rule.init(w), w, step=0)
        >>> rule.update(g, state, w, step=1)[0]["x"]
        tensor([[0.7500]])
    """

    lr: Hyper = 1e-2
    beta: Hyper = 0.9
    dampening: Hyper = 0.0
    variant: str = "polyak"

    name: ClassVar[str] = "momentum"
    title: ClassVar[str] = "Momentum (heavy ball)"
    equation: ClassVar[str] = "b = βb + (1-dampening)g\nx ← x - lr · b"
    source: ClassVar[str] = "Polyak 1964; Sutskever et al. 2013; notes §6.3.3"
    notes: ClassVar[str] = (
        "The notes write v = -g + βv, x + lr v: the same with v = -b. Torch's SGD is the polyak form; its "
        "dampening spares the first gradient, as here. Optax's trace is the polyak form without dampening."
    )
    variants: ClassVar[dict[str, str]] = {
        "polyak": "rate outside of the sum: x ← x - lr b (the notes, torch, optax)",
        "sutskever": "rate inside of the sum: v = βv + lr g, x ← x - v; differs when lr changes",
    }
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"beta": (0.0, 1.0)}
    torch_names: ClassVar[dict[str, str]] = {"b": "momentum_buffer"}

    def slots(self) -> tuple[str, ...]:
        """Decayed sum of gradients (b), or of gradients times their rates (v)."""
        return ("v",) if self.variant == "sutskever" else ("b",)

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Momentum's equation on one stacked tensor."""
        if t > 1:
            g = cast(1 - h.dampening, g) * g
        if self.variant == "sutskever":
            v = cast(h.beta, x) * s["v"] + cast(h.lr, x) * g
            return x - v, {"v": v}
        b = cast(h.beta, x) * s["b"] + g
        return x - cast(h.lr, x) * b, {"b": b}


@dataclass(frozen=True, kw_only=True, eq=False)
class Nesterov(Rule):
    """Nesterov's acceleration: momentum whose gradient is taken where the momentum is about to lead.

    ``b = beta b + g``, ``x = x - lr (g + beta b)``.

    Nesterov's method keeps a point ``z`` and takes the gradient at ``z - beta v``. A rule is given the
    gradient at the weights, so the weights here *are* that look-ahead point, ``x = z - beta v``; ``z`` is
    ``x + beta v`` (``v = lr b`` while the rate is constant).

    Args:
        lr: Learning rate.
        beta: Decay of the sum (torch's ``momentum``).
        variant: ``"torch"``: the rate stands outside of the sum. ``"lookahead"``: the rate stands inside,
            ``v = beta v + lr g``, ``x = x - (lr g + beta v)``, which is Nesterov's method exactly, also when
            ``lr`` changes. The two are equal while ``lr`` is constant.

    Source: Nesterov 1983; Sutskever et al. 2013 (as momentum). Torch's ``SGD(nesterov=True)`` and optax's
    ``sgd(nesterov=True)`` equal ``"torch"``.

    Example:
        >>> import torch
        >>> w = {"x": torch.tensor([[1.0]])}
        >>> rule = Nesterov(lr=0.1, beta=0.5)
        >>> rule.update({"x": torch.tensor([[1.0]])}, rule.init(w), w, step=0)[0]["x"]
        tensor([[0.8500]])
    """

    lr: Hyper = 1e-2
    beta: Hyper = 0.9
    variant: str = "torch"

    name: ClassVar[str] = "nesterov"
    title: ClassVar[str] = "Nesterov's acceleration"
    equation: ClassVar[str] = "b = βb + g\nx ← x - lr · (g + βb)"
    source: ClassVar[str] = "Nesterov 1983; Sutskever et al. 2013"
    notes: ClassVar[str] = (
        "Not in the notes. Torch's SGD(nesterov=True) and optax's are the torch form; torch's foreach code "
        "path overwrites p.grad as it goes, this one never does."
    )
    variants: ClassVar[dict[str, str]] = {
        "torch": "rate outside of the sum (torch, optax)",
        "lookahead": "rate inside: v = βv + lr g, x ← x - (lr g + βv); differs when lr changes",
    }
    ranges: ClassVar[dict[str, tuple[float, float]]] = Momentum.ranges
    torch_names: ClassVar[dict[str, str]] = Momentum.torch_names

    def slots(self) -> tuple[str, ...]:
        """Decayed sum of gradients (b), or of gradients times their rates (v)."""
        return ("v",) if self.variant == "lookahead" else ("b",)

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Nesterov's equation on one stacked tensor."""
        beta, lr = cast(h.beta, x), cast(h.lr, x)
        if self.variant == "lookahead":
            v = beta * s["v"] + lr * g
            return x - (lr * g + beta * v), {"v": v}
        b = beta * s["b"] + g
        return x - lr * (g + beta * b), {"b": b}
