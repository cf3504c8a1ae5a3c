"""Runs a network once on tensors whose axes carry labels, and learns which units may change places.

Each torch function that the network's code calls says what it does to labels: an elementwise function keeps
them, a matrix product makes the axes that it sums over one, a reshape regroups them. A function that is not
known fixes the axes that it is given, so what remains free can be permuted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from losslab.engine.template import Template
from losslab.paths.labels import Label, unify
from losslab.tasks.nest import leaves, map_nest

Labels = list[Label]

RULES: dict[str, Callable[..., Any]] = {}
"""Name of a torch function -> ``rule(trace, result, *args, **kwargs)``, the labels of its result."""


class Trace:
    """What a run has found out.

    Attributes:
        fixed_by: Functions that are not known and fixed free axes.
        read: What the layers read in order: the label of the axis that is summed over, and the values as
            ``[rows, size]``; filled if asked for.
    """

    def __init__(self, keep: bool = False) -> None:
        self.fixed_by: list[str] = []
        self.read: list[tuple[Label, Tensor]] = []
        self.keep = keep

    def reads(self, x: Tensor, axis: int) -> None:
        """Notes what a layer reads."""
        label = labels_of(x)[axis]
        if self.keep and label.free:
            plain = x.as_subclass(Tensor).detach()
            self.read.append((label, plain.movedim(axis, -1).reshape(-1, plain.shape[axis])))


class Marked(Tensor):
    """A tensor whose axes carry labels."""

    labels: Labels
    seen_by: Trace

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls the function and labels its result."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            tensors = leaves(result) if isinstance(result, (Tensor, tuple, list)) else []
            if not tensors:
                return result
            trace = next(t.seen_by for t in _marked((args, kwargs)))
            name = getattr(func, "__name__", str(func))
            if name == "__get__":
                name = getattr(getattr(func, "__self__", None), "__name__", name)
            rule = RULES.get(name, _unknown)
            found = rule(trace, result, *args, **kwargs)
            if found is NotImplemented:
                found = _unknown(trace, result, *args, **kwargs)
            if isinstance(found, _Unknown):
                if found.harm:
                    trace.fixed_by.append(name)
                return map_nest(lambda t: mark(t, _fixed(t), trace), result)
            if isinstance(result, Tensor):
                return mark(result, found, trace)
            pairs = zip(result, found, strict=True)
            return type(result)(mark(t, ls, trace) if isinstance(t, Tensor) else t for t, ls in pairs)


class _Unknown:
    def __init__(self, harm: bool) -> None:
        self.harm = harm


def mark(t: Tensor, labels: Labels, trace: Trace) -> Marked:
    """The tensor with labels on its axes."""
    assert len(labels) == t.dim(), (len(labels), t.dim())
    marked = t if isinstance(t, Marked) else t.as_subclass(Marked)
    marked.labels, marked.seen_by = labels, trace
    return marked


def labels_of(t: Tensor) -> Labels:
    """The labels of a tensor's axes; those of a tensor that the code made up itself are fixed."""
    return t.labels if isinstance(t, Marked) and hasattr(t, "labels") else _fixed(t)


def traced(
    module: nn.Module, run: Callable[[nn.Module, Any], Any], batch: Any, keep: bool = False
) -> tuple[dict[str, Labels], Trace]:
    """Runs a network in evaluation mode on labelled weights, buffers and examples.

    Args:
        module: The network; copied.
        run: ``run(module, batch)``, whose results must not change.
        batch: Examples; their axes are fixed.
        keep: Whether to keep what the layers read.

    Returns:
        The labels of each weight and buffer, and what else was learned.
    """
    template, trace = Template(module), Trace(keep)
    named = [*module.named_parameters(), *module.named_buffers()]
    weights = {n: mark(t.detach().clone(), [Label(s) for s in t.shape], trace) for n, t in named}
    given = map_nest(lambda t: mark(t.detach().clone(), _fixed(t), trace), batch)
    with torch.no_grad(), template.holding(weights, False) as network:
        result = run(network, given)
    for t in leaves(result):
        for label in labels_of(t):
            label.fix()
    return {n: t.labels for n, t in weights.items()}, trace


def broadcast(result: Tensor, *operands: Any) -> Labels:
    """Labels of an elementwise result of several tensors: axes that meet become one."""
    found: Labels = []
    for axis in range(1, result.dim() + 1):
        own: Label | None = None
        for t in operands:
            if isinstance(t, Tensor) and t.dim() >= axis and t.shape[-axis] > 1:
                label = labels_of(t)[-axis]
                if own is not None:
                    unify(own, label)
                own = own or label
        found.insert(0, own or Label(result.shape[-axis], fixed=True))
    return found


def _unknown(trace: Trace, result: Any, *args: Any, **kwargs: Any) -> Any:
    harm = False
    for t in _marked((args, kwargs)):
        for label in t.labels:
            harm |= label.free
            label.fix()
    return _Unknown(harm)


def _marked(nest: Any) -> list[Marked]:
    return [t for t in leaves(nest) if isinstance(t, Marked) and hasattr(t, "labels")]


def _fixed(t: Tensor) -> Labels:
    return [Label(s, fixed=True) for s in t.shape]
