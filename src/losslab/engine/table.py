"""The table of hand-batched operations: what `Stacked` values know how to do.

Each entry takes the arguments of the torch function it stands for, some of them `Stacked`, and does the work
of all members in one call. A case that an entry does not cover raises `NotInTable`; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from losslab.engine import kernels
from losslab.engine.stacked import OPERATIONS, NotInTable, Stacked


def _register(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(implementation: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            OPERATIONS[function] = implementation
        return implementation

    return add


def _methods(*names: str) -> list[Any]:
    """The torch function, the tensor method and the dunders that go by these names."""
    places = (torch, F, Tensor, torch.special)
    return [getattr(place, n) for n in names for place in places if hasattr(place, n)]


# -- elementwise ---------------------------------------------------------------------------------------

_UNARY = (
    "relu tanh sigmoid gelu silu elu selu celu leaky_relu softplus softsign hardtanh relu6 logsigmoid mish "
    "exp log log1p expm1 abs neg square sqrt rsqrt sin cos erf clamp clip sign reciprocal detach "
    "float double half bfloat16 long to type_as contiguous isfinite nan_to_num hardswish hardsigmoid clone "
    "__abs__ __neg__ logical_not log2 sigmoid_ relu_"
).split()


def _elementwise(function: Any) -> Callable[..., Any]:
    def run(x: Stacked, *args: Any, **kwargs: Any) -> Stacked:
        if any(isinstance(a, Stacked) for a in (*args, *kwargs.values())):
            raise NotInTable(f"{function.__name__} with stacked options")
        return Stacked(function(x.data, *args, **kwargs))

    return run


for _function in {id(f): f for f in _methods(*_UNARY)}.values():
    OPERATIONS[_function] = _elementwise(_function)


def aligned(*values: Any) -> list[Any]:
    """Raw tensors that broadcast with each other as the members' values would."""
    rank = max(v.dim() for v in values if isinstance(v, (Stacked, Tensor)))
    raw = []
    for v in values:
        if isinstance(v, Stacked):
            d = v.data
            raw.append(d if d.dim() == rank + 1 else d.reshape(d.shape[0], *[1] * (rank + 1 - d.dim()), *d.shape[1:]))
        else:
            raw.append(v)
    return raw


_BINARY = {
    "add": "add __add__ __radd__ __iadd__",
    "sub": "sub subtract __sub__ __isub__",
    "mul": "mul multiply __mul__ __rmul__ __imul__",
    "true_divide": "div divide true_divide __truediv__ __itruediv__",
    "pow": "pow __pow__",
    "maximum": "maximum",
    "minimum": "minimum",
    "eq": "eq __eq__",
    "ne": "ne __ne__",
    "lt": "lt __lt__",
    "le": "le __le__",
    "gt": "gt __gt__",
    "ge": "ge __ge__",
}


def _binary(function: Any, swapped: bool = False) -> Callable[..., Any]:
    def run(a: Any, b: Any, *args: Any, **kwargs: Any) -> Stacked:
        x, y = aligned(a, b)
        return Stacked(function(y, x, **kwargs) if swapped else function(x, y, *args, **kwargs))

    return run


for _torch_name, _names in _BINARY.items():
    for _function in _methods(*_names.split()):
        OPERATIONS[_function] = _binary(getattr(torch, _torch_name))
for _torch_name, _names in {"sub": "__rsub__ rsub", "true_divide": "__rtruediv__ __rdiv__", "pow": "__rpow__"}.items():
    for _function in _methods(*_names.split()):
        OPERATIONS[_function] = _binary(getattr(torch, _torch_name), swapped=True)


@_register(*_methods("where"))
def _where(condition: Any, x: Any, y: Any) -> Stacked:
    return Stacked(torch.where(*aligned(condition, x, y)))


@_register(Tensor.add_)
def _add_in_place(x: Stacked, value: Any) -> Stacked:
    x.data.add_(value.data if isinstance(value, Stacked) else value)
    return x


# -- reductions ----------------------------------------------------------------------------------------


def _axes(dim: Any, rank: int) -> Any:
    """Member dimensions -> dimensions of the raw tensor."""
    if isinstance(dim, (tuple, list)):
        return tuple(_axes(d, rank) for d in dim)
    return dim + 1 if dim >= 0 else dim % rank + 1


