"""Stacked values: each operation acts on every member as torch acts on that member alone."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes
from torch import Tensor

from losslab.engine import tape
from losslab.engine.stacked import NotInTable, Stacked
from losslab.engine.tape import Node

MEMBERS = 3

BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "**": operator.pow,
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow,
    "alpha": lambda a, b: torch.add(a, b, alpha=3), "maximum": torch.maximum, "minimum": torch.minimum,
    "where": lambda a, b: torch.where(a > b, a, b * b), "method": lambda a, b: a.sub(b).mul(b),
    "<": operator.lt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
TAPED = ("+", "-", "*", "add", "sub", "mul")

REDUCTIONS = ("sum", "mean", "amax", "amin", "logsumexp", "var", "std", "prod", "argmax", "softmax",
              "log_softmax", "cumsum", "all", "any")  # fmt: skip


def values(seed: int, shape: tuple[int, ...], stacked: bool) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    full = (MEMBERS, *shape) if stacked else shape
    return torch.rand(full, generator=g, dtype=torch.float64) + 0.5


@st.composite
def operands(draw: Any) -> list[Any]:
    """Two tensors that broadcast, or a number; at least one differs between members."""
    shapes = draw(
        mutually_broadcastable_shapes(num_shapes=2, max_dims=3, min_side=1, max_side=4)
    ).input_shapes
    kinds = draw(st.sampled_from(["ss", "sp", "ps", "sn", "ns"]))
    made: list[Any] = []
    for seed, (shape, kind) in enumerate(zip(shapes, kinds, strict=True)):
        made.append(1.5 if kind == "n" else (values(seed, shape, kind == "s"), kind == "s"))
    return made


def raw(operand: Any) -> Any:
    return operand if isinstance(operand, float) else operand[0]


def of(operand: Any, member: int) -> Any:
    return operand if isinstance(operand, float) else operand[0][member] if operand[1] else operand[0]


def accepted(op: Callable[..., Any], *given: Any) -> bool:
    """Whether plain torch takes these arguments (torch.maximum wants two tensors, for example)."""
    try:
        op(*given)
    except (TypeError, AttributeError):
        return False
    return True


@given(operands(), st.sampled_from(sorted(BINARY)))
def test_binary_operations(pair: list[Any], name: str) -> None:
    op = BINARY[name]
    if not accepted(op, of(pair[0], 0), of(pair[1], 0)):
        return
    leaves = [raw(p).requires_grad_() for p in pair if not isinstance(p, float) and p[1]]
    found = op(*(Stacked(raw(p)) if not isinstance(p, float) and p[1] else raw(p) for p in pair))
    assert isinstance(found, Stacked)
    wanted = torch.stack([op(of(pair[0], i), of(pair[1], i)) for i in range(MEMBERS)])
    torch.testing.assert_close(found.data.expand_as(wanted), wanted, rtol=1e-13, atol=1e-13)
    if wanted.is_floating_point():
        weights = values(7, tuple(wanted.shape), False)
        ours = torch.autograd.grad((found.data * weights).sum(), leaves, allow_unused=True)
        theirs = torch.autograd.grad((wanted * weights).sum(), leaves, allow_unused=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@given(operands(), st.sampled_from(TAPED))
def test_binary_operations_on_a_tape(pair: list[Any], name: str) -> None:
    op = BINARY[name]
    stacked = {str(k): raw(p) for k, p in enumerate(pair) if not isinstance(p, float) and p[1]}
    nodes = tape.leaves(stacked)
    found = op(*(nodes.get(str(k), raw(p)) for k, p in enumerate(pair)))
    assert isinstance(found, Node)
    leaves = {k: t.clone().requires_grad_() for k, t in stacked.items()}
    held = [(leaves[str(k)], True) if str(k) in leaves else p for k, p in enumerate(pair)]
    wanted = torch.stack([op(of(held[0], i), of(held[1], i)) for i in range(MEMBERS)])
    torch.testing.assert_close(found.data.expand_as(wanted), wanted.detach(), rtol=1e-13, atol=1e-13)
    result = (found * found).sum()
    tape.backward(result)
    theirs = torch.autograd.grad((wanted * wanted).sum(), list(leaves.values()))
    for node, wanted_grad in zip(nodes.values(), theirs, strict=True):
        torch.testing.assert_close(node.grad, wanted_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", [operator.add, operator.sub, operator.mul])
def test_a_value_on_a_tape_stays_on_it_whatever_it_meets(op: Callable[..., Any]) -> None:
    x = values(0, (2,), True)
    for order in (lambda a, b: (a, b), lambda a, b: (b, a)):
        for other in (Stacked(values(1, (2,), True)), values(2, (2,), False), 2.0, 3):
            node = tape.leaves({"x": x})["x"]
            result = op(*order(node, other)).sum()
            assert isinstance(result, Node)
            tape.backward(result)
            assert node.grad is not None
            assert bool((node.grad != 0).all())


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.sampled_from(REDUCTIONS),
    st.integers(-3, 2) | st.none(),
    st.booleans(),
    st.booleans(),
)
@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_reductions(shape: list[int], name: str, dim: int | None, keepdim: bool, method: bool) -> None:
    data = values(0, tuple(shape), True)
    if name in ("all", "any"):
        data = data > 1.0
    function = (lambda x, *a, **k: getattr(x, name)(*a, **k)) if method else getattr(torch, name)
    options: dict[str, Any] = {} if dim is None else {"dim": dim}
    if keepdim and name not in ("softmax", "log_softmax", "cumsum"):
        options["keepdim"] = True
    try:
        wanted = torch.stack([function(x, **options) for x in data])
    except (IndexError, TypeError):  # no such dimension, or torch wants one
        return
    try:
        found = function(Stacked(data), **options)
    except NotInTable:
        assert dim is None  # of everything with keepdim; the engine takes vmap
        return
    torch.testing.assert_close(found.data, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.mean((0, 2), True), lambda x: x.sum(-1, True), lambda x: x.var(0, unbiased=False),
        lambda x: x.flatten(-2), lambda x: x.flatten(0, 1), lambda x: x.reshape(-1, 2), lambda x: x[..., 0],
        lambda x: x[:, None, 1:], lambda x: x.unsqueeze(-1).squeeze(-1), lambda x: x.squeeze(),
        lambda x: x.transpose(0, -1), lambda x: x.permute(2, 0, 1), lambda x: torch.cat([x, x * 2], -1),
        lambda x: torch.cat([torch.ones(1, 3, 2), x]), lambda x: sum(y.sum() for y in x),
        lambda x: x.clamp(0.7, 1.1), lambda x: x.clone().add_(1.0), lambda x: x.mean(dtype=torch.float32),
        lambda x: torch.softmax(x, -1, torch.float32), lambda x: x @ x.transpose(-1, -2),
        lambda x: x @ torch.ones(2, 5), lambda x: torch.ones(3, 3) @ x, lambda x: 1 / x, lambda x: 2.0**x,
    ],
)  # fmt: skip
def test_operations_of_the_table(act: Callable[[Any], Any]) -> None:
    data = values(0, (4, 3, 2), True).float()
    wanted = torch.stack([act(x) for x in data])
    found = act(Stacked(data))
    assert tuple(found.shape) == tuple(wanted.shape[1:])
    torch.testing.assert_close(found.data, wanted)


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.var(0, False), lambda x: x.std(1, True), lambda x: x.var(False), lambda x: x.sum(axis=1),
        lambda x: x.sum([]), lambda x: x.mT, lambda x: x[True], lambda x: x[[0, 1]], lambda x: x[x > 1],
        lambda x: x.view(torch.int64), lambda x: torch.stack([y.sum() for y in x]), lambda x: x.max(),
        lambda x: x.norm(), lambda x: x.topk(1), torch.linalg.vector_norm, lambda x: x[0].flatten(1),
    ],
)  # fmt: skip
def test_what_looks_like_an_operation_of_the_table_is_right_or_refused(act: Callable[[Any], Any]) -> None:
    data = values(0, (4, 3, 2), True)
    try:
        found = act(Stacked(data))
    except Exception:  # the engine takes any as a reason to try the next backend
        return
    wanted = torch.stack([act(x) for x in data])
    torch.testing.assert_close(found.data, wanted, rtol=1e-12, atol=1e-12)


def test_a_branch_on_a_value_is_refused() -> None:
    with pytest.raises(NotInTable, match="differs between members"):
        bool(Stacked(torch.ones(3)) > 0)
