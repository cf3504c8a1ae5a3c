"""The first layer of an affine family of networks, computed once for all of them.

On a slice or a curve each weight is ``W_m = sum_k c_mk W_k`` with a few k and many m. Where the input is the
same for all members, so is ``x W_k^T``: K products instead of M, and then one product with the coefficients.
For a plane of LeNet-300-100 that leaves an eighth of the multiplications. On a CPU a chain of linear layers
and activations is then run point by point, over the same memory, which so stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losslab.engine import Points
from losslab.engine.backends import Function, Stand
from losslab.engine.chain import ACTIVATIONS, layers
from losslab.engine.products import product
from losslab.engine.stacked import Stacked
from losslab.engine.template import Template

ACTIVATIONS_BYTES = 1 << 22
"""Memory for values of points that are evaluated together: they should stay in the cache."""

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


class Remembering:
    """A network that is run once on each input, and knows what has been computed elsewhere."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._seen: dict[int, tuple[Any, Any]] = {}

    def put(self, x: Any, y: Any) -> None:
        """Tells it the outputs of an input."""
        self._seen[id(x)] = (x, y)  # the input is kept, so that its id stays its own

    def __call__(self, x: Any) -> Any:
        """Its outputs."""
        if id(x) not in self._seen:
            self.put(x, self._module(x))
        return self._seen[id(x)][1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _passes_on(layer: nn.Module | None) -> bool:
    """Whether a layer does nothing to vectors in evaluation mode."""
    if isinstance(layer, nn.Flatten):
        return (layer.start_dim, layer.end_dim) == (1, -1)
    return type(layer) in (nn.Identity, nn.Dropout)


@dataclass(frozen=True)
class Straight:
    """Linear layers, and activations after the first of them, run for one point after another.

    Args:
        layers: The names of a linear layer's weight and bias, or a function, which may work in place.
    """

    layers: tuple[Any, ...]

    @property
    def last(self) -> str:
        """The weight of the last linear layer."""
        return next(layer[0] for layer in reversed(self.layers) if isinstance(layer, tuple))

    @classmethod
    def of(cls, template: Template, frame: Points, x: Any) -> Straight | None:
        """The chain that a network in evaluation mode is; None if it is anything else, or partly frozen."""
        if not (isinstance(x, Tensor) and x.is_cpu and x.dim() > 1):
            return None
        names = {(id(table), key): name for table, key, name in template.slots}
        vectors = x.dim() == 2
        found: list[Any] = []
        for layer in layers(template.module):
            vectors = vectors or isinstance(layer, nn.Flatten)
            if type(layer) is nn.Linear and vectors:
                held = layer._parameters.items()
                found.append(tuple(names[id(layer._parameters), key] for key, p in held if p is not None))
            elif layer is not None and type(layer) in ACTIVATIONS and found:
                activation = ACTIVATIONS[type(layer)]
                found.append(activation.inplace or activation.function)
            elif not _passes_on(layer):
                return None
        used = {name for layer in found if isinstance(layer, tuple) for name in layer}
        return cls(tuple(found)) if used and used <= set(frame.weights) else None

    def outputs(self, frame: Points, coefficients: Tensor, x: Tensor, products: dict[Any, Any]) -> Tensor:
        """Outputs ``[M, B, C]`` at every combination of the frame on the inputs x ``[B, ...]``.

        Args:
            frame: K points.
            coefficients: ``[M, K]``.
            x: Inputs that all points share.
            products: What has been computed of the frame on these inputs so far.
        """
        (first, *rest) = self.layers
        key = (id(x), first)
        if key not in products:
            y = product(x.flatten(1), *(frame.weights[name].flatten(0, 1) for name in first))
            each = y.unflatten(1, (frame.members, -1)).transpose(0, 1).contiguous()
            products[key] = (each, x)
        later = [name for layer in rest if isinstance(layer, tuple) for name in layer]
        mixed = {name: _mixed(coefficients, frame.weights[name]) for name in later}
        found: Tensor | None = None
        for m, h in enumerate(_first(products[key][0], coefficients)):
            for layer in rest:
                h = product(h, *(mixed[n][m] for n in layer)) if isinstance(layer, tuple) else layer(h)
            if found is None:  # class by class, as the softmax wants it
                found = h.new_empty(len(coefficients), h.shape[1], h.shape[0])
            found[m].copy_(h.T)
        assert found is not None
        return found.transpose(1, 2)


def _mixed(coefficients: Tensor, frame: Tensor) -> Tensor:
    return (coefficients @ frame.flatten(1)).unflatten(1, frame.shape[1:])


def _first(each: Tensor, coefficients: Tensor) -> Iterator[Tensor]:
    """``sum_k c_mk each_k`` for one m after another, each in the memory of the one before.

    Rows that differ in their last coefficient only, as along a line or a grid's row, take one addition.
    """
    begun, value = torch.empty_like(each[:1]), torch.empty_like(each[0])
    known: list[float] | None = None
    for row, (*start, last) in zip(coefficients, coefficients.tolist(), strict=True):
        if start != known:
            torch.mm(row[None, :-1], each[:-1].flatten(1), out=begun.flatten(1))
            known = start
        yield torch.add(begun[0], each[-1], alpha=last, out=value)


def run_family(
    template: Template, fn: Function, frame: Points, coefficients: Tensor, at: Stand, widest: int
) -> dict[str, Tensor]:
    """``fn`` (name -> mean over the batch) at every combination of the frame.

    Args:
        template: The network, whose operations are all in the engine's table.
        fn: Metrics.
        frame: K points without batch norm.
        coefficients: ``[M, K]``.
        at: The batch, for all members alike.
        widest: The most outputs that a layer has.
    """
    x: Any = at.batch[0] if isinstance(at.batch, tuple) else None
    straight = Straight.of(template, frame, x)
    if straight is not None:
        widest = frame.weights[straight.last].shape[1]
    size = max(1, ACTIVATIONS_BYTES // (4 * at.examples * widest))
    products: dict[Any, Any] = {}
    parts: list[dict[str, Tensor]] = []
    for rows in coefficients.split(size):
        values: dict[str, Any] = {n: Family(w, rows, products) for n, w in frame.weights.items()}
        values |= {n: Stacked(b[:1].expand(len(rows), *b.shape[1:])) for n, b in frame.buffers.items()}
        with torch.no_grad(), template.holding(values, False) as module:
            network = Remembering(module)
            if straight is not None:
                network.put(x, Stacked(straight.outputs(frame, rows, x, products)))
            found = fn(network, at.batch)  # type: ignore[arg-type]
        parts.append({name: value.data for name, value in found.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
