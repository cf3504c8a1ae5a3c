"""The first layer of an affine family of networks, computed once for all of them.

On a slice or a curve each weight is ``W_m = sum_k c_mk W_k`` with a few k and many m. Where the input is the
same for all members, so is ``x W_k^T``: K products instead of M, and then one product with the coefficients.
For a plane of LeNet-300-100 that leaves an eighth of the multiplications.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from losslab.engine import Points, kernels
from losslab.engine.backends import Function, Stand
from losslab.engine.stacked import Stacked
from losslab.engine.template import Template

WIDE = 64
"""Outputs from which a layer is computed example by example."""

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


class Family(Stacked):
    """The stack ``sum_k c_mk t_k`` that is written out only when somebody needs it.

    Args:
        frame: ``[K, *shape]``.
        coefficients: ``[M, K]``.
        products: What has been computed of the frame on shared inputs so far; kept between families.
    """

    __slots__ = ("_written", "coefficients", "frame", "products")

    def __init__(self, frame: Tensor, coefficients: Tensor, products: dict[Any, Any]) -> None:
        self.frame, self.coefficients, self.products = frame, coefficients, products
        self._written: Tensor | None = None

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """``[M, *shape]``."""
        if self._written is None:
            flat = self.coefficients @ self.frame.reshape(len(self.frame), -1)
            self._written = flat.reshape(-1, *self.frame.shape[1:])
        return self._written

    @property
    def shape(self) -> torch.Size:
        """Shape of one member's value."""
        return self.frame.shape[1:]

    @property
    def ndim(self) -> int:
        """Dimensions of one member's value."""
        return self.frame.dim() - 1

    def dim(self) -> int:
        """Dimensions of one member's value."""
        return self.frame.dim() - 1

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Shares what is shared, leaves the rest to the table."""
        if func is F.linear or func in _CONVOLUTIONS:
            found = _shared(func, *args, **(kwargs or {}))
            if found is None and func is F.linear:
                found = _wide(*args, **(kwargs or {}))
            if found is not None:
                return found
        return super().__torch_function__(func, types, args, kwargs)


def _shared(function: Any, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
    """The layer on an input that all members share, or None where it is not that."""
    batched = 2 if function is F.linear else weight.dim()
    groups = kwargs.get("groups", args[3] if len(args) > 3 else 1)
    if not isinstance(x, Tensor) or not isinstance(weight, Family) or x.dim() != batched or groups != 1:
        return None
    if bias is not None and not isinstance(bias, Family):
        return None
    key = (id(x), id(weight.frame), repr((args, kwargs)))
    if key not in weight.products:
        frames, outputs = weight.frame.shape[:2]
        offset = None if bias is None else bias.frame.flatten()
        y = function(x, weight.frame.flatten(0, 1), offset, *args, **kwargs)
        each = y.unflatten(1, (frames, outputs)).transpose(0, 1).contiguous()
        weight.products[key] = (each, x)  # the input is kept, so that its id stays its own
    each, _ = weight.products[key]
    mixed = weight.coefficients @ each.flatten(1)
    return Stacked(mixed.reshape(-1, *each.shape[1:]))


def _wide(x: Any, weight: Any, bias: Any = None) -> Stacked | None:
    """A hidden layer whose outputs are many, example by example, or None where it is not that.

    The table computes a layer that is narrower than its batch feature by feature, because the softmax of a
    last layer, and gradients, are faster so. Here nothing is differentiated.
    """
    few = weight.shape[0] < WIDE or not isinstance(x, Stacked) or x.dim() != 2
    if few or not isinstance(weight, Stacked) or not (bias is None or isinstance(bias, Stacked)):
        return None
    return Stacked(kernels.products(x.data, weight.data, None if bias is None else bias.data))


def run_family(
    template: Template, fn: Function, frame: Points, coefficients: Tensor, at: Stand, size: int
) -> dict[str, Tensor]:
    """``fn`` (name -> mean over the batch) at every combination of the frame, ``size`` at a time.

    Args:
        template: The network, whose operations are all in the engine's table.
        fn: Metrics.
        frame: K points without batch norm.
        coefficients: ``[M, K]``.
        at: The batch, for all members alike.
        size: How many points at a time.
    """
    products: dict[Any, Any] = {}
    parts: list[dict[str, Tensor]] = []
    for rows in coefficients.split(size):
        values: dict[str, Any] = {n: Family(w, rows, products) for n, w in frame.weights.items()}
        values |= {n: Stacked(b[:1].expand(len(rows), *b.shape[1:])) for n, b in frame.buffers.items()}
        with torch.no_grad(), template.holding(values, False) as module:
            found = fn(module, at.batch)
        parts.append({name: value.data for name, value in found.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
