"""Large matrix products by oneDNN: batched for the kernels, differentiable for a network alone.

Torch sends float32 matrix products on a CPU to MKL, which on AMD machines leaves half of the vector width
unused; oneDNN does not (1.5 to 2.5 times faster for 4096 x 784 x 300, equal where MKL uses all of it). Its
overhead a call only pays for large matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LARGE = 1 << 20
"""Multiplications in a product from which oneDNN beats MKL."""

LARGE_WEIGHT = 1 << 14
"""Size of a weight from which its products with a usual batch are large."""

_onednn: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)


def available(a: Tensor) -> bool:
    """Whether oneDNN multiplies matrices of this kind."""
    return _onednn is not None and a.device.type == "cpu" and a.dtype == torch.float32


def by_onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a b^T + bias``: ``[m, k]``, ``[n, k]``, ``[n]`` -> ``[m, n]``, where `available`; no graph."""
    return _onednn(a, b, bias, "none", [], "")


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a b^T + bias``, by whichever library is faster; no graph."""
    if a.shape[0] * a.shape[1] * b.shape[0] >= LARGE and available(a):
        return by_onednn(a, b, bias)
    return a @ b.T if bias is None else torch.addmm(bias, a, b.T)


class Product(torch.autograd.Function):
    """`product` with derivatives of every order, forward and reverse, and under ``torch.func.vmap``."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        """One product."""
        return product(a, b, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps the factors."""
        a, b, bias = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        ctx.biased = bias is not None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """``g b``, ``g^T a`` and the column sums of g, themselves products."""
        a, b = ctx.saved_tensors
        g, needs = grads[0], ctx.needs_input_grad
        return (
            Product.apply(g, b.T, None) if needs[0] else None,
            Product.apply(g.T, a.T, None) if needs[1] else None,
            g.sum(0) if ctx.biased and needs[2] else None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        """``da b^T + a db^T + dbias``."""
        a, b = ctx.saved_tensors
        da, db, shift = tangents
        moved = None if da is None else Product.apply(da, b, shift)
        if db is not None:
            turned = Product.apply(a, db, None if moved is not None else shift)
            moved = turned if moved is None else moved + turned
        return shift.expand(a.shape[0], -1) if moved is None and shift is not None else moved

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], a: Tensor, b: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, int]:
        """Many products that share a factor are one larger product."""
        count = info.batch_size
        a, b = (t if d is None else t.movedim(d, 0) for t, d in zip((a, b), in_dims[:2], strict=True))
        if bias is not None and in_dims[2] is not None:
            return Product.vmap(info, (*in_dims[:2], None), a, b, None)[0] + bias.movedim(
                in_dims[2], 0
            ).unsqueeze(1), 0
        if in_dims[0] is None and in_dims[1] is not None:
            y = Product.apply(b.flatten(0, 1), a, None).unflatten(0, (count, -1)).mT
            return (y if bias is None else y + bias), 0
        if in_dims[1] is None:
            return Product.apply(a.flatten(0, 1), b, bias).unflatten(0, (count, -1)), 0
        return torch.stack([Product.apply(a[i], b[i], bias) for i in range(count)]), 0


class LargeProducts(TorchFunctionMode):
    """While active, linear layers of ordinary tensors multiply by `Product`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Takes over large ``F.linear``."""
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def pay(weights: Iterable[Tensor]) -> bool:
        """Whether some weight is large enough to be worth the watching."""
        return any(w.dim() == 2 and w.numel() >= LARGE_WEIGHT and available(w) for w in weights)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = input.shape[:-1].numel()
    same = input.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not same or not available(weight) or weight.dim() != 2 or rows * weight.numel() < LARGE:
        return F.linear(input, weight, bias)
    y = Product.apply(input.reshape(rows, input.shape[-1]), weight, bias)
    return y.reshape(*input.shape[:-1], weight.shape[0])
