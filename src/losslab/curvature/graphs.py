"""One chunk of data, differentiated: what products of a matrix with vectors are computed from."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from losslab.engine.backends import Function, Stand, VmapBackend
from losslab.engine.execution import Execution
from losslab.errors import LosslabError
from losslab.tasks import Batch
from losslab.tasks.nest import leaves, map_nest

Theta = list[Tensor]
"""The weights that are differentiated, ``[n, ...]`` each, in the order of their names."""

Middle = Callable[[Tensor, Batch], Callable[[Tensor], Tensor]]
"""From outputs ``[n, B, ...]`` and their batch, the matrix between ``J^T`` and ``J`` as a function."""


@dataclass(frozen=True)
class Piece:
    """A chunk of the data for some of the points.

    Args:
        execution: How their code is run.
        at: The points on the chunk.
        share: The chunk's share of the examples.
        rows: Which points.
        names: The weights that are differentiated.
    """

    execution: Execution
    at: Stand
    share: float
    rows: slice
    names: tuple[str, ...]

    def thinned(self, examples: int) -> Iterator[Piece]:
        """The chunk in parts of at most so many examples."""
        total, step = self.at.examples, max(1, examples // self.at.members)
        for a in range(0, total, step):
            count = min(step, total - a)
            batch = map_nest(lambda t, a=a, n=count: t[a : a + n], self.at.batch)
            at = dataclasses.replace(self.at, batch=batch)
            yield dataclasses.replace(self, at=at, share=self.share * count / total)

    def theta(self) -> Theta:
        """Fresh leaves at the points."""
        return [self.at.weights[n].detach().requires_grad_() for n in self.names]

    def run(self, fn: Function, theta: Theta) -> Any:
        """``fn`` at every point with these weights; differentiable."""
        weights = self.at.weights | dict(zip(self.names, theta, strict=True))
        execution = dataclasses.replace(self.execution, chunk=self.at.members)
        return execution.run(fn, dataclasses.replace(self.at, weights=weights), training=False)

    def each(self, fn: Function, theta: Theta) -> Tensor:
        """``fn`` on each example alone, ``[n, B]``: every example has a copy of the weights."""
        weights = self.at.weights | dict(zip(self.names, theta, strict=True))
        count = self.at.examples
        batch = map_nest(lambda t: t[:, None], self.at.batch)
        template, draws = self.execution.backend.template, self.execution.backend.draws
        rows = []
        for i in range(self.at.members):
            one = [
                {name: t[i].expand(count, *t.shape[1:]) for name, t in stack.items()}
                for stack in (weights, self.at.buffers)
            ]
            at = Stand(one[0], one[1], batch, True, self.at.keys[i].expand(count)).sheltered()
            try:
                rows.append(VmapBackend(template, draws).run(fn, at, training=False))
            except Exception:  # whatever vmap makes of the user's code
                rows.append(dataclasses.replace(self.execution, chunk=count).run(fn, at, training=False))
        return torch.stack(rows)


class Graph(Protocol):
    """A differentiated chunk.

    Attributes:
        slopes: First derivatives with their graphs, if any are held.
    """

    slopes: Sequence[Tensor | None]

    def products(self, vectors: Theta, batched: bool = False) -> list[Tensor | None]:
        """The matrix times one vector, given and returned by name; with ``batched``, ``[K, n, ...]`` each."""
        ...


class TwiceDifferentiated:
    """The gradient of a loss with its graph: each product is one backward pass through it.

    Args:
        piece: The chunk.
        loss: ``loss(module, batch)``.
    """

    def __init__(self, piece: Piece, loss: Function) -> None:
        self.theta = piece.theta()
        with torch.enable_grad():
            losses = piece.run(loss, self.theta)
            self.slopes: Sequence[Tensor | None] = [None] * len(self.theta)
            if losses.requires_grad:
                self.slopes = torch.autograd.grad(
                    losses.sum(), self.theta, create_graph=True, allow_unused=True
                )

    def products(self, vectors: Theta, batched: bool = False) -> list[Tensor | None]:
        """Hessian times a vector, by name; None where it is zero."""
        # A loss linear in a weight has a gradient there that no longer depends on the weights.
        pairs = [
            (g, v) for g, v in zip(self.slopes, vectors, strict=True) if g is not None and g.requires_grad
        ]
        if not pairs:
            return [None] * len(self.theta)
        found = torch.autograd.grad(
            [g for g, _ in pairs],
            self.theta,
            [v for _, v in pairs],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
        return list(found)


class ThereAndBack:
    """Outputs with their graph: products of ``J^T M J``, J the outputs' derivative and M between them.

    ``J v`` is the derivative of ``J^T u`` along u, so that reverse mode does for both.

    Args:
        piece: The chunk.
        outputs: From weights to outputs ``[n, B, ...]``.
        middle: Makes M from the outputs.
    """

    def __init__(self, piece: Piece, outputs: Callable[[Theta], Tensor], middle: Middle) -> None:
        self.theta = piece.theta()
        with torch.enable_grad():
            self.outputs = outputs(self.theta)
            self.slopes: Sequence[Tensor | None] = [None] * len(self.theta)
            self.dummy = torch.zeros_like(self.outputs, requires_grad=True)
            if self.outputs.requires_grad:
                self.slopes = torch.autograd.grad(
                    self.outputs, self.theta, self.dummy, create_graph=True, allow_unused=True
                )
        self.middle = middle(self.outputs.detach(), piece.at.batch)

    def products(self, vectors: Theta, batched: bool = False) -> list[Tensor | None]:
        """``J^T M J`` times a vector, by name; None where it is zero."""
        pairs = [
            (g, v) for g, v in zip(self.slopes, vectors, strict=True) if g is not None and g.requires_grad
        ]
        if not pairs:
            return [None] * len(self.theta)
        (tangent,) = torch.autograd.grad(
            [g for g, _ in pairs],
            self.dummy,
            [v for _, v in pairs],
            retain_graph=True,
            is_grads_batched=batched,
        )
        pushed = torch.stack([self.middle(t) for t in tangent]) if batched else self.middle(tangent)
        found = torch.autograd.grad(
            self.outputs,
            self.theta,
            pushed,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
        return list(found)


class ForwardHessian:
    """Hessian products by pushing a vector through the gradient: no second graph is held.

    Args:
        piece: The chunk.
        loss: ``loss(module, batch)``.
    """

    def __init__(self, piece: Piece, loss: Function) -> None:
        self.theta = tuple(t.detach() for t in piece.theta())
        self.slopes: Sequence[Tensor | None] = ()
        self.gradient = torch.func.grad(
            lambda *theta: piece.run(loss, list(theta)).sum(), argnums=tuple(range(len(self.theta)))
        )

    def products(self, vectors: Theta, batched: bool = False) -> list[Tensor | None]:
        """Hessian times a vector, by name."""

        def along(*v: Tensor) -> tuple[Tensor, ...]:
            return torch.func.jvp(self.gradient, self.theta, v)[1]

        with _quietly():
            return list(torch.func.vmap(along)(*vectors) if batched else along(*vectors))


class ForwardThereAndBack:
    """Products of ``J^T M J`` by pushing the vector forward and pulling the result back.

    Args:
        piece: The chunk.
        outputs: From weights to outputs ``[n, B, ...]``.
        middle: Makes M from the outputs.
    """

    def __init__(self, piece: Piece, outputs: Callable[[Theta], Tensor], middle: Middle) -> None:
        self.theta = tuple(t.detach() for t in piece.theta())
        self.slopes: Sequence[Tensor | None] = ()
        self.run = lambda *theta: outputs(list(theta))
        self.middle, self.batch = middle, piece.at.batch

    def products(self, vectors: Theta, batched: bool = False) -> list[Tensor | None]:
        """``J^T M J`` times a vector, by name."""
        with _quietly():
            if batched:
                return list(torch.func.vmap(lambda *v: tuple(self._one(list(v))))(*vectors))
            return list(self._one(vectors))

    def _one(self, vectors: Theta) -> Sequence[Tensor]:
        tangent = torch.func.jvp(self.run, self.theta, tuple(vectors))[1]
        outputs, back = torch.func.vjp(self.run, *self.theta)[:2]
        return back(self.middle(outputs.detach(), self.batch)(tangent))


@contextmanager
def _quietly() -> Iterator[None]:
    """Forward mode scripts some of torch's own functions when it is first used, which torch deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def curved(criterion: Callable[[Tensor, Batch], Tensor]) -> Middle:
    """The Hessian of a criterion in the outputs, the middle of a Gauss-Newton matrix."""

    def middle(outputs: Tensor, batch: Batch) -> Callable[[Tensor], Tensor]:
        z = outputs.detach().requires_grad_()
        with torch.enable_grad():
            loss = torch.stack([criterion(row, batch) for row in z.unbind(0)]).sum()
            (slope,) = torch.autograd.grad(loss, z, create_graph=True)
        if not slope.requires_grad:
            return torch.zeros_like
        return lambda tangent: torch.autograd.grad(slope, z, tangent, retain_graph=True)[0]

    return middle


