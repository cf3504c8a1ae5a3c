"""Adam and its relatives: Kingma & Ba's, the notes', AdaMax, AMSGrad in three forms, AdamNC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from losslab.rules.rule import Hyper, Rule, cast, root


@dataclass(frozen=True, kw_only=True, eq=False)
class Adam(Rule):
    """Adam: a running mean of gradients over the root of a running mean of their squares.

    ``m = b1 m + (1-b1) g``, ``v = b2 v + (1-b2) g^2``,
    ``x = x - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)``.

    Args:
        lr: Learning rate.
        beta1: Decay ``b1`` of the mean of gradients.
        beta2: Decay ``b2`` of the mean of squared gradients.
        eps: Added to the root, outside of it and after the bias correction.
        eps_root: Added inside of the root (optax has it; torch has not).
        variant: ``"kingma-ba"`` (bias correction of both means), ``"lecture"`` (the notes: no correction,
            no eps; ``eps`` is then ignored and a zero gradient gives 0/0 = NaN), ``"uncorrected"`` (no
            correction, with eps).

    Source: Kingma & Ba 2015, Algorithm 1; lecture notes 6.3.3. Torch's Adam and optax's equal
    ``"kingma-ba"``; torch's SparseAdam means a different eps (it is not divided by the correction).

    Example:
        >>> w = {"x": torch.tensor([[1.0], [1.0]])}
        >>> rule = Adam(lr=[0.1, 0.2])
        >>> w, state = rule.update({"x": torch.tensor([[3.0], [-0.5]])}, rule.init(w), w, step=0)
        >>> w["x"].flatten()
        tensor([0.9000, 1.2000])
    """

    lr: Hyper = 1e-3
    beta1: Hyper = 0.9
    beta2: Hyper = 0.999
    eps: Hyper = 1e-8
    eps_root: Hyper = 0.0
    variant: str = "kingma-ba"

    name: ClassVar[str] = "adam"
    title: ClassVar[str] = "Adam"
    equation: ClassVar[str] = (
        "m = β₁m + (1-β₁)g\nv = β₂v + (1-β₂)g²\nx ← x - lr · m̂ / (√(v̂ + eps_root) + eps)\n"
        "m̂ = m/(1-β₁ᵗ), v̂ = v/(1-β₂ᵗ)"
    )
    source: ClassVar[str] = "Kingma & Ba 2015, Algorithm 1; notes §6.3.3"
    notes: ClassVar[str] = (
        "The notes leave out the bias correction and eps: with a constant gradient their "
        "first step is 3.16 lr and their largest, at t = 12, 6.57 lr. Torch adds eps after the corrected "
        "root, as here; the older Keras form adds it before the correction, which is another eps."
    )
    variants: ClassVar[dict[str, str]] = {
        "kingma-ba": "bias correction of both means, eps outside of the root (torch, optax)",
        "lecture": "the notes' form: no bias correction, no eps",
        "uncorrected": "no bias correction, with eps",
    }
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"beta1": (0.0, 1.0), "beta2": (0.0, 1.0)}
    torch_names: ClassVar[dict[str, str]] = {"m": "exp_avg", "v": "exp_avg_sq"}

    def slots(self) -> tuple[str, ...]:
        """Running means of the gradient (m) and of its square (v)."""
        return ("m", "v")

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adam's equation on one stacked tensor."""
        m, v = _means(g, s, h.beta1, h.beta2)
        if self.variant == "kingma-ba":
            first, second = 1 - h.beta1**t, 1 - h.beta2**t
        else:
            first = second = 1.0
        denominator = (v / cast(second, v) + cast(h.eps_root, v)).sqrt()
        if self.variant != "lecture":
            denominator = denominator + cast(h.eps, v)
        return x - cast(h.lr / first, x) * m / denominator, {"m": m, "v": v}


@dataclass(frozen=True, kw_only=True, eq=False)
class AdaMax(Rule):
    """AdaMax: Adam with the largest decayed gradient in place of the root of the mean square.

    ``m = b1 m + (1-b1) g``, ``u = max(b2 u, |g| + eps)``, ``x = x - lr / (1-b1^t) m / u``.

    Source: Kingma & Ba 2015, Algorithm 2 (which has no eps: a gradient that was always zero would give 0/0).
    Torch's Adamax puts the same eps at the same place.

    Example:
        >>> w = {"x": torch.tensor([[1.0]])}
        >>> rule = AdaMax(lr=0.1)
        >>> rule.update({"x": torch.tensor([[4.0]])}, rule.init(w), w, step=0)[0]["x"]
        tensor([[0.9000]])
    """

    lr: Hyper = 2e-3
    beta1: Hyper = 0.9
    beta2: Hyper = 0.999
    eps: Hyper = 1e-8

    name: ClassVar[str] = "adamax"
    title: ClassVar[str] = "AdaMax"
    equation: ClassVar[str] = "m = β₁m + (1-β₁)g\nu = max(β₂u, |g| + eps)\nx ← x - lr/(1-β₁ᵗ) · m/u"
    source: ClassVar[str] = "Kingma & Ba 2015, Algorithm 2"
    notes: ClassVar[str] = "Not in the notes. Torch's Adamax is the same rule."
    ranges: ClassVar[dict[str, tuple[float, float]]] = Adam.ranges
    torch_names: ClassVar[dict[str, str]] = {"m": "exp_avg", "u": "exp_inf"}

    def slots(self) -> tuple[str, ...]:
        """Running mean of the gradient (m), largest decayed gradient (u)."""
        return ("m", "u")

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """AdaMax's equation on one stacked tensor."""
        m = cast(h.beta1, g) * s["m"] + cast(1 - h.beta1, g) * g
        u = torch.maximum(cast(h.beta2, g) * s["u"], g.abs() + cast(h.eps, g))
        return x - cast(h.lr / (1 - h.beta1**t), x) * m / u, {"m": m, "u": u}


