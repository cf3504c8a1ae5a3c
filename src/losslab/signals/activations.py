"""What is known of activation functions: which calls they are, and where their slope is nearly gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losslab.tasks.models import LeCunTanh

#: |s| from which a sigmoid counts as saturated: its slope is below 0.045 there, its largest is 0.25.
SIGMOID_BOUND = 3.0
#: Share of the largest slope below which any other activation counts as saturated.
LEAST_SLOPE = 0.1


@dataclass(frozen=True)
class Activation:
    """An elementwise function as it was called in a network.

    Attributes:
        name: Such as ``"tanh"``.
        apply: The function, options included.
    """

    name: str
    apply: Callable[[Tensor], Tensor]

    @property
    def gates(self) -> bool:
        """Whether it passes or blocks (ReLU): being off is its work, being off for every example is death."""
        return self.name in ("relu", "leaky_relu")

    def slope(self, s: Tensor) -> Tensor:
        """f'(s) elementwise, in the shape of s; at a kink torch's choice (0 for ReLU at 0)."""
        with torch.enable_grad():
            leaf = s.detach().requires_grad_()
            y = self.apply(leaf)
            (found,) = torch.autograd.grad(y.sum(), leaf)
        return found

    def flat(self, s: Tensor) -> Tensor:
        """Where nearly no gradient passes, bool in the shape of s.

        Sigmoid: |s| > 3. ReLU: s <= 0. Others: |f'(s)| below a tenth of the function's largest slope.
        """
        if self.name == "sigmoid":
            return s.abs() > SIGMOID_BOUND
        if self.name == "relu":
            return s <= 0
        if self.name == "tanh":
            return 1 - torch.tanh(s).square() < LEAST_SLOPE  # the commonest case, without autograd
        slope = self.slope(s).abs()
        if self.name == "leaky_relu":
            return slope == 0
        return slope < LEAST_SLOPE * self._steepest(s)

    def _steepest(self, s: Tensor) -> Tensor:
        grid = torch.linspace(-8, 8, 1601, dtype=s.dtype, device=s.device)
        return self.slope(grid).abs().max()


_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Softsign: "softsign",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.CELU: "celu",
    nn.Softplus: "softplus",
    nn.Hardtanh: "hardtanh",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.LogSigmoid: "logsigmoid",
    nn.Mish: "mish",
    LeCunTanh: "lecun_tanh",
}

_NAMES = [name for name in _MODULES.values() if name != "lecun_tanh"]

FUNCTIONS: dict[Any, str] = {
    getattr(place, spelled): name
    for name in _NAMES
    for spelled in (name, f"{name}_")
    for place in (torch, F, Tensor)
    if hasattr(place, spelled)
}
"""Torch function or tensor method -> the activation that it is."""


def of_module(module: nn.Module) -> Activation | None:
    """The activation that a module is, or None."""
    kind = next((k for k in type(module).__mro__ if k in _MODULES), None)
    if kind is None:
        return None
    # Not module(...): that would call hooks.
    return Activation(_MODULES[kind], lambda s: kind.forward(module, s))


def of_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Activation:
    """The activation that a call of one of `FUNCTIONS` is."""
    name = FUNCTIONS[function]
    plain = getattr(F, name, None) or getattr(torch, name)
    options = {n: v for n, v in kwargs.items() if n not in ("inplace", "input")}
    rest = args[1:]
    if name in ("relu", "tanh", "sigmoid", "softsign", "logsigmoid"):
        plain, rest, options = getattr(torch, name, None) or getattr(F, name), (), {}
    elif any(isinstance(value, bool) for value in rest):  # a trailing positional ``inplace``
        rest = rest[:-1]
    return Activation(name, lambda s: plain(s, *rest, **options))
