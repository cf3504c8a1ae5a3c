"""The fastest way through a network of a few small layers: a tape of hand-batched operations and their VJPs.

For tiny networks the bookkeeping of automatic differentiation costs more than the arithmetic. Here the
network's own code still runs at every step, on `Node` values; each operation notes how to send a gradient
back, and `backward` plays the notes in reverse. Operations not in `RULES` raise `NotInTable`, and the engine
takes the table with torch's autograd instead. First derivatives only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from losslab.engine import kernels
from losslab.engine.gradients import Factored
from losslab.engine.points import Stack
from losslab.engine.stacked import NotInTable, Stacked
from losslab.rules.fused import SLICED_FROM

aten = torch.ops.aten

Vjp = Callable[[Tensor], Tensor]

RULES: dict[Any, Callable[..., Any]] = {}
"""Torch function -> implementation on nodes that also records its vector-Jacobian products."""


class Node(Stacked):
    """A stacked value on a tape.

    Args:
        data: ``[N, *shape]``.
        parents: The values it was made of, each with the product that sends a gradient back to it.
    """

    __slots__ = ("grad", "parents", "tape")

    def __init__(self, data: Tensor, parents: tuple[tuple[Node, Vjp], ...] = ()) -> None:
        self.data = data
        self.parents = parents
        self.grad: Tensor | None = None
        if parents:
            self.tape: list[Node] = parents[0][0].tape
            self.tape.append(self)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the tape's version of a torch function."""
        rule = RULES.get(func)
        if rule is None:
            raise NotInTable(getattr(func, "__name__", str(func)))
        return rule(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        rule = RULES.get(getattr(Tensor, name, None))
        if rule is None:
            raise NotInTable(f"Tensor.{name}")
        return lambda *args, **kwargs: rule(self, *args, **kwargs)


def leaves(weights: Stack) -> dict[str, Node]:
    """The weights as nodes at the start of a fresh tape."""
    tape: list[Node] = []
    nodes = {}
    for name, weight in weights.items():
        nodes[name] = node = Node(weight.detach())
        node.tape = tape
    return nodes


def backward(result: Node) -> None:
    """Leaves d(sum of ``result``)/d(value) in ``grad`` of the leaves: the tape played in reverse."""
    result.grad = torch.ones_like(result.data)
    for node in reversed(result.tape):
        g = node.grad
        if g is None:
            continue
        for parent, vjp in node.parents:
            sent = vjp(g)
            parent.grad = sent if parent.grad is None else parent.grad + sent
        node.grad = None
    result.tape.clear()


def _rule(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(implementation: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            RULES[function] = implementation
        return implementation

    return add


def _is_constant(value: Any) -> bool:
    return not isinstance(value, Node)


@_rule(F.linear)
def _linear(x: Any, weight: Any, bias: Any = None) -> Node:
    if _is_constant(weight) or (bias is not None and _is_constant(bias)):
        raise NotInTable("linear with a shared weight")
    w, members = weight.data, weight.data.shape[0]
    data = x.data if isinstance(x, Stacked) else x.expand(members, *x.shape)
    if data.dim() != 3:
        raise NotInTable("linear of anything but a batch of vectors")
    y = kernels.linear(data, w, None if bias is None else bias.data)
    factored = w.is_cpu and w[0].numel() >= SLICED_FROM
    vjp_weight: Any = Factored if factored else kernels.linear_vjp_weight
    parents: list[tuple[Node, Vjp]] = [(weight, lambda g: vjp_weight(g, data))]
    if bias is not None:
        parents.append((bias, lambda g: g.sum(1)))
    if isinstance(x, Node):
        parents.append((x, lambda g: kernels.linear_vjp_input(g, w, data)))
    return Node(y, tuple(parents))


def _activation(function: Any, slope: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """An elementwise function; ``slope(g, x, y)`` is the gradient sent back."""

    def run(x: Node, *args: Any, **kwargs: Any) -> Node:
        if args or any(v for k, v in kwargs.items() if k != "inplace"):
            raise NotInTable(f"{function.__name__} with options")
        data = x.data
        y = function(data)
        return Node(y, ((x, lambda g: slope(g, data, y)),))

    return run


def _softsign(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


_ACTIVATIONS: list[tuple[tuple[Any, ...], Any, Callable[[Tensor, Tensor, Tensor], Tensor]]] = [
    ((torch.relu, F.relu, Tensor.relu), torch.relu, lambda g, x, y: aten.threshold_backward(g, y, 0)),
    ((torch.tanh, F.tanh, Tensor.tanh), torch.tanh, lambda g, x, y: aten.tanh_backward(g, y)),
    ((torch.sigmoid, F.sigmoid, Tensor.sigmoid), torch.sigmoid, lambda g, x, y: aten.sigmoid_backward(g, y)),
    ((F.silu,), F.silu, lambda g, x, y: aten.silu_backward(g, x)),
    ((F.gelu,), F.gelu, lambda g, x, y: aten.gelu_backward(g, x)),
    ((F.elu,), F.elu, lambda g, x, y: aten.elu_backward(g, 1.0, 1.0, 1.0, False, x)),
    ((F.softsign,), _softsign, lambda g, x, y: g * (1 - y.abs()).square_()),
    ((torch.square, Tensor.square), torch.square, lambda g, x, y: g * (2 * x)),
    ((torch.neg, Tensor.neg, Tensor.__neg__), torch.neg, lambda g, x, y: -g),
    ((torch.exp, Tensor.exp), torch.exp, lambda g, x, y: g * y),
]
for _functions, _function, _slope in _ACTIVATIONS:
    for _each in _functions:
        RULES[_each] = _activation(_function, _slope)


def _sum_to(g: Tensor, shape: torch.Size) -> Tensor:
    """A gradient summed over the axes along which its value was broadcast."""
    extra = g.dim() - len(shape)
    if extra:  # the member axis leads, broadcast axes come right behind it
        g = g.sum(tuple(range(1, 1 + extra)))
    axes = tuple(i for i, (a, b) in enumerate(zip(g.shape, shape, strict=True)) if a != b)
    return g.sum(axes, keepdim=True) if axes else g


def _raw(value: Any, rank: int) -> Any:
    if isinstance(value, Stacked):
        d = value.data
        return d if d.dim() == rank + 1 else d.reshape(d.shape[0], *[1] * (rank + 1 - d.dim()), *d.shape[1:])
    return value


def _rank(*values: Any) -> int:
    return max(v.dim() for v in values if isinstance(v, (Stacked, Tensor)))


def _sum_of(a: Any, b: Any, sign_a: int, sign_b: int) -> Node:
    rank = _rank(a, b)
    x, y = _raw(a, rank), _raw(b, rank)
    data = x + y if sign_a == sign_b else (x - y if sign_a > 0 else y - x)
    parents: list[tuple[Node, Vjp]] = []
    for value, sign in ((a, sign_a), (b, sign_b)):
        if isinstance(value, Node):
            shape = value.data.shape
            parents.append((value, _sender(shape, sign)))
    return Node(data, tuple(parents))


def _sender(shape: torch.Size, sign: int) -> Vjp:
    return lambda g: _sum_to(g if sign > 0 else -g, shape)


@_rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
def _add(a: Any, b: Any) -> Node:
    return _sum_of(a, b, 1, 1)


@_rule(torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__isub__)
def _sub(a: Any, b: Any) -> Node:
    return _sum_of(a, b, 1, -1)


@_rule(Tensor.__rsub__)
def _rsub(a: Any, b: Any) -> Node:
    return _sum_of(a, b, -1, 1)


@_rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__)
def _mul(a: Any, b: Any) -> Node:
    rank = _rank(a, b)
    x, y = _raw(a, rank), _raw(b, rank)
    parents: list[tuple[Node, Vjp]] = []
    if isinstance(a, Node):
        parents.append((a, lambda g: _sum_to(g * y, a.data.shape)))
    if isinstance(b, Node):
        parents.append((b, lambda g: _sum_to(g * x, b.data.shape)))
    return Node(x * y, tuple(parents))


@_rule(torch.div, Tensor.div, Tensor.__truediv__)
def _div(a: Any, b: Any) -> Node:
    if not isinstance(b, (int, float)):
        raise NotInTable("division by a tensor")
    return Node(a.data / b, ((a, lambda g: g / b),))


@_rule(torch.pow, Tensor.pow, Tensor.__pow__)
def _pow(a: Any, b: Any) -> Node:
    if not isinstance(b, (int, float)) or b == 0 or _is_constant(a):
        raise NotInTable("a tensor, or 0, as exponent")
    x = a.data
    return Node(x**b, ((a, lambda g: g * (b * x ** (b - 1))),))


@_rule(torch.sum, Tensor.sum)
def _sum(x: Node) -> Node:
    shape = x.data.shape
    return Node(
        x.data.reshape(shape[0], -1).sum(1),
        ((x, lambda g: g.view(-1, *[1] * (len(shape) - 1)).expand(shape)),),
    )


@_rule(torch.mean, Tensor.mean)
def _mean(x: Node) -> Node:
    shape, count = x.data.shape, x.data[0].numel()
    return Node(
        x.data.reshape(shape[0], -1).mean(1),
        ((x, lambda g: (g / count).view(-1, *[1] * (len(shape) - 1)).expand(shape)),),
    )


def _reshaped(x: Node, data: Tensor) -> Node:
    shape = x.data.shape
    return Node(data, ((x, lambda g: g.reshape(shape)),))


@_rule(torch.flatten, Tensor.flatten)
def _flatten(x: Node, start_dim: int = 0, end_dim: int = -1) -> Node:
    last = end_dim if end_dim < 0 else end_dim + 1
    return _reshaped(x, x.data.flatten(start_dim + 1 if start_dim >= 0 else start_dim, last))


@_rule(torch.reshape, Tensor.reshape, Tensor.view)
def _reshape(x: Node, *shape: Any) -> Node:
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    return _reshaped(x, x.data.reshape(x.data.shape[0], *sizes))


@_rule(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
def _dropout(x: Node, p: float = 0.5, training: bool = True, inplace: bool = False) -> Node:
    if training and p > 0:
        raise NotInTable("dropout without the members' keys")
    return x


@_rule(F.cross_entropy)
def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Node:
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
    if not plain or reduction != "mean" or _is_constant(input) or input.dim() != 2 or target.dim() != 1:
        raise NotInTable("this form of cross_entropy")
    z = input.data
    labels = target.data if isinstance(target, Stacked) else target.expand(z.shape[0], *target.shape)
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
    return Node(losses.neg_(), ((input, vjp),))


@_rule(F.mse_loss)
def _mse_loss(input: Any, target: Any, *args: Any, reduction: str = "mean", **kwargs: Any) -> Node:
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    if args or kwargs or reduction != "mean" or tuple(input.shape) != tuple(target.shape):
        raise NotInTable("this form of mse_loss")
    return _mean(_activation_of_square(_sum_of(input, target, 1, -1)))


_activation_of_square = RULES[torch.square]
