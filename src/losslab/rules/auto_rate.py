"""Descent at the rate that an on-line estimate of the largest eigenvalue allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from losslab.rules.curvature import ask
from losslab.rules.rule import Hyper, Rule, cast


@dataclass(frozen=True, kw_only=True, eq=False)
class AutoRate(Rule):
    """Descent at ``lr / lambda``, the largest eigenvalue of the Hessian estimated along the way.

    ``psi = (1 - gamma) psi + (gamma/alpha) (grad(x + alpha psi/|psi|) - grad(x))``,
    ``x = x - lr g / |psi|``.

    The bracket is a finite difference of the gradient, so one update is one step of the power method on the
    Hessian of the current batch, averaged over batches, and ``|psi|`` tends to its largest eigenvalue in
    size. ``lr = 1`` is the fastest rate along the steepest direction; beyond 2 descent is unstable there.
    The first update begins with ``warmup`` products on its batch, each replacing psi, because a rate from a
    random psi would be far too large.

    Args:
        lr: The rate in units of 1 / lambda.
        alpha: Length of the finite difference.
        gamma: Share of the newest product in the average; large at first, small later is the paper's advice.
        warmup: Products before the first update.

    Source: LeCun, Simard & Pearlmutter, Automatic Learning Rate Maximization by On-Line Estimation of the
    Hessian's Eigenvectors (1993); Efficient BackProp (1998), section 9.2. psi starts at a fixed random unit
    vector. Not in torch or optax.

    Example:
        >>> class Bowl:
        ...     def gradient(self, x):
        ...         return 4 * x
        >>> w = {"x": torch.tensor([[1.0]], dtype=torch.float64)}
        >>> rule = AutoRate(gamma=1.0)
        >>> rule.update({"x": 4 * w["x"]}, rule.init(w), w, step=0, curvature=Bowl())[0]["x"].abs() < 1e-9
        tensor([[True]])
    """

    lr: Hyper = 1.0
    alpha: Hyper = 1e-2
    gamma: Hyper = 0.1
    warmup: int = 20

    name: ClassVar[str] = "auto-rate"
    title: ClassVar[str] = "Descent at the reciprocal of the largest eigenvalue"
    equation: ClassVar[str] = "ψ = (1 - γ) ψ + γ/α · (∇L(x + α ψ/|ψ|) - ∇L(x))\nx ← x - lr · g / |ψ|"
    source: ClassVar[str] = "LeCun, Simard & Pearlmutter 1993; LeCun et al. 1998, §9.2"
    notes: ClassVar[str] = (
        "The paper runs the estimate for a while and then trains at a fixed rate; here it goes on and the "
        "rate follows. Not in torch or optax."
    )
    whole_vector: ClassVar[bool] = True
    needs_curvature: ClassVar[bool] = True
    largest: ClassVar[int] = 2**62  # no matrix is kept
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "alpha": (1e-300, float("inf")),
        "gamma": (0.0, 1.0 + 1e-9),
    }

    def asks(self) -> tuple[str, ...]:
        """Gradients at other weights."""
        return ("gradient",)

    def slots(self) -> tuple[str, ...]:
        """The running product psi."""
        return ("psi",)

    def initial(self, slot: str, x: Tensor) -> Tensor:
        """A random unit vector, the same for every member."""
        generator = torch.Generator().manual_seed(1993)
        z = torch.randn(x.shape[1], generator=generator, dtype=torch.float64)
        return (z / z.norm()).to(x).expand_as(x).clone()

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The equation on the whole vectors ``[N, P]``."""
        psi, alpha, gamma = s["psi"], cast(h.alpha, x), cast(h.gamma, x)
        here = ask(h.curvature, "gradient", x).to(x)

        def product(psi: Tensor) -> Tensor:
            unit = psi / torch.linalg.vector_norm(psi, dim=1, keepdim=True)
            return (ask(h.curvature, "gradient", x + alpha * unit).to(x) - here) / alpha

        if t == 1:
            for _ in range(self.warmup):
                psi = product(psi)
        new = product(psi)
        psi = (1 - gamma) * psi + gamma * new
        # A leading eigenvalue below zero turns psi round, and the average may vanish to the last digit.
        psi = torch.where(psi.any(1, keepdim=True), psi, new)
        return x - cast(h.lr, x) * g / torch.linalg.vector_norm(psi, dim=1, keepdim=True), {"psi": psi}
