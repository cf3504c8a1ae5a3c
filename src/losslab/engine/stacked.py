"""A value that N networks hold together, and the table of operations that know how to act on it.

`Stacked` stands where a network expects a tensor. Each torch function called on it is looked up in
`OPERATIONS`, which runs all members' work as one hand-batched operation; a function that is not there raises
`NotInTable`, and the engine takes vmap instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPERATIONS: dict[Any, Callable[..., Any]] = {}
"""Torch function or tensor method -> its implementation for arguments of which some are `Stacked`."""

_ACTIVATIONS = frozenset({"relu", "relu_", "sigmoid", "sigmoid_", "tanh"})


class NotInTable(Exception):
    """An operation that the table does not know for these arguments."""


class Stacked:
    """A tensor with a hidden leading member axis: it looks like one member's value.

    Args:
        data: ``[N, *shape]``.
    """

    __slots__ = ("data",)

    def __init__(self, data: Tensor) -> None:
        self.data = data

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the table's version of a torch function."""
        operation = OPERATIONS.get(func)
        if operation is None:
            raise NotInTable(getattr(func, "__name__", str(func)))
        return operation(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        method = getattr(Tensor, name, None)
        operation = OPERATIONS.get(method)
        if operation is None:
            raise NotInTable(f"Tensor.{name}")
        seen = visible(name, operation)
        return lambda *args, **kwargs: seen(self, *args, **kwargs)

    @property
    def shape(self) -> torch.Size:
        """Shape of one member's value."""
        return self.data.shape[1:]

    @property
    def ndim(self) -> int:
        """Dimensions of one member's value."""
        return self.data.dim() - 1

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        return self.data.device

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow here."""
        return self.data.requires_grad

    @property
    def is_cuda(self) -> bool:
        """Whether the values are on a GPU."""
        return self.data.is_cuda

    def dim(self) -> int:
        """Dimensions of one member's value."""
        return self.data.dim() - 1

    def size(self, dim: int | None = None) -> Any:
        """Size of one member's value."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Elements of one member's value."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Whether the values are floating."""
        return self.data.is_floating_point()

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        raise NotInTable("a branch on a value that differs between members")

    def __iter__(self) -> Any:
        return iter(Stacked(row) for row in self.data.unbind(1))


def visible(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
    """How to run a method so that a mode, if there is one, sees activations, as it sees a tensor's."""
    if name in _ACTIVATIONS and torch._C._is_torch_function_mode_enabled():
        function: Callable[..., Any] = getattr(torch, name)
        return function
    return operation


def _dunder(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)

    def call(self: Stacked, *args: Any) -> Any:
        # As torch dispatches, to the most derived type: what meets a value on a tape goes on the tape.
        kind = next((type(a) for a in args if isinstance(a, type(self))), type(self))
        return kind.__torch_function__(function, (), (self, *args))

    return call


# fmt: off
_DUNDERS = [
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow", "neg", "abs",
    "matmul", "rmatmul", "getitem", "eq", "ne", "lt", "le", "gt", "ge", "float", "iadd", "isub", "imul",
    "itruediv",
]
# fmt: on
for _name in _DUNDERS:
    setattr(Stacked, f"__{_name}__", _dunder(f"__{_name}__"))
