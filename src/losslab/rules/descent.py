"""Gradient descent and stochastic gradient descent: one update, two sources of gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from losslab.rules.rule import Hyper, Rule, cast


@dataclass(frozen=True, kw_only=True, eq=False)
class SGD(Rule):
    """Stochastic gradient descent: a step against an estimate of the gradient.

    ``x = x - lr g``, with ``g`` the mean gradient of one example or of a mini-batch. How the batch is drawn
    (with or without replacement, one order a member or one for all) belongs to the batches, not to the rule.

    Args:
        lr: Learning rate.

    Source: Robbins & Monro 1951; lecture notes 6.2 and 6.2.1. Torch's SGD without momentum and optax's
    ``sgd`` are the same.

    Example:
        >>> import torch
        >>> w = {"x": torch.tensor([[1.0], [1.0]])}
        >>> rule = SGD(lr=[0.1, 0.5])
        >>> rule.update({"x": torch.tensor([[2.0], [2.0]])}, rule.init(w), w, step=0)[0]["x"].flatten()
        tensor([0.8000, 0.0000])
    """

    lr: Hyper = 1e-2

    name: ClassVar[str] = "sgd"
    title: ClassVar[str] = "Stochastic gradient descent"
    equation: ClassVar[str] = "x ← x - lr · g, g the gradient of one example or of a mini-batch"
    source: ClassVar[str] = "Robbins & Monro 1951; notes §6.2, §6.2.1"
    notes: ClassVar[str] = (
        "The notes draw a sample at random (with replacement) in §6.2 and use every mini-batch once an epoch "
        "(without) in §6.2.1: two sampling schemes under one update. Torch and optax: the same update."
    )

    def leaf(
        self, g: Tensor, x: Tensor, s: dict[str, Tensor], h: Any, t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step against the gradient of one stacked tensor."""
        return x - cast(h.lr, x) * g, s


@dataclass(frozen=True, kw_only=True, eq=False)
class GD(SGD):
    """Gradient descent: a step against the gradient of the whole training loss.

    ``x = x - lr g``, with ``g`` the gradient over all examples: `SGD`'s update, and ``full_batch`` asks the
    training loop for the whole training set where no batch size is given.

    On a quadratic with eigenvalues from ``mu`` to ``L`` it converges for ``lr < 2/L``, fastest at
    ``2/(mu + L)``, where the error shrinks by ``(L - mu)/(L + mu)`` a step.

    Args:
        lr: Learning rate.

    Source: Cauchy 1847; lecture notes 6.2.3 and 6.3.

    Example:
        >>> import torch
        >>> w = {"x": torch.tensor([[1.0]])}
        >>> rule = GD(lr=0.1)
        >>> rule.update({"x": torch.tensor([[2.0]])}, rule.init(w), w, step=0)[0]["x"]
        tensor([[0.8000]])
    """

    name: ClassVar[str] = "gd"
    title: ClassVar[str] = "Gradient descent"
    equation: ClassVar[str] = "x ← x - lr · g, g the gradient of the whole training loss"
    source: ClassVar[str] = "Cauchy 1847; notes §6.2.3, §6.3"
    notes: ClassVar[str] = (
        "The notes' quadratic argument (§6.2.3) is about this rule, not about SGD. Torch and optax have no "
        "rule of this name: it is their SGD given the whole data."
    )
    full_batch: ClassVar[bool] = True