def averaged(outputs: Tensor, batch: Batch) -> Callable[[Tensor], Tensor]:
    """The middle of an empirical Fisher matrix: one over the number of examples."""
    count = outputs.shape[1]
    return lambda tangent: tangent / count


def example_losses(criterion: Callable[[Tensor, Batch], Tensor], outputs: Tensor, batch: Batch) -> Tensor:
    """The criterion of each example alone: outputs ``[n, B, ...]`` -> ``[n, B]``."""
    tensors = leaves(batch)

    def alone(z: Tensor, *parts: Tensor) -> Tensor:
        rest = iter(parts)
        return criterion(z[None], map_nest(lambda _: next(rest)[None], batch))

    try:
        mapped = torch.func.vmap(alone)
        return torch.stack([mapped(row, *tensors) for row in outputs.unbind(0)])
    except Exception as error:
        raise LosslabError(
            f"the criterion does not take one example at a time ({str(error).splitlines()[0]}): write it as "
            "a mean over the examples in plain torch"
        ) from error


def dropouts(module: nn.Module) -> list[str]:
    """The names of the layers that drop units."""
    plain, others = nn.modules.dropout._DropoutNd, (nn.RNNBase, nn.MultiheadAttention)
    return [
        n
        for n, m in module.named_modules()
        if (m.p if isinstance(m, plain) else m.dropout if isinstance(m, others) else 0.0) > 0
    ]
