"""What a rule may ask about the loss around the weights, and the line search that such rules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from losslab.errors import LosslabError


class Curvature(Protocol):
    """The least that a second-order rule is given: the Hessian at the current weights."""

    def hessian(self) -> Tensor:
        """The Hessian of each member's loss, ``[N, P, P]``, parameters in the order of the weights."""


class Landscape(Curvature, Protocol):
    """All that a rule may ask; what is asked for on the same batch, of each member's own loss."""

    def gauss_newton(self) -> Tensor:
        """``J^T H_out J`` of each member, ``[N, P, P]``: J the Jacobian of the network's outputs."""

    def products(self, vectors: Tensor) -> Tensor:
        """The Hessian times one vector a member, ``[N, P] -> [N, P]``."""

    def value(self, weights: Tensor) -> Tensor:
        """The loss at other weights, ``[N, P] -> [N]``."""

    def gradient(self, weights: Tensor) -> Tensor:
        """The gradient at other weights, ``[N, P] -> [N, P]``."""


def check(curvature: Curvature | None, rule: str, asked: tuple[str, ...]) -> None:
    """Refuses a curvature that cannot answer what a rule asks.

    Raises:
        LosslabError: None, or one without a method that is asked for.
    """
    if curvature is None:
        raise LosslabError(f"{rule} needs the {_words(asked[0])} and got none: pass curvature=")
    for name in asked:
        if not hasattr(curvature, name):
            raise LosslabError(
                f"{rule} asks its curvature for {name}(), which a {type(curvature).__name__} does not have: "
                "pass one with that method, as losslab.train does"
            )


def _words(name: str) -> str:
    return {"hessian": "Hessian", "gauss_newton": "Gauss-Newton matrix"}.get(name, f"curvature's {name}()")


SUFFICIENT = 1e-4
"""Share of the fall that the gradient promises which a step of a line search must achieve (Armijo)."""


def backtracked(
    value: Callable[[Tensor], Tensor], x: Tensor, step: Tensor, slope: Tensor, halvings: int = 30
) -> Tensor:
    """Each member's step, halved until the loss falls by `SUFFICIENT` of what the gradient promises.

    Args:
        value: ``[N, P] -> [N]``.
        x: The weights ``[N, P]``.
        step: The step of each member, ``[N, P]``.
        slope: The gradient times the step, ``[N]``, below zero.
        halvings: A member whose loss falls for none of these stays where it is; one whose loss or step is
            not finite becomes NaN.

    Example:
        >>> bowl = lambda x: x.square().sum(1)
        >>> x = torch.tensor([[1.0], [1.0]])
        >>> backtracked(bowl, x, torch.tensor([[-1.0], [-7.0]]), torch.tensor([-2.0, -14.0])).flatten()
        tensor([-1.0000, -1.7500])
    """
    start = value(x)
    lost = ~torch.isfinite(start) | ~torch.isfinite(step).all(1)
    found, rate = torch.zeros_like(step), torch.ones_like(start)
    done = lost.clone()
    # Beside a minimum the loss changes by less than its own rounding, which must not reject the step.
    slack = 4 * torch.finfo(start.dtype).eps * start.abs()
    for _ in range(halvings + 1):
        trial = rate.to(step)[:, None] * step
        fell = value(x + trial) <= start + SUFFICIENT * rate * slope.to(start) + slack
        good = fell & ~done
        found = torch.where(good[:, None], trial, found)
        done = done | good
        if bool(done.all()):
            break
        rate = torch.where(done, rate, rate / 2)
    return torch.where(lost[:, None], torch.nan, found)


def ask(curvature: Landscape, name: str, *told: Tensor) -> Tensor:
    """What the curvature answers, free of any graph; it may differentiate to find out."""
    with torch.enable_grad():
        answer: Tensor = getattr(curvature, name)(*told)
    return answer.detach()


def usable(matrix: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices ``[N, P, P]`` with the identity in place of those that are not finite, and which are ``[N]``.

    One matrix that is not finite makes a batched decomposition fail for all members.
    """
    good = torch.isfinite(matrix).all(dim=2).all(dim=1) & torch.isfinite(g).all(dim=1)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.where(good[:, None, None], matrix, eye), good