def _reduction(function: Any) -> Callable[..., Any]:
    def run(x: Stacked, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Stacked:
        if not isinstance(x, Stacked):
            raise NotInTable(function.__name__)
        if dim is None or dim == ():
            if keepdim:
                raise NotInTable(f"{function.__name__} of everything with keepdim")
            flat = x.data.reshape(x.data.shape[0], -1)
            return Stacked(function(flat, dim=1, **kwargs))
        return Stacked(function(x.data, dim=_axes(dim, x.dim()), keepdim=keepdim, **kwargs))

    return run


for _name in ("sum", "mean", "amax", "amin", "argmax", "argmin", "logsumexp", "var", "std", "prod", "all", "any"):
    for _function in _methods(_name):
        OPERATIONS[_function] = _reduction(getattr(torch, _name))


def _along(function: Any) -> Callable[..., Any]:
    def run(x: Stacked, dim: int | None = None, *args: Any, **kwargs: Any) -> Stacked:
        kwargs.pop("_stacklevel", None)
        if dim is None:
            raise NotInTable(f"{function.__name__} without dim")
        return Stacked(function(x.data, _axes(dim, x.dim()), *(a for a in args if a != 3), **kwargs))

    return run


for _name in ("softmax", "log_softmax", "cumsum"):
    for _function in _methods(_name):
        OPERATIONS[_function] = _along(getattr(torch, _name))


# -- shapes --------------------------------------------------------------------------------------------


def _sizes(shape: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape


@_register(torch.flatten, Tensor.flatten)
def _flatten(x: Stacked, start_dim: int = 0, end_dim: int = -1) -> Stacked:
    rank = x.dim()
    return Stacked(x.data.flatten(_axes(start_dim, rank), _axes(end_dim, rank)))


@_register(torch.reshape, Tensor.reshape, Tensor.view)
def _reshape(x: Stacked, *shape: Any) -> Stacked:
    return Stacked(x.data.reshape(x.data.shape[0], *_sizes(shape)))


@_register(torch.permute, Tensor.permute)
def _permute(x: Stacked, *dims: Any) -> Stacked:
    return Stacked(x.data.permute(0, *(_axes(d, x.dim()) for d in _sizes(dims))))


@_register(torch.transpose, Tensor.transpose)
def _transpose(x: Stacked, a: int, b: int) -> Stacked:
    return Stacked(x.data.transpose(_axes(a, x.dim()), _axes(b, x.dim())))


@_register(torch.t, Tensor.t)
def _t(x: Stacked) -> Stacked:
    return x if x.dim() < 2 else Stacked(x.data.transpose(1, 2))


@_register(torch.unsqueeze, Tensor.unsqueeze)
def _unsqueeze(x: Stacked, dim: int) -> Stacked:
    return Stacked(x.data.unsqueeze(_axes(dim, x.dim() + 1)))


@_register(torch.squeeze, Tensor.squeeze)
def _squeeze(x: Stacked, dim: int | None = None) -> Stacked:
    if dim is None:
        return Stacked(x.data.reshape(x.data.shape[0], *(s for s in x.shape if s != 1)))
    return Stacked(x.data.squeeze(_axes(dim, x.dim())))


@_register(torch.cat, torch.concat)
def _cat(parts: Any, dim: int = 0) -> Stacked:
    members = next(p.data.shape[0] for p in parts if isinstance(p, Stacked))
    raw = [p.data if isinstance(p, Stacked) else p.expand(members, *p.shape) for p in parts]
    return Stacked(torch.cat(raw, _axes(dim, raw[0].dim() - 1)))


@_register(Tensor.__getitem__)
def _getitem(x: Stacked, index: Any) -> Stacked:
    parts = index if isinstance(index, tuple) else (index,)
    if not isinstance(x, Stacked) or not all(p is None or p is ... or isinstance(p, (int, slice)) for p in parts):
        raise NotInTable("indexing with a tensor")
    return Stacked(x.data[(slice(None), *parts)])


@_register(F.pad, torch._C._nn.pad)
def _pad(x: Stacked, pad: Any, mode: str = "constant", value: float | None = None) -> Stacked:
    if mode != "constant" or len(pad) > 2 * x.dim():
        raise NotInTable(f"pad with mode {mode}")
    return Stacked(F.pad(x.data, pad, mode, value))


# -- layers --------------------------------------------------------------------------------------------


def _stack_of(value: Any, members: int) -> Tensor:
    return value.data if isinstance(value, Stacked) else value.expand(members, *value.shape)


@_register(F.linear)
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


@_register(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)
def _matmul(a: Any, b: Any) -> Stacked:
    if a.dim() < 2 or b.dim() < 2:
        raise NotInTable("matmul with a vector")
    return Stacked(torch.matmul(*aligned(a, b)))


@_register(Tensor.__rmatmul__)
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


for _function in (torch.conv1d, torch.conv2d, torch.conv3d):
    OPERATIONS[_function] = _convolution(_function)


@_register(F.batch_norm)
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
    values = (x, running_mean, running_var, weight, bias)
    if not isinstance(x, Stacked) or any(v is not None and not isinstance(v, Stacked) for v in values):
        raise NotInTable("batch norm of a shared value")
    raw = [None if v is None else v.data for v in values]
    return Stacked(kernels.batch_norm(raw[0], *raw[1:], training, momentum, eps))  # type: ignore[arg-type]


@_register(F.layer_norm)
def _layer_norm(x: Stacked, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Stacked:
    y = Stacked(F.layer_norm(x.data, shape, eps=eps))
    y = y if weight is None else OPERATIONS[torch.mul](y, weight)
    return y if bias is None else OPERATIONS[torch.add](y, bias)


def _pooling(function: Any, spatial: int) -> Callable[..., Any]:
    def run(x: Stacked, *args: Any, **kwargs: Any) -> Stacked:
        if x.dim() != spatial + 2:
            raise NotInTable(f"{function.__name__} of a single example")
        y = function(x.data.flatten(0, 1), *args, **kwargs)
        return Stacked(y.unflatten(0, x.data.shape[:2]))

    return run


for _function, _spatial in (
    (torch.max_pool1d, 1),
    (torch.max_pool2d, 2),
    (F.avg_pool1d, 1),
    (F.avg_pool2d, 2),
    (F.adaptive_avg_pool1d, 1),
    (F.adaptive_avg_pool2d, 2),
):
    OPERATIONS[_function] = _pooling(_function, _spatial)


@_register(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
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


@_register(F.cross_entropy)
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
        members = next(v.data.shape[0] for v in (input, target) if isinstance(v, Stacked))
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
