"""The table of hand-batched operations, continued: layers and losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from losslab.engine import kernels
from losslab.engine.stacked import OPERATIONS, NotInTable, Stacked
from losslab.engine.table import aligned, register

# -- layers --------------------------------------------------------------------------------------------


def _stack_of(value: Any, members: int) -> Tensor:
    return value.data if isinstance(value, Stacked) else value.expand(members, *value.shape)


def _members(*values: Any) -> int:
    return next(v.data.shape[0] for v in values if isinstance(v, Stacked))


@register(F.linear)
def _linear(x: Any, weight: Any, bias: Any = None) -> Stacked:
    if not isinstance(weight, Stacked) or (bias is not None and not isinstance(bias, Stacked)):
        raise NotInTable("linear with a shared weight")
    data = _stack_of(x, weight.data.shape[0])
    if data.dim() < 3:
        raise NotInTable("linear of a single example")
    shape = data.shape
    rows = data if data.dim() == 3 else data.reshape(shape[0], -1, shape[-1])
    y = kernels.Linear.apply(rows, weight.data, None if bias is None else bias.data)
    return Stacked(y if data.dim() == 3 else y.reshape(*shape[:-1], y.shape[-1]))


@register(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)
def _matmul(a: Any, b: Any) -> Stacked:
    if a.dim() < 2 or b.dim() < 2:
        raise NotInTable("matmul with a vector")
    return Stacked(torch.matmul(*aligned(a, b)))


@register(Tensor.__rmatmul__)
def _rmatmul(a: Any, b: Any) -> Stacked:
    return _matmul(b, a)


def _convolution(function: Any) -> Callable[..., Any]:
    def run(x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Stacked:
        names = ("stride", "padding", "dilation", "groups")
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        if not isinstance(weight, Stacked):
            raise NotInTable("convolution with a shared weight")
        data = _stack_of(x, weight.data.shape[0])
        if data.dim() != weight.data.dim():
            raise NotInTable("convolution of a single example")
        raw_bias = bias.data if isinstance(bias, Stacked) else bias
        return Stacked(kernels.convolution(function, data, weight.data, raw_bias, options))

    return run


_function: Any
for _function in (torch.conv1d, torch.conv2d, torch.conv3d):
    OPERATIONS[_function] = _convolution(_function)


@register(F.batch_norm)
def _batch_norm(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Stacked:
    values = (running_mean, running_var, weight, bias)
    if any(v is not None and not isinstance(v, Stacked) for v in values):
        raise NotInTable("batch norm with shared statistics")
    mean, var, scale, shift = (None if v is None else v.data for v in values)
    data = _stack_of(x, _members(x, *values))
    return Stacked(kernels.batch_norm(data, mean, var, scale, shift, training, momentum, eps))


@register(F.layer_norm)
def _layer_norm(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Stacked:
    y = Stacked(F.layer_norm(_stack_of(x, _members(x, weight, bias)), shape, eps=eps))
    y = y if weight is None else OPERATIONS[torch.mul](y, weight)
    return y if bias is None else OPERATIONS[torch.add](y, bias)


def _pooling(function: Any, spatial: int) -> Callable[..., Any]:
    def run(x: Stacked, *args: Any, **kwargs: Any) -> Stacked:
        if x.dim() != spatial + 2 or kwargs.get("return_indices"):
            raise NotInTable(f"{function.__name__} of a single example, or with indices")
        y = function(x.data.flatten(0, 1), *args, **kwargs)
        return Stacked(y.unflatten(0, x.data.shape[:2]))

    return run


for _function, _spatial in (
    (F.max_pool1d, 1),
    (F.max_pool2d, 2),
    (torch.max_pool1d, 1),
    (torch.max_pool2d, 2),
    (F.avg_pool1d, 1),
    (F.avg_pool2d, 2),
    (F.adaptive_avg_pool1d, 1),
    (F.adaptive_avg_pool2d, 2),
):
    OPERATIONS[_function] = _pooling(_function, _spatial)


@register(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
def _dropout(x: Stacked, p: float = 0.5, training: bool = True, inplace: bool = False) -> Stacked:
    # A dropout that acts is replaced by the member's own stream before it gets here.
    if training and p > 0:
        raise NotInTable("dropout without the members' keys")
    return x


# -- losses --------------------------------------------------------------------------------------------


def _reduced(losses: Tensor, reduction: str) -> Stacked:
    if reduction == "none":
        return Stacked(losses)
    flat = losses.reshape(losses.shape[0], -1)
    return Stacked(flat.mean(1) if reduction == "mean" else flat.sum(1))


@register(F.cross_entropy)
def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Stacked:
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
    if not plain or not isinstance(input, Stacked) or input.dim() != 2 or target.dim() != 1:
        raise NotInTable("this form of cross_entropy")
    labels = _stack_of(target, input.data.shape[0])
    losses, kept = kernels.cross_entropy(input.data, labels, ignore_index)
    if kept is None:
        return _reduced(losses, reduction)
    if reduction == "mean":
        return Stacked((losses * kept).sum(1) / kept.sum(1))
    return _reduced(losses * kept, reduction)


def _pairwise_loss(function: Any) -> Callable[..., Any]:
    def run(input: Any, target: Any, *args: Any, reduction: str = "mean", **kwargs: Any) -> Stacked:
        if args or any(isinstance(v, (Stacked, Tensor)) for v in kwargs.values()):
            raise NotInTable(f"this form of {function.__name__}")
        kwargs = {k: v for k, v in kwargs.items() if v is not None}
        if tuple(input.shape) != tuple(target.shape):
            raise NotInTable(f"{function.__name__} of two shapes")
        members = _members(input, target)
        pair = (_stack_of(input, members), _stack_of(target, members))
        return _reduced(function(*pair, reduction="none", **kwargs), reduction)

    return run


for _function in (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
):
    OPERATIONS[_function] = _pairwise_loss(_function)
