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

from losslab.engine.stacked import OPERATIONS, NotInTable, Stacked


def register(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the implementation of these torch functions on stacked values."""

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

# fmt: off
_UNARY = [
    "relu", "tanh", "sigmoid", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "softplus",
    "softsign", "hardtanh", "relu6", "logsigmoid", "mish", "exp", "log", "log1p", "expm1", "abs", "neg",
    "square", "sqrt", "rsqrt", "sin", "cos", "erf", "clamp", "clip", "sign", "reciprocal", "detach",
    "float", "double", "half", "bfloat16", "long", "to", "type_as", "contiguous", "isfinite",
    "nan_to_num", "hardswish", "hardsigmoid", "clone", "__abs__", "__neg__", "logical_not", "log2",
    "sigmoid_", "relu_",
]
# fmt: on


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
            raw.append(
                d if d.dim() == rank + 1 else d.reshape(d.shape[0], *[1] * (rank + 1 - d.dim()), *d.shape[1:])
            )
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
for _torch_name, _names in {
    "sub": "__rsub__ rsub",
    "true_divide": "__rtruediv__ __rdiv__",
    "pow": "__rpow__",
}.items():
    for _function in _methods(*_names.split()):
        OPERATIONS[_function] = _binary(getattr(torch, _torch_name), swapped=True)


@register(*_methods("where"))
def _where(condition: Any, x: Any, y: Any) -> Stacked:
    return Stacked(torch.where(*aligned(condition, x, y)))


@register(Tensor.add_)
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
    def run(x: Stacked, dim: Any = None, *args: Any, keepdim: bool = False, **kwargs: Any) -> Stacked:
        if not isinstance(x, Stacked) or isinstance(dim, bool):
            raise NotInTable(function.__name__)
        if args:
            if len(args) > 1 or function in (torch.var, torch.std):  # theirs is "unbiased" in this place
                raise NotInTable(f"{function.__name__} with positional options")
            keepdim = args[0]
        if dim is None or dim in ((), []):
            if keepdim:
                raise NotInTable(f"{function.__name__} of everything with keepdim")
            flat = x.data.reshape(x.data.shape[0], -1)
            return Stacked(function(flat, dim=1, **kwargs))
        return Stacked(function(x.data, dim=_axes(dim, x.dim()), keepdim=keepdim, **kwargs))

    return run


def argmax(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """As torch's: the first largest; its own kernel is 4 to 20 times slower on a CPU than that of ``max``."""
    return x.max(dim, keepdim).indices if x.is_cpu else torch.argmax(x, dim, keepdim)


def argmin(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """As torch's: the first smallest."""
    return x.min(dim, keepdim).indices if x.is_cpu else torch.argmin(x, dim, keepdim)


for _name, _quick in (("argmax", argmax), ("argmin", argmin)):
    for _function in _methods(_name):
        OPERATIONS[_function] = _reduction(_quick)


for _name in (
    "sum",
    "mean",
    "amax",
    "amin",
    "logsumexp",
    "var",
    "std",
    "prod",
    "all",
    "any",
):
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


@register(torch.flatten, Tensor.flatten)
def _flatten(x: Stacked, start_dim: int = 0, end_dim: int = -1) -> Stacked:
    rank = x.dim()
    return Stacked(x.data.flatten(_axes(start_dim, rank), _axes(end_dim, rank)))


@register(torch.reshape, Tensor.reshape, Tensor.view)
def _reshape(x: Stacked, *shape: Any) -> Stacked:
    return Stacked(x.data.reshape(x.data.shape[0], *_sizes(shape)))


@register(torch.permute, Tensor.permute)
def _permute(x: Stacked, *dims: Any) -> Stacked:
    return Stacked(x.data.permute(0, *(_axes(d, x.dim()) for d in _sizes(dims))))


@register(torch.transpose, Tensor.transpose)
def _transpose(x: Stacked, a: int, b: int) -> Stacked:
    return Stacked(x.data.transpose(_axes(a, x.dim()), _axes(b, x.dim())))


@register(torch.t, Tensor.t)
def _t(x: Stacked) -> Stacked:
    return x if x.dim() < 2 else Stacked(x.data.transpose(1, 2))


@register(torch.unsqueeze, Tensor.unsqueeze)
def _unsqueeze(x: Stacked, dim: int) -> Stacked:
    return Stacked(x.data.unsqueeze(_axes(dim, x.dim() + 1)))


@register(torch.squeeze, Tensor.squeeze)
def _squeeze(x: Stacked, dim: int | None = None) -> Stacked:
    if dim is None:
        return Stacked(x.data.reshape(x.data.shape[0], *(s for s in x.shape if s != 1)))
    return Stacked(x.data.squeeze(_axes(dim, x.dim())))


@register(torch.cat, torch.concat)
def _cat(parts: Any, dim: int = 0) -> Stacked:
    members = next(p.data.shape[0] for p in parts if isinstance(p, Stacked))
    raw = [p.data if isinstance(p, Stacked) else p.expand(members, *p.shape) for p in parts]
    return Stacked(torch.cat(raw, _axes(dim, raw[0].dim() - 1)))


@register(Tensor.__getitem__)
def _getitem(x: Stacked, index: Any) -> Stacked:
    parts = index if isinstance(index, tuple) else (index,)
    if not isinstance(x, Stacked) or not all(
        p is None or p is ... or isinstance(p, (int, slice)) for p in parts
    ):
        raise NotInTable("indexing with a tensor")
    return Stacked(x.data[(slice(None), *parts)])


@register(F.pad, torch._C._nn.pad)
def _pad(x: Stacked, pad: Any, mode: str = "constant", value: float | None = None) -> Stacked:
    if mode != "constant" or len(pad) > 2 * x.dim():
        raise NotInTable(f"pad with mode {mode}")
    return Stacked(F.pad(x.data, pad, mode, value))
