"""The fastest way through a network of a few small layers: a tape of hand-batched operations and their VJPs.

For tiny networks the bookkeeping of automatic differentiation costs more than the arithmetic. Here the
network's own code still runs at every step, on `Node` values; each operation notes how to send a gradient
back, and `backward` plays the notes in reverse. Operations not in `RULES` raise `NotInTable`, and the engine
takes the table with torch's autograd instead. First derivatives only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from losslab.engine import kernels, operations
from losslab.engine.points import Stack
from losslab.engine.stacked import NotInTable, Stacked, visible

Vjp = Callable[[Tensor], Sequence[Any]]
"""The gradient of a node's value -> the gradients it sends to its parents, in their order.

A gradient belongs to the node it arrives at, which may overwrite it; so no two parents are sent one tensor.
"""

RULES: dict[Any, Callable[..., Any]] = {}
"""Torch function -> implementation on nodes that also records its vector-Jacobian products."""


class Node(Stacked):
    """A stacked value on a tape.

    Args:
        data: ``[N, *shape]``.
        parents: The values it was made of.
        vjp: Sends a gradient back to them.
    """

    __slots__ = ("grad", "parents", "tape", "vjp")

    def __init__(self, data: Tensor, parents: Sequence[Node] = (), vjp: Vjp = tuple) -> None:
        self.data = data
        self.parents, self.vjp = parents, vjp
        self.grad: Tensor | None = None
        if parents:
            self.tape: list[Node] = parents[0].tape
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
        seen = visible(name, rule)
        return lambda *args, **kwargs: seen(self, *args, **kwargs)


def leaves(weights: Stack) -> dict[str, Node]:
    """The weights as nodes at the start of a fresh tape."""
    tape: list[Node] = []
    nodes = {}
    for name, weight in weights.items():
        nodes[name] = node = Node(weight.detach())
        node.tape = tape
    return nodes


def backward(result: Node, between: Sequence[Node] = ()) -> dict[int, Tensor]:
    """Leaves d(sum of ``result``)/d(value) in ``grad`` of the leaves: the tape played in reverse.

    Args:
        result: One number a member.
        between: Values on the way whose gradients are wanted too.

    Returns:
        The ``id`` of a node of ``between`` -> its gradient; those that the result depends on.
    """
    result.grad = torch.ones_like(result.data)
    wanted = {id(node) for node in between}
    found = {}
    tape = result.tape
    while tape:
        node = tape.pop()  # and with it what only its way back needed: the memory is taken again
        g = node.grad
        if g is None:
            continue
        if id(node) in wanted:
            found[id(node)] = g.clone()  # what comes next may take its memory
        for parent, sent in zip(node.parents, node.vjp(g), strict=True):
            parent.grad = sent if parent.grad is None else parent.grad + sent
        node.grad = None
    return found


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
    parents = [weight] if bias is None else [weight, bias]
    inner = isinstance(x, Node)
    y, vjp = operations.linear(data, w, None if bias is None else bias.data, inner)
    return Node(y, [*parents, x] if inner else parents, vjp)


_USUAL = (False, True, 1.0, "none")
"""Options that change nothing here: in place or not, alpha of elu, gelu without approximation."""


def _activation(activation: operations.Activation) -> Callable[..., Any]:
    def run(x: Node, *args: Any, **kwargs: Any) -> Node:
        if any(option not in _USUAL for option in (*args, *kwargs.values())):
            raise NotInTable(f"{activation.function.__name__} with options")
        y, vjp = activation(x.data)
        return Node(y, (x,), lambda g: (vjp(g),))

    return run


for _names, _each in (
    ((torch.relu, F.relu, Tensor.relu), operations.RELU),
    ((torch.tanh, F.tanh, Tensor.tanh), operations.TANH),
    ((torch.sigmoid, F.sigmoid, Tensor.sigmoid), operations.SIGMOID),
    ((F.silu,), operations.SILU),
    ((F.gelu,), operations.GELU),
    ((F.elu,), operations.ELU),
    ((F.softsign,), operations.SOFTSIGN),
    ((torch.square, Tensor.square), operations.SQUARE),
    ((torch.neg, Tensor.neg, Tensor.__neg__), operations.NEGATIVE),
    ((torch.exp, Tensor.exp), operations.EXPONENTIAL),
):
    for _name in _names:
        RULES[_name] = _activation(_each)


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
    parents = [v for v in (a, b) if isinstance(v, Node)]
    signs = [sign for v, sign in ((a, sign_a), (b, sign_b)) if isinstance(v, Node)]

    def vjp(g: Tensor) -> list[Tensor]:
        sent = [_sum_to(g if s > 0 else -g, p.data.shape) for s, p in zip(signs, parents, strict=True)]
        if len(sent) == 2 and sent[1] is g:
            sent[1] = g.clone()
        return sent

    return Node(data, parents, vjp)


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
    factors = [(v, other) for v, other in ((a, y), (b, x)) if isinstance(v, Node)]
    return Node(
        x * y,
        [v for v, _ in factors],
        lambda g: [_sum_to(g * other, v.data.shape) for v, other in factors],
    )


@_rule(torch.div, Tensor.div, Tensor.__truediv__)
def _div(a: Any, b: Any) -> Node:
    if not isinstance(b, (int, float)):
        raise NotInTable("division by a tensor")
    return Node(a.data / b, (a,), lambda g: (g / b,))


@_rule(torch.pow, Tensor.pow, Tensor.__pow__)
def _pow(a: Any, b: Any) -> Node:
    if not isinstance(b, (int, float)) or b == 0 or _is_constant(a):
        raise NotInTable("a tensor, or 0, as exponent")
    x = a.data
    return Node(x**b, (a,), lambda g: (g * (b * x ** (b - 1)),))


@_rule(torch.sum, Tensor.sum)
def _sum(x: Node) -> Node:
    data = x.data.reshape(x.data.shape[0], -1).sum(1)
    return Node(data, (x,), lambda g: (_spread(g, x.data.shape),))


@_rule(torch.mean, Tensor.mean)
def _mean(x: Node) -> Node:
    count = x.data[0].numel()
    data = x.data.reshape(x.data.shape[0], -1).mean(1)
    return Node(data, (x,), lambda g: (_spread(g / count, x.data.shape),))


def _spread(g: Tensor, shape: torch.Size) -> Tensor:
    """One number a member ``[N]`` at every place of ``[N, ...]``."""
    return g.view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()


def _reshaped(x: Node, data: Tensor) -> Node:
    shape = x.data.shape
    return Node(data, (x,), lambda g: (g.reshape(shape),))


@_rule(torch.flatten, Tensor.flatten)
def _flatten(x: Node, start_dim: int = 0, end_dim: int = -1) -> Node:
    last = end_dim if end_dim < 0 else end_dim + 1
    return _reshaped(x, x.data.flatten(start_dim + 1 if start_dim >= 0 else start_dim, last))


@_rule(torch.reshape, Tensor.reshape, Tensor.view)
def _reshape(x: Node, *shape: Any) -> Node:
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    return _reshaped(x, x.data.reshape(x.data.shape[0], *sizes))


@_rule(F.batch_norm)
def _batch_norm(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Node:
    given = (x, weight, bias)
    on_tape = [k for k, v in enumerate(given) if isinstance(v, Node)]
    values = (running_mean, running_var, weight, bias)
    if not on_tape or any(v is not None and not isinstance(v, Stacked) for v in values):
        raise NotInTable("batch norm of constants, or with shared statistics")
    mean, var, scale, shift = (None if v is None else v.data for v in values)
    inputs = x.data if isinstance(x, Stacked) else x.expand(given[on_tape[0]].data.shape[0], *x.shape)
    data, vjp = kernels.batch_norm_with_vjp(inputs, mean, var, scale, shift, training, momentum, eps)

    def send(g: Tensor) -> list[Any]:
        sent = vjp(g)
        return [sent[k] for k in on_tape]

    return Node(data, [given[k] for k in on_tape], send)


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
    losses, vjp = operations.cross_entropy(z, labels, ignore_index)
    return Node(losses, (input,), lambda g: (vjp(g),))


@_rule(F.mse_loss)
def _mse_loss(input: Any, target: Any, *args: Any, reduction: str = "mean", **kwargs: Any) -> Node:
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    if args or kwargs or reduction != "mean" or tuple(input.shape) != tuple(target.shape):
        raise NotInTable("this form of mse_loss")
    if _is_constant(input) or not _is_constant(target):
        return _mean(RULES[torch.square](_sum_of(input, target, 1, -1)))
    y = target.data if isinstance(target, Stacked) else target.expand(input.data.shape)
    losses, vjp = operations.mean_square(input.data, y)
    return Node(losses, (input,), lambda g: (vjp(g),))
