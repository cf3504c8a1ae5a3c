"""Operations of N networks at once, each with the function that sends a gradient back; no graph.

What the tape records one by one, and what a chain of layers runs straight through. A gradient belongs to
whoever it is sent to, and may be overwritten there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from losslab.engine import kernels
from losslab.engine.gradients import Factored
from losslab.rules.fused import SLICED_FROM

aten = torch.ops.aten

Vjp = Callable[[Tensor], Tensor]
"""The gradient of a value -> the gradient of what it was made of."""


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, inner: bool
) -> tuple[Tensor, Callable[[Tensor], list[Any]]]:
    """``x W^T + b``; sends back to W, to b where there is one, and with ``inner`` to x.

    Args:
        x: ``[N, B, i]``.
        weight: ``[N, o, i]``. The gradient of a large one is left as two factors.
        bias: ``[N, o]``.
        inner: Whether x depends on weights.
    """
    factored = weight.is_cpu and weight[0].numel() >= SLICED_FROM
    vjp_weight: Any = Factored if factored else kernels.linear_vjp_weight

    def vjp(g: Tensor) -> list[Any]:
        sent = [vjp_weight(g, x)]
        if bias is not None:
            sent.append(g.sum(1))
        if inner:
            sent.append(kernels.linear_vjp_input(g, weight, x))
        return sent

    return kernels.linear(x, weight, bias), vjp


@dataclass(frozen=True)
class Activation:
    """An elementwise function.

    Args:
        function: ``y = function(x)``.
        slope: ``(g, x, y)`` -> the gradient sent back, which may take g's memory.
        inplace: The same function written over x, where the slope does not need x.
    """

    function: Any
    slope: Callable[[Tensor, Tensor, Tensor], Tensor]
    inplace: Any = None

    def __call__(self, x: Tensor, forgotten: bool = False) -> tuple[Tensor, Vjp]:
        """Its value, and the way back; ``forgotten`` tells that nobody else needs x."""
        function = self.inplace if forgotten and self.inplace is not None else self.function
        y, slope = function(x), self.slope
        return y, lambda g: slope(g, x, y)


def _softsign(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


_relu_slope = aten.threshold_backward.grad_input
_tanh_slope = aten.tanh_backward.grad_input
_sigmoid_slope = aten.sigmoid_backward.grad_input

RELU = Activation(torch.relu, lambda g, x, y: _relu_slope(g, y, 0, grad_input=g), torch.relu_)
TANH = Activation(torch.tanh, lambda g, x, y: _tanh_slope(g, y, grad_input=g), torch.tanh_)
SIGMOID = Activation(torch.sigmoid, lambda g, x, y: _sigmoid_slope(g, y, grad_input=g), torch.sigmoid_)
SILU = Activation(F.silu, lambda g, x, y: aten.silu_backward(g, x))
GELU = Activation(F.gelu, lambda g, x, y: aten.gelu_backward(g, x))
ELU = Activation(F.elu, lambda g, x, y: aten.elu_backward(g, 1.0, 1.0, 1.0, False, x))
SOFTSIGN = Activation(_softsign, lambda g, x, y: g * (1 - y.abs()).square_())
SQUARE = Activation(torch.square, lambda g, x, y: g * (2 * x))
NEGATIVE = Activation(torch.neg, lambda g, x, y: -g)
EXPONENTIAL = Activation(torch.exp, lambda g, x, y: g * y)


def cross_entropy(z: Tensor, labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Vjp]:
    """Mean over examples of ``-log softmax(z)[y]``: z ``[N, B, C]``, labels ``[N, B]`` -> ``[N]``.

    Raises:
        IndexError: A label outside of the classes.
        ValueError: Not a label an example.
    """
    if labels.shape != z.shape[:2]:  # gathering would take what there is
        raise ValueError(f"{labels.shape[1]} labels of {z.shape[1]} examples")
    log_p = torch.log_softmax(z.transpose(1, 2).contiguous(), 1)
    share: Tensor | float = 1 / labels.shape[1]
    try:
        if labels.is_cuda or 0 <= ignore_index < z.shape[2]:
            raise IndexError  # look before indexing: a GPU would stop the program, the index may be valid
        picked = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    except (IndexError, RuntimeError):
        labels, kept = kernels.checked_labels(labels, z.shape[2], ignore_index)
        picked = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
        if kept is not None:
            share = kept.to(z.dtype) / kept.sum(1, keepdim=True)

    def vjp(g: Tensor) -> Tensor:
        each = (g[:, None] * share)[:, None, :] if isinstance(share, Tensor) else (g * share).view(-1, 1, 1)
        return kernels.cross_entropy_vjp(log_p, labels.unsqueeze(1), each).transpose(1, 2)

    losses = picked.mean(1) if isinstance(share, float) else (picked * share).sum(1)
    return losses.neg_(), vjp


def mean_square(z: Tensor, target: Tensor) -> tuple[Tensor, Vjp]:
    """Mean over examples and outputs of ``(z - y)^2``: ``[N, B, ...]`` twice -> ``[N]``."""
    error = z - target
    count = error[0].numel()

    def vjp(g: Tensor) -> Tensor:
        return error.mul_((g * (2 / count)).view(-1, *[1] * (error.dim() - 1)))

    return error.square().flatten(1).mean(1), vjp