@dataclass(frozen=True, kw_only=True, eq=False)
class AMSGrad(Rule):
    """AMSGrad: Adam whose denominator never decreases. Three rules go by this name.

    ``m``, ``v`` as in Adam, ``w = max(w, .)``, ``x = x - lr m / (sqrt(w) + eps)``, and what is maximised
    differs (below).

    Args:
        lr: Learning rate.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of squared gradients.
        eps: Added to the root.
        variant: ``"paper"``: maximum of ``v``, no bias correction (Reddi, Kale & Kumar 2018, Algorithm 2;
            the paper has no eps: pass 0). ``"torch"``: maximum of ``v``, then both corrections of the current
            step; its denominator is *not* monotone. ``"optax"``: maximum of the corrected ``v / (1-b2^t)``,
            corrected mean; it freezes the first gradient's full square.

    Example:
        >>> w = {"x": torch.tensor([[0.5]])}
        >>> rule = AMSGrad(lr=0.1, beta1=0.0, beta2=0.99, eps=0.0)
        >>> rule.update({"x": torch.tensor([[1.0]])}, rule.init(w), w, step=0)[0]["x"]
        tensor([[-0.5000]])
    """

    lr: Hyper = 1e-3
    beta1: Hyper = 0.9
    beta2: Hyper = 0.999
    eps: Hyper = 1e-8
    variant: str = "paper"

    name: ClassVar[str] = "amsgrad"
    title: ClassVar[str] = "AMSGrad"
    equation: ClassVar[str] = (
        "m = β₁m + (1-β₁)g\nv = β₂v + (1-β₂)g²\nw = max(w, v)\nx ← x - lr · m / (√w + eps)"
    )
    source: ClassVar[str] = "Reddi, Kale & Kumar 2018, Algorithm 2"
    notes: ClassVar[str] = (
        "The remedy of the notes' reference [9]. Torch corrects the maximum with the current 1-β₂ᵗ, so its "
        "denominator can shrink; optax maximises the corrected second moment."
    )
    variants: ClassVar[dict[str, str]] = {
        "paper": "maximum of v, no bias correction",
        "torch": "maximum of v, then corrected with the current step's factors",
        "optax": "maximum of the corrected v",
    }
    ranges: ClassVar[dict[str, tuple[float, float]]] = Adam.ranges
    torch_names: ClassVar[dict[str, str]] = {**Adam.torch_names, "w": "max_exp_avg_sq"}

    def slots(self) -> tuple[str, ...]:
        """Adam's two means and the maximum (w) of the second."""
        return ("m", "v", "w")

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """AMSGrad's equation on one stacked tensor."""
        m, v = _means(g, s, h.beta1, h.beta2)
        first, second = (1.0, 1.0) if self.variant == "paper" else (1 - h.beta1**t, 1 - h.beta2**t)
        w = torch.maximum(s["w"], v / cast(second, v) if self.variant == "optax" else v)
        scale = root(second) if self.variant == "torch" else 1.0
        denominator = w.sqrt() / cast(scale, w) + cast(h.eps, w)
        return x - cast(h.lr / first, x) * m / denominator, {"m": m, "v": v, "w": w}


@dataclass(frozen=True, kw_only=True, eq=False)
class AdamNC(Rule):
    """AdamNC: Adam with ``b2 = 1 - 1/t``, so that ``v`` is the plain average of all squared gradients.

    ``v = ((t-1) v + g^2) / t``, ``x = x - lr m / (sqrt(v) + eps)``; with ``b1 = 0`` and ``lr = a/sqrt(t)``
    this is AdaGrad with rate ``a``.

    Source: Reddi, Kale & Kumar 2018, Algorithm 3 and Corollary 2. Neither torch nor optax has it.

    Example:
        >>> w = {"x": torch.tensor([[1.0]])}
        >>> rule = AdamNC(lr=0.1, beta1=0.0)
        >>> rule.update({"x": torch.tensor([[4.0]])}, rule.init(w), w, step=0)[0]["x"]
        tensor([[0.9000]])
    """

    lr: Hyper = 1e-3
    beta1: Hyper = 0.9
    eps: Hyper = 1e-8

    name: ClassVar[str] = "adamnc"
    title: ClassVar[str] = "AdamNC"
    equation: ClassVar[str] = "m = β₁m + (1-β₁)g\nv = ((t-1)v + g²)/t\nx ← x - lr · m / (√v + eps)"
    source: ClassVar[str] = "Reddi, Kale & Kumar 2018, Algorithm 3, Corollary 2"
    notes: ClassVar[str] = "Not in the notes; the second remedy of their reference [9]."
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"beta1": (0.0, 1.0)}
    torch_names: ClassVar[dict[str, str]] = Adam.torch_names

    def slots(self) -> tuple[str, ...]:
        """Mean of gradients (m), average of their squares (v)."""
        return ("m", "v")

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """AdamNC's equation on one stacked tensor."""
        m, v = _means(g, s, h.beta1, 1 - 1 / t)
        return x - cast(h.lr, x) * m / (v.sqrt() + cast(h.eps, v)), {"m": m, "v": v}


def _means(g: Tensor, s: dict[str, Tensor], beta1: Any, beta2: Any) -> tuple[Tensor, Tensor]:
    m = cast(beta1, g) * s["m"] + cast(1 - beta1, g) * g
    v = cast(beta2, g) * s["v"] + cast(1 - beta2, g) * (g * g)
    return m, v
